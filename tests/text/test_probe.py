"""Tokenizers and chat templates that ingestion accepts or refuses."""

import pytest
from tokenizers import AddedToken, Regex, decoders, normalizers

from tests.tiny import tiny_tokenizer
from trans_peft.domain.bounds import MAX_DECODER_GROWTH, MAX_TOKEN_CHARACTERS
from trans_peft.errors import LimitExceededError
from trans_peft.isolation import CallLimits, call_isolated
from trans_peft.text.chat import MAX_TEMPLATE_CHARACTERS
from trans_peft.text.probe import tokenizer_problems

GOOD = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
LOOPS = (
    "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}"
    "{% endfor %}{% endfor %}{% endfor %}"
)


def tokenizer(*, decoder=None, normalizer=None, template=None, token=None):
    changed = tiny_tokenizer()
    if decoder is not None:
        changed.backend_tokenizer.decoder = decoder
    if normalizer is not None:
        changed.backend_tokenizer.normalizer = normalizer
    if token is not None:
        changed.add_tokens([AddedToken(token)])
    changed.chat_template = template
    return changed


def probe(uploaded):
    return call_isolated(
        tokenizer_problems,
        uploaded,
        subject="the tokenizer of s3://bases/mine",
        limits=CallLimits(cpu_s=2, memory_bytes=1 << 29),
        imports=("trans_peft.text.probe", "transformers.utils.chat_template_utils"),
    )


def test_a_tokenizer_that_samples_is_refused():
    changed = tiny_tokenizer()
    for dropout, refused in ((None, False), (0.0, False), (0.1, True)):
        changed.backend_tokenizer.model.dropout = dropout
        assert bool(tokenizer_problems(changed)) is refused
    assert "model.dropout is 0.1" in tokenizer_problems(changed)[0]


def grow(times, rules=1):
    return [normalizers.Replace("a", "a" * times)] * rules


@pytest.mark.parametrize(
    "uploaded",
    [
        tokenizer(),
        tokenizer(template=GOOD),
        tokenizer(template={"default": GOOD, "tool_use": GOOD}),
        tokenizer(template="{{ raise_exception('no system role') }}"),
        tokenizer(template="{{ strftime_now('%Y') }}" + GOOD),
        tokenizer(decoder=decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])),
        tokenizer(decoder=decoders.Replace("a", "a" * MAX_DECODER_GROWTH)),
        tokenizer(normalizer=normalizers.Replace(Regex(" {2,}"), "▁")),
        tokenizer(token="x" * MAX_TOKEN_CHARACTERS),
    ],
)
def test_valid_tokenizers_pass(uploaded):
    assert probe(uploaded) == []


@pytest.mark.parametrize(
    ("uploaded", "message"),
    [
        (tokenizer(token="x" * (MAX_TOKEN_CHARACTERS + 1)), "tokens of more than 4096"),
        (tokenizer(decoder=decoders.Replace("a", "a" * 17)), "17 times longer"),
        (
            tokenizer(decoder=decoders.Sequence([decoders.Replace("a", "a" * 5)] * 2)),
            "25 times longer",
        ),
        (tokenizer(decoder=decoders.Replace(Regex("(a+)+b"), "x")), "regular expression"),
        (tokenizer(normalizer=normalizers.Replace(Regex("(a|a|aa)+$$b"), "x")), "fails on a probe"),
        (tokenizer(template="{% for m in messages %}"), "does not compile"),
        (tokenizer(template="{{ [1, 2] | random }}"), "`random` renders different text"),
        (tokenizer(template={"default": GOOD, "tool_use": "{% if"}), "the chat template tool_use"),
        (tokenizer(template=" " * (MAX_TEMPLATE_CHARACTERS + 1)), "at most 1048576"),
    ],
)
def test_invalid_tokenizers_are_refused_with_the_reason(uploaded, message):
    assert message in "; ".join(probe(uploaded))


@pytest.mark.parametrize(
    ("uploaded", "limit"),
    [
        # Which of the two limits comes first depends on the machine.
        (tokenizer(normalizer=normalizers.Sequence(grow(1500, 3))), "(memory|processor time)"),
        (tokenizer(template=LOOPS), "processor time"),
        (tokenizer(template={"default": GOOD, "tool_use": LOOPS}), "processor time"),
        (tokenizer(template="{{ 'x' * 10 ** 10 }}"), "memory"),
        (tokenizer(template="{% set x = 9 ** (9 ** 9) %}"), "processor time"),
    ],
)
def test_a_tokenizer_that_exceeds_a_limit_is_stopped(uploaded, limit):
    with pytest.raises(LimitExceededError, match=f"the tokenizer of s3://bases/mine .*{limit}"):
        probe(uploaded)
