"""Who may join the queue."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.service.fakes import fake_service, running
from tests.service.test_lifecycle import COMPLETIONS, ask, fake, wait_for
from xllm.runtime import Request
from xllm.service.backlog import EVIDENCE, STARTS, Backlog
from xllm.service.endpoint import Limits
from xllm.service.errors import ApiError


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def request(name: object, tokens: int) -> Request:
    return Request(str(name), (1,) * tokens)


@given(st.integers(1, 50), st.integers(1, 400), st.integers(1, 40))
def test_a_steady_rate_is_what_the_next_one_is_told(seconds_each, tokens, waiting):
    """One prompt of so many tokens starts every so many seconds; a wait says how long those ahead will take."""
    clock = Clock()
    backlog = Backlog(clock=clock)
    for name in range(60):
        backlog.add([request(name, tokens)])
        clock.now += seconds_each
        backlog.started(str(name))
        clock.now += 1000.0  # nobody waits: says nothing
    assert backlog.seconds == 0.0
    backlog.add([request(f"ahead {index}", tokens) for index in range(waiting)])
    assert math.isclose(backlog.seconds, waiting * seconds_each, rel_tol=0.01)
    for index in range(waiting):
        backlog.drop(f"ahead {index}")
    assert (backlog.tokens, backlog.seconds) == (0, 0.0)


def test_nobody_is_refused_before_there_is_evidence_and_nobody_who_has_nobody_ahead():
    clock = Clock()
    backlog = Backlog(max_wait=1.0, clock=clock)
    backlog.add([request("long", 100_000)])
    clock.now += EVIDENCE * 0.9
    backlog.add([request("too early to say", 100_000)])
    clock.now += 3600.0
    backlog.started("long")
    assert backlog.seconds == pytest.approx(3600.0, rel=0.01)
    with pytest.raises(ApiError) as refused:
        backlog.add([request("late", 1)])
    assert (refused.value.status, refused.value.headers["retry-after"]) == (429, "600")
    assert backlog.tokens == 100_000  # the refused one left nothing behind
    backlog.drop("too early to say")
    backlog.add([request("alone", 100_000)])


def test_a_small_model_is_known_by_its_starts():
    """Long before seconds of work are seen, hundreds would have come in."""
    clock = Clock()
    backlog = Backlog(max_wait=1.0, clock=clock)
    for name in range(int(STARTS) + 1):
        backlog.add([request(name, 10)])
        clock.now += 0.01
        backlog.started(str(name))
    let_in = 0
    with pytest.raises(ApiError, match="429"):
        while let_in < 1000:
            backlog.add([request(f"ahead {let_in}", 10)])
            let_in += 1
    assert 95 <= let_in <= 105, "a second of them"


def test_what_the_past_has_shown_is_forgotten_within_the_longest_wait():
    clock = Clock()
    backlog = Backlog(max_wait=1.0, clock=clock)
    for seconds in (*[0.001] * 100, *[1.0] * 16):  # free slots, then none
        backlog.add([request("one", 10)])
        clock.now += seconds
        backlog.started("one")
    backlog.add([request("ahead", 10)])
    assert 0.7 < backlog.seconds < 1.0


def test_requests_that_are_prepared_are_ahead_too():
    backlog = Backlog(max_wait=1.0, clock=Clock())
    with backlog.preparing(2) as took:
        for _ in range(100):
            took(1.6)
        backlog.check()  # 0.8 s each, as there are two that prepare
        with backlog.preparing(2):
            with pytest.raises(ApiError) as refused:
                backlog.check()
            assert "2 requests to prepare" in str(refused.value.hint)
            backlog.check(0.5)  # one that is prepared has waited for that already
            with pytest.raises(ApiError):
                backlog.check(1.5)
    backlog.check()


def test_the_first_preparation_says_little_of_the_others():
    """It reads the template, and the vocabulary for grammars: seconds, once."""
    backlog = Backlog(max_wait=1.0, clock=Clock())
    with backlog.preparing(2) as took:
        took(4.0)
        with backlog.preparing(2), backlog.preparing(2):
            backlog.check()


def test_a_refusal_needs_nothing_of_the_body_and_leaves_the_connection(tmp_path, monkeypatch):
    service = fake_service(tmp_path, Limits(max_wait=1.0))
    with running(service) as (base, _), httpx.Client(base_url=base, timeout=30) as client:
        json = {"content-type": "application/json"}
        assert client.post(COMPLETIONS, content="{broken", headers=json).status_code == 400
        monkeypatch.setattr(Backlog, "seconds", property(lambda self: 5.0))
        for content in ("{broken", b"[" * 100_000):
            answer = client.post(COMPLETIONS, content=content, headers=json)
            assert (answer.status_code, answer.headers["retry-after"]) == (429, "4")
        assert client.post(COMPLETIONS, json={"prompt": "hi", "offline": True}).status_code == 200
        assert client.post("/tokenize", json={"prompt": "hi"}).status_code == 200
        monkeypatch.undo()
        assert client.post(COMPLETIONS, json={"prompt": "hi"}).json()["choices"][0]["text"] == "hi"


def test_a_request_that_would_wait_too_long_is_told_when_to_come_again(tmp_path):
    service = fake_service(tmp_path, Limits(max_wait=1.0))
    clock = Clock()
    service.dispatcher.backlog._clock = clock
    with running(service) as (base, _), ThreadPoolExecutor(2) as others:
        fake(service).paused = True
        first = others.submit(ask, base, prompt=[65] * 100)
        wait_for(lambda: service.dispatcher.backlog.tokens == 100)
        clock.now += 10.0  # ten seconds for a hundred tokens
        fake(service).paused = False
        assert first.result().status_code == 200
        fake(service).paused = True
        second = others.submit(ask, base, prompt=[65] * 50)
        wait_for(lambda: service.dispatcher.backlog.tokens == 50)
        refused = ask(base, prompt=[65])
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "4")
        assert "5.0 s, the limit is 1 s" in refused.json()["error"]["message"]
        assert "--max-wait" in refused.json()["error"]["hint"]["knob"]
        fake(service).paused = False
        assert second.result().status_code == 200
        assert ask(base, prompt=[65]).status_code == 200
        assert service.dispatcher.backlog.tokens == 0
