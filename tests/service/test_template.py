"""Chat templates follow transformers' conventions and can't hold the server, whatever they contain."""

from __future__ import annotations

import time

import pytest

from xllm.service.errors import ApiError
from xllm.service.template import MAX_SECONDS, ChatTemplate

MESSAGES = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]


def render(source: str, **arguments) -> str:
    return ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"}).render(MESSAGES, arguments)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{% for m in messages %}\n  {% if m.role == 'user' %}\n{{ bos_token }}{{ m['content'] }}\n{% endif %}\n{% endfor %}", "<s>u\n"),  # noqa: E501
        ("{{ {'a': '<b> é'} | tojson }}", '{"a": "<b> é"}'),
        ("{{ [1] | tojson(indent=2) }}", "[\n  1\n]"),
        ("{% for m in messages %}{% if loop.index0 == 1 %}{% continue %}{% endif %}{{ m.content }}{% endfor %}", "sa"),
        ("{% for m in messages %}{{ m.content }}{% if m.role == 'user' %}{% break %}{% endif %}{% endfor %}", "su"),
        ("{% for m in messages %}{{ loop.length }}{{ loop.last }}{{ loop.first }}{{ loop.revindex }}{% endfor %}", None),  # noqa: E501
        ("{% generation %}{{ messages[2].content }}{% endgeneration %}{{ eos_token }}", "a</s>"),
        ("{% if add_generation_prompt %}go{% endif %}{{ tools is none }}", "goTrue"),
        ("{% set ns = namespace(n=0) %}{% for m in messages[::-1] %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}", "3"),  # noqa: E501
        ("{% macro f(x) %}[{{ x }}]{% endmacro %}{{ f(1) ~ f('b') }}", "[1][b]"),
        ("{{ 'a,b'.split(',')[-1].strip('b') + 'x' * 3 }}{{ '%05d' % 7 }}{{ '{:>3}'.format(1) }}", "xxx00007  1"),
        ("{{ messages | map(attribute='role') | join('|') }}", "system|user|assistant"),
        ("{{ messages | selectattr('role', 'equalto', 'user') | list | length }}", "1"),
        ("{{ {'b': 1, 'a': 2} | dictsort | first | last }}{{ {'a': 1}.items() | list }}", "2[('a', 1)]"),
        ("{{ strftime_now('%Y') | length }}{{ missing is defined }}{{ enable_thinking }}", "4Falseno"),
        ("{{ 'a\nb' | indent(2) | trim }}{{ 'aXb' | replace('X', '-') }}", "a\n  ba-b"),
    ],
)  # fmt: skip
def test_conventions(source, expected):
    text = render(source, enable_thinking="no")
    assert text == (expected if expected is not None else "3FalseTrue33FalseFalse23TrueFalse1")


def test_developer_is_the_system_of_templates_that_do_not_know_it():
    message = [{"role": "developer", "content": "d"}]
    assert ChatTemplate("{{ messages[0].role }}").render(message, {}) == "system"
    assert ChatTemplate("{{ messages[0].role }}{# developer #}").render(message, {}) == "developer"


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{% for i in range(2) recursive %}{{ loop(range(2)) }}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% for i in range(100000) %}{% set x = range(100000) | sum %}{% endfor %}",
        "{% for i in range(100000) %}{{ 'a' * 10000 }}{% endfor %}",
        "{% set ns = namespace(s='aa') %}{% for i in range(99) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
        "{% set ns = namespace(s='aa') %}{% for i in range(99) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
        "{% set ns = namespace(s=[1]) %}{% for i in range(99) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
        "{{ 'a' * 10 ** 10 }}",
        "{{ 10 ** 10 ** 10 }}",
        "{{ [1] * 10 ** 9 }}",
        "{{ '%999999999d' % 1 }}",
        "{{ '%*d' % (999999999, 1) }}",
        "{{ '{:>999999999}'.format(1) }}",
        "{{ '%999999999d' | format(1) }}",
        "{{ 'a'.center(10 ** 9) }}",
        "{{ ('a' * 1000000).replace('', 'b' * 1000000) }}",
        "{{ ('a' * 1000000) | replace('a', 'b' * 1000000) }}",
        "{{ 'a' | indent(10 ** 9, true) }}",
        "{{ (['a' * 1000000] * 80000) | join }}",
        "{{ ''.join(['a' * 1000000] * 80000) }}",
        "{{ '\\ud800' }}",
        "{{ raise_exception('roles must alternate') }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ messages.append(1) }}",
        "{{ namespace(__class__=1) }}",
        "{{ missing.attribute.of }}",
        "{{ 1 / 0 }}",
    ],
)
def test_what_a_template_may_not_do_is_a_typed_error(source):
    with pytest.raises(ApiError) as caught:
        render(source)
    assert (caught.value.status, caught.value.code) == (400, "template_error")


def test_the_reason_of_the_template_reaches_the_client():
    with pytest.raises(ApiError, match="roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}")


@pytest.mark.parametrize("source", ["{% for %}", "{{ 'a' | batch(10) }}", "{% include 'x' %}{% bad %}"])
def test_a_source_that_is_no_template_is_refused(source):
    with pytest.raises(ValueError, match="does not compile"):
        ChatTemplate(source)


def test_arguments_can_not_replace_the_messages():
    with pytest.raises(ApiError, match="messages"):
        render("x", messages=[])


def test_a_template_is_not_charged_for_what_others_do_meanwhile():
    class Busy:
        def __str__(self) -> str:
            time.sleep(1.5 * MAX_SECONDS)
            return "later"

    assert render("{{ busy }}{% for _ in range(3) %}.{% endfor %}", busy=Busy()) == "later..."
