"""Decides how `xllm serve` starts: the models of a server opened beside everything else that takes time, their memory
planned together, one store of KV pages and one line of steps for all."""

from __future__ import annotations

import argparse
import gc
import logging
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xllm import config
from xllm.commands import UsageError, artifact_folder, engine_options, facts_of, process_options

if TYPE_CHECKING:
    from xllm.artifact import Artifact
    from xllm.memory import Ledger, MemoryPlan, RowsLedger
    from xllm.runtime.cost import StepCost
    from xllm.runtime.engine import Engine
    from xllm.runtime.rows import RowEngine
    from xllm.service.dispatch import Dispatcher
    from xllm.service.endpoint import Service
    from xllm.service.metrics import Front
    from xllm.watch.observers import Observers

TIERS = ("host_cache", "disk_cache", "disk_cache_size")


@dataclass
class Model:
    """One of the models of a server."""

    name: str
    artifact: Artifact
    dispatcher: Dispatcher
    observers: Observers
    engine: Engine | RowEngine
    ledger: Ledger | RowsLedger


def serve(arguments: argparse.Namespace) -> None:
    """`xllm serve`: answers until a signal ends it."""
    gc.disable()  # a start makes nothing but objects that stay
    config.leave_the_cores_alone()
    from xllm.doors import open_doors

    doors = open_doors(arguments)
    named = arguments.served_model_name
    if named and len(named) != len(arguments.models):
        raise UsageError(
            f"--served-model-name is given {len(named)} times: give it once for each model, in their order"
        )
    folders = [artifact_folder(model) for model in arguments.models]
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    logging.basicConfig(level=arguments.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s %(message)s")
    took: dict[str, float] = {}
    with _lap(took, "runtime imported"):
        from xllm.llm import open_model
        from xllm.targets import host
        from xllm.targets.fitted import cost_of

    # Checking the weights runs outside the interpreter lock: beside it, the HTTP stack and the tokenizer are loaded.
    with ExitStack() as ending:

        @_lap(took, "artifact")
        def open_artifacts() -> list[Artifact]:
            opened = []
            for folder in folders:
                with _said_of(str(folder)):
                    opened.append(open_model(folder, arguments.require_signature))
            return opened

        with ThreadPoolExecutor(1, thread_name_prefix="xllm-open") as opener:
            opened = opener.submit(open_artifacts)
            opening = opener.submit(_lap(took, "engine")(lambda: _open(opened.result(), arguments, ending)))
            with _lap(took, "HTTP imported"):
                from xllm.service.metrics import Front
                from xllm.service.parsers.reading import choose
                from xllm.service.server import serve as answer
                from xllm.service.tokenizer import TextCodec
            artifacts = opened.result()
            with _lap(took, "tokenizer"):
                codecs = []
                for artifact in artifacts:
                    with _said_of(str(artifact.path)):
                        codecs.append(TextCodec.from_artifact(artifact.tokenizer, artifact.path))
            models, memory = opening.result()
        host.trim()  # what loading took
        chosen = host.threads(arguments.threads)
        print(f"memory of {', '.join(model.name for model in models)}", flush=True)
        print(memory.table([model.name for model in models]), flush=True)
        print(f"threads: {chosen.count} ({chosen.why})", flush=True)
        front, services = Front(), []
        for model, codec in zip(models, codecs, strict=True):
            artifact, whose = model.artifact, f" of {model.name}" if len(models) > 1 else ""
            dialect = choose(artifact.chat_template, arguments.tool_call_parser, arguments.reasoning_parser)
            cost, why = cost_of(artifact, chosen.count)
            if artifact.task == "generate":
                print(f"step times{whose}: {why}", flush=True)
                told = f"calls of tools as {dialect.tools}, reasoning as {dialect.reasoning}"
                print(f"answers{whose}: {told}", flush=True)
            services.append(_service(model, codec, dialect, front, cost, arguments))
        laps = ", ".join(f"{name} {seconds:.3f} s" for name, seconds in took.items())
        logging.getLogger("xllm.start").info("%s", laps)
        if arguments.state_dir is not None:
            from xllm.service.batches import Batches
            from xllm.service.shelf import Files

            services[0].batches = Batches(Files(arguments.state_dir))
        answer(services, doors.listener, doors.access(), _listening, control=doors.control)


def _open(
    artifacts: Sequence[Artifact], arguments: argparse.Namespace, ending: ExitStack
) -> tuple[list[Model], MemoryPlan]:
    """The engines, started; `ending` ends them, whatever happens."""
    from xllm.llm import open_engine, open_rows
    from xllm.memory import Ledger, plan_models
    from xllm.runtime.store import PageStore
    from xllm.runtime.xtensor import LinuxMemory
    from xllm.service.dispatch import Dispatcher
    from xllm.targets.turns import Turns

    generating = [artifact for artifact in artifacts if artifact.task == "generate"]
    if not generating:
        _check_rows_flags(arguments, artifacts[0])
    names = arguments.served_model_name or [artifact.name for artifact in artifacts]
    parts = [*map(_file_part, names)]
    if twice := next((name for name, part in zip(names, parts, strict=True) if parts.count(part) > 1), None):
        raise UsageError(
            f"two models are called {twice}, or nearly so: name each of them, in their order, with --served-model-name"
        )
    options = engine_options(arguments) | {"max_seqs": arguments.max_seqs}
    options |= {"scheduler": arguments.scheduler or "chunked", "order": arguments.order}
    tiers = _tiers(arguments)
    memory = plan_models(
        artifacts, arguments.memory, arguments.max_seqs, options["prefix_cache"], tiers.get("host_cache", 0)
    )
    if "disk_cache" in tiers:
        from xllm.llm import DISK_CACHE_BYTES

        tiers["disk_cache_size"] = tiers.get("disk_cache_size", DISK_CACHE_BYTES) // max(1, len(generating))
    turns = Turns()
    pages = PageStore(LinuxMemory(memory.page_bytes), memory.pages) if generating else None
    models: list[Model] = []
    for name, artifact, ledger in zip(names, artifacts, memory.ledgers, strict=True):
        dispatcher, observers = Dispatcher(), _observers(arguments, name if len(artifacts) > 1 else None)
        ending.callback(observers.close)  # after the engine
        common: dict[str, Any] = {"watch": observers.watch, "turns": turns}
        with _said_of(name):
            if isinstance(ledger, Ledger):
                own = options | tiers | common | {"ledger": ledger, "pages": pages, "trace": observers.trace}
                if "disk_cache" in tiers and artifact.manifest["digest"] in [
                    one.artifact.manifest["digest"] for one in models
                ]:
                    own["disk_cache"] = tiers["disk_cache"] / _file_part(name)  # a folder has one owner
                engine, _ = open_engine(artifact, dispatcher.sink, **own)
            else:
                own = process_options(arguments) | common | {"ledger": ledger}
                engine, _ = open_rows(artifact, dispatcher.sink, **own)
        ending.callback(engine.stop)
        models.append(Model(name, artifact, dispatcher, observers, engine, ledger))
    return models, memory


def _check_rows_flags(arguments: argparse.Namespace, artifact: Artifact) -> None:
    of_engine = ("chunk", "max_seqs", "no_async_scheduling", "no_prefix_cache", "scheduler", "order")
    of_engine += ("trace_decisions", *TIERS)
    for flag in of_engine:
        if getattr(arguments, flag) not in (None, False):
            name = flag.replace("_", "-")
            raise UsageError(f"--{name} is for artifacts that generate; {artifact.name} has task {artifact.task}")


def _file_part(name: str) -> str:
    """A model's name as part of a file's: no other folder, nothing hidden."""
    return "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in name).lstrip(".") or "_"


def _observers(arguments: argparse.Namespace, name: str | None) -> Observers:
    """Of one model: where there are several, each has files of its own name."""
    from xllm.watch.observers import Observers

    traffic: Path | None = arguments.record_traffic
    profiles: Path | None = arguments.profile_dir
    trace: Path | None = arguments.trace_decisions
    try:
        if name is not None:
            part = _file_part(name)
            trace = trace and trace.with_name(f"{trace.stem}-{part}{trace.suffix}")
            traffic = traffic and traffic.with_name(f"{traffic.stem}-{part}{traffic.suffix}")
            if profiles is not None and profiles.is_dir():
                profiles = profiles / part
                profiles.mkdir(exist_ok=True)
        return Observers(traffic, profiles, trace)
    except (ValueError, OSError) as error:
        raise UsageError(str(error)) from None


def _service(
    model: Model, codec: Any, dialect: Any, front: Front, cost: StepCost | None, arguments: argparse.Namespace
) -> Service:
    from xllm.control import EngineControl
    from xllm.llm import prices_of
    from xllm.runtime.engine import Engine
    from xllm.service.app import load_service
    from xllm.service.endpoint import Limits

    artifact, engine = model.artifact, model.engine
    service = load_service(
        facts=facts_of(artifact, model.name),
        codec=codec,
        chat_template=artifact.chat_template,
        special_tokens=artifact.special_tokens,
        engine=engine,
        dispatcher=model.dispatcher,
        limits=Limits(
            max_concurrent_requests=arguments.max_concurrent_requests,
            max_wait=arguments.max_wait or None,
            max_body_bytes=arguments.max_body,
        ),
        dialect=dialect,
        front=front,
        prices=prices_of(artifact, engine, cost),
    )
    service.profiling = model.observers.profiling
    service.recorder.memory = model.ledger.sizes
    if isinstance(engine, Engine):
        service.controls = EngineControl(engine, artifact, arguments.require_signature)
        service.weights_folder = arguments.weights_dir
    return service


@contextmanager
def _said_of(model: str) -> Iterator[None]:
    """What is wrong with a model is said with its name."""
    from xllm.artifact import ArtifactError
    from xllm.runtime import RuntimeFault

    try:
        yield
    except (ArtifactError, RuntimeFault) as error:
        message = error.message if isinstance(error, RuntimeFault) else str(error)
        raise UsageError(message if model in message else f"{model}: {message}") from error


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


def _tiers(arguments: argparse.Namespace) -> dict[str, Any]:
    given = {name: getattr(arguments, name) for name in TIERS if getattr(arguments, name) is not None}
    if "disk_cache_size" in given and "disk_cache" not in given:
        raise UsageError("--disk-cache-size says how much: give --disk-cache DIR too")
    if given and arguments.no_prefix_cache:
        raise UsageError("--host-cache and --disk-cache hold what the prefix cache knows: leave --no-prefix-cache out")
    return given
