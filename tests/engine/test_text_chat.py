"""Chat templates: what transformers' users expect, refusals by name, and bounds that a hostile template meets."""

from __future__ import annotations

from typing import Any

import pytest

from veriattn.engine.chat import MAX_RENDERED_CHARS, ChatTemplate
from veriattn.errors import ModelError, UsageError

USER = [{"role": "user", "content": "hi"}]
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe brief<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def render(source: str, messages: Any = USER, **options: Any) -> str:
    return ChatTemplate(source, "<s>", "</s>").render(messages, **options)


def test_chatml() -> None:
    body = "<|im_start|>system\nBe brief<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
    assert render(CHATML) == body + "<|im_start|>assistant\n"
    assert render(CHATML, add_generation_prompt=False) == body


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ bos_token }}{{ eos_token }}", "<s></s>"),
        ("{% if tools is none and documents is none %}none{% endif %}", "none"),
        ("{{ messages | tojson }}", '[{"role": "user", "content": "hi"}]'),
        ("{{ '<é>' | tojson }}", '"<é>"'),
        ("{{ {'b': 1, 'a': 2} | tojson(indent=2, sort_keys=true) }}", '{\n  "a": 2,\n  "b": 1\n}'),
        ("  {% if true %}\nx\n  {% endif %}\ny", "x\ny"),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("{% generation %}{{ 1 + 1 }}{% endgeneration %}", "2"),
        ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}", "1"),
        ("{{ messages | map(attribute='role') | join(',') }}", "user"),
        ("{{ messages[0].content.strip().upper() ~ '!' }}", "HI!"),
        ("{{ messages[0]['content'].split('i')[0] * 3 }}", "hhh"),
        ("{% macro f(x) %}[{{ x }}]{% endmacro %}{{ f('a') ~ f('b') }}", "[a][b]"),
        ("{% set x %}a{{ 1 }}{% endset %}{{ x | replace('a', 'b') }}", "b1"),
        ("{{ 'x\ny' | indent }}", "x\n    y"),
        ("{{ '' if strftime_now is defined else 'no clock' }}", "no clock"),
        ("{% set bound_emit = 1 %}{% set environment = 2 %}{% for i in [1, 2] %}x{{ i }}{% endfor %}", "x1x2"),
        ("{{ messages[0].nothing }}{{ nothing }}", ""),
    ],
)
def test_what_templates_use(source: str, expected: str) -> None:
    assert render(source) == expected


def test_rendering_is_repeatable() -> None:
    template = ChatTemplate(CHATML, None, None)
    long = [{"role": "user", "content": "x" * 300_000}] * 8
    assert template.render(long) == template.render(long)


def test_parts_of_type_text_are_joined_and_empty_fields_ignored() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    message = {"role": "assistant", "content": parts, "refusal": None, "tool_calls": [], "name": "n"}
    assert render("{{ messages[0].content }}{{ messages[0].name }}{{ messages[0] | length }}", [message]) == "a\nbn3"


@pytest.mark.parametrize(
    "messages",
    [
        [],
        ["hi"],
        [{}],
        [{"role": "user"}],
        [{"role": 1, "content": "x"}],
        [{"role": "user", "content": None}],
        [{"role": "user", "content": 3}],
        [{"role": "user", "content": b"x"}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
        [{"role": "user", "content": ["x"]}],
        [{"role": "user", "content": "x", "tool_calls": [{"id": "1"}]}],
        [{"role": "user", "content": "x", "name": 3}],
    ],
)
def test_messages_that_are_not_text_are_refused(messages: Any) -> None:
    render("{{ messages | length }}")
    with pytest.raises(UsageError):
        render("{{ messages | length }}", messages)


def test_a_template_may_refuse_messages() -> None:
    with pytest.raises(UsageError, match="roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}")


@pytest.mark.parametrize(
    "source",
    ["{% for x in %}", "{{ 'a' | no_such_filter }}", "{{ messages | random }}", "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
     "{% if %}", "x" * (1 << 19), "{% for a in [1] %}" * 30 + "{% endfor %}" * 30],
)  # fmt: skip
def test_templates_that_do_not_compile(source: str) -> None:
    with pytest.raises(ModelError, match="chat template"):
        ChatTemplate(source, None, None)


@pytest.mark.parametrize(
    "source",
    [
        "{{ nothing.x }}",
        "{{ 1 / 0 }}",
        "{{ messages[0].content + 1 }}",
        "{% include 'x' %}",
        "{% import 'os' as os %}",
        "{{ strftime_now('%d') }}",
        "{{ lipsum() }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_templates_that_fail(source: str) -> None:
    with pytest.raises(ModelError, match="the chat template fails"):
        render(source)


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages[0].pop('role') }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ ('' | attr('__class__')).__mro__ }}",
        "{{ (joiner | attr('__init__') | attr('__globals__')).os }}",
    ],
)
def test_the_sandbox_holds(source: str) -> None:
    with pytest.raises(ModelError, match=r"unsafe|[uU]ndefined"):
        render(source)


EXPLOSIONS = [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(40) }}",
    "{% for a in [1, [1, [1]]] recursive %}{{ loop([1, 2, 3]) }}{% endfor %}",
    "{% set n = namespace(x='a') %}{% for a in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "{% set n = namespace(x='a') %}{% for a in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "{% set n = namespace(x='a') %}{% for a in range(99) %}{% set n.x = [n.x, n.x] %}{% endfor %}",
    "{% set n = namespace(x='a') %}{% for a in range(99) %}{% set n.x = (n.x, n.x) %}{% endfor %}{{ n.x == n.x }}",
    "{% set n = namespace(x='a') %}{% for a in range(99) %}{% set n.x = {1: n.x, 2: n.x} %}{% endfor %}",
    "{% set n = namespace(x='a') %}{% for a in range(99) %}{% set n.x = dict(a=n.x, b=n.x) %}{% endfor %}",
    "{% set n = namespace(x='\\\\') %}{% for a in range(99) %}{% set n.x = n.x | tojson %}{% endfor %}",
    "{% set n = namespace(x='<') %}{% for a in range(99) %}{% set n.x = n.x | replace('<', '<<') %}{% endfor %}",
    "{% set n = namespace(x='<') %}{% for a in range(99) %}{% set n.x = [n.x, n.x] | join(n.x) %}{% endfor %}",
    "{% set n = namespace(x=3) %}{% for a in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "{{ 9 ** 9 ** 9 }}",
    "{{ 'a' * 10 ** 10 }}",
    "{{ 10 ** 10 * 'a' }}",
    "{{ [0] * 10 ** 10 }}",
    "{{ ['a' * 1000] * 100000 }}",
    "{{ ('a' * 2000000).replace('a', 'bbbbbb') }}",
    "{{ ('a' * 2000000).replace('', 'bbbbbb') }}",
    "{{ 'aaaa' | replace('a', 'b' * 2000000) }}",
    "{{ ([1] * 100000) | replace(1, 'b' * 100) }}",
    "{{ ([1] * 1000) | join([1] * 10000) }}",
    "{{ (['a'] * 100) | join('x' * 100000) }}",
    "{{ ('x' * 100000).join(['a'] * 100) }}",
    "{{ ('x' * 100000).join('a' * 100) }}",
    "{{ ('x' * 4000000).join('a' * 4000000) }}",
    "{{ 'x' | indent(100000000) }}",
    "{{ ('\n' * 1000000) | indent('xxxxxxxxxxxxx') }}",
    "{{ [1] | tojson(indent=100000000) }}",
    "{% set x %}{% for a in range(99999) %}" + "a" * 100 + "{% endfor %}{% endset %}",
    "{% for a in range(99999) %}{% set x %}" + "a" * 100 + "{% endset %}{% endfor %}",
    "{% macro f() %}{% for a in range(99999) %}{{ 'a' * 100 }}{% endfor %}{% endmacro %}{% set x = f() %}",
    "{% for a in range(99999) %}{{ messages[0].content }}" + "a" * 100 + "{% endfor %}",
    "{{ '%1000000000d' % 3 }}",
    "{{ '{:>1000000000}'.format(3) }}",
    "{{ ('{:>1000000000}' | attr('format'))(3) }}",
    "{{ 'a'.ljust(1000000000) }}",
    "{{ ('a' | attr('center'))(1000000000) }}",
    "{{ 'a'['zfill'](1000000000) }}",
    "{{ '\t'.expandtabs(1000000000) }}",
]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("source", EXPLOSIONS)
def test_hostile_templates_end(source: str) -> None:
    template = ChatTemplate(source + "{{ messages[0].content }}", "<s>", "</s>")
    with pytest.raises(ModelError, match="the chat template fails"):
        template.render(USER)


@pytest.mark.parametrize("source", ["{{ messages | map('upper') }}", "{{ range }}", "{{ namespace() }}", "{{ self }}"])
def test_what_has_no_fixed_text_is_not_written(source: str) -> None:
    with pytest.raises(ModelError, match="writes out"):
        render(source)


def test_a_result_may_be_as_long_as_the_bound() -> None:
    # Split, so that no single value reaches the bound.
    message = {"role": "user", "content": "x" * (MAX_RENDERED_CHARS // 4)}
    assert len(render("{% for m in messages %}{{ m.content }}{% endfor %}", [message] * 4)) == MAX_RENDERED_CHARS
    with pytest.raises(ModelError, match="writes more"):
        render("{% for m in messages %}{{ m.content }}{% endfor %}", [message] * 5)
