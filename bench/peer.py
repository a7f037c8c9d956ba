"""The peer: the same checkpoint in transformers, eager, with its own cache. Run as a process, prints one line of JSON.

python -m bench.peer CHECKPOINT --dtype bfloat16 --threads 2 --prompt 512 --output 8
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from bench.inprocess import Rates

DTYPES = ("bfloat16", "float32")


def measured(checkpoint: Path, dtype: str, threads: int, prompt_tokens: int, output_tokens: int) -> Rates:
    """Rates of transformers in a process of its own."""
    command = [sys.executable, "-m", "bench.peer", str(checkpoint), "--dtype", dtype, "--threads", str(threads)]
    command += ["--prompt", str(prompt_tokens), "--output", str(output_tokens)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    return Rates(**json.loads(done.stdout.splitlines()[-1]))


def rates(checkpoint: Path, dtype: str, threads: int, prompt_tokens: int, output_tokens: int) -> Rates:
    """A short prompt first, so that nothing is set up within the measurement. Logits of the last token only, as a
    server would ask for them."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(str(checkpoint), dtype=getattr(torch, dtype)).eval()
    source = torch.Generator().manual_seed(0)
    prompt = torch.randint(0, model.config.vocab_size, (1, prompt_tokens), generator=source)
    with torch.inference_mode():
        warm = model(prompt[:, :16], use_cache=True, logits_to_keep=1)
        model(warm.logits.argmax(-1), past_key_values=warm.past_key_values, use_cache=True)
        begin = time.perf_counter()
        state = model(prompt, use_cache=True, logits_to_keep=1)
        token = state.logits[:, -1].argmax(-1, keepdim=True)
        prefill, steps = time.perf_counter() - begin, []
        for _ in range(output_tokens - 1):
            begin = time.perf_counter()
            state = model(token, past_key_values=state.past_key_values, use_cache=True)
            token = state.logits[:, -1].argmax(-1, keepdim=True)
            steps.append(time.perf_counter() - begin)
    return Rates(prefill, statistics.median(steps))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--output", type=int, default=8)
    options = parser.parse_args()
    found = rates(options.checkpoint, options.dtype, options.threads, options.prompt, options.output)
    print(json.dumps(vars(found)))


if __name__ == "__main__":
    main()
