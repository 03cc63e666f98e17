"""Special tokens inside answers and references count alike, in every way of answering."""

import json
from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.tiny import CHAT_TEMPLATE, tiny_model, tiny_tokenizer
from trans_peft.data import ChatMessage, Example
from trans_peft.domain.data import DataSource
from trans_peft.domain.evaluation import BARE, Suite
from trans_peft.text.answers import answer_text
from trans_peft.text.chat import turn_end
from trans_peft.validation.decoding.generation import generate
from trans_peft.validation.evaluate import evaluate
from trans_peft.validation.tokenized_suite import prepare

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = ("a b c", "What is", "x")
SUITE = Suite("s", DataSource("s", "0" * 64), max_new_tokens=5, stop=(), keep_answers=True)


def naming(special: dict[int, str], **options) -> PreTrainedTokenizerFast:
    """The tiny tokenizer, in which these ids are special tokens instead of bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = dict(enumerate([*alphabet, "<pad>", "<eos>"])) | special
    moved = [alphabet[i] for i in special if i < len(alphabet)]
    vocabulary = {name: i for i, name in names.items()}
    vocabulary |= {byte: 258 + i for i, byte in enumerate(moved)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        additional_special_tokens=list(special.values()),
        chat_template=CHAT_TEMPLATE,
        **options,
    )


def run(tokenizer, examples, suite=SUITE, **options):
    return evaluate(
        model(), tokenizer, suite, examples, weights_sha256=BARE, base_fingerprint_sha256="b",
        **options,
    )  # fmt: skip


@cache
def model():
    """A model that generates printable ASCII (ids 0 to 93) and does not repeat its prompt."""
    found = tiny_model(seed=5, vocabulary=300)
    head = torch.randn(300, 32)
    head[94:] = 0
    found.config.tie_word_embeddings = False
    found.lm_head.weight = torch.nn.Parameter(head)
    return found.eval()


@cache
def said(prompt: str) -> tuple[int, ...]:
    """The model's answer, five tokens; none of them is renamed in the prompts."""
    ids = tiny_tokenizer()(prompt)["input_ids"]
    (answer,) = generate(model(), tiny_tokenizer(), [ids], max_new_tokens=5).ids
    assert 257 not in answer
    return tuple(answer)


def speaker(prompt: str, at: int, name: str = "<|tool|>"):
    """A tokenizer with a special token in the answer, and the answer's text."""
    token = said(prompt)[at]
    assert token not in tiny_tokenizer()(prompt)["input_ids"]
    tokenizer = naming({token: name})
    return tokenizer, tokenizer.decode(said(prompt))


@pytest.mark.parametrize("at", [0, 2, 4])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_an_answer_with_the_text_of_the_reference_is_right(prompt, at):
    tokenizer, text = speaker(prompt, at)
    assert "<|tool|>" in text
    (item,) = run(tokenizer, [Example("1", prompt, text)]).items
    assert item.correct
    assert item.answer == text
    without = text.replace("<|tool|>", "")
    (item,) = run(tokenizer, [Example("1", prompt, without)]).items
    assert not item.correct


@pytest.mark.parametrize(
    ("scoring", "threshold"),
    [("exact_match", None), ("regex:(?s).*", None), ("regex:<.tool.>", None), ("chrf", 100.0)],
)
def test_special_tokens_are_kept_under_every_rule(scoring, threshold):
    tokenizer, text = speaker(PROMPTS[0], 2)
    suite = replace(SUITE, scoring=scoring, threshold=threshold)
    assert run(tokenizer, [Example("1", PROMPTS[0], text)], suite).score == 100


def test_a_kept_answer_is_a_correct_draft():
    tokenizer, _ = speaker(PROMPTS[0], 2)
    examples = [Example("1", PROMPTS[0], "other")]
    first = run(tokenizer, examples)
    asked = prepare(tokenizer, SUITE, examples, context=None)
    assert asked.drafts(first.kept_answers) == [list(said(PROMPTS[0]))]
    again = run(tokenizer, examples, drafts=first.kept_answers)
    assert again.items == first.items


@pytest.mark.parametrize("stop", ["<|tool|>", "tool", "|>"])
def test_a_stop_string_may_be_part_of_a_special_token(stop):
    tokenizer, text = speaker(PROMPTS[0], 2)
    suite = replace(SUITE, stop=(stop,))
    (item,) = run(tokenizer, [Example("1", PROMPTS[0], "x")], suite).items
    assert item.answer == text.split(stop)[0]


def test_a_choice_may_have_special_tokens():
    tokenizer = naming({200: "<|tool|>"})
    choices = (" <|tool|>x", " x")
    suite = replace(SUITE, scoring="choice")
    asked = prepare(tokenizer, suite, [Example("1", "a", " x", choices=choices)], context=None)
    assert [200 in ids for ids in asked.choices[0]] == [True, False]
    answers = [
        run(tokenizer, [Example("1", "a", right, choices=choices)], suite).items[0]
        for right in choices
    ]
    assert answers[0].answer == answers[1].answer
    assert [item.correct for item in answers] == [item.answer == c for item, c in zip(
        answers, choices, strict=True
    )]  # fmt: skip


CHATML = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def test_the_token_that_ends_a_turn_ends_an_answer():
    """The tokenizer's end-of-text token is another one, as in many bases that were tuned."""
    template = (
        "{% for m in messages %}{{ m.content }}"
        "{% if m.role == 'assistant' %}<|end|>{% endif %}{{ '\n' }}{% endfor %}"
    )
    prompt = tiny_tokenizer()("a b c\n")["input_ids"]
    (ids,) = generate(model(), tiny_tokenizer(), [prompt], max_new_tokens=5).ids
    at = next(i for i in range(1, 5) if ids[i] not in [*prompt, *ids[:i]])
    tokenizer = naming({ids[at]: "<|end|>"})
    tokenizer.chat_template = template
    text = tokenizer.decode(ids[:at])
    chat = Example("1", "", text, (ChatMessage("user", "a b c"), ChatMessage("assistant", text)))
    assert chat.prompt_ids(tokenizer) == prompt
    (item,) = run(tokenizer, [chat]).items
    assert item.answer == text
    assert item.correct


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (CHATML, "<|end|>"),
        (CHAT_TEMPLATE, "<eos>"),
        ("{% for m in messages %}{{ m.content }}\n<|end|>{% endfor %}", "<|end|>"),
        ("{% for m in messages %}{{ m.content }}\n{% endfor %}", None),
        ("{% for m in messages %}{{ m.content }} END{% endfor %}", None),
        ("{% for m in messages %}<|end|>{{ m.content | upper }}{% endfor %}", None),
        ("{{ raise_exception('no') }}", None),
    ],
)
def test_the_token_by_which_a_template_ends_a_turn(template, end):
    tokenizer = naming({250: "<|start|>", 251: "<|end|>"})
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "x"}]
    found = turn_end(tokenizer, turns, template)
    assert found == (None if end is None else tokenizer.convert_tokens_to_ids(end))


@settings(deadline=None, max_examples=50)
@given(answer=st.lists(st.integers(0, 257), max_size=6), ended=st.booleans())
def test_the_text_of_an_answer_ends_before_its_end_token(answer, ended):
    tokenizer = naming({10: "<|tool|>", 11: "<|end|>"})
    ends = {257, 11}
    before = answer
    for i, token in enumerate(answer):
        if token in ends:
            before = answer[:i]
            break
    ids = [*answer, *([257] if ended else [])]
    assert answer_text(tokenizer, ids, ends) == tokenizer.decode(before)


def test_the_padding_token_is_part_of_an_answer():
    tokenizer = naming({})
    tokenizer.pad_token = "!"
    ids = tokenizer("Hello!")["input_ids"]
    assert answer_text(tokenizer, [*ids, 257], {257}) == "Hello!"


def metaspace(*special: str) -> PreTrainedTokenizerFast:
    """A tokenizer in SentencePiece's manner, which writes a space after a special token."""
    pieces = ["<unk>", "<pad>", "<eos>", *special, "\u2581", *"abcxyz <>|"]
    tokenizer = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always", split=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", eos_token="<eos>",
        additional_special_tokens=list(special),
    )  # fmt: skip


def test_the_tokens_of_a_reference_are_right_whatever_text_they_decode_to():
    tokenizer = metaspace("<|tool|>")
    asked = prepare(
        tokenizer,
        SUITE,
        [Example("1", "a", " <|tool|>x"), Example("2", "a", " x"), Example("3", "a", " 8")],
        context=None,
    )
    exact = tokenizer.decode(asked.expected[0])
    assert exact.strip() != "<|tool|>x"  # else this test shows nothing
    assert asked.is_correct(0, exact)
    assert asked.is_correct(0, "<|tool|>x")
    assert not asked.is_correct(0, "x")
    assert asked.is_correct(1, "x")
    assert not asked.is_correct(1, exact)
    assert not asked.is_correct(
        2, tokenizer.decode(asked.expected[2])
    )  # an unknown token is no answer


def test_the_harness_keeps_special_tokens_too(tmp_path):
    pytest.importorskip("lm_eval", reason="needs the extra `harness`")
    from trans_peft.validation.harness import evaluate_harness, harness_suite

    tokenizer, text = speaker(PROMPTS[0], 2)
    rows = [
        {"q": PROMPTS[0], "a": text},
        {"q": PROMPTS[0], "a": text.replace("<|tool|>", "")},
        {"q": PROMPTS[1], "a": "no"},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "special.yaml").write_text(
        f"task: special\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path / 'rows.jsonl'}}}}}\n"
        "test_split: test\noutput_type: generate_until\n"
        'doc_to_text: "{{q}}"\ndoc_to_target: "{{a}}"\n'
        'generation_kwargs: {until: ["never there"], max_gen_toks: 5, do_sample: false}\n'
        "metric_list: [{metric: exact_match}]\nmetadata: {version: 1.0}\n"
    )
    suite = replace(
        harness_suite("special", "exact_match", folder=str(tmp_path)), keep_answers=True
    )
    found = evaluate_harness(
        model(), tokenizer, suite, folder=str(tmp_path), batch_size=2,
        weights_sha256=BARE, base_fingerprint_sha256="b",
    )  # fmt: skip
    assert [item.correct for item in found.items] == [True, False, False]
    assert json.loads(found.items[0].answer) == [text]
