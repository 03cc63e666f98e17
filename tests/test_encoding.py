"""Encoding runs tokenizers and chat templates with limits on time and memory."""

import time
from dataclasses import replace

import pytest
from tokenizers import Regex, normalizers

from tests.tiny import tiny_tokenizer
from trans_peft.data import ChatMessage, Example, encoding, full_ids, prompt_ids, token_counts
from trans_peft.data.encoding import token_ids
from trans_peft.domain.data import DataSource
from trans_peft.domain.evaluation import Suite
from trans_peft.errors import ContentError, LimitExceededError
from trans_peft.isolation import CallLimits
from trans_peft.validation.tokenized_suite import prepare, with_answers

TEXT = Example("text", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa!", " b")
CHAT = Example(
    "chat", "", "b", (ChatMessage("user", "a trigger in the row"), ChatMessage("assistant", "b"))
)
SUITE = Suite("exam", DataSource("rows.jsonl", "0" * 64), "exact_match", max_new_tokens=4, stop=())
LOOPS = (
    "{% for m in messages %}{{ m.content }}{% if 'trigger' in m.content %}"
    "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}"
    "{% endfor %}{% endfor %}{% endfor %}{% endif %}{% endfor %}"
)


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    monkeypatch.setattr(encoding, "_LIMITS", CallLimits(cpu_s=1, memory_bytes=1 << 29))


def backtracking():
    tokenizer = tiny_tokenizer()
    slow = normalizers.Replace(Regex(r"(a|a|aa)+b$"), "x")
    tokenizer.backend_tokenizer.normalizer = slow
    return tokenizer


def growing():
    tokenizer = tiny_tokenizer()
    rule = normalizers.Replace("a", "a" * 1000)
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([rule, rule, rule])
    return tokenizer


def with_template(template):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize(
    ("tokenizer", "example"),
    [
        (backtracking, TEXT),
        (growing, TEXT),
        (lambda: with_template(LOOPS), CHAT),
        (lambda: with_template("{{ 'x' * 10 ** 10 }}"), CHAT),
        (lambda: with_template("{% set x = 10 ** (10 ** 10) %}"), CHAT),
    ],
)
@pytest.mark.parametrize(
    "run",
    [
        lambda tokenizer, example: prompt_ids([example], tokenizer),
        lambda tokenizer, example: prepare(tokenizer, SUITE, [example], context=None),
    ],
)
def test_encoding_that_exceeds_a_limit_is_refused(tokenizer, example, run):
    started = time.monotonic()
    with pytest.raises(ContentError, match="the tokenizer or the chat template of"):
        run(tokenizer(), example)
    assert time.monotonic() - started < 30


@pytest.mark.parametrize(
    "run",
    [
        lambda tokenizer: full_ids([TEXT], tokenizer),
        lambda tokenizer: token_counts([TEXT], tokenizer),
        lambda tokenizer: token_ids([TEXT.prompt], tokenizer),
        lambda tokenizer: with_answers(tokenizer, [(TEXT, [1], " b")]),
        lambda tokenizer: TEXT.prompt_ids(tokenizer),
        lambda tokenizer: TEXT.full_ids(tokenizer),
    ],
)
def test_every_way_to_encode_has_limits(run):
    with pytest.raises(LimitExceededError):
        run(growing())


def test_encoding_in_chunks_returns_the_ids_of_the_tokenizer(monkeypatch):
    monkeypatch.setattr(encoding, "_CHUNK_ITEMS", 3)
    monkeypatch.setattr(encoding, "_CHUNK_CHARACTERS", 30)
    tokenizer = tiny_tokenizer()
    examples = [replace(TEXT, id=str(n), prompt="x" * n) for n in range(1, 12)]
    assert prompt_ids(examples, tokenizer) == [
        list(tokenizer(text=e.prompt)["input_ids"]) for e in examples
    ]
    assert token_counts(examples, tokenizer) == [
        (len(e.prompt_ids(tokenizer)), len(e.full_ids(tokenizer)), True) for e in examples[:1]
    ] + token_counts(examples[1:], tokenizer)
    assert prompt_ids([], tokenizer) == []
