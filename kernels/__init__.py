"""Kernels, importable as `xllm.kernels`: `cpu` is the native library and its runner; README.md says how to add one."""
