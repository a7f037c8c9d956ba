"""Who may join the queue."""

from __future__ import annotations

import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from urllib.parse import urlsplit

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.service.fakes import fake_service, running
from tests.service.test_lifecycle import COMPLETIONS, ask, fake, wait_for
from xllm.runtime import Request, TokenOutput
from xllm.runtime.beams import BeamParams
from xllm.runtime.cost import Basis, StepCost
from xllm.runtime.policies.state import TokenCost
from xllm.runtime.pricing import Prices
from xllm.service.backlog import Backlog
from xllm.service.dispatch import Dispatcher, Subscription
from xllm.service.endpoint import Limits
from xllm.service.errors import ApiError


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def request(name: object, tokens: int) -> Request:
    return Request(str(name), (1,) * tokens)


def backlog_of(clock: Clock, max_wait: float | None = 1.0, of_token: float = 1e-3, **more) -> Backlog:
    """Prompts take `of_token` a token, 512 of them a step, and answers nothing."""
    return Backlog(max_wait, Prices(TokenCost(of_token), answer=0), clock=clock, **more)


def served(backlog: Backlog, clock: Clock, name: str, tokens: int, seconds: float) -> None:
    backlog.add([request(name, tokens)])
    clock.now += seconds
    backlog.started(name)
    backlog.ended(name, 1)


def test_a_burst_at_the_start_is_refused_by_its_price():
    clock = Clock()
    backlog = backlog_of(clock)
    backlog.add([request("alone", 100_000)])  # whatever it takes, nobody is ahead
    with pytest.raises(ApiError) as refused:
        backlog.add([request("late", 1)])
    assert (refused.value.status, refused.value.headers["retry-after"]) == (429, "99")
    assert backlog.tokens == 100_000  # the refused one left nothing behind
    backlog.drop("alone")
    for index in range(3):
        backlog.add([request(index, 500)])
    assert backlog.seconds == pytest.approx(1.5)
    with pytest.raises(ApiError, match="limit is 1 s"):
        backlog.add([request("one more", 500)])


@settings(deadline=None, max_examples=25)
@given(st.floats(0.05, 20.0), st.integers(1, 400), st.integers(1, 40))
def test_prices_of_another_machine_are_corrected(slower, tokens, waiting):
    clock = Clock()
    backlog = backlog_of(clock, None)
    assert backlog.ratio == 1.0
    for name in range(200):
        served(backlog, clock, str(name), tokens, slower * tokens * 1e-3)
        clock.now += 1000.0  # nobody waits: says nothing
    assert backlog.seconds == 0.0
    assert backlog.ratio == pytest.approx(slower, rel=0.01)
    for index in range(waiting):
        backlog.add([request(f"ahead {index}", tokens)])
    assert backlog.seconds == pytest.approx(waiting * slower * tokens * 1e-3, rel=0.01)
    for index in range(waiting):
        backlog.drop(f"ahead {index}")
    assert (backlog.tokens, backlog.seconds) == (0, 0.0)


def test_a_prompt_that_is_being_computed_is_less_and_less_ahead():
    clock = Clock()
    backlog = backlog_of(clock, None)
    backlog.add([request("first", 2000)])
    backlog.add([request("second", 1000)])
    assert backlog.seconds == pytest.approx(3.0)
    clock.now += 1.5
    assert backlog.seconds == pytest.approx(1.5)
    clock.now += 0.5
    assert backlog.seconds == pytest.approx(1.0), "the second has not begun"
    clock.now += 8.0  # and the first still has not: the prices are wrong
    assert backlog.seconds == pytest.approx(1.0 * (1 + 10) / (1 + 2))
    backlog.started("first")
    assert backlog.seconds > 2.0


def test_a_small_model_is_known_by_its_starts():
    """Long before seconds of work are seen, hundreds would have come in."""
    clock = Clock()
    backlog = backlog_of(clock, of_token=1e-6)  # of the model; what HTTP takes is not in it
    for name in range(64):
        served(backlog, clock, str(name), 10, 0.01)
    let_in = 0
    with pytest.raises(ApiError, match="429"):
        while let_in < 1000:
            backlog.add([request(f"ahead {let_in}", 10)])
            let_in += 1
    assert 90 <= let_in <= 110, "a second of them"


def test_what_the_past_has_shown_is_forgotten_within_the_longest_wait():
    clock = Clock()
    backlog = backlog_of(clock)
    for seconds in (*[0.001] * 100, *[1.0] * 16):  # free slots, then none
        served(backlog, clock, "one", 10, seconds)
    backlog.add([request("ahead", 10)])
    assert 0.7 < backlog.seconds < 1.0


def test_who_decodes_is_in_the_price():
    clock = Clock()
    cost = StepCost(Basis((1,), (1,), (0,)), (0.01, 0.0, 1e-3, 0.0, 0.0, 0.0))  # 10 ms a step, 1 ms a token
    backlog = Backlog(None, Prices(cost, 512, 16, slots=4, answer=50), clock=clock)
    for name in range(4):
        backlog.add([request(name, 100)])
        clock.now += backlog.seconds
        backlog.started(str(name))
    backlog.add([request("ahead", 16)])
    # The step under way; then all slots are taken: one ends in 50 / 4 steps.
    assert backlog.seconds == pytest.approx(0.014 + 12.5 * 0.014 + 0.016, rel=0.01)
    backlog.ended("0", 50)
    assert backlog.seconds == pytest.approx(0.013 + 0.013 + 0.016, rel=0.01)


def test_a_prompt_that_waits_for_a_slot_counts_as_one_whatever_its_length():
    clock = Clock()
    cost = StepCost(Basis((1,), (1,), (0,)), (0.01, 0.0, 0.0, 0.0, 0.0, 0.0))  # 10 ms a step, with whatever in it
    backlog = Backlog(None, Prices(cost, slots=4, answer=100), clock=clock)
    backlog.add([request(f"running {name}", 10) for name in range(4)])
    backlog.started(*[f"running {name}" for name in range(4)])
    backlog.add([request(name, 3000 if name == 19 else 10) for name in range(20)])
    assert backlog.seconds == pytest.approx(20 * 0.25, rel=0.05)
    for name in range(20):  # a slot is free in every 100 / 4 steps
        clock.now += 0.25
        backlog.ended(f"running {name}", 100)
        backlog.started(str(name))
        backlog._running[f"running {name + 4}"] = backlog._running.pop(str(name))
        assert backlog.ratio == pytest.approx(1.0, abs=0.2)


def test_a_search_says_nothing_of_what_prompts_take():
    """Its outputs come all at its end."""
    clock = Clock()
    backlog = backlog_of(clock, max_wait=10.0)
    for name in range(6):
        backlog.add([replace(request(f"search {name}", 100), beams=BeamParams(4))])
    clock.now += 60.0
    assert (backlog.seconds, backlog.ratio, backlog.tokens) == (0.0, 1.0, 0)
    backlog.add([request("other", 100)])
    backlog.started("search 0")
    backlog.ended("search 0", 1000)
    assert backlog.ratio == 1.0
    assert backlog.seconds == pytest.approx(0.1)


@pytest.mark.parametrize("reason", ["cancelled", "error"])
def test_what_ends_without_a_result_was_not_computed(reason):
    clock = Clock()
    dispatcher = Dispatcher()
    dispatcher.backlog = backlog_of(clock, max_wait=30.0)
    names = [str(name) for name in range(6)]
    for name in names:
        dispatcher.backlog.add([request(name, 5000)])
    clock.now += 1.0
    dispatcher._deliver([TokenOutput(name, None, 0, finish_reason=reason) for name in names])
    assert (dispatcher.backlog.ratio, dispatcher.backlog.tokens) == (1.0, 0)


def test_an_answer_that_a_stop_string_ended_tells_how_long_answers_are():
    clock = Clock()
    dispatcher, cost = Dispatcher(), StepCost(Basis((1,), (1,), (0,)), (0.01, 0.0, 1e-3, 0.0, 0.0, 0.0))
    backlog = dispatcher.backlog = Backlog(None, Prices(cost, 512, 16, slots=1, answer=50), clock=clock)

    def wait_behind_one() -> float:
        backlog.add([request("first", 10)])
        backlog.started("first")
        backlog.add([request("ahead", 10)])
        seconds = backlog.seconds
        backlog.drop("first")
        backlog.drop("ahead")
        return seconds

    before = wait_behind_one()
    for name in map(str, range(100)):
        backlog.add([request(name, 10)])
        clock.now += 0.02
        backlog.started(name)
        dispatcher.cancel(Subscription([]), name, tokens=5)
    assert wait_behind_one() < before / 4


def test_steps_of_other_models_take_turns_with_these():
    clock = Clock()
    backlogs: list[Backlog] = []
    ours, theirs = (backlog_of(clock, None, others=backlogs) for _ in range(2))
    backlogs += [ours, theirs]
    ours.add([request("ours", 1024)])
    assert ours.seconds == pytest.approx(1.024)
    theirs.add([request("theirs", 512)])
    assert ours.seconds == pytest.approx(1.024 + 0.512), "they have one step, and these two"
    assert theirs.seconds == pytest.approx(0.512 + 0.512)
    theirs.hold(True)
    assert ours.seconds == pytest.approx(1.024)


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
    service = fake_service(tmp_path, Limits(max_wait=1.0), prices=Prices(TokenCost(0.05), answer=0))
    with running(service) as (base, _), ThreadPoolExecutor(1) as others:
        fake(service).paused = True
        first = others.submit(ask, base, prompt=[65] * 100)  # the very first: nothing has been seen yet
        service.dispatcher.backlog._clock = Clock()
        wait_for(lambda: service.dispatcher.backlog.tokens == 100)
        refused = ask(base, prompt=[65])
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "4")
        assert "5.0 s, the limit is 1 s" in refused.json()["error"]["message"]
        assert "--max-wait" in refused.json()["error"]["hint"]["knob"]
        assert 'backlog_seconds{model_name="fake"} 5.0' in httpx.get(f"{base}/metrics").text
        fake(service).paused = False
        assert first.result().status_code == 200
        assert ask(base, prompt=[65]).status_code == 200
        assert service.dispatcher.backlog.tokens == 0


def test_connections_do_not_wait_for_a_turn_of_the_loop_each(tmp_path):
    """Where nobody counts them: a busy loop has few turns a second."""
    service = fake_service(tmp_path)
    come, accepted = threading.Event(), threading.Event()
    turns = 0
    with running(service) as (base, server):
        parts = urlsplit(base)
        loop = service.dispatcher._loop
        assert loop is not None

        def turn() -> None:
            nonlocal turns
            if len(server.server_state.connections) == 32:
                accepted.set()
            elif turns < 1000:
                turns += 1
                loop.call_soon(turn)

        def busy() -> None:
            come.wait(20)
            loop.call_soon(turn)

        loop.call_soon_threadsafe(busy)
        clients = [socket.create_connection((parts.hostname, parts.port)) for _ in range(32)]
        come.set()
        assert accepted.wait(20)
        for client in clients:
            client.close()
    assert turns <= 8
