import io
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from demo.picture import draw
from demo.results import Result, notes, table
from demo.settings import ARMS, FULL, POLICY, recipes
from trans_peft.domain.evaluation import Comparison, SuiteJudgment, Verdict
from trans_peft.domain.recovery import RecoveryStrategy, StrategyAttempt
from trans_peft.validation.scoring import make_scorer

CHANGE = Comparison(
    reference_score=61.5,
    items=512,
    discordant=131,
    difference=-9.25,
    lower=-12.1,
    upper=-6.4,
    inferiority_bound=-6.4,
    non_inferior=False,
    inferior=True,
    superior=False,
    reference_non_inferior=True,
)
FIGURES = SuiteJudgment(
    "exceptions",
    52.25,
    CHANGE,
    power=0.71,
    versus_bare_base=replace(CHANGE, reference_score=20.0),
)
PLAIN = Result(
    "exceptions-plain", "exceptions", "plain LoRA", 52.25, FIGURES, Verdict.NEEDS_RETUNING,
    "it lost 9.25 points", False,
)  # fmt: skip
OURS = replace(
    PLAIN,
    adapter="exceptions-trans-peft",
    method="Trans-PEFT (mask 0.1)",
    direct=48.5,
    figures=replace(
        FIGURES,
        score=59.0,
        versus_old_base=replace(
            CHANGE, reference_score=60.0, difference=-1.0, lower=-3.0, upper=1.0
        ),
    ),
    verdict=Verdict.PASSED,
    reason="it lost nothing that counts",
    strategy=RecoveryStrategy.DISTILLED,
    tried=(
        StrategyAttempt(RecoveryStrategy.DIRECT, "needs-retuning", "it lost 11.5 points", 40.0),
        StrategyAttempt(RecoveryStrategy.DISTILLED, "passed", "it lost 1 point", 90.0, "20 steps"),
    ),
)


def _printed(found: list[Result]) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(table(found))
    return console.export_text()


def test_the_table_shows_every_figure_of_a_verdict():
    text = _printed([PLAIN, OURS])
    for figure in ("61.5", "52.2", "20.0", "-9.2", "-12.1", "-6.4", "512", "131", "71 %"):
        assert figure in text
    assert "needs-retuning" in text and "passed" in text


@pytest.mark.parametrize(
    ("ours", "expected"),
    [
        (59.0, "6.8 points ahead on v2"),
        (50.0, "2.2 points behind on v2"),
        (52.25, "level on v2"),
    ],
)
def test_the_notes_compare_the_scores_on_v2(ours: float, expected: str):
    arms = [PLAIN, replace(OURS, direct=ours)]
    assert expected in notes(arms)[-1]
    lost = f"cost the plain adapter 9.2 points and the Trans-PEFT one {60 - ours:.1f}"
    assert lost in notes(arms)[-1]


def test_a_recovered_adapter_shows_all_three_scores_and_every_attempt():
    assert "60.0→48.5→59.0" in _printed([PLAIN, OURS])
    assert "61.5→52.2 " in _printed([PLAIN, OURS])
    text = "\n".join(notes([PLAIN, OURS]))
    assert "direct: needs-retuning, 40 s. it lost 11.5 points" in text
    assert "distilled (20 steps): passed, 90 s. it lost 1 point" in text


def test_the_notes_contain_the_reasons_and_the_margin():
    text = "\n".join(notes([PLAIN, OURS]))
    assert "it lost 9.25 points" in text
    assert f"margin of {POLICY.margin_points:g} points" in text


def test_the_picture_has_a_row_for_each_task(tmp_path: Path):
    other = [replace(arm, task="returns") for arm in (PLAIN, OURS)]
    with (
        Image.open(draw([PLAIN, OURS], tmp_path / "one.png")) as one,
        Image.open(draw([PLAIN, OURS, *other], tmp_path / "two.png")) as two,
    ):
        assert one.width == two.width
        assert two.height == 2 * one.height


@pytest.mark.parametrize("demo_task", FULL, ids=lambda demo_task: demo_task.task.name)
def test_the_arms_of_a_task_differ_only_in_their_perturbation(demo_task):
    arms = list(recipes(demo_task))
    assert len(arms) == len(ARMS) == 2
    assert arms[0].perturbation.is_off and not arms[1].perturbation.is_off
    same = [replace(arm, adapter="x", perturbation=arms[0].perturbation) for arm in arms]
    assert same[0] == same[1]
    make_scorer(demo_task.suite)  # its scoring and threshold can be used
