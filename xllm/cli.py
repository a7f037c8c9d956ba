"""Decides the commands, their flags and what a person sees: one line for an error, exit code 2 when the input is at
fault, 130 after Ctrl-C. Every command imports what it needs when it runs, so that `xllm --help` costs nothing."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from xllm import config
from xllm.storage import FLOATS, GROUPS, INTS

EXIT_INPUT, EXIT_FAULT, EXIT_INTERRUPTED = 2, 1, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit code."""
    debug = 0
    try:
        debug = config.environment().debug
        arguments = _parser().parse_args(argv)
        return arguments.run(arguments) or 0
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader of our output left, as `xllm show ... | head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        expected = isinstance(error, (OSError, ValueError)) or type(error).__module__.startswith("xllm.")
        if not expected:
            print(f"xllm: internal error: {type(error).__name__}: {error}; XLLM_DEBUG=1 shows where", file=sys.stderr)
        else:
            print(f"xllm: {_one_line(error)}", file=sys.stderr)
        if debug:
            import traceback

            traceback.print_exception(error)
        return EXIT_INPUT if expected else EXIT_FAULT


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    message = getattr(error, "message", None)
    return " ".join((message if isinstance(message, str) else str(error) or type(error).__name__).split())


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message}; see {self.prog} --help", file=sys.stderr)
        raise SystemExit(EXIT_INPUT)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="xllm",
        description="Compile a model once, serve it in a second.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""\
examples:
  xllm compile ./Qwen3-0.6B -o qwen.xllm      checkpoint folder to artifact
  xllm serve qwen.xllm --port 8000            OpenAI API on http://127.0.0.1:8000/v1
  xllm generate qwen.xllm -p "Hello"          one answer, streamed to the terminal
  xllm doctor                                 is this machine ready?

environment: XLLM_CACHE, folder of artifacts that `serve CHECKPOINT` compiles; XLLM_DEBUG, 1 passes and hits,
2 near misses, 3 IR diffs, 4 full IR, 5 numeric checks of each rewrite (any level also shows tracebacks)""",
    )
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, run: Callable[[argparse.Namespace], int | None], help_: str, *examples: str) -> Any:
        sub = commands.add_parser(
            name,
            help=help_,
            description=help_,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            epilog="examples:\n" + "\n".join(f"  {example}" for example in examples),
        )
        sub.set_defaults(run=run)
        return sub

    _compile_flags(
        command(
            "compile",
            _compile,
            "compile a Hugging Face checkpoint folder, or an ONNX file, into an artifact",
            "xllm compile ./Qwen3-0.6B -o qwen.xllm",
            "xllm compile ./Qwen3-0.6B -o qwen.xllm --weights bfloat16 --kv float32 --max-len 8192",
            "xllm compile ./Qwen3-0.6B -o qwen.xllm --tuning cached      after `xllm tune`",
            "xllm compile ./Qwen3-0.6B -o qwen4.xllm --weights int4 --group 64 --head-weights int8",
            "xllm compile encoder.onnx -o encoder.xllm --dim batch=8 --dim seq=512",
        )
    )
    _serve_flags(
        command(
            "serve",
            _serve,
            "answer the OpenAI API from an artifact, or from a checkpoint folder that is compiled once",
            "xllm serve qwen.xllm",
            "xllm serve qwen.xllm --memory 4GiB --threads 2 --port 8080",
            "xllm serve qwen.xllm --host 0.0.0.0 --api-key-file keys.txt",
        )
    )
    _generate_flags(
        command(
            "generate",
            _generate,
            "answer one prompt and print timings on stderr",
            'xllm generate qwen.xllm -p "Once upon a time" --max-tokens 100',
            'xllm generate qwen.xllm --chat -p "Who are you?" --temperature 0.7 --seed 1',
        )
    )
    command("passes", _passes, "list the passes of the compiler in order", "xllm passes")
    from xllm.inspection import commands as inspection
    from xllm.measure import commands as measure

    inspection.add(command, _dim)
    measure.add(command, _positive)
    pack = command(
        "pack", _pack, "write an artifact as one file", "xllm pack qwen.xllm qwen.pack", "xllm serve qwen.pack"
    )
    unpack = command("unpack", _unpack, "write a packed artifact as a folder", "xllm unpack qwen.pack qwen.xllm")
    for sub, source, out in ((pack, "ARTIFACT", "FILE"), (unpack, "FILE", "ARTIFACT")):
        sub.add_argument("source", type=Path, metavar=source)
        sub.add_argument("out", type=Path, metavar=out)
    sign = command(
        "sign",
        _sign,
        "sign an artifact folder with an Ed25519 key, or make such a key",
        "xllm sign --new-key release.pem          writes release.pem and release.pem.pub",
        "xllm sign qwen.xllm --key release.pem",
        "xllm serve qwen.xllm --require-signature release.pem.pub",
    )
    sign.add_argument("artifact", type=Path, nargs="?", metavar="ARTIFACT")
    sign.add_argument("--key", type=Path, metavar="FILE", help="private key in PEM")
    sign.add_argument("--new-key", type=Path, metavar="FILE", help="write a new private key, and FILE.pub")
    command("doctor", _doctor, "check this machine and this installation", "xllm doctor")
    return parser


def _compile_flags(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="folder with safetensors, or an .onnx file")
    sub.add_argument("-o", "--out", type=Path, metavar="ARTIFACT", help="folder to write")
    sub.add_argument("--target", default="cpu", choices=("cpu",))
    stored = (*FLOATS, *INTS)
    sub.add_argument(
        "--weights",
        choices=stored,
        help="storage of weights (default: as in the checkpoint; bfloat16 where that is quantised)",
    )
    sub.add_argument("--group", choices=GROUPS, help="inputs that share a scale (default 32)")
    sub.add_argument("--head-weights", choices=stored, help="of embeddings and the head (default: as --weights)")
    sub.add_argument(
        "--kv", choices=FLOATS, help="storage of keys and values (default: as the weights; bfloat16 beside integers)"
    )
    sub.add_argument("--max-seqs", type=_positive, metavar="N", help="sequences decoded together")
    sub.add_argument("--max-len", type=_positive, metavar="N", help="tokens of prompt and answer together")
    sub.add_argument("--max-batch-tokens", type=_positive, metavar="N", help="tokens of one step")
    tasks = ("generate", "embed", "classify")
    sub.add_argument("--task", choices=tasks, help="what a step gives (default: what the checkpoint says)")
    sub.add_argument("--disable-pass", action="append", default=[], metavar="NAME", help="leave a pass out; repeatable")
    sub.add_argument("--traffic", type=Path, metavar="FILE", help="JSON histogram of step sizes to choose buckets for")
    sub.add_argument("--tuning", metavar="FILE", help="predict from this table of `xllm tune`, or `cached`: this CPU's")
    sub.add_argument("--reuse", type=Path, metavar="ARTIFACT", help="take equal weights from it (default: from -o)")
    sub.add_argument("--share-weights", type=Path, metavar="FOLDER", help="keep one copy of equal weights there")
    sub.add_argument("--bisect-passes", action="store_true", help="write nothing; find the first pass that goes wrong")
    sub.add_argument("--check", choices=("numerics",), default="numerics", help="what --bisect-passes looks at")
    sub.add_argument("--pass-module", action="append", default=[], metavar="NAME", help="a file of passes; repeatable")
    sub.add_argument("--kernel-module", action="append", default=[], metavar="NAME", help="and one of kernels")
    sub.add_argument("--dim", action="append", default=[], type=_dim, metavar="NAME=MAX", help="limit of an ONNX dim")
    sub.add_argument("--quiet", action="store_true", help="no progress, no report")


def _engine_flags(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--require-signature", type=Path, metavar="FILE", help="public key of who must have signed it")
    sub.add_argument("--memory", type=_size, metavar="SIZE", help="all the memory to use, like 4GiB")
    sub.add_argument("--threads", type=_positive, metavar="N", help="compute threads (default: the cores it may use)")
    sub.add_argument("--chunk", type=_positive, metavar="N", help="prompt tokens of one sequence per step")
    sub.add_argument("--kernel-module", action="append", default=[], metavar="NAME", help="run its kernels; repeatable")
    sub.add_argument("--no-async-scheduling", action="store_true", help="prepare a step only after the one before")
    sub.add_argument("--no-prefix-cache", action="store_true", help="compute every prompt from its first token")


def _serve_flags(sub: argparse.ArgumentParser) -> None:
    from xllm.service.parsers import REASONING_PARSERS, TOOL_PARSERS

    sub.add_argument("model", type=Path, metavar="ARTIFACT_OR_CHECKPOINT")
    sub.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1)")
    sub.add_argument("--port", type=_port, default=8000, help="port (default 8000; 0 takes a free one)")
    _engine_flags(sub)
    sub.add_argument("--max-seqs", type=_positive, metavar="N", help="sequences decoded together, at most")
    presets = "chunked (default), continuous, prefill-only, mix, zero-evict, fixed-steps; +latency-aware, +zero-evict"
    orders = "fcfs, priority, deadline, sjf, density, decode_deadline, decode_density, urgency_density,"
    orders += " urgency_priority, decode_urgency_density (default: the preset's own)"
    sub.add_argument("--scheduler", metavar="NAME", help=f"what a step is made of: {presets} (docs/scheduling.md)")
    sub.add_argument("--order", metavar="NAME", help=f"who goes first: {orders}")
    sub.add_argument("--api-key-file", type=Path, metavar="FILE", help="accepted keys, one a line")
    sub.add_argument(
        "--max-concurrent-requests",
        type=_count,
        default=200,
        metavar="N",
        help="more get 429 (default 200, 0 = no limit)",
    )
    sub.add_argument("--max-body", type=_size, default=8 << 20, metavar="SIZE", help="of a request (default 8MiB)")
    sub.add_argument("--served-model-name", metavar="NAME", help="the model's name in the API")
    for what, flag, names in (
        ("tool calls are", "--tool-call-parser", TOOL_PARSERS),
        ("reasoning is", "--reasoning-parser", REASONING_PARSERS),
    ):
        told = f"how {what} written (default: what the chat template shows): {', '.join(names)}"
        sub.add_argument(flag, choices=names, metavar="NAME", help=told)
    sub.add_argument("--log-level", default="info", choices=("debug", "info", "warning", "error"))


def _generate_flags(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("artifact", type=Path, metavar="ARTIFACT")
    sub.add_argument("-p", "--prompt", required=True, metavar="TEXT")
    sub.add_argument("--chat", action="store_true", help="send the prompt as a user message through the chat template")
    sub.add_argument("--max-tokens", type=int, metavar="N", help="at most so many tokens (default: the context)")
    for name in ("temperature", "top-p", "min-p", "presence-penalty", "frequency-penalty", "repetition-penalty"):
        sub.add_argument(f"--{name}", type=float, metavar="X")
    for name in ("top-k", "min-tokens", "seed"):
        sub.add_argument(f"--{name}", type=int, metavar="N")
    sub.add_argument("--stop", action="append", metavar="TEXT", help="end before this text; repeatable")
    sub.add_argument("--ignore-eos", action="store_true", help="go on to --max-tokens")
    _engine_flags(sub)


def _compile(arguments: argparse.Namespace) -> int:
    from xllm.commands import UsageError, compile_function, needs_compiler, stored_as

    if arguments.checkpoint.suffix == ".onnx":
        compile_function(arguments)
        return 0
    if arguments.dim:
        raise UsageError("--dim is for ONNX files; a checkpoint takes --max-len, --max-seqs and --max-batch-tokens")
    out: Path = arguments.out
    if out is None and not arguments.bisect_passes:
        raise UsageError("say where to write the artifact: -o/--out ARTIFACT")
    if not (arguments.checkpoint / "config.json").is_file():  # known before seconds of imports
        raise UsageError(f"{arguments.checkpoint} is not a checkpoint folder: it has no config.json")
    needs_compiler(f"compiling {arguments.checkpoint}")
    from xllm.compiler import CompileOptions, compile_checkpoint
    from xllm.measure.tables import read_tuning
    from xllm.traffic import read_traffic

    chosen = {
        "target": arguments.target,
        "weights": stored_as(arguments, "weights"),
        "head": stored_as(arguments, "head_weights"),
        "kv": arguments.kv,
        "max_seqs": arguments.max_seqs,
        "max_len": arguments.max_len,
        "max_batch_tokens": arguments.max_batch_tokens,
        "task": arguments.task,
        "disable": tuple(arguments.disable_pass),
        "traffic": read_traffic(arguments.traffic) if arguments.traffic else (),
        "pass_modules": tuple(arguments.pass_module),
        "kernel_modules": tuple(arguments.kernel_module),
        "tuning": read_tuning(arguments.tuning) if arguments.tuning else None,
        "debug": config.environment().debug,
    }
    places = {"reuse": arguments.reuse, "share_weights": arguments.share_weights}
    options = CompileOptions(**{name: value for name, value in chosen.items() if value is not None})
    if arguments.bisect_passes:
        from xllm.inspection.commands import bisect

        return bisect(arguments.checkpoint, options)
    if arguments.quiet:
        compile_checkpoint(arguments.checkpoint, out, options, **places)
        return 0
    with _progress() as show:
        report = compile_checkpoint(arguments.checkpoint, out, options, show, **places)
    print(report.text())
    return 0


def _serve(arguments: argparse.Namespace) -> None:
    from xllm.commands import serve

    serve(arguments)


def _generate(arguments: argparse.Namespace) -> None:
    from xllm.commands import generate

    generate(arguments)


def _passes(arguments: argparse.Namespace) -> None:
    from xllm.commands import needs_compiler

    needs_compiler("listing the passes")
    from xllm.pipeline import describe_passes

    print(describe_passes())


def _pack(arguments: argparse.Namespace) -> None:
    from xllm.artifact import pack

    pack(arguments.source, arguments.out)


def _unpack(arguments: argparse.Namespace) -> None:
    from xllm.artifact import unpack

    unpack(arguments.source, arguments.out)


def _sign(arguments: argparse.Namespace) -> None:
    from xllm.commands import sign

    sign(arguments)


def _doctor(arguments: argparse.Namespace) -> int:
    from xllm.doctor import FAIL, checks

    failed = False
    for check in checks():
        failed |= check.status == FAIL
        print(check.line(), flush=True)
    return EXIT_FAULT if failed else 0


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on stderr for what takes long."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    console = Console(stderr=True)  # where it is no terminal, a bar would leave an empty line
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("starting", total=None)
        yield lambda what, done, total: bar.update(task, description=what, completed=done, total=total or None)


def _version() -> str:
    from xllm import __version__

    return f"xllm {__version__}"


def _number(text: str, low: int, high: int) -> int:
    if not text.isascii() or not text.isdigit() or not low <= int(text) <= high:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {low} to {high}")
    return int(text)


def _positive(text: str) -> int:
    return _number(text, 1, 1 << 31)


def _count(text: str) -> int:
    return _number(text, 0, 1 << 31)


def _dim(text: str) -> tuple[str, int]:
    name, _, size = text.rpartition("=")
    if not name:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=MAX")
    return name, _number(size, 1, 1 << 24)


def _port(text: str) -> int:
    return _number(text, 0, 65535)


def _size(text: str) -> int:
    try:
        return config.size_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


if __name__ == "__main__":
    raise SystemExit(main())
