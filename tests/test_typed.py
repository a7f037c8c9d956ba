"""Typed values from any thread: a type that many threads use first at the same time, in a process of its own, because
where this fails it ends the process."""

from __future__ import annotations

import subprocess
import sys

import msgspec
import pytest

from xllm import typed

# 100 types of 60 fields in all, each one first used by four threads; a thread keeps the interpreter for a microsecond.
FIRST_USES = """
import sys, threading, types
from xllm import typed

sys.setswitchinterval(1e-6)
lines = ["from __future__ import annotations", "import msgspec"]
for at in range(6):
    lines += [f"class C{at}(msgspec.Struct):", *(f"    f{n}: int | str | None = None" for n in range(10))]
    lines += [f"    inner: C{at - 1} | None = None"] if at else []
code, wrong = compile("\\n".join(lines), "fresh", "exec"), []
for at in range(100):
    fresh = types.ModuleType(f"fresh{at}")
    sys.modules[fresh.__name__] = fresh
    exec(code, fresh.__dict__)
    barrier = threading.Barrier(4)

    def use(kind, give):
        barrier.wait()
        got = give(kind)
        if (got.f3, got.inner.f1) != (1, "x"):
            wrong.append(got)

    given = [lambda kind: typed.convert({"f3": 1, "inner": {"f1": "x"}}, kind)] * 2
    given += [lambda kind: typed.decode(b'{"f3": 1, "inner": {"f1": "x"}}', kind)] * 2
    threads = [threading.Thread(target=use, args=(fresh.C5, give)) for give in given]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
sys.exit(f"wrong: {wrong}" if wrong else 0)
"""


def test_many_threads_may_use_a_type_first() -> None:
    done = subprocess.run([sys.executable, "-c", FIRST_USES], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr


def test_what_does_not_fit_is_msgspecs_error() -> None:
    with pytest.raises(msgspec.ValidationError):
        typed.convert([1, "a"], list[int])
    with pytest.raises(msgspec.DecodeError):
        typed.decode(b"{", dict)
