"""Suites that a judge model marks: the marks, their correction by labels, and the verdict."""

import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from pydantic import TypeAdapter
from scipy.stats import beta

from benchmarks.judge_model import JUDGES, simulate
from tests.tiny import tiny_model, tiny_tokenizer
from tests.validation.test_degrees import degrees, of
from tests.validation.test_gate import POLICY
from trans_peft.data import Example
from trans_peft.domain.data import DataSource
from trans_peft.domain.evaluation import BARE, Evaluation, ItemResult, Suite, Verdict
from trans_peft.domain.judge_model import JudgeModel
from trans_peft.edges.json_codec import from_json, to_json
from trans_peft.errors import EvaluationError, InvalidSpecError
from trans_peft.validation.engine import LoopEngine
from trans_peft.validation.evaluate import evaluate
from trans_peft.validation.gate import judge as verdict_of
from trans_peft.validation.judge_model import mark_answers
from trans_peft.validation.statistics.judged import (
    MARK_LEVEL,
    JudgedChanges,
    LabeledMarks,
    _lower_mean,
    _upper_mean,
)
from trans_peft.validation.statistics.order import SuiteClusters

PAGE = (Path(__file__).parents[2] / "docs" / "statistics.md").read_text()
JUDGE = JudgeModel(
    "judge",
    "Q: {prompt}\nA: {answer}\nRight: {reference}\nIs A right?",
    (" yes", " partly", " no"),
    (1, 0.5, 0),
    DataSource("labeled.jsonl", "ab" * 32),
    "cd" * 32,
)
SUITE = Suite("essays", DataSource("essays.jsonl", "ef" * 32), scoring="judge", judge=JUDGE)
ITEMS = [Example("1", "2+2=", "4", reference="four"), Example("2", "Say {x}.", "x")]
ANSWERED = [(ITEMS[0], "{5}"), (ITEMS[1], "y")]


# The judge model as data.

INVALID = {
    "uri must": {"uri": ""},
    "and {answer}, and may have {reference}, found 'prompt'": {"prompt": "{prompt}"},
    "found 'answer', 'gold', 'prompt'": {"prompt": "{prompt}{answer}{gold}"},
    "double braces": {"prompt": "{prompt}{answer}{"},
    "neither a format nor a conversion": {"prompt": "{prompt}{answer!r}"},
    "at least two different texts": {"choices": (" yes", "yes ", " no")},
    "one number for each choice": {"marks": (0, 1)},
    "with 0 and 1 among them": {"marks": (0.9, 0.5, 0)},
    "must lie in": {"marks": (1, math.nan, 0)},
    "neither cluster nor slice": {"labeled": DataSource("l.jsonl", cluster="author")},
}


@pytest.mark.parametrize("message", INVALID)
def test_an_invalid_judge_model_is_refused(message):
    with pytest.raises(InvalidSpecError, match=re.escape(message)):
        replace(JUDGE, **INVALID[message])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"judge": None}, "belong together"),
        ({"scoring": "chrf"}, "belong together"),
        ({"threshold": 50}, "no threshold"),
        ({"temperature": 1.0, "samples": 2}, "one answer to each item"),
    ],
)
def test_a_suite_that_a_judge_model_cannot_mark_is_refused(changes, message):
    with pytest.raises(InvalidSpecError, match=message):
        replace(SUITE, **changes)


CHANGES = [
    {"fingerprint_sha256": "00" * 32},
    {"prompt": "{prompt}{answer}"},
    {"choices": (" yes", " maybe", " no")},
    {"marks": (1, 0.4, 0)},
    {"dtype": "bfloat16"},
    {"labeled": DataSource("labeled.jsonl", "00" * 32)},
]


def test_everything_that_changes_a_mark_is_part_of_the_suites_hash():
    changed = [replace(SUITE, judge=replace(JUDGE, **change)) for change in CHANGES]
    assert len({suite.suite_sha256 for suite in [SUITE, *changed]}) == len(CHANGES) + 1
    moved = replace(JUDGE, uri="s3://x/judge", labeled=DataSource("s3://x/l.jsonl", "ab" * 32))
    assert replace(SUITE, judge=moved).suite_sha256 == SUITE.suite_sha256
    for unpinned in (
        replace(JUDGE, fingerprint_sha256=""),
        replace(JUDGE, labeled=DataSource("l")),
    ):
        with pytest.raises(InvalidSpecError, match="not pinned"):
            _ = replace(SUITE, judge=unpinned).suite_sha256


# Marks.


class FakeEngine:
    """Gives the choices these probabilities after every text."""

    name, dtype = "fake", "float32"

    def __init__(self, *probabilities):
        self.probabilities, self.asked = probabilities, []

    def likelihoods(self, questions, *, on_progress=None):
        self.asked += questions
        return [[math.log(p) for p in self.probabilities] for _ in questions]


def test_a_mark_is_the_mean_weighted_by_the_likelihoods_of_the_choices():
    engine, tokenizer = FakeEngine(0.2, 0.1, 0.1), tiny_tokenizer()
    marks = mark_answers(engine, tokenizer, JUDGE, ANSWERED, context=512)
    assert marks == pytest.approx([0.625, 0.625])
    text = "Q: 2+2=\nA: {5}\nRight: four\nIs A right?"
    assert tokenizer.decode(engine.asked[0][0]) == text
    assert [tokenizer.decode(ids) for ids in engine.asked[0][1]] == list(JUDGE.choices)
    assert "Q: Say {x}.\nA: y\nRight: x" in tokenizer.decode(engine.asked[1][0])


def test_marks_of_a_model_are_those_of_its_softmax(monkeypatch):
    monkeypatch.setattr("trans_peft.validation.judge_model._LEAST_PROBABILITY", 0)
    model, tokenizer = tiny_model().eval(), tiny_tokenizer()
    judge = replace(JUDGE, choices=("y", "n"), marks=(1, 0))
    found = mark_answers(LoopEngine(model, tokenizer), tokenizer, judge, ANSWERED, context=512)
    for mark, (item, answer) in zip(found, ANSWERED, strict=True):
        text = judge.text(item.prompt, answer, item.reference or item.completion)
        with torch.no_grad():
            logits = model(**tokenizer(text, return_tensors="pt")).logits[0, -1]
        both = logits[tokenizer("yn")["input_ids"]].softmax(0)
        assert mark == pytest.approx(float(both[0]), abs=1e-5)
    assert len(set(found)) == 2


def test_choices_with_hardly_any_probability_are_no_marks():
    with pytest.raises(InvalidSpecError, match=r"(?s)does not answer with.*' partly'.*found: +0.0"):
        mark_answers(FakeEngine(1e-3, 1e-4, 1e-3), tiny_tokenizer(), JUDGE, ANSWERED, context=512)


def test_logits_that_are_not_finite_are_an_error():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    with torch.no_grad():
        model.lm_head.weight.fill_(math.nan)
    with pytest.raises(EvaluationError, match="finite"):
        mark_answers(LoopEngine(model, tokenizer), tokenizer, JUDGE, ANSWERED, context=512)


def test_a_judge_model_is_not_loaded_beside_the_model_that_answers():
    with pytest.raises(InvalidSpecError, match="cannot share memory"):
        evaluate(
            tiny_model(), tiny_tokenizer(), SUITE, ITEMS,
            weights_sha256=BARE, base_fingerprint_sha256="x",
        )  # fmt: skip


# The correction.


@pytest.mark.parametrize("right", [0, 3, 50, 97, 100])
@pytest.mark.parametrize("alpha", [0.05, 0.002])
def test_the_bounds_of_a_mean_are_wider_than_the_exact_ones_and_close_to_them(right, alpha):
    values = [1.0] * right + [0.0] * (100 - right)
    exact = beta.ppf(alpha, right, 101 - right) if right else 0.0  # Clopper and Pearson
    lower = _lower_mean(values, alpha)
    assert exact - 0.04 <= lower <= exact + 1e-9
    if right:
        kl = sum(
            p * math.log(p / q)
            for p, q in ((right / 100, lower), (1 - right / 100, 1 - lower))
            if p
        )
        assert 100 * kl == pytest.approx(-math.log(alpha))
    assert _upper_mean([1 - v for v in values], alpha) == pytest.approx(1 - lower)


def judged(changes, right, wrong, effect=0.05):
    clusters = SuiteClusters(range(len(changes)))
    return JudgedChanges(list(changes), clusters, effect, LabeledMarks(right, wrong))


LABELS = 100_000
CHANGED = np.random.default_rng(3).choice([-1.0, 0.0, 1.0], 400, p=[0.1, 0.84, 0.06])


def test_with_many_labels_of_a_perfect_judge_the_bounds_are_those_of_degrees():
    found = judged(CHANGED, [1.0] * LABELS, [0.0] * LABELS)
    assert found.points == pytest.approx(of(CHANGED).points)
    level = MARK_LEVEL * 0.05
    for name in ("lower_bound", "upper_bound"):
        expected = getattr(of(CHANGED), name)(level)
        assert getattr(found, name)(0.05) == pytest.approx(expected, abs=1e-3)
    assert found.power_of_non_inferiority(0.05, 0.05) == pytest.approx(
        of(CHANGED).power_of_non_inferiority(0.05, level), abs=0.02
    )
    decided = of(CHANGED).items_to_decide(-0.05, level)
    assert found.items_to_decide(-0.05, 0.05) == pytest.approx(decided, rel=0.05)


def test_half_the_slope_doubles_the_change_and_its_bounds():
    """Right answers get 0.8 on average and wrong ones 0.3."""
    found = judged(CHANGED / 2, [0.8] * LABELS, [0.3] * LABELS)
    whole = judged(CHANGED, [1.0] * LABELS, [0.0] * LABELS)
    assert found.points == pytest.approx(whole.points)
    assert found.lower_bound(0.05) == pytest.approx(whole.lower_bound(0.05), abs=0.01)
    assert found.upper_bound(0.05) == pytest.approx(whole.upper_bound(0.05), abs=0.01)


def test_the_bounds_use_the_end_of_the_slope_that_is_farther_from_zero():
    right, wrong = [0.9] * 50, [0.2] * 50
    low, high = LabeledMarks(right, wrong).slope_bounds((1 - MARK_LEVEL) * 0.05)
    assert 0 < low < 0.7 < high < 1
    loss, gain = judged([-0.1] * 400, right, wrong), judged([0.1] * 400, right, wrong)
    level = MARK_LEVEL * 0.05
    assert loss.lower_bound(0.05) == pytest.approx(
        of([-0.1] * 400, 0.05 * low).lower_bound(level) / low
    )
    assert gain.lower_bound(0.05) == pytest.approx(
        of([0.1] * 400, 0.05 * low).lower_bound(level) / high
    )
    assert gain.upper_bound(0.05) == pytest.approx(-loss.lower_bound(0.05))


def test_too_few_labels_show_nothing():
    found = judged(CHANGED, [0.6] * 20, [0.4] * 20)
    assert (found.lower_bound(0.05), found.upper_bound(0.05)) == (-1, 1)
    assert found.power_of_non_inferiority(0.05, 0.05) == found.items_to_decide(-0.05, 0.05) == 0


# The gate.

RNG = np.random.default_rng(4)
OLD = (RNG.random(500) < 0.7).astype(float)
LABELED = tuple(
    (is_right, 0.9 if is_right else 0.5) for is_right in (True, False) for _ in range(2000)
)


def arms(new):
    """Marks of 0.9 for right answers and of 0.5 for wrong ones."""
    sides = degrees(0.5 + 0.4 * OLD, "old"), degrees(0.5 + 0.4 * new)
    bare = degrees(np.full(len(new), 0.5), weights=BARE)
    return [
        {name: replace(side, labeled=LABELED) for name, side in arm.items()}
        for arm in (*sides, bare)
    ]


def test_the_verdict_is_about_the_share_of_right_answers():
    """Of 500 answers, 45 right ones become wrong: the mean mark falls by 3.6 points only."""
    new = OLD.copy()
    new[np.flatnonzero(OLD)[:45]] = 0
    found = verdict_of(POLICY, *arms(new))
    versus_old = found.suites[0].versus_old_base
    assert versus_old.difference == pytest.approx(-9)
    assert versus_old.lower < -9 < versus_old.upper
    assert versus_old.reference_score == pytest.approx(100 * OLD.mean())
    assert found.suites[0].score == pytest.approx(100 * new.mean())
    assert found.verdict is Verdict.INCONCLUSIVE
    uncorrected = [
        {name: replace(side, labeled=()) for name, side in arm.items()} for arm in arms(new)
    ]
    assert verdict_of(POLICY, *uncorrected).verdict is Verdict.PASSED


def test_an_adapter_that_lost_nothing_passes():
    assert verdict_of(POLICY, *arms(OLD)).verdict is Verdict.PASSED


def test_a_judge_model_counts_no_negative_flips():
    with pytest.raises(InvalidSpecError, match=r"cannot count: \['summaries'\]"):
        verdict_of(replace(POLICY, max_negative_flip_points=4.0), *arms(OLD))


def test_labels_are_stored_and_read():
    evaluation = Evaluation(
        "essays", "w", "b", "s", "d", (ItemResult("1", 0.5),), labeled=((True, 0.9), (False, 0.1))
    )
    assert from_json(Evaluation, to_json(evaluation), where="a test") == evaluation
    assert evaluation.score == pytest.approx(50)


# The simulation of docs/statistics.md.

TABLE = [
    [line.split("|")[1].strip(), *map(float, re.findall(r"[\d.]+", line))]
    for line in PAGE.split("<!-- judge:")[1].split("\n\n")[1].splitlines()[2:]
]


@pytest.mark.parametrize("row", [row for row in TABLE if row[1] == 100], ids=lambda row: row[0])
def test_the_table_in_the_docs_matches_the_simulation(row):
    name, labels, _, *percents = row
    lost, kept = (
        simulate(JUDGES[name], int(labels), loss, adapters=200, seed=9) for loss in (0.05, 0.0)
    )
    found = [lost.uncorrected, kept.uncorrected, lost.corrected, kept.corrected]
    assert [100 * rate for rate in found] == pytest.approx(percents, abs=11)


def test_the_table_in_the_docs_shows_the_level_and_what_breaks_it():
    kept = [row for row in TABLE if row[0] != "lenient on the new base"]
    assert max(row[5] for row in kept) <= 5
    assert max(row[3] for row in kept) > 20, "a biased judge passes too many without correction"
    assert min(row[5] for row in TABLE if row not in kept) > 5, "the assumption does not hold"


def test_the_simulation_decides_as_the_gate_does(monkeypatch):
    """The simulation tests one threshold for many adapters; the gate computes a bound."""
    from benchmarks import judge_model

    seen = []
    tested = judge_model._passed

    def passed(changes, margins, alpha):
        seen.append((changes, margins, tested(changes, margins, alpha)))
        return seen[-1][2]

    monkeypatch.setattr(judge_model, "_passed", passed)
    monkeypatch.setattr(judge_model, "ITEMS", 400)
    simulate(JUDGES["no errors"], 100, 0.0, adapters=8, seed=1)
    changes, margins, decisions = seen[0]
    assert 0 < sum(decisions) < 8
    for number, decided in enumerate(decisions):
        low = margins[number] / judge_model.MARGIN
        bound = of(changes[:, number], margins[number]).lower_bound(MARK_LEVEL * 0.05)
        assert (bound / low >= -judge_model.MARGIN) == decided


def test_the_example_on_the_page_is_valid():
    (text,) = [t for t in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL) if "judge:" in t]
    (suite,) = TypeAdapter(tuple[Suite, ...]).validate_python(yaml.safe_load(text)["suites"])
    assert suite.judge is not None
    assert suite.judge.is_right(suite.judge.choices[0].strip()) is True
