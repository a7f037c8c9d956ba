"""Decides how the two commands that answer start: `serve` over HTTP, `generate` on the terminal. Both open the engine
beside everything else that takes time, and never import torch."""

from __future__ import annotations

import argparse
import gc
import os
import queue
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xllm import config
from xllm.storage import INTS, full_word

if TYPE_CHECKING:
    from xllm.artifact import Artifact
    from xllm.memory import Ledger, RowsLedger
    from xllm.runtime.engine import Engine
    from xllm.runtime.rows import RowEngine
    from xllm.service.params import Job
    from xllm.service.sampling import ModelFacts
    from xllm.service.tokenizer import TextCodec


TIERS = ("host_cache", "disk_cache", "disk_cache_size")


class UsageError(ValueError):
    """What the user asked for can't be done as asked; the message says what to try."""


def stored_as(arguments: argparse.Namespace, flag: str) -> str | None:
    """The word for a storage flag, with --group where it is an integer type."""
    name = getattr(arguments, flag)
    if arguments.group and not {arguments.weights, arguments.head_weights} & set(INTS):
        raise UsageError(f"--group {arguments.group} is for integer weights: give --weights int8 or int4 too")
    return full_word(name, arguments.group) if name else None


def compile_function(arguments: argparse.Namespace) -> None:
    """`xllm compile model.onnx`."""
    steps = ("head_weights", "kv", "max_seqs", "max_len", "max_batch_tokens", "task", "traffic", "tuning", "reuse",
             "bisect_passes")  # fmt: skip
    if given := next((name for name in steps if getattr(arguments, name) not in (None, False)), None):
        raise UsageError(f"--{given.replace('_', '-')} is for language models; an ONNX file takes --dim NAME=MAX")
    if arguments.out is None:
        raise UsageError("say where to write the artifact: -o ARTIFACT")
    dims = dict(arguments.dim)
    if name := next((name for name in dims if sum(name == other for other, _ in arguments.dim) > 1), None):
        raise UsageError(f"--dim names {name} more than once")
    needs_compiler(f"compiling {arguments.checkpoint}")
    from xllm.functions import compile_onnx

    report = compile_onnx(
        arguments.checkpoint,
        arguments.out,
        dims,
        weights=stored_as(arguments, "weights") or "float32",
        activations=arguments.activations or "",
        disable=tuple(arguments.disable_pass),
        pass_modules=tuple(arguments.pass_module),
        kernel_modules=tuple(arguments.kernel_module),
        share_weights=arguments.share_weights,
        debug=config.environment().debug,
    )
    if not arguments.quiet:
        print(report.text())


def serve(arguments: argparse.Namespace) -> None:
    """`xllm serve`: answers until a signal ends it."""
    gc.disable()  # a start makes nothing but objects that stay
    config.leave_the_cores_alone()
    import logging

    from xllm.doors import open_doors

    doors = open_doors(arguments)
    folder = _artifact_folder(arguments.model)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    logging.basicConfig(level=arguments.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s %(message)s")
    from xllm.watch.observers import Observers

    try:
        observers = Observers(arguments.record_traffic, arguments.profile_dir, arguments.trace_decisions)
    except ValueError as error:
        raise UsageError(str(error)) from None
    took: dict[str, float] = {}
    with _lap(took, "runtime imported"):
        from xllm.control import EngineControl
        from xllm.llm import open_engine, open_model, open_rows
        from xllm.runtime.engine import Engine
        from xllm.service.dispatch import Dispatcher
        from xllm.targets import host
        from xllm.targets.fitted import cost_of
    dispatcher = Dispatcher()

    # Checking the weights runs outside the interpreter lock: beside it, the HTTP stack and the tokenizer are loaded.
    with ThreadPoolExecutor(1, thread_name_prefix="xllm-open") as opener:
        opened = opener.submit(_lap(took, "artifact")(open_model), folder, arguments.require_signature)

        @_lap(took, "engine")
        def open_rest() -> tuple[Engine, Ledger] | tuple[RowEngine, RowsLedger]:
            artifact = opened.result()
            if artifact.task == "generate":
                options = _engine(arguments) | _tiers(arguments)
                options |= {"max_seqs": arguments.max_seqs, "watch": observers.watch, "trace": observers.trace}
                options |= {"scheduler": arguments.scheduler or "chunked", "order": arguments.order}
                return open_engine(artifact, dispatcher.sink, **options)
            of_engine = ("chunk", "max_seqs", "no_async_scheduling", "no_prefix_cache", "scheduler", "order")
            of_engine += ("trace_decisions", *TIERS)
            for flag in of_engine:
                if getattr(arguments, flag) not in (None, False):
                    name = flag.replace("_", "-")
                    raise UsageError(
                        f"--{name} is for artifacts that generate; {artifact.name} has task {artifact.task}"
                    )
            return open_rows(artifact, dispatcher.sink, watch=observers.watch, **_process(arguments))

        opening = opener.submit(open_rest)
        with _lap(took, "HTTP imported"):
            from xllm.service.app import load_service
            from xllm.service.endpoint import Limits
            from xllm.service.parsers.reading import choose
            from xllm.service.server import serve as answer
            from xllm.service.tokenizer import TextCodec
        artifact = opened.result()
        with _lap(took, "tokenizer"):
            codec = TextCodec.from_artifact(artifact.tokenizer, artifact.path)
        engine, ledger = opening.result()
    host.trim()  # what loading took
    try:
        dialect = choose(artifact.chat_template, arguments.tool_call_parser, arguments.reasoning_parser)
        chosen = host.threads(arguments.threads)
        print(f"memory of {artifact.name}\n{ledger.table()}", flush=True)
        print(f"threads: {chosen.count} ({chosen.why})", flush=True)
        if artifact.task == "generate":
            print(f"step times: {cost_of(artifact, chosen.count)[1]}", flush=True)
            print(f"answers: calls of tools as {dialect.tools}, reasoning as {dialect.reasoning}", flush=True)
        laps = ", ".join(f"{name} {seconds:.3f} s" for name, seconds in took.items())
        logging.getLogger("xllm.start").info("%s", laps)
        batches = None
        if arguments.state_dir is not None:
            from xllm.service.batches import Batches
            from xllm.service.shelf import Files

            batches = Batches(Files(arguments.state_dir))
        service = load_service(
            facts=_facts(artifact, arguments.served_model_name),
            codec=codec,
            chat_template=artifact.chat_template,
            special_tokens=artifact.special_tokens,
            engine=engine,
            dispatcher=dispatcher,
            limits=Limits(
                max_concurrent_requests=arguments.max_concurrent_requests,
                max_wait=arguments.max_wait or None,
                max_body_bytes=arguments.max_body,
            ),
            dialect=dialect,
            batches=batches,
        )
        service.profiling = observers.profiling
        if isinstance(engine, Engine):
            service.controls = EngineControl(engine, artifact, arguments.require_signature)
            service.weights_folder = arguments.weights_dir
        answer(service, doors.listener, doors.access(), _listening, control=doors.control)
    finally:
        engine.stop()
        observers.close()


@contextmanager
def _lap(took: dict[str, float], name: str) -> Iterator[None]:
    """Notes the seconds of a part; parts of two threads run beside each other."""
    begin = time.perf_counter()
    yield
    took[name] = time.perf_counter() - begin


def _listening(url: str) -> None:
    print(f"listening on {url}", flush=True)
    gc.freeze()  # what is loaded now is never looked at again: shorter pauses while serving
    gc.enable()


def generate(arguments: argparse.Namespace) -> None:
    """`xllm generate`: the text on stdout as it comes, one line of timings on stderr."""
    from xllm.llm import open_engine, open_model
    from xllm.runtime import Request, TokenOutput
    from xllm.service.generation import Choice
    from xllm.service.tokenizer import TextCodec

    begin = time.perf_counter()
    outputs: queue.SimpleQueue[list[TokenOutput]] = queue.SimpleQueue()
    artifact = open_model(arguments.artifact, arguments.require_signature)
    codec = TextCodec.from_artifact(artifact.tokenizer, artifact.path)
    engine, _ = open_engine(artifact, outputs.put, **_engine(arguments))
    try:
        job = _job(arguments, artifact, codec)
        choice = Choice(codec, job.stops, job.skip_special_tokens)
        loaded = first = time.perf_counter()
        engine.submit(Request("generate", job.prompts[0], job.params[0]))
        while choice.finish_reason is None:
            for output in outputs.get():
                if choice.finish_reason is None:
                    first = first if choice.tokens else time.perf_counter()
                    print(choice.push(output).text, end="", flush=True)
        end = time.perf_counter()
    finally:
        engine.stop()
    print()
    steps = choice.tokens - 1
    rate = f", {steps / (end - first):.1f} tokens/s" if steps > 0 else ""
    print(
        f"load {loaded - begin:.2f} s · prompt {len(job.prompts[0])} tokens, first token after {first - loaded:.3f} s"
        f" · answer {choice.tokens} tokens{rate} · ended by {choice.finish_reason}",
        file=sys.stderr,
    )


def replay(arguments: argparse.Namespace) -> int:
    """`xllm replay`: 1 where a decision is another."""
    from xllm.runtime.policies.trace import replay

    with arguments.trace.open() as lines:
        found = replay(lines)
    same = f"{found.differing:,} differ, the first: {found.first}" if found.differing else "all are the same again"
    print(f"{found.decisions:,} decisions of {found.scheduler}: {same}")
    return 1 if found.differing else 0


def sign(arguments: argparse.Namespace) -> None:
    """`xllm sign`: a new key, a signature, or both."""
    from xllm.artifact import Artifact, is_packed, new_key
    from xllm.artifact import sign as write_signature

    key = arguments.key or arguments.new_key
    if key is None or (arguments.artifact is None and arguments.new_key is None):
        raise UsageError("give an ARTIFACT and --key FILE; --new-key FILE makes a key")
    if arguments.new_key is not None:
        print(f"wrote {arguments.new_key} and {new_key(arguments.new_key)}")
    if arguments.artifact is not None:
        if is_packed(arguments.artifact):
            raise UsageError(f"{arguments.artifact} is packed: unpack it, sign the folder, pack it again")
        artifact = Artifact.open(arguments.artifact, ignore_signature=True)
        artifact.map_weights()
        write_signature(artifact.path, artifact.manifest["digest"], key)
        print(f"signed {arguments.artifact}, digest {artifact.manifest['digest']}")


def _job(arguments: argparse.Namespace, artifact: Artifact, codec: TextCodec) -> Job:
    """The prompt and the sampling flags under the rules of the HTTP API."""
    from xllm.service.body import ChatBody, CompletionBody, Message
    from xllm.service.errors import ApiError
    from xllm.service.params import chat_job, completion_job

    names = ("max_tokens", "temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty")
    names += ("repetition_penalty", "top_k", "min_tokens", "seed", "stop", "ignore_eos")
    fields = {name: getattr(arguments, name) for name in names}
    facts = _facts(artifact, None)
    try:
        "".join((arguments.prompt, *(arguments.stop or ()))).encode()
    except UnicodeEncodeError:
        raise UsageError("the prompt and the stop texts must be UTF-8") from None
    try:
        if not arguments.chat:
            return completion_job(CompletionBody(prompt=arguments.prompt, **fields), facts, codec.encode, codec.decode)
        if artifact.chat_template is None:
            raise UsageError("this artifact has no chat template; leave --chat out")
        from xllm.service.template import ChatTemplate

        template = ChatTemplate(artifact.chat_template, artifact.special_tokens)
        messages = [Message(role="user", content=arguments.prompt)]
        return chat_job(ChatBody(messages=messages, **fields), facts, codec.encode, template.render)
    except ApiError as error:
        raise UsageError(error.message) from None


def _facts(artifact: Artifact, name: str | None) -> ModelFacts:
    from xllm.service.sampling import ModelFacts, default_sampling

    model, task = artifact.manifest["model"], artifact.manifest["task"]
    return ModelFacts(
        name=name or artifact.name,
        vocab=model["vocab"],
        max_len=model["max_len"],
        defaults=default_sampling(artifact.generation),
        task=artifact.task,
        width=task.get("width", 0),
        labels=tuple(task.get("labels", ())),
        segments=task.get("segments", 1),
        eos_ids=tuple(model.get("eos_ids", ())),
    )


def _engine(arguments: argparse.Namespace) -> dict[str, Any]:
    return _process(arguments) | {
        "chunk": arguments.chunk,
        "async_scheduling": not arguments.no_async_scheduling,
        "prefix_cache": not arguments.no_prefix_cache,
    }


def _tiers(arguments: argparse.Namespace) -> dict[str, Any]:
    given = {name: getattr(arguments, name) for name in TIERS if getattr(arguments, name) is not None}
    if "disk_cache_size" in given and "disk_cache" not in given:
        raise UsageError("--disk-cache-size says how much: give --disk-cache DIR too")
    if given and arguments.no_prefix_cache:
        raise UsageError("--host-cache and --disk-cache hold what the prefix cache knows: leave --no-prefix-cache out")
    return given


def _process(arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "memory_bytes": arguments.memory,
        "threads": arguments.threads,
        "kernel_modules": tuple(arguments.kernel_module),
    }


def _artifact_folder(model: Path) -> Path:
    """The artifact to serve; a checkpoint folder is compiled into the cache first, in a process of its own, because a
    server never imports torch."""
    from xllm.artifact.store import is_artifact

    if is_artifact(model):
        return model
    if not (model / "config.json").is_file():
        raise UsageError(
            f"{model} is neither an artifact (manifest.json, or packed) nor a checkpoint folder (config.json)"
        )
    artifact = _cached_artifact(model)
    if (artifact / "manifest.json").is_file():
        print(f"{model} is a checkpoint; serving the artifact compiled from it before: {artifact}", flush=True)
        return artifact
    needs_compiler(f"{model} is a checkpoint and compiling it")
    import subprocess

    print(f"{model} is a checkpoint; compiling it once into {artifact}", flush=True)
    command = [sys.executable, "-m", "xllm.cli", "compile", os.fspath(model), "-o", os.fspath(artifact)]
    if code := subprocess.run(command, check=False).returncode:
        raise SystemExit(code if code > 0 else 1)
    return artifact


def _cached_artifact(checkpoint: Path) -> Path:
    """Named by the checkpoint's files as they are now, by this version and this machine's instruction set."""
    import hashlib

    from xllm import __version__
    from xllm.kernels.cpu import level

    root = checkpoint.resolve()
    files = sorted(file for file in root.rglob("*") if file.is_file())
    states = [f"{file.relative_to(root).as_posix()} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files]
    digest = hashlib.sha256("\n".join([__version__, level(), os.fspath(root), *states]).encode()).hexdigest()
    return config.environment().cache / "artifacts" / f"{root.name}-{digest[:16]}.xllm"


def needs_compiler(what: str) -> None:
    """Raises UsageError when the packages that compile are missing."""
    from importlib.util import find_spec

    missing = [name for name in ("torch", "transformers", "networkx") if find_spec(name) is None]
    if missing:
        raise UsageError(
            f"{what} needs {', '.join(missing)}: pip install 'xllm[compile]'; or compile elsewhere, serving needs none"
        )
