"""xllm: an LLM serving system built around a compiler. `xllm.LLM(artifact).generate(...)` runs one in this process."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from xllm.offline import LLM, Completion
    from xllm.runtime.request import SamplingParams
    from xllm.session import Session

__all__ = ["LLM", "Completion", "SamplingParams", "Session", "__version__"]


def __getattr__(name: str) -> Any:
    """Names are imported when first used, so that `import xllm` costs nothing."""
    if name in ("LLM", "Completion"):
        from xllm import offline

        return getattr(offline, name)
    if name == "Session":
        from xllm.session import Session

        return Session
    if name == "SamplingParams":
        from xllm.runtime.request import SamplingParams

        return SamplingParams
    raise AttributeError(f"module 'xllm' has no attribute {name!r}")
