"""How urgent a request is travels from the body to the engine, or is refused by its field."""

from __future__ import annotations

import json

import pytest

from tests.service.fakes import fake
from xllm.runtime.urgency import ORDINARY, Urgency

ROUTES = {
    "/v1/completions": {"prompt": "hi"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}]},
}
FIELDS = {"priority": "HIGH", "offline": True, "ttft_slo_ms": 1500, "tpot_slo_ms": 80.5}


@pytest.mark.parametrize("route", ROUTES)
def test_the_engine_gets_what_the_body_says(served, http, route):
    engine = fake(served[1])
    for given, expected in ((FIELDS, Urgency("HIGH", True, 1500, 80.5)), (dict.fromkeys(FIELDS), ORDINARY)):
        before = len(engine.seen)
        assert http.post(route, json=ROUTES[route] | given | {"n": 2}).status_code == 200
        assert [request.urgency for request in engine.seen[before:]] == [expected] * 2


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("field", "text"),
    [
        ("priority", '"high"'), ("priority", "3"), ("offline", '"yes"'), ("ttft_slo_ms", "0"), ("ttft_slo_ms", "-5"),
        ("ttft_slo_ms", "NaN"), ("tpot_slo_ms", "Infinity"), ("tpot_slo_ms", "true"), ("tpot_slo_ms", "1e300"),
    ],
)  # fmt: skip
def test_a_value_that_means_nothing_is_a_400_with_its_field(http, route, stream, field, text):
    body = json.dumps(ROUTES[route] | {"stream": stream})[:-1] + f', "{field}": {text}}}'
    answer = http.post(route, content=body, headers={"content-type": "application/json"})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, field), error
    assert field in error["message"]


def test_preemptions_are_told_by_who_needed_what(http):
    told = http.get("/metrics").text
    for cause in (
        "offline_decode_preempt_offline", "online_decode_preempt_online", "online_prefill_preempt_offline",
        "online_decode_preempt_offline",
    ):  # fmt: skip
        assert f'\nnum_{cause}_requests{{model_name="fake"}} 0.0' in told
