"""Decides the flags of the commands that compile and run, and what their values may be."""

from __future__ import annotations

import argparse
from pathlib import Path

from xllm import config
from xllm.storage import ACTIVATIONS, FLOATS, GROUPS, INTS, KVS


def compile_flags(sub: argparse.ArgumentParser) -> None:
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
        "--activations",
        choices=ACTIVATIONS,
        help="round rows to it in products: beside weights of that type, int8 beside int4 too (default: no)",
    )
    sub.add_argument(
        "--kv", choices=KVS, help="storage of keys and values (default: as the weights; bfloat16 beside integers)"
    )
    sub.add_argument("--max-seqs", type=positive, metavar="N", help="sequences decoded together")
    sub.add_argument("--max-len", type=positive, metavar="N", help="tokens of prompt and answer together")
    sub.add_argument("--max-batch-tokens", type=positive, metavar="N", help="tokens of one step")
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
    sub.add_argument("--dim", action="append", default=[], type=dim, metavar="NAME=MAX", help="limit of an ONNX dim")
    sub.add_argument("--quiet", action="store_true", help="no progress, no report")


def engine_flags(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--require-signature", type=Path, metavar="FILE", help="public key of who must have signed it")
    sub.add_argument("--memory", type=size, metavar="SIZE", help="all the memory to use, like 4GiB")
    sub.add_argument("--threads", type=positive, metavar="N", help="compute threads (default: the cores it may use)")
    sub.add_argument("--chunk", type=positive, metavar="N", help="prompt tokens of one sequence per step")
    sub.add_argument("--kernel-module", action="append", default=[], metavar="NAME", help="run its kernels; repeatable")
    sub.add_argument("--no-async-scheduling", action="store_true", help="prepare a step only after the one before")
    sub.add_argument("--no-prefix-cache", action="store_true", help="compute every prompt from its first token")


def serve_flags(sub: argparse.ArgumentParser) -> None:
    from xllm.service.parsers import REASONING_PARSERS, TOOL_PARSERS

    sub.set_defaults(flags=sub)
    sub.add_argument("models", type=Path, nargs="*", metavar="ARTIFACT_OR_CHECKPOINT", help="each is one model")
    told = "a JSON object of these flags; what the command line says goes before it (`xllm config --help`)"
    sub.add_argument("--config", type=Path, metavar="FILE", help=told)
    sub.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1)")
    sub.add_argument("--port", type=port, default=8000, help="port (default 8000; 0 takes a free one)")
    engine_flags(sub)
    sub.add_argument("--max-seqs", type=positive, metavar="N", help="sequences decoded together, at most")
    kept = "for keys and values that the KV pages have no room for"
    sub.add_argument("--host-cache", type=size, metavar="SIZE", help=f"memory beside --memory, {kept} (default none)")
    sub.add_argument("--disk-cache", type=Path, metavar="DIR", help=f"files {kept}; the next start finds them again")
    sub.add_argument("--disk-cache-size", type=size, metavar="SIZE", help="of these files in all (default 8GiB)")
    presets = "chunked (default), continuous, prefill-only, mix, zero-evict, fixed-steps; +latency-aware, +zero-evict"
    orders = "fcfs, priority, deadline, sjf, density, decode_deadline, decode_density, urgency_density,"
    orders += " urgency_priority, decode_urgency_density (default: the preset's own)"
    sub.add_argument("--scheduler", metavar="NAME", help=f"what a step is made of: {presets} (docs/scheduling.md)")
    sub.add_argument("--order", metavar="NAME", help=f"who goes first: {orders}")
    sub.add_argument("--api-key-file", type=Path, metavar="FILE", help="accepted keys, one a line")
    sub.add_argument("--admin-key-file", type=Path, metavar="FILE", help="keys that may control it, one a line")
    sub.add_argument(
        "--admin-port", type=port, metavar="PORT",
        help="control routes and /metrics are on this port, and control is on no other; 0 takes a free one",
    )  # fmt: skip
    sub.add_argument("--admin-host", metavar="HOST", help="address of --admin-port (default 127.0.0.1)")
    sub.add_argument(
        "--allow-origin", action="append", default=[], metavar="ORIGIN",
        help="pages of this site may ask, like https://chat.example.com; repeatable (default: the server's own page)",
    )  # fmt: skip
    sub.add_argument("--weights-dir", type=Path, metavar="FOLDER", help="artifacts /update_weights may load")
    sub.add_argument(
        "--max-concurrent-requests", type=count, default=200, metavar="N",
        help="more get 429 (default 200, 0 = no limit)",
    )  # fmt: skip
    sub.add_argument(
        "--max-wait",
        type=count,
        default=300,
        metavar="SECONDS",
        help="what waits already may take so long, then newcomers get 429 (default 300, 0 = no limit)",
    )
    sub.add_argument("--max-body", type=size, default=8 << 20, metavar="SIZE", help="of a request (default 8MiB)")
    sub.add_argument("--state-dir", type=Path, metavar="DIR", help="keep files and batches there (default: keep none)")
    named = "the model's name in the API; of several models give it once for each, in their order"
    sub.add_argument("--served-model-name", action="append", default=[], metavar="NAME", help=named)
    for what, flag, names in (
        ("tool calls are", "--tool-call-parser", TOOL_PARSERS),
        ("reasoning is", "--reasoning-parser", REASONING_PARSERS),
    ):
        told = f"how {what} written (default: what the chat template shows): {', '.join(names)}"
        sub.add_argument(flag, choices=names, metavar="NAME", help=told)
    sub.add_argument(
        "--record-traffic", type=Path, metavar="FILE",
        help="write which sizes of steps it runs, every minute and at the end, for `xllm compile --traffic FILE`",
    )  # fmt: skip
    sub.add_argument(
        "--profile-dir", type=Path, metavar="FOLDER",
        help="allow POST /start_profile and /stop_profile: they write profiles of at most a minute there, 16 are kept",
    )  # fmt: skip
    sub.add_argument(
        "--trace-decisions", type=Path, metavar="FILE",
        help="write the scheduler's latest decisions, every minute and at the end, for `xllm replay FILE`: no texts",
    )  # fmt: skip
    sub.add_argument("--log-level", default="info", choices=("debug", "info", "warning", "error"))


def generate_flags(sub: argparse.ArgumentParser) -> None:
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
    engine_flags(sub)


def number(text: str, low: int, high: int) -> int:
    if not text.isascii() or not text.isdigit() or not low <= int(text) <= high:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {low} to {high}")
    return int(text)


def positive(text: str) -> int:
    return number(text, 1, 1 << 31)


def count(text: str) -> int:
    return number(text, 0, 1 << 31)


def dim(text: str) -> tuple[str, int]:
    name, _, size = text.rpartition("=")
    if not name:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=MAX")
    return name, number(size, 1, 1 << 24)


def port(text: str) -> int:
    return number(text, 0, 65535)


def size(text: str) -> int:
    try:
        return config.size_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
