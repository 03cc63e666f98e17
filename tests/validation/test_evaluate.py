from contextlib import contextmanager
from dataclasses import replace
from hashlib import sha256

import pytest
import torch

from tests.tiny import tiny_model, tiny_tokenizer
from tests.validation.fake_tokenizers import Merging
from trans_peft.data import ChatMessage, Example
from trans_peft.domain.data import DataSource
from trans_peft.domain.evaluation import BARE, Suite
from trans_peft.errors import DataError, EvaluationError, InvalidSpecError
from trans_peft.validation.decoding.generation import generate
from trans_peft.validation.evaluate import evaluate

pytestmark = pytest.mark.usefixtures("one_thread")

SUITE = Suite("bytes", DataSource("bytes.jsonl", "0" * 64), max_new_tokens=3, stop=())
QUESTIONS = ("a b c", "What is it?", "x", "a rather longer question than the others")


@pytest.fixture(scope="module")
def model():
    return tiny_model(seed=4).eval()


@pytest.fixture(scope="module")
def answers(model, tokenizer):
    """The model's answers, one question at a time."""
    return [
        generate(model, tokenizer, [tokenizer(q)["input_ids"]], max_new_tokens=3).texts[0]
        for q in QUESTIONS
    ]


def examples_of(answers):
    return [
        Example(f"q{i}", question, answer)
        for i, (question, answer) in enumerate(zip(QUESTIONS, answers, strict=True))
    ]


def run(model, tokenizer, examples, suite=SUITE, **options):
    return evaluate(
        model,
        tokenizer,
        suite,
        examples,
        weights_sha256=BARE,
        base_fingerprint_sha256="base",
        **options,
    )


def test_an_answer_equal_to_the_reference_is_right(model, tokenizer, answers):
    examples = examples_of(answers)
    examples[2] = replace(examples[2], completion="no")
    result = run(model, tokenizer, examples)
    assert [(item.id, item.correct) for item in result.items] == [
        ("q0", True), ("q1", True), ("q2", False), ("q3", True),
    ]  # fmt: skip
    assert result.score == 75
    assert (result.suite, result.weights_sha256) == ("bytes", BARE)
    assert result.suite_sha256 == SUITE.suite_sha256
    assert result.decoding_sha256 == SUITE.decoding_sha256
    assert result.seconds > 0


@pytest.mark.parametrize("keep", [False, True])
def test_answers_are_kept_only_with_keep_answers(keep, model, tokenizer, answers):
    result = run(model, tokenizer, examples_of(answers), replace(SUITE, keep_answers=keep))
    assert [item.answer for item in result.items] == (answers if keep else [None] * 4)
    hashes = [sha256(answer.encode()).hexdigest() for answer in answers]
    assert [item.answer_sha256 for item in result.items] == hashes


def test_the_order_of_examples_and_the_batch_change_no_item(model, tokenizer, answers):
    examples = examples_of(answers)
    whole = run(model, tokenizer, examples)
    turned = run(model, tokenizer, examples[::-1], batch_size=2)
    assert set(whole.items) == set(turned.items)


def test_a_limit_keeps_the_first_rows(model, tokenizer, answers):
    result = run(model, tokenizer, examples_of(answers), replace(SUITE, limit=2))
    assert [item.id for item in result.items] == ["q0", "q1"]


def test_a_chat_is_rendered_with_the_tokenizers_template(model, tokenizer):
    prompt = tokenizer("<|user|>hi<eos><|assistant|>")["input_ids"]
    (answer,) = generate(model, tokenizer, [prompt], max_new_tokens=3).texts
    chat = Example("c", "", answer, (ChatMessage("user", "hi"), ChatMessage("assistant", answer)))
    assert run(model, tokenizer, [chat]).score == 100


def test_the_models_modes_are_restored(tokenizer, answers):
    model = tiny_model(seed=4)
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = run(model, tokenizer, examples_of(answers))
    assert result.score == 100
    assert all(module.training for module in model.modules())
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_progress_counts_items(model, tokenizer, answers):
    progress = []
    run(
        model,
        tokenizer,
        examples_of(answers),
        on_progress=lambda *p: progress.append(p),
        batch_size=3,
    )
    assert progress == [(3, 4), (4, 4)]


def test_all_invalid_items_are_listed_before_the_model_runs(tokenizer):
    examples = [
        Example("twice", "a", "b"),
        Example("twice", "c", "d"),
        Example("long", "x" * 510, "y"),
        Example("empty", "", "y"),
    ]
    with pytest.raises(DataError) as error:
        run(tiny_model(), tokenizer, examples)
    for part in (
        "id 'twice': 2 items have this id",
        "long: its prompt of 510 tokens and max_new_tokens=3 are 513 tokens, but",
        "empty: its prompt has no tokens",
    ):
        assert part in str(error.value)


def test_the_longest_prompt_that_fits_is_answered(model, tokenizer):
    assert len(run(model, tokenizer, [Example("fits", "x" * 509, "y")]).items) == 1


def test_a_prompt_that_is_tokenized_differently_before_its_answer_is_refused(model, tokenizer):
    with pytest.raises(DataError, match=r"id cut: .*move the white space"):
        run(model, Merging(tokenizer), [Example("cut", "answer: ", "yes")])
    assert run(model, Merging(tokenizer), [Example("uncut", "answer:", " yes")]).items


def test_a_tokenizer_needs_no_padding_token(model, tokenizer, answers):
    bare = tiny_tokenizer()
    bare.pad_token = None
    expected = run(model, tokenizer, examples_of(answers))
    assert run(model, bare, examples_of(answers)).items == expected.items
    assert bare.pad_token is None


def test_a_suite_without_items_is_refused(model, tokenizer):
    with pytest.raises(DataError, match="no items"):
        run(model, tokenizer, [])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scoring": "guess"}, "exact_match"),
        ({"data": DataSource("bytes.jsonl")}, "not pinned"),
        ({"dtype": "bfloat16"}, "expected: bfloat16"),
    ],
)
def test_a_suite_that_cannot_be_run_is_refused(changes, message, model, tokenizer, answers):
    with pytest.raises(InvalidSpecError, match=message):
        run(model, tokenizer, examples_of(answers), replace(SUITE, **changes))


def test_logits_that_are_not_finite_are_an_evaluation_error(tokenizer, answers):
    model = tiny_model()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(EvaluationError, match="not finite"):
        run(model, tokenizer, examples_of(answers))


@contextmanager
def passes(model):
    """Record the number of rows of each forward pass in the block."""
    seen = []
    hook = model.register_forward_pre_hook(
        lambda _, __, given: seen.append(len(given["input_ids"])), with_kwargs=True
    )
    yield seen
    hook.remove()


def test_right_answers_take_one_forward_pass_a_batch(model, tokenizer, answers):
    with passes(model) as seen:
        assert run(model, tokenizer, examples_of(answers), batch_size=2).score == 100
    assert len(seen) == 2


def test_a_given_draft_replaces_the_right_answer(model, tokenizer, answers):
    examples = [replace(example, completion="~~~") for example in examples_of(answers)]
    plain = run(model, tokenizer, examples)
    with passes(model) as seen:
        drafts = {example.id: answer for example, answer in zip(examples, answers, strict=True)}
        found = run(model, tokenizer, examples, drafts=drafts)
    assert seen == [1, 3]  # each read once; the longest is not worth padding for
    assert (found.items, found.key) == (plain.items, plain.key)
    assert {item.correct for item in found.items} == {False}


def test_wrong_drafts_change_no_item(model, tokenizer, answers):
    examples = examples_of(answers)
    wrong = {"q0": "", "q1": answers[2] + answers[3], "q3": "~", "q9": "no such item"}
    assert (
        run(model, tokenizer, examples, drafts=wrong).items == run(model, tokenizer, examples).items
    )


def test_a_chats_draft_is_its_last_turn(model, tokenizer):
    prompt = tokenizer("<|user|>hi<eos><|assistant|>")["input_ids"]
    (answer,) = generate(model, tokenizer, [prompt], max_new_tokens=3).texts
    chat = Example("c", "", "~", (ChatMessage("user", "hi"), ChatMessage("assistant", "~")))
    with passes(model) as seen:
        run(model, tokenizer, [chat], drafts={"c": answer})
    assert len(seen) == 1


def test_near_ties_are_counted(tokenizer, answers):
    undecided = tiny_model(seed=4).eval()
    with torch.no_grad():
        undecided.lm_head.weight[:256] = 0  # and with it every logit but those of special tokens
        undecided.lm_head.weight[256:] = -1
    result = run(undecided, tokenizer, examples_of(answers))
    assert result.near_ties > 0
    assert run(tiny_model(seed=4), tokenizer, examples_of(answers)).near_ties == 0
