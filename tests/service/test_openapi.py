"""The OpenAPI document, and what schemathesis makes of it: any call, valid or not, gets an answer of the document's
form and never a failure of the server. XLLM_FUZZ_EXAMPLES sets how many calls a route gets."""

from __future__ import annotations

import os
import re
from typing import Any, cast

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi import checks

from tests.service.fakes import fake_service, running
from xllm.service.errors import TYPES
from xllm.service.gate import Keys

HEALTH: Any = list(HealthCheck)
EXAMPLES = int(os.environ.get("XLLM_FUZZ_EXAMPLES", "8"))


@pytest.fixture(scope="module")
def document(served) -> Any:
    return httpx.get(f"{served[0]}/openapi.json").json()


@pytest.mark.parametrize("mode", list(GenerationMode))
def test_every_call_gets_an_answer_of_the_documents_form(served, mode):
    api = schemathesis.openapi.from_url(f"{served[0]}/openapi.json")
    for found in api.get_all_operations():
        operation: Any = cast(Any, found).ok()
        if mode is GenerationMode.NEGATIVE and "requestBody" not in operation.definition.raw:
            continue  # nothing of it can be wrong

        @given(operation.as_strategy(generation_mode=mode))
        @settings(
            max_examples=EXAMPLES, deadline=None, derandomize=True, database=None,
            suppress_health_check=HEALTH,
        )  # fmt: skip
        def call(case):
            case.call_and_validate(excluded_checks=left_out(case.operation), timeout=30)

        call()


def left_out(operation: Any) -> list[Any]:
    """What has the right types may be refused for its values: ranges depend on the model. As parts of a form wrong
    members may come out right."""
    form = "multipart/form-data" in operation.definition.raw.get("requestBody", {}).get("content", {})
    return [checks.positive_data_acceptance, *([checks.negative_data_rejection] if form else [])]


def test_the_document_has_every_route_and_no_other(document, served):
    paths = document["paths"]
    for path, operations in paths.items():
        for method in operations:
            concrete = re.sub(r"{\w+}", "x", path.replace("{model}", "fake"))
            answer = httpx.request(method, f"{served[0]}{concrete}", json={} if method == "post" else None)
            missing = answer.status_code == 404 and answer.json()["error"]["code"].endswith("_not_found")
            assert answer.status_code not in (404, 405) or missing, path
    assert "/v1/videos" not in paths and httpx.get(f"{served[0]}/v1/videos").status_code == 404


def test_bodies_say_what_is_closed_and_what_is_not_supported(document):
    body = document["components"]["schemas"]["ChatBody"]
    assert body["additionalProperties"] is False and body["required"] == ["messages"]
    assert body["properties"]["modalities"]["enum"] == [None, ["text"]]
    kinds = document["components"]["schemas"]["Error"]["properties"]["error"]["properties"]["type"]["enum"]
    assert set(kinds) == set(TYPES.values())


def test_keys_are_in_the_document_where_they_are_needed(tmp_path, document):
    assert document["security"] == []
    with running(fake_service(tmp_path), Keys(["one"])) as (base, _):
        assert httpx.get(f"{base}/openapi.json").status_code == 401
        guarded = httpx.get(f"{base}/openapi.json", headers={"x-api-key": "one"}).json()
    assert [next(iter(way)) for way in guarded["security"]] == ["bearer", "key"]
    assert guarded["paths"]["/health"]["get"]["security"] == []
