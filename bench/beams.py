"""What a beam search costs: its time beside that of as many samples of the same prompt and length.

    python -m bench.beams [--widths 4 8] [--prompt 64] [--tokens 64] [--rounds 5] [--artifact DIR]

In turns; each round has another prompt, so that nothing of it is cached. Times on the clock, and of all processors,
which others on the machine disturb less.
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path
from typing import Any

from bench.report import RESULTS, Spread, console, footer, save, table
from bench.subject import story
from xllm.offline import LLM
from xllm.targets import host


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.beams", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--widths", type=int, nargs="+", default=(4, 8), metavar="N")
    parser.add_argument("--prompt", type=int, default=64, metavar="N", help="tokens of each (default 64)")
    parser.add_argument("--tokens", type=int, default=64, metavar="N", help="of each answer (default 64)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="in turns (default 5)")
    parser.add_argument("--artifact", type=Path, metavar="DIR", help="one that generates (default: the story model)")
    parser.add_argument("--threads", type=int, metavar="N")
    parser.add_argument("--out", type=Path, default=RESULTS / "beams.json", metavar="FILE")
    options = parser.parse_args()
    out, source, rows = console(), random.Random(0), dict[str, Any]()
    threads = host.threads(options.threads).count
    title = f"{options.tokens} tokens behind {options.prompt}"
    made = table(title, "beams", "search ms", "samples ms", "times as long", "times the work")
    with story(options.artifact) as path, LLM(path, threads=threads) as llm:
        name, vocab = llm.artifact.name, llm.artifact.manifest["model"]["vocab"]
        common = {"max_tokens": options.tokens, "ignore_eos": True}
        for width in options.widths:
            spent: list[tuple[float, float, float, float]] = []
            for at in range(options.rounds + 1):  # the first one maps pages and binds buckets
                prompts = [[source.randrange(vocab) for _ in range(options.prompt)] for _ in range(2)]
                begin, began = time.perf_counter(), time.process_time()
                llm.beam_search(prompts[0], width, **common)
                middle, searched = time.perf_counter(), time.process_time()
                llm.generate([prompts[1]] * width, temperature=1.0, seed=at, progress=False, **common)
                end, ended = time.perf_counter(), time.process_time()
                spent.append((middle - begin, end - middle, searched - began, ended - searched))
            search, samples = (Spread.of(times[which] for times in spent[1:]) for which in (0, 1))
            ratio, work = (Spread.of(times[at] / times[at + 1] for times in spent[1:]) for at in (0, 2))
            made.add_row(f"{width}", search.text(1e3, 0), samples.text(1e3, 0), ratio.text(1, 2), work.text(1, 2))
            rows[f"{width}"] = {
                "search_seconds": search, "samples_seconds": samples, "ratio": ratio, "processor_ratio": work,
            }  # fmt: skip
    out.print(made)
    footer(out)
    settings = {
        "model": name, "threads": threads, "prompt": options.prompt, "tokens": options.tokens, "rounds": options.rounds,
    }  # fmt: skip
    save(options.out, "beams", settings, rows)


if __name__ == "__main__":
    main()
