"""A compiled function from Python: arrays in by name, arrays out by name. Decides nothing; the target's part runs."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from xllm.artifact import Artifact, ArtifactError

if TYPE_CHECKING:
    import numpy as np


class Session:
    """An artifact that `xllm compile model.onnx` wrote.

    threads: compute threads (default: the cores this process may use). verify: check every byte of the weights first.
    require_signature: public key file of who must have signed it. kernel_modules: files of others whose kernels it was
    compiled with.
    Raises ArtifactError for an artifact that is none, is changed, or cannot run here.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        threads: int | None = None,
        verify: bool = True,
        require_signature: str | os.PathLike[str] | None = None,
        kernel_modules: Sequence[str] = (),
    ) -> None:
        from xllm.targets import host
        from xllm.targets.cpu.function import CpuFunction

        artifact = Artifact.open(path, require_signature)
        if not artifact.plan.is_function:
            raise ArtifactError("not-a-function", f"{path} is a language model: xllm.LLM or `xllm serve` run it")
        self._function = CpuFunction(
            artifact, host.threads(threads).count, verify=verify, kernel_modules=kernel_modules
        )
        plan = artifact.plan
        self.inputs = {name: (plan.buffers[port.buffer].dtype, _shown(port)) for name, port in plan.inputs.items()}
        self.outputs = {name: (plan.buffers[port.buffer].dtype, _shown(port)) for name, port in plan.outputs.items()}
        self.limits = dict(plan.buckets[0].sizes)

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Results by name. `inputs` has an array of exactly the dtype and shape of `self.inputs` for each name; dims
        may be up to `self.limits`. Raises ValueError naming the input that does not fit. One call runs at a time.
        """
        return self._function.run(inputs)

    def close(self) -> None:
        """Ends the threads. Later runs raise."""
        self._function.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _shown(port: object) -> tuple[int | str, ...]:
    """A port's shape with dims by name: (2, "batch", "past + seq")."""
    return tuple(size if isinstance(size, int) else _words(size.terms) for size in port.shape)  # pyright: ignore


def _words(terms: Mapping[str, int]) -> str:
    parts = []
    for dim, factor in sorted(terms.items()):
        names = [*dim.split("*")] if dim else []
        parts.append(" * ".join([*([str(factor)] if factor != 1 or not names else []), *names]))
    return " + ".join(parts) or "0"
