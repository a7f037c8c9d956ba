"""What the library refuses."""

from __future__ import annotations


class KernelError(ValueError):
    """A plan, a batch or a weight that the library refuses; the message names the kernel and the argument."""
