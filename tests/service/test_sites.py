"""Which pages of a browser may ask: those of the server itself, and of sites that were allowed. Programs always may."""

from __future__ import annotations

import argparse
from urllib.parse import urlsplit

import httpx
import pytest

from tests.service.fakes import fake, fake_service, running
from xllm.commands import UsageError
from xllm.doors import Doors, open_doors
from xllm.flags import serve_flags
from xllm.service.gate import CONTROL, PUBLIC, Keys
from xllm.service.listener import bind, url
from xllm.service.sites import origins_of

BODY = {"prompt": "hi", "max_tokens": 2}
ROUTE = "/v1/completions"


def code(answer: httpx.Response) -> tuple[int, str | None]:
    return answer.status_code, answer.json().get("error", {}).get("code")


def test_what_a_page_may_send_without_asking_is_no_request(served):
    """A simple request: a text, a form, or no type at all; it changes nothing whatever its body."""
    base, service = served
    seen = len(fake(service).seen)
    for kind in (None, "text/plain", "text/plain;charset=UTF-8", "application/x-www-form-urlencoded"):
        headers = {"content-type": kind} if kind else {}
        answer = httpx.post(base + ROUTE, content=b'{"prompt": "hi"}', headers=headers)
        assert code(answer) == (415, "unsupported_media_type")
        assert "application/json" in answer.json()["error"]["message"]
    assert len(fake(service).seen) == seen
    assert code(httpx.post(f"{base}/start_profile")) == (403, "profiling_disabled"), "no body needs no type"


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "https://example.com"},
        {"origin": "null"},
        {"origin": "http://localhost:1"},  # another server of the same machine
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
        {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"},  # a form, as this is no GET
    ],
)
def test_pages_of_other_sites_are_refused(served, headers):
    answer = httpx.post(served[0] + ROUTE, json=BODY, headers=headers)
    assert code(answer) == (403, "other_site")
    assert answer.json()["error"]["hint"]["knob"] == "xllm serve --allow-origin"
    assert "access-control-allow-origin" not in answer.headers
    assert httpx.request("OPTIONS", served[0] + ROUTE, headers=headers).status_code == 403


def test_the_own_page_programs_and_links_are_let_in(served):
    base = served[0]
    own = {"origin": base, "sec-fetch-site": "same-origin"}
    for headers in ({}, {"origin": base}, own, {"sec-fetch-site": "none"}):
        assert httpx.post(base + ROUTE, json=BODY, headers=headers).status_code == 200
    link = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}
    assert httpx.get(base, headers=link).status_code == 200
    assert code(httpx.get(f"{base}/v1/models", headers={"sec-fetch-site": "cross-site"})) == (403, "other_site")


def test_a_server_without_keys_is_asked_by_the_names_of_this_machine(served):
    base = served[0]
    port = urlsplit(base).port
    for host in (f"127.0.0.1:{port}", f"localhost:{port}", "LOCALHOST", "chat.localhost", "[::1]:80"):
        assert httpx.post(base + ROUTE, json=BODY, headers={"host": host}).status_code == 200, host
    for host in ("rebound.example.com", f"127.0.0.1.example.com:{port}", "10.0.0.1", "localhost.example.com", "[::2]"):
        # Its page is of the same origin, as far as its browser knows.
        answer = httpx.post(base + ROUTE, json=BODY, headers={"host": host, "origin": f"http://{host}"})
        assert code(answer) == (403, "unknown_host"), host


def test_names_are_no_matter_where_keys_are(tmp_path):
    with running(fake_service(tmp_path), Keys(["one"])) as (base, _):
        headers = {"host": "llm.example.com", "x-api-key": "one"}
        assert httpx.post(base + ROUTE, json=BODY, headers=headers).status_code == 200
        assert code(httpx.post(base + ROUTE, json=BODY, headers=headers | {"origin": "https://a.example"}))[0] == 403


def test_an_allowed_site_asks_and_reads(tmp_path):
    origin = "https://chat.example.com"
    with running(fake_service(tmp_path), origins=[f"{origin}/"]) as (base, _):
        asks = {"access-control-request-method": "POST", "access-control-request-headers": "content-type,x-api-key"}
        answer = httpx.request("OPTIONS", base + ROUTE, headers={"origin": origin} | asks)
        assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == origin
        assert answer.headers["access-control-allow-headers"] == "content-type,x-api-key"
        assert "POST" in answer.headers["access-control-allow-methods"]
        answer = httpx.post(base + ROUTE, json=BODY, headers={"origin": origin, "sec-fetch-site": "cross-site"})
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, origin)
        assert answer.headers["vary"] == "origin"
        refused = httpx.post(base + ROUTE, json={}, headers={"origin": origin})
        assert refused.status_code == 400 and refused.headers["access-control-allow-origin"] == origin
        assert code(httpx.post(base + ROUTE, json=BODY, headers={"origin": "https://evil.example.com"}))[0] == 403
        assert httpx.post(base + ROUTE, json=BODY, headers={"host": "chat.example.com"}).status_code == 200


def test_a_preflight_carries_no_key(tmp_path):
    with running(fake_service(tmp_path), Keys(["one"]), origins=["*"]) as (base, _):
        headers = {"origin": "http://a.example", "access-control-request-method": "POST"}
        assert httpx.request("OPTIONS", base + ROUTE, headers=headers).status_code == 200
        assert httpx.post(base + ROUTE, json=BODY, headers=headers).status_code == 401


@pytest.mark.parametrize("text", ["example.com", "https://a.example/path", "https://", "https://a b", ""])
def test_what_is_no_origin(text):
    with pytest.raises(ValueError, match="is no origin"):
        origins_of([text])


@pytest.mark.parametrize("admin", [None, Keys(["root"])])
def test_control_is_on_its_own_port_and_nowhere_else(tmp_path, admin):
    control = bind("127.0.0.1", 0)
    with running(fake_service(tmp_path), admin=admin, control=control) as (base, _), control:
        own = url(control)
        key = {"x-api-key": "root"} if admin else {}
        orders = [("GET" if path == "/is_sleeping" else "POST", path) for path in CONTROL]
        orders += [("POST", "/start_profile"), ("POST", "/stop_profile")]
        document = httpx.get(f"{base}/openapi.json").json()["paths"]
        for method, path in orders:
            assert code(httpx.request(method, base + path, headers=key)) == (404, "unknown_route"), path
            assert path not in document
            found = httpx.request(method, own + path, headers=key)
            assert found.status_code not in (401, 404, 405), path
            if admin:
                assert code(httpx.request(method, own + path)) == (401, "missing_api_key")
                wrong = httpx.request(method, own + path, headers={"x-api-key": "one"})
                assert code(wrong) == (401, "invalid_api_key")
        assert httpx.get(f"{own}/is_sleeping", headers=key).json() == {"is_sleeping": False, "level": None}
        assert {httpx.get(own + path).status_code for path in PUBLIC} == {200}
        assert "num_running_requests" in httpx.get(f"{own}/metrics", headers=key).text
        assert httpx.post(f"{own}/abort", headers=key, json={"all": True}).json() == {"aborted": 0}
        for path in (ROUTE, "/v1/models", "/"):
            method = "POST" if path == ROUTE else "GET"
            assert httpx.request(method, own + path, headers=key).status_code == 404, path
        lie = {"host": f"127.0.0.1:{control.getsockname()[1]}"}
        assert httpx.post(f"{base}/pause", headers=key | lie).status_code == 404, "the port is the connection's"
        assert code(httpx.post(f"{own}/pause", headers=key | {"origin": base})) == (403, "other_site")


def doors(*flags: str) -> Doors:
    parser = argparse.ArgumentParser()
    serve_flags(parser)
    return open_doors(parser.parse_args(["model", "--port", "0", *flags]))


def test_what_would_be_open_to_more_than_was_meant_is_refused(tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("one\n")
    admin = ("--admin-key-file", str(keys))
    for flags, said in (
        (("--host", "0.0.0.0"), "--api-key-file"),
        (("--admin-host", "127.0.0.1"), "--admin-port"),
        (("--admin-port", "0", "--admin-host", "0.0.0.0"), "--admin-key-file"),
        (("--allow-origin", "*"), "every site"),
        (("--allow-origin", "*", "--api-key-file", str(keys), "--admin-port", "0"), "every site"),
        (("--allow-origin", "example.com"), "is no origin"),
        (("--allow-origin", "http://[::1"), "is no origin"),
        (("--allow-origin", "http://[name]"), "is no origin"),
        (("--allow-origin", "http://localhost:99999"), "is no origin"),
    ):
        with pytest.raises(UsageError, match=said):
            doors(*flags)
    found = doors("--api-key-file", str(keys), *admin, "--admin-port", "0", "--admin-host", "0.0.0.0")
    assert found.control is not None
    with found.listener, found.control:
        found.control.listen()
        taken = str(found.control.getsockname()[1])
        assert found.access().control_port == int(taken)
        with pytest.raises(UsageError, match="--admin-port 0"):
            doors("--admin-port", taken, "--admin-host", "0.0.0.0", *admin)


def test_one_port_of_two_addresses_is_not_both(tmp_path):
    """Who comes by the one would be let in as by the other."""
    with bind("127.0.0.1", 0) as free:
        port = str(free.getsockname()[1])
    for _ in range(2):  # neither is left open
        with pytest.raises(UsageError, match=f"--admin-port {port} is the --port too"):
            doors("--port", port, "--admin-port", port, "--admin-host", "127.0.0.2")
