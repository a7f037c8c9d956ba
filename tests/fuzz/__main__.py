"""Long runs: python -m tests.fuzz TARGET [--seconds N], guided by coverage where atheris is installed.

What breaks a target is written beside the report, so that it can be run again: python -m tests.fuzz TARGET FILE.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from importlib.util import find_spec
from pathlib import Path

from tests.fuzz.mutate import mutated
from tests.fuzz.targets import SEEDS, TARGETS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", choices=tuple(TARGETS))
    parser.add_argument("file", type=Path, nargs="?", help="run this input alone")
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--plain", action="store_true", help="without atheris")
    options = parser.parse_args()
    run = TARGETS[options.target]
    if options.file is not None:
        run(options.file.read_bytes())
    elif find_spec("atheris") is not None and not options.plain:
        _guided(options.target, options.seconds)
    else:
        end, rng, count = time.monotonic() + options.seconds, random.Random(time.time_ns()), 0
        while time.monotonic() < end:
            data = mutated(rng.choice(SEEDS[options.target]), rng)
            try:
                run(data)
            except BaseException:
                Path(f"crash-{options.target}").write_bytes(data)
                raise
            count += 1
        print(f"{options.target}: {count} inputs in {options.seconds} s, no finding")


def _guided(name: str, seconds: int) -> None:
    """libFuzzer's loop; it ends the process itself."""
    import tempfile

    import atheris

    corpus = Path(tempfile.mkdtemp(prefix=f"xllm-corpus-{name}-"))
    for number, seed in enumerate(SEEDS[name]):
        (corpus / str(number)).write_bytes(seed)
    for module in ("xllm.artifact", "xllm.frontend", "xllm.service", "xllm.plan"):
        for loaded in [known for known in sys.modules if known == module or known.startswith(f"{module}.")]:
            _instrument(atheris, sys.modules[loaded])
    run = TARGETS[name]
    atheris.Setup([sys.argv[0], f"-max_total_time={seconds}", "-max_len=65536", str(corpus)], run)
    atheris.Fuzz()


def _instrument(atheris, module) -> None:
    """Coverage for the functions of a module that is loaded already."""
    for name, value in list(vars(module).items()):
        if callable(value) and getattr(value, "__module__", "") == module.__name__ and hasattr(value, "__code__"):
            setattr(module, name, atheris.instrument_func(value))


if __name__ == "__main__":
    main()
