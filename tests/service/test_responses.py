"""The Responses API through the official client: whole, streamed, chained and stored, tools, forms, errors."""

from __future__ import annotations

import itertools
import json
import re
from typing import Any

import httpx
import openai
import pytest

from tests.service.fakes import fake, fake_service, ids, running
from tests.service.test_tools import CALL, SCHEMA, SCRIPTS, TEMPLATE
from xllm.service.gate import Keys
from xllm.service.responses import MAX_STORED, Store, Stored

TOOLS: list[Any] = [
    {"type": "function", "name": "weather", "description": "now", "parameters": SCHEMA},
    {"type": "function", "name": "clock"},
]
EAGER: list[Any] = [tool | {"eager_input_streaming": True} for tool in TOOLS]
KEYS = "one", "other"


@pytest.fixture(scope="module")
def served(tmp_path_factory, script):
    service = fake_service(tmp_path_factory.mktemp("responses"), template=TEMPLATE, reply=script)
    with running(service, Keys(KEYS)) as (base, _):
        yield base, service


@pytest.fixture
def client(served):
    with openai.OpenAI(base_url=f"{served[0]}/v1", api_key=KEYS[0], max_retries=0, timeout=30) as client:
        yield client


def ask(client: openai.OpenAI, **fields: Any) -> Any:
    return client.responses.create(**{"model": "fake", "input": "weather?", "tools": TOOLS} | fields)


def shown(response: Any) -> list[dict[str, Any]]:
    """The items of an answer, less the ids."""
    items = [item.to_dict() for item in response.output]
    for item in items:
        del item["id"]
        item.pop("call_id", None)
        item.pop("parsed_arguments", None)
        for part in item.get("content") or ():
            part.pop("parsed", None)
    return items


def prompt(served: Any) -> str:
    """The last one that the model got, behind the tools."""
    text = served[1].codec.decode(fake(served[1]).seen[-1].prompt, skip_special_tokens=False)
    return text.split("\n", 1)[1] if text.startswith("[") else text


def test_a_response_has_its_items_in_order(client, script):
    script.text = SCRIPTS["two"]
    response = ask(client, metadata={"a": "b"}, temperature=0.5, instructions="Be brief.")
    thought, said, weather, clock = shown(response)
    assert (thought["type"], thought["content"]) == ("reasoning", [{"type": "reasoning_text", "text": "a"}])
    assert (said["type"], said["role"], said["content"][0]["text"]) == ("message", "assistant", "Let me see.")
    assert (weather["name"], json.loads(weather["arguments"])) == ("weather", {"city": "Zürich 😀"})
    assert (clock["type"], clock["name"], clock["status"]) == ("function_call", "clock", "completed")
    assert (response.status, response.output_text) == ("completed", "Let me see.")
    assert (response.metadata, response.temperature, response.instructions) == ({"a": "b"}, 0.5, "Be brief.")
    assert [tool.name for tool in response.tools] == ["weather", "clock"]
    assert response.usage.output_tokens == len(ids(script.text)) + 1
    assert response.usage.output_tokens_details.reasoning_tokens == len("a</think>")


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_events_add_up_to_the_whole(client, script, name):
    script.text = SCRIPTS[name]
    whole = ask(client)
    with client.responses.stream(model="fake", input="weather?", tools=TOOLS) as stream:
        final = stream.get_final_response()
    assert shown(final) == shown(whole)
    assert (final.status, final.usage.output_tokens) == (whole.status, whole.usage.output_tokens)
    assert final.output_text == whole.output_text


@pytest.mark.parametrize("eager", [False, True])
def test_events_are_numbered_and_say_where_they_belong(client, script, eager):
    script.text = SCRIPTS["two"]
    events = list(ask(client, stream=True, tools=EAGER if eager else TOOLS))
    deltas = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
    assert "".join(deltas) == '{"city": "Zürich 😀"}{}' and (max(map(len, deltas)) <= 2 if eager else len(deltas) == 2)
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [kind for kind, _ in itertools.groupby(event.type.removeprefix("response.") for event in events)]
    texts = [
        ["output_item.added", "content_part.added", f"{kind}.delta", f"{kind}.done", "content_part.done",
         "output_item.done"] for kind in ("reasoning_text", "output_text")
    ]  # fmt: skip
    calls = ["output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done"]
    assert kinds == ["created", "in_progress", *itertools.chain(*texts), *calls * 2, "completed"]
    added = {event.output_index: event.item.id for event in events if event.type == "response.output_item.added"}
    assert sorted(added) == [0, 1, 2, 3]
    for event in events:
        assert added.get(getattr(event, "output_index", None)) == getattr(event, "item_id", added.get(
            getattr(event, "output_index", None)))  # fmt: skip


def test_logprobs_are_those_of_the_text(client, script):
    script.text = f"why</think>  So it is.{CALL}"
    fields: dict[str, Any] = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    [part] = next(item for item in ask(client, **fields).output if item.type == "message").content
    tokens = "".join(logprob.token for logprob in part.logprobs)
    assert tokens.strip() == part.text == "So it is."
    assert {len(logprob.top_logprobs) for logprob in part.logprobs} == {2}
    events = list(ask(client, stream=True, **fields))
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    assert "".join(one.token for event in deltas for one in event.logprobs) == tokens
    done = next(event for event in events if event.type == "response.output_text.done")
    assert [one.token for one in done.logprobs] == [one.token for one in part.logprobs]
    only = ask(client, top_logprobs=1).output
    assert next(item for item in only if item.type == "message").content[0].logprobs
    assert not next(item for item in ask(client).output if item.type == "message").content[0].logprobs


def test_events_are_padded_where_that_is_asked_for(client, script):
    script.text = "why</think>So it is."
    for options in ({"include_obfuscation": True}, {"include_obfuscation": False}, {}):
        events = [event.to_dict() for event in ask(client, stream=True, stream_options=options)]
        deltas = [event for event in events if event["type"].endswith(".delta")]
        padded = [len(event["delta"]) + len(event.get("obfuscation", "")) for event in deltas]
        assert bool(options.get("include_obfuscation")) == all(size % 64 == 0 for size in padded)
        assert not [event for event in events if "obfuscation" in event and event not in deltas]


def test_an_answer_that_is_cut_is_incomplete(client, script):
    script.text = "x</think>one two three"
    cut = ask(client, max_output_tokens=len("x</think>one"))
    assert (cut.status, cut.incomplete_details.reason, cut.output_text) == ("incomplete", "max_output_tokens", "one")
    assert [item["status"] for item in shown(cut)] == ["completed", "incomplete"]
    *_, last = ask(client, max_output_tokens=len("x</think>one"), stream=True)
    assert (last.type, last.response.status) == ("response.incomplete", "incomplete")


def test_a_response_follows_the_one_before(client, script, served):
    script.text = SCRIPTS["one"]
    first = ask(client, instructions="Be brief.")
    call = next(item for item in first.output if item.type == "function_call")
    script.text = "b</think>Sunny."
    output = [{"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}]
    second = ask(client, input=output, previous_response_id=first.id, stream=False)
    call_text = '<tool_call>{"name": "weather", "arguments": {"city": "Zürich 😀"}}</tool_call>'
    turns = ["user\nweather?", f"assistant\n<think>Where? There.</think>{call_text}", "tool\nsunny"]
    assert prompt(served) == "".join(f"<|start|>{turn}<|end|>" for turn in turns) + "<|start|>assistant\n<think>"
    with client.responses.stream(model="fake", input="Thanks", previous_response_id=second.id) as stream:
        third = stream.get_final_response()
    assert third.previous_response_id == second.id
    assert "assistant\n<think>b</think>Sunny.<|end|><|start|>user\nThanks" in prompt(served)
    items = client.responses.input_items.list(third.id).data
    assert [item.type for item in items] == ["message", "message", "reasoning", "function_call_output",
                                             "function_call", "reasoning", "message"]  # fmt: skip


def test_a_response_follows_one_whose_call_broke_off(client, script, served):
    for name, tokens in (("broken", len(SCRIPTS["broken"])), ("invalid", 200)):
        script.text = (SCRIPTS | {"invalid": SCRIPTS["broken"] + "</tool_call>"})[name]
        whole = ask(client, max_output_tokens=tokens)
        assert [item.type for item in whole.output] == ["reasoning", "message"]
        assert whole.output_text == 'Now: {"name": "weather", "arguments": {"ci'
        *_, last = ask(client, max_output_tokens=tokens, tools=EAGER, stream=True)
        assert last.response.output[-1].type == "function_call"
        ask(client, input="Go on.", previous_response_id=last.response.id)
        assert "assistant\n<think>c</think>Now:<|end|><|start|>user\nGo on." in prompt(served)


def test_items_that_a_client_keeps_itself_are_one_conversation(client, script, served):
    script.text = f"a</think>Hm.{CALL}"
    first = ask(client, store=False)
    said = [{"role": "user", "content": "weather?"}, *(item.to_dict() for item in first.output)]
    call = first.output[-1]
    ask(client, input=[*said, {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}])
    shown = '<think>a</think>Hm.<tool_call>{"name": "weather", "arguments": {"city": "Zürich 😀"}}</tool_call>'
    assert f"assistant\n{shown}<|end|><|start|>tool\nsunny" in prompt(served)


def test_what_is_stored_is_its_owners(client, script, served):
    script.text = "a</think>b"
    kept, dropped = ask(client), ask(client, store=False)
    assert client.responses.retrieve(kept.id) == kept
    other = openai.OpenAI(base_url=f"{served[0]}/v1", api_key=KEYS[1], max_retries=0)
    for who, name in ((other, kept.id), (client, dropped.id), (client, "resp_x")):
        with pytest.raises(openai.NotFoundError):
            who.responses.retrieve(name)
        with pytest.raises(openai.NotFoundError) as refused:
            ask(who, previous_response_id=name)
        assert refused.value.param == "previous_response_id"
        with pytest.raises(openai.NotFoundError):
            who.responses.delete(name)
    client.responses.delete(kept.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(kept.id)
    assert httpx.put(f"{served[0]}/v1/responses/x", headers={"x-api-key": KEYS[0]}).status_code == 405


def test_the_store_is_bounded():
    store = Store()
    for at in range(MAX_STORED + 2):
        store.keep(f"r{at}", Stored("t", b"[]", b"{}"))
    assert store.find(f"r{MAX_STORED + 1}", "t").response == b"{}"
    with pytest.raises(Exception, match="no such response"):
        store.find("r1", "t")
    store.keep("large", Stored("t", b"x" * (64 << 20), b""))
    assert store.find("large", "t")
    with pytest.raises(Exception, match="no such response"):
        store.find("r2", "t")


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "image": (
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "http://x"}]}]},
        "input[0].content[0].type",
    ),
    "reference": ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
    "role": ({"input": [{"role": "robot", "content": "x"}]}, "input[0]"),
    "field of an item": ({"input": [{"role": "user", "content": "x", "colour": 1}]}, "input[0].colour"),
    "tool of a server": ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
    "background": ({"background": True}, "background"),
    "conversation": ({"conversation": "x"}, "conversation"),
    "effort": ({"reasoning": {"effort": "high"}}, "reasoning.effort"),
    "truncation": ({"truncation": "auto"}, "truncation"),
    "nothing": ({"input": []}, "input"),
    "form": ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
    "schema": (
        {"text": {"format": {"type": "json_schema", "name": "x", "schema": {"not": {}}}}, "tools": []},
        "text.format.schema",
    ),
    "length": ({"max_output_tokens": 0}, "max_output_tokens"),
    "name of a tool": ({"tools": [{"type": "function", "name": "a b"}]}, "tools[0].name"),
    "arguments": (
        {"input": [{"type": "function_call", "call_id": "c", "name": "clock", "arguments": "["}]},
        "input[0].arguments",
    ),
    "included": ({"include": ["reasoning.encrypted_content"]}, "include[0]"),
    "options": ({"extra_body": {"stream_options": {}}}, "stream_options"),
    "logprobs": ({"top_logprobs": 21}, "top_logprobs"),
    "unknown": ({"extra_body": {"top_q": 1}}, "top_q"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_can_not_be_kept_is_refused_by_name(client, case):
    fields, param = REFUSED[case]
    with pytest.raises(openai.BadRequestError) as refused:
        ask(client, **fields)
    assert refused.value.param == param, refused.value.message
    assert param.partition("[")[0] in refused.value.message
    assert not re.search(r"\b(max_tokens|response_format|messages\[|\.function\b)", str(refused.value.body))
