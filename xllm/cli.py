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
from xllm.flags import compile_flags, count, dim, generate_flags, positive, serve_flags

EXIT_INPUT, EXIT_FAULT, EXIT_INTERRUPTED = 2, 1, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit code."""
    debug = 0
    try:
        debug = config.environment().debug
        arguments = _parser().parse_args(argv)
        if getattr(arguments, "models", None) == [] or getattr(arguments, "config", None) is not None:
            arguments = _with_settings(arguments, sys.argv[1:] if argv is None else argv)
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
        command = self.prog.partition(":")[0]  # a file of settings may stand behind it
        print(f"{self.prog}: {message}; see {command} --help", file=sys.stderr)
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

    compile_flags(
        command(
            "compile",
            _compile,
            "compile a Hugging Face checkpoint folder, or an ONNX file, into an artifact",
            "xllm compile ./Qwen3-0.6B -o qwen.xllm",
            "xllm compile ./Qwen3-0.6B -o qwen.xllm --weights bfloat16 --kv float32 --max-len 8192",
            "xllm compile ./Qwen3-0.6B -o qwen8.xllm --kv int8          longer texts in the same memory",
            "xllm compile ./Qwen3-0.6B -o qwen.xllm --tuning cached      after `xllm tune`",
            "xllm compile ./Qwen3-0.6B -o qwen4.xllm --weights int4 --group 64 --head-weights int8",
            "xllm compile ./Qwen3-0.6B -o fast.xllm --weights int8 --activations int8",
            "xllm compile encoder.onnx -o encoder.xllm --dim batch=8 --dim seq=512",
        )
    )
    serve_flags(
        command(
            "serve",
            _serve,
            "answer the OpenAI API from artifacts, or from checkpoint folders that are compiled once",
            "xllm serve qwen.xllm",
            "xllm serve qwen.xllm --memory 4GiB --threads 2 --port 8080",
            "xllm serve qwen.xllm --host 0.0.0.0 --api-key-file keys.txt",
            "xllm serve qwen.xllm --admin-port 9000                       control is there, and nowhere else",
            "xllm serve qwen.xllm bge.xllm --memory 4GiB      requests choose by `model`, KV pages are shared",
            "xllm serve --config qwen.json --port 8001                    flags from a file",
        )
    )
    generate_flags(
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

    inspection.add(command, dim)
    measure.add(command, positive, count)
    replay = command(
        "replay",
        _replay,
        "take the decisions of a scheduler again, and say where this version decides otherwise",
        "xllm serve qwen.xllm --scheduler mix --trace-decisions decisions.jsonl",
        "xllm replay decisions.jsonl",
    )
    replay.add_argument("trace", type=Path, metavar="FILE")
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
    settings = command(
        "config",
        _config,
        "check a file of settings, or write one: what flags of `xllm serve` say beyond the defaults",
        "xllm config dump qwen.xllm --memory 4GiB --scheduler mix > qwen.json",
        "xllm config check qwen.json",
        "xllm serve --config qwen.json --port 8001",
    )
    settings.add_argument("what", choices=("check", "dump"))
    settings.add_argument("rest", nargs=argparse.REMAINDER, metavar="FILE | FLAGS")
    command("doctor", _doctor, "check this machine and this installation", "xllm doctor")
    return parser


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
        "activations": arguments.activations,
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


def _with_settings(arguments: argparse.Namespace, argv: Sequence[str]) -> argparse.Namespace:
    from xllm.commands import UsageError
    from xllm.settings import with_file

    if arguments.config is None:
        raise UsageError("say what to serve: xllm serve ARTIFACT")
    return with_file(_parser, argv, arguments.config)


def _config(arguments: argparse.Namespace) -> None:
    from xllm.commands import UsageError
    from xllm.settings import read, written

    if arguments.what == "dump":
        print(written(_parser, arguments.rest))
        return
    if len(arguments.rest) != 1:
        raise UsageError("say which file to check: xllm config check FILE")
    print(f"{arguments.rest[0]}: {len(read(_parser, Path(arguments.rest[0])))} settings, all of them known")


def _serve(arguments: argparse.Namespace) -> None:
    from xllm.serving import serve

    serve(arguments)


def _generate(arguments: argparse.Namespace) -> None:
    from xllm.commands import generate

    generate(arguments)


def _passes(arguments: argparse.Namespace) -> None:
    from xllm.commands import needs_compiler

    needs_compiler("listing the passes")
    from xllm.pipeline import describe_passes

    print(describe_passes())


def _replay(arguments: argparse.Namespace) -> int:
    from xllm.commands import replay

    return replay(arguments)


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


if __name__ == "__main__":
    raise SystemExit(main())
