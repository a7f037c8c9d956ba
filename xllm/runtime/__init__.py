"""The runtime: continuous batching over an executor and an xTensor KV pool. Standard library, numpy and blake3
only."""

from xllm.runtime.config import EngineConfig, EngineStats
from xllm.runtime.errors import InvariantBroken, MemoryFault, RequestRefused, RuntimeFault, StepError
from xllm.runtime.executor import Batch, Executor, Handle, KVSpec, Limits, Row, StepResult
from xllm.runtime.request import FinishReason, Group, Request, SamplingParams, TokenOutput

__all__ = [
    "Batch",
    "EngineConfig",
    "EngineStats",
    "Executor",
    "FinishReason",
    "Group",
    "Handle",
    "InvariantBroken",
    "KVSpec",
    "Limits",
    "MemoryFault",
    "Request",
    "RequestRefused",
    "Row",
    "RuntimeFault",
    "SamplingParams",
    "StepError",
    "StepResult",
    "TokenOutput",
]
