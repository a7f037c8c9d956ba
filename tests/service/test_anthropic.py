"""The official client of Anthropic's Messages API against a scripted model: whole, streamed, tools, errors."""

from __future__ import annotations

import json
from typing import Any

import anthropic
import httpx
import openai
import pytest

from tests.service.fakes import fake, fake_service, ids, running
from tests.service.test_tools import CALL, CLOCK, SCHEMA, SCRIPTS, TEMPLATE

SAY: list[Any] = [{"role": "user", "content": "weather?"}]
TOOLS: list[Any] = [
    {"name": "weather", "description": "now", "input_schema": SCHEMA, "cache_control": {"type": "ephemeral"}},
    {"name": "clock", "input_schema": {"type": "object"}},
]


@pytest.fixture(scope="module")
def served(tmp_path_factory, script):
    service = fake_service(tmp_path_factory.mktemp("messages"), template=TEMPLATE, reply=script)
    with running(service) as (base, _):
        yield base, service


@pytest.fixture
def claude(served):
    with anthropic.Anthropic(base_url=served[0], api_key="none", max_retries=0, timeout=30) as client:
        yield client


def ask(claude: anthropic.Anthropic, **fields: Any) -> Any:
    return claude.messages.create(**{"model": "fake", "max_tokens": 300, "messages": SAY, "tools": TOOLS} | fields)


def blocks(message: Any) -> list[dict[str, Any]]:
    found = [block.to_dict() for block in message.content]
    for block in found:
        assert block.pop("id", "call_").startswith("call_")
    return [{name: value for name, value in block.items() if value is not None} for block in found]


def test_a_message_has_its_blocks_in_order(claude, script):
    script.text = SCRIPTS["two"]
    message = ask(claude)
    assert blocks(message) == [
        {"type": "thinking", "thinking": "a", "signature": ""},
        {"type": "text", "text": "Let me see."},
        {"type": "tool_use", "name": "weather", "input": {"city": "Zürich 😀"}},
        {"type": "tool_use", "name": "clock", "input": {}},
    ]
    assert (message.type, message.role, message.model) == ("message", "assistant", "fake")
    assert (message.stop_reason, message.stop_sequence) == ("tool_use", None)
    assert message.id.startswith("msg_")
    assert message.usage.output_tokens == len(ids(script.text)) + 1
    assert message.usage.cache_read_input_tokens == 0 and message.usage.input_tokens > 0


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_events_add_up_to_the_whole(claude, script, name):
    script.text = SCRIPTS[name]
    whole = ask(claude)
    with claude.messages.stream(model="fake", max_tokens=300, messages=SAY, tools=TOOLS) as stream:
        final = stream.get_final_message()
    assert blocks(final) == blocks(whole)
    assert (final.stop_reason, final.usage.output_tokens) == (whole.stop_reason, whole.usage.output_tokens)
    assert final.usage.input_tokens == whole.usage.input_tokens


def test_events_come_in_the_order_of_the_api(claude, script):
    script.text = SCRIPTS["two"]
    kinds = [event.type for event in ask(claude, stream=True)]
    block = "content_block_start", "content_block_delta", "content_block_stop"
    joined = [kind for at, kind in enumerate(kinds) if at == 0 or kind != kinds[at - 1]]
    assert joined == ["message_start", *block * 4, "message_delta", "message_stop"]


def test_how_a_message_ended(claude, script):
    script.text = "x</think>one two three"
    assert ask(claude).stop_reason == "end_turn"
    cut = ask(claude, max_tokens=len("x</think>one"))
    assert (cut.stop_reason, blocks(cut)[-1]["text"]) == ("max_tokens", "one")
    stopped = ask(claude, stop_sequences=["four", " three"])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", " three")
    assert blocks(stopped)[-1]["text"] == "one two"
    *_, delta, _ = ask(claude, stop_sequences=[" three"], stream=True)
    assert (delta.delta.stop_reason, delta.delta.stop_sequence) == ("stop_sequence", " three")


def test_turns_reach_the_template(claude, script, served):
    script.text = SCRIPTS["one"]
    message = ask(claude)
    call = next(block for block in message.content if block.type == "tool_use")
    result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "sunny"}]}
    said = [result, {"type": "text", "text": "and now?", "cache_control": {"type": "ephemeral"}}]
    turns: list[Any] = [*SAY, {"role": "assistant", "content": message.content}, {"role": "user", "content": said}]
    ask(claude, system=[{"type": "text", "text": "Be brief."}], messages=turns)
    prompt = served[1].codec.decode(fake(served[1]).seen[-1].prompt, skip_special_tokens=False)
    tools, _, rest = prompt.partition("\n")
    assert [tool["function"]["name"] for tool in json.loads(tools)] == ["weather", "clock"]
    call_text = '<tool_call>{"name": "weather", "arguments": {"city": "Zürich 😀"}}</tool_call>'
    shown = ["system\nBe brief.", "user\nweather?", f"assistant\n<think>Where? There.</think>{call_text}",
             "tool\nsunny", "user\nand now?"]  # fmt: skip
    assert rest == "".join(f"<|start|>{turn}<|end|>" for turn in shown) + "<|start|>assistant\n<think>"


@pytest.mark.parametrize("eager", [False, True])
def test_input_comes_when_it_is_whole_or_as_it_is_written_where_a_tool_says_so(claude, script, eager):
    script.text = f"a</think>{CALL}"
    tools: list[Any] = [tool | {"eager_input_streaming": eager} for tool in TOOLS]

    def streamed() -> tuple[list[str], Any]:
        with claude.messages.stream(model="fake", max_tokens=200, messages=SAY, tools=tools) as stream:
            pieces = [event.partial_json for event in stream if event.type == "input_json"]
            return pieces, stream.get_final_message()

    pieces, final = streamed()
    assert "".join(pieces) == '{"city": "Zürich 😀"}' and (max(map(len, pieces)) <= 2 if eager else len(pieces) == 1)
    assert final.content[-1].input == {"city": "Zürich 😀"} and final.stop_reason == "tool_use"
    body = '{"name": "weather", "arguments": {"city": "Bern", "at": 12'
    script.text = f"a</think><tool_call>{body}"
    pieces, final = streamed()
    assert "".join(pieces) == (body[body.index('{"city') :] if eager else "") and final.stop_reason == "end_turn"
    for message in [ask(claude, tools=tools)] + [final] * (not eager):
        assert blocks(message)[1:] == [{"type": "text", "text": body}] and message.stop_reason == "end_turn"


def test_choices_of_tools(claude, script):
    script.text = f"a</think>{CALL}{CLOCK}"
    one = ask(claude, tool_choice={"type": "auto", "disable_parallel_tool_use": True})
    assert [block["name"] for block in blocks(one) if block["type"] == "tool_use"] == ["weather"]
    none = ask(claude, tool_choice={"type": "none"})
    assert not [block for block in none.content if block.type == "tool_use"]


def test_tokens_are_counted(claude, script, served):
    counted = claude.messages.count_tokens(model="fake", messages=SAY, tools=TOOLS).input_tokens
    script.text = "a"
    assert counted == ask(claude).usage.input_tokens == len(fake(served[1]).seen[-1].prompt)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "image": (
        {"messages": [{"role": "user", "content": [{"type": "image", "source": {"type": "url", "url": "http://x"}}]}]},
        "messages[0].content[0]",
    ),
    "role": ({"messages": [{"role": "system", "content": "x"}]}, "messages[0].role"),
    "call of a user": (
        {"messages": [{"role": "user", "content": [{"type": "tool_use", "id": "a", "name": "f", "input": {}}]}]},
        "messages[0].content[0]",
    ),
    "field of a block": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "colour": 1}]}]},
        "messages[0].content[0].colour",
    ),
    "system": ({"system": [{"type": "image"}]}, "system[0]"),
    "tool of a server": ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type"),
    "choice": ({"tool_choice": {"type": "tool"}}, "tool_choice"),
    "thinking": ({"thinking": {"type": "loud"}}, "thinking.type"),
    "container": ({"container": "x"}, "container"),
    "no turns": ({"messages": []}, "messages"),
    "temperature": ({"extra_body": {"temperature": 3.0}}, "temperature"),
    "stops": ({"stop_sequences": ["a"] * 5}, "stop_sequences has 5"),
    "an empty stop": ({"stop_sequences": [""]}, "stop_sequences has a string"),
    "name of a tool": ({"tools": [{"name": "a b", "input_schema": {}}]}, "tools[0].name has"),
    "unknown": ({"extra_body": {"top_q": 1}}, "top_q"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_can_not_be_kept_is_refused_by_name(claude, case):
    fields, name = REFUSED[case]
    with pytest.raises(anthropic.BadRequestError) as refused:
        ask(claude, **fields)
    body: Any = refused.value.body
    assert body["type"] == "error" and body["error"]["type"] == "invalid_request_error" and body["request_id"]
    assert any(part in body["error"]["message"] for part in name.split("|")), body


def test_errors_have_the_form_of_the_api(claude, served):
    with pytest.raises(anthropic.NotFoundError):
        ask(claude, model="other")
    answer = httpx.post(f"{served[0]}/v1/messages", json={"messages": SAY})
    assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error")
    assert "max_tokens" in answer.json()["error"]["message"]
    with pytest.raises(openai.BadRequestError), openai.OpenAI(base_url=f"{served[0]}/v1", api_key="x") as other:
        other.chat.completions.create(model="fake", messages=[])  # other routes keep theirs
