"""Who may import whom (DESIGN section 3), what no file may do, and that serving never loads torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TORCH = {"torch", "sympy", "networkx", "transformers"}
SERVING = {"blake3", "msgspec", "numpy"}
HTTP = {"httptools", "jinja2", "msgspec", "prometheus_client", "tokenizers", "uvicorn", "uvloop"}

# Package (or module): what of ours it may import besides itself, and which libraries besides the standard one.
MAY: dict[str, tuple[set[str], set[str]]] = {
    "ir": (set(), {"torch", "numpy"}),
    "errors": (set(), set()),
    "config": (set(), set()),
    "typed": (set(), {"msgspec"}),
    "targets": (set(), set()),
    "targets.base": (set(), set()),
    "plan": ({"targets.base", "typed"}, {"msgspec"}),
    "artifact": ({"kernels", "plan", "typed"}, {"blake3", "msgspec", "numpy"}),
    "artifact.signature": ({"artifact"}, {"cryptography"}),
    "storage": (set(), set()),
    "files": (set(), set()),
    "traffic": ({"files"}, set()),
    "frontend": ({"ir", "errors"}, {"blake3", "torch", "transformers", "numpy"}),
    "frontend.onnx": ({"ir", "errors", "frontend"}, {"torch", "numpy", "onnx", "onnx_ir"}),
    **{
        f"frontend.onnx_{part}": ({"ir", "errors", "frontend"}, {"torch", "numpy", "sympy", "onnx", "onnx_ir"})
        for part in ("arithmetic", "attention", "build", "file", "products", "shapes")
    },
    "packing": ({"errors", "frontend", "ir", "kernels", "plan", "targets"}, {"blake3", "numpy"}),
    "passes": ({"ir", "plan", "targets.base", "errors", "extensions"}, {"torch", "networkx", "sympy", "numpy"}),
    "compiler": (
        {"artifact", "errors", "frontend", "ir", "packing", "passes", "pipeline", "storage", "targets"},
        set(),
    ),
    "pipeline": ({"", "artifact", "errors", "extensions", "ir", "passes", "plan", "storage", "targets"}, set()),
    "targets.cpu": ({"targets.base", "kernels", "storage"}, set()),
    "targets.cpu.arena": ({"artifact"}, {"numpy"}),
    "targets.cpu.bound": ({"kernels", "plan", "targets.cpu"}, {"numpy"}),
    "targets.cpu.bounds": ({"plan", "targets.base", "targets.cpu"}, set()),
    "targets.cpu.executor": ({"artifact", "kernels", "plan", "runtime", "targets"}, SERVING),
    "targets.cpu.function": ({"artifact", "kernels", "plan", "targets"}, SERVING),
    "targets.cpu.prompts": ({"kernels", "runtime"}, set()),
    "targets.cpu.steps": ({"kernels", "runtime"}, {"numpy"}),
    "targets.cpu.tuning": ({"typed"}, {"msgspec"}),
    "targets.arrays": (set(), {"numpy"}),
    "targets.fitted": ({"artifact", "runtime.cost", "targets", "typed"}, {"msgspec"}),
    "targets.predicted": ({"artifact", "runtime.cost", "targets"}, set()),
    "targets.modules": ({"", "artifact", "extensions", "plan", "targets.arrays", "targets.base"}, {"numpy"}),
    "targets.fallback": ({"artifact", "ir", "plan", "targets.arrays", "targets.base"}, {"numpy", "torch"}),
    "kernels": (set(), {"numpy"}),
    "functions": (
        {"artifact", "errors", "frontend", "ir", "packing", "passes", "pipeline", "plan", "storage", "targets"},
        {"numpy"},
    ),
    "session": ({"artifact", "targets"}, {"numpy"}),
    "runtime": ({"artifact", "plan", "targets"}, {"blake3", "numpy"}),
    "service": ({"", "config", "runtime", "typed"}, HTTP),
    "service.files": ({"service"}, {"python_multipart"}),
    "service.grammar": ({"runtime", "service", "typed"}, {"llguidance", "msgspec", "numpy"}),
    "service.budget": ({"runtime", "service"}, {"numpy"}),
    "service.trial": (set(), {"llguidance"}),
    "embedded": (set(), {"tokenizers", "torch", "transformers", "safetensors"}),
    "watch": ({"artifact", "files", "runtime", "traffic"}, {"msgspec", "numpy"}),
    "memory": ({"artifact", "runtime", "targets"}, set()),
    "control": ({"artifact", "runtime", "targets"}, set()),
    "llm": ({"artifact", "control", "memory", "plan", "runtime", "targets"}, set()),
    "completion": ({"runtime", "service"}, {"rich"}),
    "offline": (
        {"artifact", "completion", "control", "llm", "memory", "runtime", "service", "typed"},
        {"msgspec", "numpy"},
    ),
    "doctor": ({"", "config", "kernels", "targets"}, set()),
    "doors": ({"", "commands", "config", "service.listener", "service.sites", "service.gate"}, set()),
    "commands": (
        {"", "artifact", "config", "functions", "kernels", "llm", "runtime", "service", "storage"},
        SERVING,
    ),
    "serving": (
        {"artifact", "commands", "config", "control", "doors", "llm", "memory", "runtime", "service", "targets"}
        | {"watch"},
        SERVING,
    ),
    "extensions": (set(), set()),
    "measure": (
        {"artifact", "config", "kernels", "llm", "memory", "runtime", "storage", "targets", "typed"},
        {"msgspec", "numpy"},
    ),
    "measure.commands": ({"artifact", "files", "inspection", "measure", "targets.fitted"}, set()),
    "inspection": ({"artifact", "measure.record", "plan", "targets.base"}, set()),
    "inspection.profile": ({"artifact", "measure.record", "targets"}, set()),
    "inspection.dot": ({"artifact", "inspection", "ir", "plan", "targets.base"}, {"networkx"}),
    "inspection.onnx_graph": ({"artifact", "inspection", "ir", "plan", "targets.base"}, {"onnx", "torch"}),
    "inspection.commands": ({"artifact", "commands", "diagnose", "inspection", "measure.record"}, set()),
    "diagnose": ({"compiler", "errors", "frontend", "passes", "targets"}, set()),
    "flags": ({"", "config", "service.parsers", "storage"}, set()),
    "settings": ({"commands"}, set()),
    "cli": (
        {"", "artifact", "commands", "compiler", "config", "doctor", "flags", "inspection", "measure", "pipeline"}
        | {"service.parsers", "serving", "settings", "traffic"},
        {"rich"},
    ),
    "": ({"offline", "runtime", "session"}, set()),
}
# What the tables do not allow: (file, module or call) -> why it is right all the same.
EXEMPT: dict[tuple[str, str], str] = {
    ("targets/cpu/function.py", "xllm.targets.fallback"): "only for plans with operators that have no native kernel",
    ("targets/cpu/executor.py", "xllm.targets.fallback"): "only for plans with operators that have no native kernel",
}
# Calls no file may make, and who may.
FORBIDDEN = ("eval", "exec", "compile", "__import__", "torch.load", "pickle.loads", "pickle.load", "os.system")
FILLS = ("msgspec.convert", "msgspec.json.Decoder")  # tables of types: typed.py lets one thread at a time do that
FORBIDDEN_MODULES = ("pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib")
ENVIRONMENT = ("os.environ", "os.getenv", "os.putenv", "os.environb")


def files() -> list[Path]:
    kernels = [file for file in sorted((ROOT / "kernels").rglob("*.py"))]
    return [file for file in sorted((ROOT / "xllm").rglob("*.py")) if "kernels" not in file.parts] + kernels


def short(file: Path) -> str:
    """Path below xllm, as the table of exemptions spells it."""
    return file.relative_to(ROOT).as_posix().removeprefix("xllm/")


def module_of(file: Path) -> str:
    """Dotted name below xllm: "passes.base", "kernels.cpu", "" for the package itself."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    parts = parts[1:] if parts[0] == "xllm" else parts
    return ".".join(part for part in parts if part != "__init__")


def rule_for(module: str, table: dict[str, tuple[set[str], set[str]]]) -> str:
    """The longest entry that holds for a module."""
    found = [name for name in table if name and (module == name or module.startswith(f"{name}."))]
    return max(found, key=len, default="")


def imports_of(file: Path) -> Iterator[str]:
    """Every module a file imports, anywhere in it but under `if TYPE_CHECKING`."""
    tree, module, package = ast.parse(file.read_text(encoding="utf-8")), module_of(file), file.name == "__init__.py"
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for part in node.body
        for inner in ast.walk(part)
    }
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            source = node.module or ""
            if node.level:  # only kernels/, which lies outside xllm/, spells imports so
                parts = (module + "." * package).split(".")[: -node.level]
                source = ".".join(("xllm", *filter(None, parts), *filter(None, [source])))
            if source == "xllm":
                held = {name.rpartition(".")[2] for name in map(module_of, files())} | {"kernels"}
                yield from (f"xllm.{alias.name}" if alias.name in held else "xllm" for alias in node.names)
            else:
                yield source


def dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


@pytest.mark.parametrize("file", files(), ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_follow_the_table(file: Path) -> None:
    module = module_of(file)
    rule = rule_for(module, MAY)
    assert rule in MAY and (rule or not module), f"{module} has no entry in the table"
    ours, libraries = MAY[rule]
    for name in imports_of(file):
        top, _, below = name.partition(".")
        if (short(file), name) in EXEMPT or top in sys.stdlib_module_names:
            continue
        if top != "xllm":
            assert top in libraries, f"{module} imports {name}"
            continue
        inside = below == rule or (below.startswith(f"{rule}.") and bool(rule))
        allowed = any(below == own or (own and below.startswith(f"{own}.")) for own in ours)
        assert inside or allowed, f"{module} imports {name}"


@pytest.mark.parametrize("file", files(), ids=lambda file: str(file.relative_to(ROOT)))
def test_no_code_from_data_and_one_reader_of_the_environment(file: Path) -> None:
    tree, module = ast.parse(file.read_text(encoding="utf-8")), module_of(file)
    for name in imports_of(file):
        assert name.partition(".")[0] not in FORBIDDEN_MODULES, f"{module} imports {name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = dotted(node.func)
            assert called not in FORBIDDEN or (short(file), called) in EXEMPT, f"{module}:{node.lineno} calls {called}"
            for word in node.keywords:
                is_false = isinstance(word.value, ast.Constant) and word.value.value is False
                assert word.arg != "trust_remote_code" or is_false, f"{module}:{node.lineno} trusts remote code"
                is_true = isinstance(word.value, ast.Constant) and word.value.value is True
                assert not (word.arg == "shell" and is_true), f"{module}:{node.lineno} runs a shell"
                fills = called == "msgspec.json.decode" and word.arg == "type"
                assert not fills or module == "typed", f"{module}:{node.lineno}: that is for typed.py"
        if isinstance(node, ast.Attribute) and dotted(node) in FILLS:
            assert module == "typed", f"{module}:{node.lineno} is for typed.py"
        if isinstance(node, ast.ImportFrom):
            assert (node.module or "").partition(".")[0] != "msgspec", f"{module}:{node.lineno}: import msgspec itself"
        if isinstance(node, ast.Import):
            named = {alias.name for alias in node.names if alias.asname}
            assert "msgspec" not in named, f"{module}:{node.lineno}: msgspec goes by its own name"
        if isinstance(node, ast.Attribute) and dotted(node) in ENVIRONMENT:
            assert module == "config", f"{module}:{node.lineno} reads the environment; config.py does"
        if isinstance(node, ast.ImportFrom) and node.module == "os":
            assert not {alias.name for alias in node.names} & {"environ", "getenv"}, f"{module} reads the environment"


def test_exemptions_are_still_needed() -> None:
    held = {(short(file), name) for file in files() for name in imports_of(file)}
    for file in files():
        calls = (node for node in ast.walk(ast.parse(file.read_text("utf-8"))) if isinstance(node, ast.Call))
        held |= {(short(file), dotted(node.func)) for node in calls}
    assert set(EXEMPT) <= held


IMPORT_ALL = """
import importlib, pkgutil, sys
import xllm.cli, xllm.serving, xllm.llm, xllm.artifact, xllm.plan, xllm.targets.cpu, xllm.targets.cpu.executor
import xllm.runtime, xllm.service
for package in (xllm.runtime, xllm.service):
    for found in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        importlib.import_module(found.name)
heavy = {"torch", "transformers", "networkx", "sympy", "llguidance"} & set(sys.modules)
sys.exit(f"imported {heavy}" if heavy else 0)
"""


def test_serving_loads_no_torch() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORT_ALL], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_command_line_loads_nothing_heavy() -> None:
    code = "import sys, xllm.cli; print(*{'numpy', 'torch', 'uvicorn', 'blake3', 'asyncio'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_a_server_loads_only_what_its_first_answer_needs() -> None:
    """Each of these costs every start milliseconds: an HTTP framework, templates, metrics, files of others."""
    code = "import sys, xllm.serving, xllm.service.server, xllm.targets.cpu.executor; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    late = {"starlette", "jinja2", "prometheus_client", "rich", "safetensors", "httpx", "xllm.extensions",
            "python_multipart"}  # fmt: skip
    assert late & set(done.stdout.split()) == set()
