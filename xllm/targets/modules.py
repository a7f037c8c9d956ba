"""Kernels of modules that others wrote: found by the name the operator gave, held to the digest the artifact records.

An artifact never makes code run by itself: it names a module, and who serves names the file again. The kernel gets
numpy arrays over the arena and the mapped weights; only its results can be written to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from xllm.artifact import Artifact, ArtifactError, MappedWeights
from xllm.plan import Bucket, Call, Plan
from xllm.targets.arrays import StepArrays, array_at
from xllm.targets.base import Extent


def kernels_of(artifact: Artifact, named: Sequence[str]) -> dict[str, Callable[..., None]]:
    """The functions of every "module:name" in the plan. No module runs before all are found as they were recorded.

    Raises ArtifactError for one that was not named, or that has changed; ExtensionError for one that can't be loaded.
    """
    wanted = dict.fromkeys(call.kernel for call in artifact.plan.calls if ":" in call.kernel)
    if not wanted and not named:
        return {}  # as almost every start, which then does without the importing of files
    from xllm import extensions

    sources = extensions.read(named)
    recorded = _recorded(artifact)
    for name in dict.fromkeys(kernel.partition(":")[0] for kernel in wanted):
        if name not in sources:
            raise ArtifactError(
                "kernel-module-missing",
                f"the artifact runs kernels of module {name}, which was not named: give --kernel-module {name} if you"
                f" trust it (in Python, kernel_modules=[{name!r}])",
            )
        if sources[name].digest != recorded.get(name):
            raise ArtifactError(
                "kernel-module-changed",
                f"{sources[name].file} is not the module {name} the artifact was compiled with (sha256"
                f" {sources[name].digest[:12]}, recorded {str(recorded.get(name))[:12]}); compile the checkpoint again",
            )
    tables = {
        name: extensions.table(extensions.run(sources[name]), "KERNELS")
        for name in dict.fromkeys(kernel.partition(":")[0] for kernel in wanted)
    }
    found = {}
    for kernel in wanted:
        module, _, name = kernel.partition(":")
        if name not in tables[module]:
            raise ArtifactError("artifact-malformed", f"the plan calls {kernel}, which is no kernel; compile again")
        found[kernel] = tables[module][name]
    return found


def _recorded(artifact: Artifact) -> dict[str, str]:
    """Digests by module, as the manifest has them."""
    return {entry["module"]: entry["digest"] for entry in artifact.manifest.get("extensions", {}).get("kernels", ())}


class ModuleCall:
    """One planned call of a module's kernel, bound to a bucket."""

    def __init__(
        self,
        call: Call,
        plan: Plan,
        bucket: Bucket,
        arena: np.ndarray,
        weights: MappedWeights,
        function: Callable[..., None],
    ) -> None:
        self._call, self._plan, self._bucket = call, plan, bucket
        self._arena, self._weights, self._function = arena, weights, function

    def run(self, step: StepArrays) -> None:
        self.run_at({"T": len(step.ids), "S": len(step.last)}, step)

    def run_at(self, sizes: Mapping[str, int], step: StepArrays | None = None) -> None:
        """The call when every dim has its size; a call of a step reads the step's arrays. Raises ExtensionError naming
        the kernel and the node."""
        arrays = {name: self._array(operand, step, sizes) for name, operand in self._call.operands}
        try:
            self._function(**arrays, **self._call.ints_at(sizes), **self._call.floats)
        except (Exception, SystemExit) as error:
            from xllm.extensions import ExtensionError

            why = f"{type(error).__name__}: {error}"
            raise ExtensionError(f"{self._call.kernel} failed at {self._call.node}: {why}") from error

    def _array(
        self, operand: Mapping[str, Any], step: StepArrays | None, sizes: Mapping[str, int]
    ) -> np.ndarray | None:
        if "ref" not in operand:
            return None  # an argument that the operation leaves out
        reference = operand["ref"]
        name = reference[1:]
        shape = [size if isinstance(size, int) else Extent(size).at(sizes) for size in operand["shape"]]
        if reference[:1] == "@":
            return self._weights.array(self._plan.weights[name]).reshape(shape)  # mapped read-only
        if reference[:1] == "$":
            array = getattr(step, name).reshape(shape).view()
        else:
            array = array_at(self._arena, self._bucket.offsets[name], shape, operand["dtype"])
        array.flags.writeable = reference in self._call.results
        return array
