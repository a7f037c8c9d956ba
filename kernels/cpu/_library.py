"""Finds and opens the shared library, and declares the structures of xk.h."""

from __future__ import annotations

import ctypes as c
from functools import cache
from pathlib import Path

_FILE = "libxk.so"


class CBatch(c.Structure):
    _fields_ = (
        ("T", c.c_int32),
        ("S", c.c_int32),
        ("N", c.c_int32),
        ("ids", c.c_void_p),
        ("positions", c.c_void_p),
        ("last", c.c_void_p),
        ("seq_start", c.c_void_p),
        ("seq_kv", c.c_void_p),
        ("prev_tokens", c.c_void_p),
    )


class CArg(c.Structure):
    _fields_ = (("kind", c.c_int32), ("address", c.c_void_p))


class CCall(c.Structure):
    _fields_ = (
        ("kernel", c.c_char_p),
        ("args", CArg * 18),
        ("ints", c.c_int64 * 20),
        ("floats", c.c_float * 8),
        ("rows", c.c_int64 * 3),
    )


_SIGNATURES = {
    "xk_error": (c.c_char_p, []),
    "xk_levels": (c.c_char_p, []),
    "xk_describe": (c.c_char_p, []),
    "xk_runner_new": (c.c_void_p, [c.c_int32, c.c_char_p]),
    "xk_runner_free": (None, [c.c_void_p]),
    "xk_runner_pool": (c.c_void_p, [c.c_void_p]),
    "xk_plan_add": (c.c_int32, [c.c_void_p, c.c_int32, c.POINTER(CCall)]),
    "xk_run": (c.c_int32, [c.c_void_p, c.c_int32, c.c_void_p, c.c_int32, c.c_int32, c.c_void_p, c.c_void_p]),
    "xk_measure_read": (c.c_double, [c.c_void_p, c.c_int64, c.c_int32]),
    "xk_measure_fma": (c.c_double, [c.c_void_p, c.c_int64, c.c_int32]),
    "xk_pack_quantised": (
        c.c_int64,
        [
            c.c_void_p,
            c.c_int64,
            c.c_int32,
            c.c_int64,
            c.c_int64,
            c.c_int32,
            c.c_int64,
            c.c_void_p,
            c.c_void_p,
            c.c_void_p,
        ],
    ),
    "xk_checksum": (c.c_int32, [c.c_void_p, c.c_int64, c.c_int32, c.c_void_p]),
    "xk_pack_panels": (None, [c.c_void_p, c.c_int64, c.c_int32, c.c_int64, c.c_int64, c.c_int32, c.c_void_p]),
}


@cache
def library() -> c.CDLL:
    """The library, its functions typed. CDLL releases the GIL around every call."""
    loaded = c.CDLL(str(library_file()))
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(loaded, name)
        function.restype, function.argtypes = result, arguments
    return loaded


def library_file() -> Path:
    """Where the library is. Raises ImportError."""
    # An editable install keeps the sources and the built library in two folders of this package's path.
    import xllm.kernels.cpu as package

    for folder in package.__path__:
        if (path := Path(folder) / _FILE).is_file():
            return path
    raise ImportError(f"{_FILE} is not built: install the project with pip (a C++17 compiler is needed)")
