"""Suites with several sampled answers to an item."""

import json
from dataclasses import replace
from hashlib import sha256

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tests.tiny import tiny_model
from trans_peft.data import Example
from trans_peft.domain.data import DataSource
from trans_peft.domain.evaluation import BARE, Suite, Verdict
from trans_peft.domain.evaluation import GatePolicy as Policy
from trans_peft.domain.identity import content_sha256
from trans_peft.errors import InvalidSpecError
from trans_peft.lifecycle.label_free import compare_label_free
from trans_peft.ports import Sampling
from trans_peft.transfer.mixed_adapters import attached_together
from trans_peft.validation.decoding.generation import generate
from trans_peft.validation.evaluate import AskedAdapter, answer, answer_together
from trans_peft.validation.gate import judge
from trans_peft.validation.statistics.sequential import SequentialSuiteTest
from trans_peft.validation.tokenized_suite import prepare

pytestmark = pytest.mark.usefixtures("one_thread")

GREEDY = Suite("bytes", DataSource("bytes.jsonl", "0" * 64), max_new_tokens=3, stop=())
SUITE = replace(
    GREEDY, scoring="regex:(?s)(?=.*[a-z])", temperature=1.0, samples=4, keep_answers=True
)
EXAMPLES = tuple(Example(f"q{i}", f"{i} is {'x' * (i % 7)}", "a") for i in range(12))
KEYS = {"weights_sha256": BARE, "base_fingerprint_sha256": "base"}


@pytest.fixture(scope="module")
def model():
    return tiny_model(seed=4).eval()


@pytest.fixture(scope="module")
def questions(tokenizer):
    return prepare(tokenizer, SUITE, EXAMPLES, context=512)


@pytest.fixture(scope="module")
def evaluation(model, questions):
    return answer(model, questions, **KEYS)


def test_the_hashes_of_suites_without_sampling_are_those_of_stored_suites():
    hashes = content_sha256(GREEDY), GREEDY.suite_sha256, GREEDY.decoding_sha256
    assert [found[:12] for found in hashes] == ["f4da1eb9e0f9", "396a1de18bb4", "ca55f932f84a"]


def test_the_result_of_an_item_is_the_mean_of_its_answers(model, tokenizer, questions, evaluation):
    """Each answer alone, with the key of its item and number."""
    for item, prompt in zip(evaluation.items, questions.prompts, strict=True):
        texts = [
            generate(
                model, tokenizer, [prompt], max_new_tokens=3,
                sampling=Sampling(1.0, 1.0, [SUITE.answer_key(item.id, number)]),
            ).texts[0]
            for number in range(4)
        ]  # fmt: skip
        assert json.loads(item.answer) == texts
        assert item.answer_sha256 == sha256(item.answer.encode()).hexdigest()
        assert item.correct == sum(any("a" <= one <= "z" for one in text) for text in texts) / 4
    assert len({item.answer for item in evaluation.items}) > 6
    assert {0.25, 0.5} <= {item.correct for item in evaluation.items}
    assert evaluation.has_degrees


def test_neither_batches_nor_other_items_nor_drafts_change_a_result(model, questions, evaluation):
    one = answer(model, questions, batch_size=1, **KEYS)
    drafted = answer(model, questions, drafts=evaluation.kept_answers, batch_size=5, **KEYS)
    assert one.items == drafted.items == evaluation.items
    ids = [example.id for example in EXAMPLES[::-3]]
    assert set(answer(model, questions.only(ids), **KEYS).items) <= set(evaluation.items)


def test_progress_counts_items(model, questions):
    seen = []
    answer(model, questions, batch_size=6, on_progress=lambda *now: seen.append(now), **KEYS)
    assert seen[-1] == (12, 12)
    assert all(done <= total == 12 for done, total in seen)


def test_another_seed_gives_other_answers_and_another_key(model, tokenizer, evaluation):
    other = replace(SUITE, sampling_seed=1)
    found = answer(model, prepare(tokenizer, other, EXAMPLES, context=512), **KEYS)
    assert [item.answer for item in found.items] != [item.answer for item in evaluation.items]
    variants = [
        GREEDY, SUITE, other, replace(SUITE, samples=5), replace(SUITE, temperature=0.5),
        replace(SUITE, top_p=0.9),
    ]  # fmt: skip
    assert len({suite.decoding_sha256 for suite in variants}) == len(variants)


def test_a_single_sampled_answer_is_right_or_wrong(model, tokenizer):
    suite = replace(SUITE, samples=1)
    found = answer(model, prepare(tokenizer, suite, EXAMPLES, context=512), **KEYS)
    assert not found.has_degrees
    assert json.dumps(found.items[0].answer)[1] != "["


def test_adapters_in_mixed_batches_answer_as_alone(questions, tmp_path):
    torch.manual_seed(1)
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(tiny_model(seed=4), config).save_pretrained(tmp_path)
    with attached_together(tiny_model(seed=4).eval(), {"a": tmp_path}) as mixed:
        asked = [AskedAdapter("a", questions, "a"), AskedAdapter(None, questions, BARE)]
        together = answer_together(mixed, asked, base_fingerprint_sha256="base")
        for one, (found, _) in zip(asked, together, strict=True):
            (alone,) = answer_together(mixed, [one], base_fingerprint_sha256="base")
            assert found.items == alone.evaluation.items
    first, second = (found.evaluation.items for found in together)
    assert first != second


def test_the_gate_bets_on_the_means_of_paired_items(evaluation):
    items = [
        replace(item, id=f"{item.id}-{copy}") for copy in range(20) for item in evaluation.items
    ]
    old = replace(evaluation, items=tuple(items), weights_sha256="a")
    worse = [replace(item, correct=max(item.correct - 0.25, 0.0)) for item in items]
    policy = Policy(must_beat_bare=False)
    for changed, verdict in ((items, Verdict.PASSED), (worse, Verdict.NEEDS_RETUNING)):
        new = replace(old, items=tuple(changed), base_fingerprint_sha256="new")
        judged = judge(policy, {"bytes": old}, {"bytes": new}, {})
        assert judged.verdict == verdict
        difference = (
            100
            * sum(
                after.correct - before.correct for before, after in zip(items, changed, strict=True)
            )
            / len(items)
        )
        assert judged.suites[0].versus_old_base.difference == pytest.approx(difference)


def test_a_sequential_policy_refuses_means(evaluation):
    with pytest.raises(InvalidSpecError, match="degrees"):
        SequentialSuiteTest(Policy(sequential=True), evaluation, "seed", suites=1)


def test_a_comparison_without_labels_refuses_sampled_answers(tmp_path):
    with pytest.raises(InvalidSpecError, match="cannot be compared without labels"):
        compare_label_free(tmp_path, None, None, SUITE, None)


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"samples": 4}, "samples=4 needs a temperature"),
        ({"top_p": 0.9, "sampling_seed": 3}, "sampling_seed=3 needs a temperature"),
        ({"temperature": 1.0, "samples": 65}, r"samples must lie in \[1, 64\], not 65"),
        ({"temperature": 1.0, "samples": 0}, r"samples must lie in \[1, 64\], not 0"),
        ({"temperature": 0.0}, r"temperature must lie in \[0.05, 10\], not '0.0'"),
        ({"temperature": float("nan")}, "temperature must lie"),
        ({"temperature": 1.0, "top_p": 0.0}, r"top_p must lie in \[0.01, 1\], not '0.0'"),
        ({"temperature": 1.0, "sampling_seed": -1}, "sampling_seed must lie"),
        ({"temperature": 1.0, "scoring": "choice"}, "choice compares likelihoods"),
    ],
)
def test_invalid_settings_are_refused(fields, problem):
    with pytest.raises(InvalidSpecError, match=problem):
        replace(GREEDY, **fields)
