"""What every contender is asked for, and which figures are compared.

Sizes are the least that still say what they are called. Contexts of 384, 2,048 and 4,096 and the served load are what
is being asked about; batches have short prompts, since at 60 tokens of prompt a second theirs would be most of the
time, and 64 steps of all sequences; memory is what the process of `prefill-512` held, and one served run gives both
of its figures.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Figure:
    """A number that a measurement gives under `key`, as the table calls it."""

    key: str
    name: str
    unit: str

    @property
    def more_is_better(self) -> bool:
        return self.unit == "tokens/s"


@dataclass(frozen=True)
class Workload:
    """So many sequences, or clients, of so many tokens. Of the figures, the first says who is near the best."""

    sequences: int
    prompt: int
    output: int
    figures: tuple[Figure, ...]
    served: bool = False

    @property
    def asked(self) -> dict[str, int]:
        """What a figure depends on."""
        return {"sequences": self.sequences, "prompt": self.prompt, "output": self.output}


DECODE = Figure("decode_tokens_per_second", "decoded", "tokens/s")
PREFILL = Figure("prefill_tokens_per_second", "of the prompt", "tokens/s")
MEMORY = Figure("megabytes_above", "peak above weights and KV", "MB")
TOTAL = Figure("total_tokens_per_second", "output of all clients", "tokens/s")
GAP = Figure("itl_p99_ms", "p99 between tokens", "ms")
START = Figure("first_token_seconds", "to the first token", "s")

WORKLOADS: Mapping[str, Workload] = {
    "decode": Workload(1, 128, 257, (DECODE,)),
    "decode-4096": Workload(1, 4064, 33, (DECODE,)),
    "prefill-512": Workload(1, 512, 1, (PREFILL, MEMORY)),
    "prefill-2048": Workload(1, 2048, 1, (PREFILL,)),
    "batch-8": Workload(8, 32, 65, (DECODE,)),
    "batch-32": Workload(32, 32, 65, (DECODE,)),
    "http-16": Workload(16, 256, 128, (TOTAL, GAP), served=True),
    "start": Workload(1, 16, 4, (START,), served=True),
}
