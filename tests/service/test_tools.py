"""Tools through the official client: what a scripted model writes comes back as calls, whole and streamed alike; what
can't be kept is refused by name."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest

from tests.service.fakes import EOS, fake, fake_service, ids, running
from xllm.service.body import ChatBody, parse
from xllm.service.endpoint import Limits
from xllm.service.errors import ApiError
from xllm.service.parsers.reading import Dialect
from xllm.service.template import ChatTemplate
from xllm.service.tools import MAX_TOOLS, MAX_TOOLS_CHARS, call_schema, offered

TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}\n{% endif %}{% for m in messages %}<|start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n<think>{% endif %}"
)
SAY: list[Any] = [{"role": "user", "content": "weather?"}]
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"type": "function", "function": {"name": "weather", "description": "now", "parameters": SCHEMA}}
TOOLS: list[Any] = [WEATHER, {"type": "function", "function": {"name": "clock"}}]
EAGER: list[Any] = [tool | {"eager_input_streaming": True} for tool in TOOLS]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich 😀"}}\n</tool_call>'
CLOCK = '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'
SCRIPTS = {
    "one": f"Where? There.\n</think>\n\n{CALL}",
    "two": f"a</think>\n\nLet me see.\n{CALL}\n{CLOCK}",
    "text": "b</think>\n\nNo calls { here.",
    "early": 'c</think>Now: <tool_call>{"name": "weather", "argum',
    "broken": 'c</think>Now: <tool_call>{"name": "weather", "arguments": {"ci',
    "unknown": 'd</think><tool_call>{"name": "other", "arguments": {}}</tool_call>',
    "thought": "only thought",
}


@pytest.fixture(scope="module")
def served(tmp_path_factory, script):
    service = fake_service(tmp_path_factory.mktemp("tools"), template=TEMPLATE, reply=script)
    with running(service) as (base, _):
        yield base, service


def ask(client: openai.OpenAI, **fields: Any) -> Any:
    return client.chat.completions.create(**{"model": "fake", "messages": SAY, "tools": TOOLS} | fields)


def without_ids(message: Any) -> dict[str, Any]:
    found = message.to_dict()
    for call in found.get("tool_calls") or ():
        assert call.pop("id").startswith("call_")
        call.pop("index", None)
    return found


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("tools", [True, False])
def test_the_stream_adds_up_to_the_whole(client, script, name, tools):
    script.text = SCRIPTS[name]
    fields = {} if tools else {"tools": openai.NOT_GIVEN}
    whole = ask(client, **fields)
    with client.chat.completions.stream(
        model="fake", messages=SAY, tools=TOOLS if tools else openai.NOT_GIVEN
    ) as stream:
        final = stream.get_final_completion().choices[0]
    one, other = without_ids(whole.choices[0].message), without_ids(final.message)
    for message in (one, other):  # what the client's own helper adds
        for field in ("parsed", "refusal", "annotations"):
            message.pop(field, None)
        for call in message.get("tool_calls") or ():
            call["function"].pop("parsed_arguments", None)
    assert {key: value for key, value in one.items() if value} == {key: value for key, value in other.items() if value}
    assert one["content"] == other.get("content")
    assert final.finish_reason == whole.choices[0].finish_reason


def test_calls(client, script):
    script.text = SCRIPTS["two"]
    answer = ask(client)
    [choice] = answer.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Let me see."
    assert choice.message.reasoning_content == "a"
    weather, clock = choice.message.tool_calls
    assert (weather.type, weather.function.name, clock.function.name) == ("function", "weather", "clock")
    assert weather.function.arguments == '{"city": "Zürich 😀"}'
    assert weather.id != clock.id
    assert answer.usage.completion_tokens == len(ids(script.text)) + 1
    assert answer.usage.completion_tokens_details.reasoning_tokens == len("a</think>")


@pytest.mark.parametrize("eager", [False, True])
def test_deltas_have_the_form_that_clients_add_up(client, script, eager):
    """A call is one delta; of an eager tool, its arguments come as the model writes them, a token at a time."""
    script.text = SCRIPTS["two"]
    chunks = [chunk.choices[0] for chunk in ask(client, stream=True, tools=EAGER if eager else TOOLS)]
    assert (chunks[0].delta.role, chunks[0].delta.content) == ("assistant", None)
    calls = [call for chunk in chunks for call in chunk.delta.tool_calls or ()]
    begun = [call for call in calls if call.function.name]
    assert [(call.index, call.function.name) for call in begun] == [(0, "weather"), (1, "clock")]
    assert all(call.id and call.type == "function" for call in begun)
    assert not any(call.id or call.type for call in calls if call not in begun)
    assert [call.index for call in calls] == sorted(call.index for call in calls)
    weather = [call.function.arguments for call in calls if call.index == 0]
    assert "".join(weather) == '{"city": "Zürich 😀"}'
    assert (len(weather) == 1) if not eager else (max(map(len, weather)) <= 2)
    assert [chunk.finish_reason for chunk in chunks if chunk.finish_reason] == ["tool_calls"]
    assert "".join(chunk.delta.content or "" for chunk in chunks) == "Let me see."


def test_what_is_no_call_is_content(client, script):
    for name, content in (
        ("text", "No calls { here."),
        ("early", 'Now: {"name": "weather", "argum'),
        ("broken", 'Now: {"name": "weather", "arguments": {"ci'),
        ("unknown", '{"name": "other", "arguments": {}}'),
    ):
        script.text = SCRIPTS[name]
        [choice] = ask(client).choices
        assert (choice.message.content, choice.message.tool_calls, choice.finish_reason) == (content, None, "stop")
    script.text = SCRIPTS["one"]
    for fields in ({"tool_choice": "none"}, {"tools": []}):
        [choice] = ask(client, **fields).choices
        assert choice.message.content == CALL  # nothing is offered, so nothing is a call
    [choice] = ask(client, max_tokens=len("Where? There.\n</think>\n\n<tool_call>")).choices
    assert (choice.message.content, choice.finish_reason) == (None, "length")


def test_no_call_that_breaks_off_is_seen_but_by_who_asked_for_it(client, script):
    """That one is there as far as it came, in a stream, and nothing to carry out."""
    script.text, text = SCRIPTS["broken"], 'Now: {"name": "weather", "arguments": {"ci'
    lazy = [tool | {"eager_input_streaming": given} for tool, given in zip(TOOLS, (False, None), strict=True)]
    for tokens, reason in ((200, "stop"), (len(script.text), "length")):
        for tools, streamed in ((TOOLS, text), (lazy, text), (EAGER, "Now:")):
            [choice] = ask(client, max_tokens=tokens, tools=tools).choices
            assert (choice.message.content, choice.message.tool_calls, choice.finish_reason) == (text, None, reason)
            chunks = [chunk.choices[0] for chunk in ask(client, max_tokens=tokens, tools=tools, stream=True)]
            assert "".join(chunk.delta.content or "" for chunk in chunks) == streamed
            assert chunks[-1].finish_reason == reason
            calls = [call.function.arguments for chunk in chunks for call in chunk.delta.tool_calls or ()]
            assert "".join(calls) == ('{"ci' if tools is EAGER else "")


def test_a_call_that_must_come_is_whole_or_content(client, script):
    script.text = 'so</think>[{"name": "clock", "arguments": {}}, {"name": "weather", "arguments": {"city": "Ulm"'
    forced: dict[str, Any] = {"tool_choice": "required", "max_tokens": len(ids(script.text))}
    [choice] = ask(client, **forced).choices
    assert (choice.message.content, choice.message.tool_calls) == (script.text.removeprefix("so</think>"), None)
    chunks = [chunk.choices[0].delta for chunk in ask(client, **forced | {"tools": EAGER}, stream=True)]
    calls = [call for delta in chunks for call in delta.tool_calls or ()]
    assert "".join(call.function.arguments for call in calls if not call.index) == "{}"


def test_a_call_with_half_of_a_pair_can_be_told_again(client, script, served):
    script.text = 'x</think><tool_call>{"name": "weather", "arguments": {"city": "\\ud800"}}</tool_call>'
    [choice] = ask(client).choices
    assert choice.message.tool_calls[0].function.arguments == '{"city": "\\ud800"}'
    ask(client, messages=[*SAY, choice.message.to_dict()])
    assert "\N{REPLACEMENT CHARACTER}" in served[1].codec.decode(fake(served[1]).seen[-1].prompt)


def test_one_call_ends_the_answer_where_calls_may_not_be_parallel(client, script, served):
    script.text = SCRIPTS["two"] + "x" * 500
    cancelled = fake(served[1]).cancelled
    [choice] = ask(client, parallel_tool_calls=False).choices
    assert [call.function.name for call in choice.message.tool_calls] == ["weather"]
    assert choice.finish_reason == "tool_calls"
    assert fake(served[1]).cancelled == cancelled + 1
    assert len(ask(client, parallel_tool_calls=True).choices[0].message.tool_calls) == 2


def test_tools_and_earlier_calls_reach_the_template(client, script, served):
    script.text = SCRIPTS["one"]
    message = ask(client).choices[0].message
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "sunny"}
    ask(client, messages=[*SAY, message, result])
    prompt = served[1].codec.decode(fake(served[1]).seen[-1].prompt, skip_special_tokens=False)
    assert json.loads(prompt.split("\n")[0]) == TOOLS
    call = '<tool_call>{"name": "weather", "arguments": {"city": "Zürich 😀"}}</tool_call>'
    assert f"assistant\n<think>Where? There.</think>{call}<|end|><|start|>tool\nsunny<|end|>" in prompt
    ask(client, tool_choice="none")
    assert b"weather?" in served[1].codec.decode(fake(served[1]).seen[-1].prompt).encode().split(b"\n", 1)[1]


def test_a_call_that_is_long_in_coming_keeps_the_connection_alive(tmp_path):
    text = "</think>" + '<tool_call>{"arguments": {"city": "' + "x" * 200 + '"}, "name": "weather"}</tool_call>'
    limits = Limits(keep_alive_seconds=0.1)
    service = fake_service(tmp_path, limits, TEMPLATE, reply=lambda request: [*ids(text), EOS], tick=0.004)
    with running(service) as (base, _):
        body = {"messages": SAY, "tools": TOOLS, "stream": True}
        answer = httpx.post(f"{base}/v1/chat/completions", json=body, timeout=60).text
    assert answer.index("keep-alive") < answer.index("tool_calls")


@pytest.mark.parametrize("stream", [False, True])
def test_samples_are_read_each_on_its_own(client, script, stream):
    script.text = SCRIPTS["one"]
    answer = ask(client, n=3, stream=stream)
    if stream:
        calls = [(choice.index, call.index) for chunk in answer for choice in chunk.choices
                 for call in choice.delta.tool_calls or ()]  # fmt: skip
        assert {*calls} == {(0, 0), (1, 0), (2, 0)}
    else:
        assert [len(choice.message.tool_calls) for choice in answer.choices] == [1, 1, 1]


def test_logprobs_are_of_all_tokens_of_the_text(client, script):
    script.text = SCRIPTS["one"]
    whole = ask(client, logprobs=True).choices[0].logprobs.content
    streamed = [chunk.choices[0].logprobs for chunk in ask(client, logprobs=True, stream=True)]
    for found in (whole, [token for held in streamed if held for token in held.content]):
        assert bytes(byte for token in found for byte in token.bytes).decode() == script.text


def function(**fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f"} | fields}


FORCED = {"type": "function", "function": {"name": "clock"}}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a call and a form": ({"tool_choice": FORCED, "response_format": {"type": "json_object"}}, "tool_choice"),
    "named, absent": ({"tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice"),
    "choice": ({"tool_choice": "any"}, "tool_choice"),
    "choice of another kind": ({"tool_choice": {"type": "allowed_tools"}}, "tool_choice"),
    "required of nothing": ({"tool_choice": "required", "tools": []}, "tool_choice"),
    "another type": ({"tools": [{"type": "custom", "function": {"name": "f"}}]}, "tools[0].type"),
    "strict": ({"tools": [function(strict=True)]}, "tools[0].function.strict"),
    "name": ({"tools": [function(name="a b")]}, "tools[0].function.name"),
    "name of none": ({"tools": [function(name="")]}, "tools[0].function.name"),
    "names": ({"tools": [function(), function()]}, "tools"),
    "parameters": ({"tools": [function(parameters=[1])]}, "tools[0].function.parameters"),
    "unknown field": ({"tools": [function(returns={})]}, "tools[0].function.returns"),
    "too many": ({"tools": [function(name=f"f{at}") for at in range(MAX_TOOLS + 1)]}, "tools"),
    "too large": ({"tools": [function(description="x" * MAX_TOOLS_CHARS)]}, "tools"),
    "calls of a user": (
        {"messages": [{"role": "user", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": ""}}]}]},
        "messages[0].tool_calls",
    ),
    "arguments": (
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]}]},
        "messages[0].tool_calls[0].function.arguments",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_can_not_be_kept_is_refused_by_name(client, case):
    fields, param = REFUSED[case]
    with pytest.raises(openai.BadRequestError) as refused:
        ask(client, **fields)
    assert refused.value.param == param, refused.value.message


def test_models_without_a_way_to_call_say_so(tmp_path):
    with running(fake_service(tmp_path)) as (base, _):
        answer = httpx.post(f"{base}/v1/chat/completions", json={"messages": SAY, "tools": TOOLS})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "tools")
    assert "--tool-call-parser" in answer.json()["error"]["hint"]["knob"]
    with pytest.raises(ApiError, match="does not tell the model about tools"):
        ChatTemplate("<tool_call>").render(SAY, {}, tools=TOOLS)


@pytest.mark.parametrize(
    ("source", "written"),
    [
        ("{{ f.arguments | tojson }}", '{"a": "ü"}'),
        (
            "{% if f.arguments is string %}{{ f.arguments }}{% else %}{{ f.arguments | tojson }}{% endif %}",
            '{"a": "ü"}',
        ),
        ("{% for key, value in f.arguments.items() %}{{ key }}={{ value }}{% endfor %}", "a=ü"),
        ("{{ 'json ' + f.arguments }}", 'json {"a": "ü"}'),
        ("{{ f.arguments }}", '{"a": "ü"}'),
    ],
)
def test_arguments_reach_a_template_in_the_form_it_takes(source, written):
    loop = "{% for m in messages %}{% for c in m.tool_calls %}{% set f = c.function %}" + source
    template = ChatTemplate(loop + "{% endfor %}{% endfor %}")
    function = {"name": "f", "arguments": {"a": "ü"}}
    message = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}
    assert template.render([message], {}) == written


def test_the_schema_of_a_required_call():
    nested = {"type": "object", "properties": {"a": {"$ref": "#/$defs/A"}}, "$defs": {"A": {"type": "integer"}}}
    schema = call_schema({"f": nested, "g.h": {}}, one=True)
    names = [choice["properties"]["name"]["const"] for choice in schema["items"]["anyOf"]]
    assert (names, schema["minItems"], schema["maxItems"]) == (["f", "g.h"], 1, 1)
    assert "maxItems" not in call_schema({"f": {}}, one=False)
    assert schema["$defs"]["f"]["properties"]["a"] == {"$ref": "#/$defs/f/$defs/A"}
    assert schema["$defs"]["g.h"] == {"type": "object"}
    assert nested["properties"]["a"] == {"$ref": "#/$defs/A"}, "the tool's own schema is as it was"


def test_limits_hold_at_their_border():
    tools = [function(name=f"f{at}") for at in range(MAX_TOOLS)]
    offer = offered(parse(json.dumps({"messages": SAY, "tools": tools}).encode(), ChatBody), Dialect("qwen25"))
    assert offer is not None
    assert (offer.shown, len(offer.schemas)) == (tools, MAX_TOOLS)
