"""One server with a fake engine for the tests that only ask it things."""

from __future__ import annotations

import httpx
import openai
import pytest

from tests.service.fakes import Script, fake_service, running
from xllm.service.batches import Batches
from xllm.service.shelf import Files


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """(base URL, service); the server lives as long as the test module."""
    folder = tmp_path_factory.mktemp("fake")
    service = fake_service(folder)
    service.batches = Batches(Files(folder / "state"))
    with running(service) as (base, _):
        yield base, service


@pytest.fixture(scope="module")
def script():
    """What the model of a server says whose `reply` this is."""
    return Script()


@pytest.fixture
def http(served):
    with httpx.Client(base_url=served[0], timeout=30) as client:
        yield client


@pytest.fixture
def client(served):
    with openai.OpenAI(base_url=f"{served[0]}/v1", api_key="none", max_retries=0, timeout=30) as client:
        yield client
