"""Decides how `xllm generate` answers on the terminal, and what it has in common with `xllm serve` and with other
commands: flags as options, a checkpoint as an artifact. What answers never imports torch."""

from __future__ import annotations

import argparse
import os
import queue
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xllm import config
from xllm.storage import INTS, full_word

if TYPE_CHECKING:
    from xllm.artifact import Artifact
    from xllm.service.params import Job
    from xllm.service.sampling import ModelFacts
    from xllm.service.tokenizer import TextCodec


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
    engine, _ = open_engine(artifact, outputs.put, **engine_options(arguments))
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
    facts = facts_of(artifact, None)
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


def facts_of(artifact: Artifact, name: str | None) -> ModelFacts:
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


def engine_options(arguments: argparse.Namespace) -> dict[str, Any]:
    return process_options(arguments) | {
        "chunk": arguments.chunk,
        "async_scheduling": not arguments.no_async_scheduling,
        "prefix_cache": not arguments.no_prefix_cache,
    }


def process_options(arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "memory_bytes": arguments.memory,
        "threads": arguments.threads,
        "kernel_modules": tuple(arguments.kernel_module),
    }


def artifact_folder(model: Path) -> Path:
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
