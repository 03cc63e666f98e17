"""Chat templates render the same texts as in transformers, independent of date and chance."""

import re
from datetime import datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tiny import CHAT_TEMPLATE, tiny_tokenizer
from trans_peft.text.chat import (
    _FORMATS,
    MAX_TEMPLATE_CHARACTERS,
    PINNED_DATE,
    pinned,
    render_prompts,
    template_of,
    template_problems,
)

LLAMA_3 = (
    "{{- bos_token }}\n"
    "{%- if not date_string is defined %}\n"
    "    {%- if strftime_now is defined %}\n"
    '        {%- set date_string = strftime_now("%d %b %Y") %}\n'
    "    {%- else %}\n"
    '        {%- set date_string = "26 Jul 2024" %}\n'
    "    {%- endif %}\n"
    "{%- endif %}\n"
    '{{- "<|system|>Today Date: " + date_string + "\\n\\n" }}\n'
    "{%- for message in messages %}\n"
    "    {{- '<|' + message['role'] + '|>' + message['content'] | trim + eos_token }}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n"
    "    {{- '<|assistant|>' }}\n"
    "{%- endif %}\n"
)
UNGUARDED = (
    '{%- set today = strftime_now("%Y-%m-%d") %}\n'
    "{% macro line() %}{{ strftime_now(format='%A, %B %-d') }}{% endmacro %}\n"
    "[{{ today }}|{{ line() }}]{% for m in messages %}\n{{ m.content }}{% endfor %}"
)
PLAIN = (
    CHAT_TEMPLATE,
    "\n  {% if true %}\n  {{ messages | tojson }}\n  {% endif %}\n",
    "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.content }}"
    "{% endfor %}",
    "{% set n = namespace(x=0) %}{% for m in messages %}{% set n.x = n.x + 1 %}{% endfor %}"
    "{% generation %}{{ n.x }}{% endgeneration %}{{ bos_token }}{{ eos_token }}",
)
CHATS = (
    [{"role": "user", "content": " a\n{{ x }} "}],
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "é <eos>"}],
)


def rendered(template, conversations=CHATS, *, prompt=False):
    return render_prompts(
        template,
        conversations,
        special_tokens=tiny_tokenizer().special_tokens_map,
        add_generation_prompt=prompt,
    )


@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("template", PLAIN)
def test_texts_equal_those_of_transformers(template, prompt):
    tokenizer = tiny_tokenizer()
    expected = [
        tokenizer.apply_chat_template(
            list(chat), chat_template=template, tokenize=False, add_generation_prompt=prompt
        )
        for chat in CHATS
    ]
    assert rendered(template, prompt=prompt) == (expected, ["", ""])
    assert pinned(template) == template


@pytest.mark.parametrize("template", [LLAMA_3, UNGUARDED, "\n  {% if 1 %}x{% endif %}" + LLAMA_3])
def test_a_pinned_template_renders_the_same_date_everywhere(template):
    tokenizer = tiny_tokenizer()
    texts, problems = rendered(template)
    assert problems == ["", ""]
    assert re.search(r"26 Jul 2024|2024-07-26\|Friday, July 26", texts[0])
    # A server that renders the saved template gets the same prompt.
    assert texts[0] == tokenizer.apply_chat_template(
        list(CHATS[0]), chat_template=pinned(template), tokenize=False
    )
    # Only the date differs from the text that is rendered today.
    now, today = (
        datetime.now(),
        tokenizer.apply_chat_template(list(CHATS[0]), chat_template=template, tokenize=False),
    )
    for format_ in ("%d %b %Y", "%Y-%m-%d", f"%A, %B {now.day}"):
        expected = PINNED_DATE.strftime(format_.replace(str(now.day), "26"))
        today = today.replace(now.strftime(format_), expected)
    assert texts[0] == today


@pytest.mark.parametrize("template", [LLAMA_3, UNGUARDED, CHAT_TEMPLATE])
def test_pinning_is_idempotent(template):
    assert pinned(pinned(template)) == pinned(template)


def test_each_format_is_that_of_the_pinned_date():
    for format_, text in _FORMATS.items():
        expected = PINNED_DATE.strftime(format_)
        if format_ not in (
            "%s",
            "%P",
            "%l",
            "%k",
            "%e",
            "%h",
        ):  # extensions of the C library, or the local time zone
            assert text.encode().decode("unicode_escape") == expected, format_
    texts, _ = rendered("{{ strftime_now('%Y%%|' ~ '%H:%M') }}", CHATS[:1])
    assert texts == ["2024%|00:00"]


@settings(deadline=None, max_examples=15)  # each example starts a child process
@given(st.lists(st.sampled_from(["%d", "%B", "%-d", "%Y", ", ", "T", "%H:%M:%S"]), max_size=6))
def test_combined_formats_are_those_of_the_pinned_date(parts):
    template = "{{ strftime_now('" + "".join(parts) + "') }}"
    assert rendered(template, CHATS[:1])[0] == [PINNED_DATE.strftime("".join(parts))]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}", "does not compile: TemplateSyntaxError"),
        ("{{ messages | nosuch }}", "does not compile: TemplateAssertionError"),
        ("{{ messages | random }}", "`random` renders different text"),
        ("{{ messages | map('random') | list }}", "`random` renders different text"),
        ("{% if false %}{{ lipsum(n=1) }}{% endif %}", "`lipsum` renders different text"),
        ("x" * (MAX_TEMPLATE_CHARACTERS + 1), "characters; at most"),
        ("{{" + "(" * 5000 + ")" * 5000 + "}}", "does not compile"),
    ],
)
def test_an_invalid_template_is_refused_before_it_is_rendered(template, message):
    (problem,) = template_problems(template)
    assert message in problem
    texts, problems = rendered(template)
    assert texts == ["", ""]
    assert all(message in problem for problem in problems)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].nosuch.field }}", "UndefinedError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ messages | map('ran' ~ 'dom') | list }}", "No filter named 'random'"),
        ("{{ self.__class__ }}{{ ().__class__.__mro__ }}", "SecurityError"),
        ("{% include 'x' %}", "TypeError"),
        ("{{ '\\ud800' }}", "UnicodeEncodeError"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "RecursionError"),
    ],
)
def test_errors_are_reported_for_each_conversation(template, message):
    texts, problems = rendered(template)
    assert texts == ["", ""]
    assert all(message in problem for problem in problems)


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ messages[0].items }}", "<object>"),
        ("{{ messages[0].items|string|upper }}", "<OBJECT>"),
        ("{{ '{}'.format(messages[0].items)[1:] }}", "object>"),
        ("{{ [messages[0].items]|join }}{{ 'a'.join ~ 1 }}", "<object><object>1"),
        ("{{ messages[0]|attr('items') }}{{ messages|map('first') }}", "<object><object>"),
        ("{{ joiner() }}{{ cycler(1) }}{{ raise_exception }}", "<object><object><object>"),
        ("{% set c = cycler(1, 2) %}{{ c.next() }}{{ c.next() }}{{ c.current }}", "121"),
        ("{% set j = joiner('-') %}{{ j() }}{{ j() }}", "-"),
        ("{% for k, v in messages[0].items() %}{{ k }}{% endfor %}", "rolecontent"),
        (
            "{% for m in messages|reverse %}{{ loop.cycle('a') }}{{ loop.last }}{% endfor %}",
            "aTrue",
        ),
    ],
)
def test_no_memory_address_becomes_text(template, text):
    chat = [[{"role": "user", "content": "hi"}]]
    found = render_prompts(template, chat, special_tokens={}, add_generation_prompt=True)
    assert found == ([text], [""])


def test_an_error_in_one_conversation_does_not_affect_others():
    template = (
        "{% if messages | length > 1 %}{{ raise_exception('one turn') }}{% endif %}"
        "{{ messages[0].content }}"
    )
    texts, problems = rendered(template)
    assert texts == [" a\n{{ x }} ", ""]
    assert [bool(problem) for problem in problems] == [False, True]


def test_the_template_of_a_tokenizer():
    tokenizer = tiny_tokenizer()
    assert template_of(tokenizer) == CHAT_TEMPLATE
    tokenizer.chat_template = {"default": LLAMA_3, "tool_use": "x"}
    assert template_of(tokenizer) == pinned(LLAMA_3)
    tokenizer.chat_template = {"tool_use": "x"}
    assert template_of(tokenizer) is None
    tokenizer.chat_template = None
    assert template_of(tokenizer) is None
