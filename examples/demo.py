"""The main job in one go: compile the embedded checkpoint, serve the artifact, ask it over HTTP, stream the answer,
stop.

    make demo        (or: python examples/demo.py "Tell me a story about a fox and a lantern.")

Uses nothing but the command line and the standard library, as a script of yours would.
"""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
import time
from pathlib import Path

from xllm.embedded import checkpoint_path

XLLM = [sys.executable, "-m", "xllm.cli"]
ARTIFACT = Path("build") / "story.xllm"


def main() -> int:
    questions = sys.argv[1:] or ["Tell me a story about a fox and a lantern."]
    print(f"compiling {checkpoint_path().name} into {ARTIFACT}")
    subprocess.run([*XLLM, "compile", str(checkpoint_path()), "-o", str(ARTIFACT)], check=True)
    started = time.perf_counter()
    command = [*XLLM, "serve", str(ARTIFACT), "--port", "0", "--log-level", "warning"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        port = wait_for_port(server)
        print(f"\nlistening after {time.perf_counter() - started:.2f} s")
        for question in questions:
            ask(port, question, started)
            started = time.perf_counter()
    finally:
        server.terminate()
        server.wait()
    print("\nserver stopped")
    return 0


def wait_for_port(server: subprocess.Popen[str]) -> int:
    """Shows what the server prints until it says where it listens."""
    assert server.stdout is not None
    for line in server.stdout:
        print(f"  server: {line}", end="")
        if "listening on http://" in line:
            return int(line.rsplit(":", 1)[1])
    raise SystemExit("the server ended before it listened")


def ask(port: int, question: str, started: float) -> None:
    """Streams one chat answer and prints when its tokens came."""
    print(f"\n> {question}")
    body = {
        "messages": [{"role": "user", "content": question}],
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    asked = time.perf_counter()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    if response.status != 200:
        raise SystemExit(f"the server answered {response.status}: {response.read().decode()}")
    first, usage = 0.0, {}
    for line in response:
        data = line.decode().strip().removeprefix("data: ")
        if not data or data == "[DONE]" or data.startswith(":"):
            continue
        event = json.loads(data)
        usage = event.get("usage") or usage
        for choice in event["choices"]:
            if text := choice["delta"].get("content"):
                first = first or time.perf_counter()
                print(text, end="", flush=True)
    done = time.perf_counter()
    tokens = usage.get("completion_tokens", 0)
    rate = (tokens - 1) / (done - first) if tokens > 1 else 0.0
    print(
        f"\n  first token {first - asked:.3f} s after the question, {first - started:.2f} s after the start"
        f" · {tokens} tokens, {rate:,.0f} a second"
    )


if __name__ == "__main__":
    sys.exit(main())
