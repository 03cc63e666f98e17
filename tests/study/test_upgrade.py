"""The table of docs/fleet.md, for a constructed fleet."""

from dataclasses import replace

import pytest

from study.upgrade import OLD, UPDATES, counted, serving_share, table
from trans_peft.domain.evaluation import Comparison, SuiteJudgment, Verdict
from trans_peft.domain.recovery import RecoveryStrategy
from trans_peft.errors import NotFoundError
from trans_peft.lifecycle.report import FleetReport, FleetRow


def comparison(reference, score):
    difference = score - reference
    return Comparison(
        reference_score=reference,
        items=100,
        discordant=10,
        difference=difference,
        lower=difference - 4.25,
        upper=difference + 5,
        inferiority_bound=difference + 5,
        non_inferior=False,
        inferior=False,
        superior=False,
        reference_non_inferior=False,
    )


def row(adapter, base, verdict=None, score=40.0):
    known = {"scores": (("raise", 50.0),)}
    if verdict is not None:
        figures = SuiteJudgment(
            "raise",
            score,
            versus_old_base=comparison(50.0, score),
            power=0.8,
            versus_bare_base=comparison(1.5, score),
        )
        known = {"suites": (figures,)}
    return FleetRow(adapter, "lora", OLD, base, verdict, "because", serves=False, **known)


def fleet(*verdicts):
    rows = [
        row(f"a{n}", base, given)
        for n, judged in enumerate(verdicts)
        for base, given in zip((OLD, *UPDATES), (None, *judged), strict=True)
    ]
    return FleetReport("fleet", OLD, OLD, (OLD, *UPDATES), tuple(rows))


PASSED, RETUNE = Verdict.PASSED, Verdict.NEEDS_RETUNING


def test_a_row_has_the_old_score_and_figures_and_verdict_on_each_update():
    first, *_ = table(fleet((PASSED, RETUNE)), 4.0).splitlines()[2:]
    passed, retune = ("40.0, -10.0 (-14.2, -5.0), " + str(v) for v in (PASSED, RETUNE))
    assert first == f"| a0 | 50.0 | {passed} | {retune} |"


def test_a_cell_names_the_strategy_that_made_the_version():
    seen = fleet((PASSED, PASSED))
    last = replace(seen.rows[-1], strategy=RecoveryStrategy.COMPENSATED)
    first, *_ = table(replace(seen, rows=(*seen.rows[:-1], last)), 4.0).splitlines()[2:]
    assert first.endswith("-5.0), passed | 40.0, -10.0 (-14.2, -5.0), passed (compensated) |")


def test_the_share_that_serves_on_the_first_update_has_an_exact_interval():
    found = serving_share(fleet((PASSED, RETUNE), (PASSED, PASSED), (RETUNE, PASSED)))
    assert (found["value"], found["low"], found["high"]) == (0.6667, 0.0943, 0.9916)


def test_the_table_ends_with_the_bare_base_and_the_counts():
    text = table(fleet((PASSED, RETUNE), (RETUNE, RETUNE)), 4.0)
    assert "| no adapter | 4.0 | 1.5 | 1.5 |" in text
    first, second = UPDATES
    assert text.endswith(f"on {first}: 1 needs-retuning, 1 passed; on {second}: 2 needs-retuning.")


def test_an_update_that_was_not_uploaded_has_no_column():
    seen = fleet((PASSED, RETUNE))
    seen = replace(seen, bases=(OLD, UPDATES[0]), rows=seen.rows[:-1])
    first, *_ = table(seen, 4.0).splitlines()[2:]
    assert first == "| a0 | 50.0 | 40.0, -10.0 (-14.2, -5.0), passed |"
    assert counted(seen) == f"on {UPDATES[0]}: 1 passed"


def test_an_adapter_without_a_verdict_is_an_error():
    with pytest.raises(NotFoundError, match=f"a0 has no figures on {UPDATES[1]}"):
        table(fleet((PASSED, None)), 4.0)


def test_verdicts_are_counted_by_base():
    first, second = UPDATES
    assert (
        counted(fleet((PASSED, RETUNE))) == f"on {first}: 1 passed; on {second}: 1 needs-retuning"
    )
