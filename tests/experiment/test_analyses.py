"""Which analyses of an experiment are missing, with a constructed analysis in place of bases."""

from dataclasses import replace
from math import nan
from pathlib import Path
from types import SimpleNamespace

import pytest

from trans_peft import analysis
from trans_peft.analysis.theorem import bound_terms
from trans_peft.bases.drift import Drift
from trans_peft.cli.files import read_experiment
from trans_peft.domain.experiment import OLD
from trans_peft.experiment import analyses
from trans_peft.experiment.analyses import FamilyAnalysis, analyse_families, are_complete, current
from trans_peft.experiment.score_file import ScoreFile

EXPERIMENT = read_experiment(Path(__file__).with_name("tables.yaml")).with_rates(
    analysis.AnalysisSettings().perturbation
)
DRIFT = Drift(nan, 0.1, 0.2, (nan,), (0.1,), (1.5,), (2.5,), 0.9)


def prepared(experiment=EXPERIMENT):
    bases = {("tiny", label): SimpleNamespace(fingerprint_sha256=label) for label in (OLD, "v2", "v3")}  # noqa: E501  # fmt: skip
    return SimpleNamespace(
        experiment=experiment,
        bases=bases,
        base=lambda planned: bases[planned.family, planned.base],
        recipe=lambda planned: SimpleNamespace(sha256=repr((planned.base, planned.seed))),
    )


@pytest.fixture
def missing(monkeypatch):
    """Return the missing analyses; `on_disk` has the labels of bases whose adapters exist."""
    sides = []

    def analyse(old, news, rows, settings, on_progress):
        sides.append([(side.name, side.adapter) for side in (old, *news)])
        terms = bound_terms(DRIFT, settings.perturbation)
        updates = tuple(analysis.UpdateAnalysis(side.name, DRIFT, terms) for side in news)
        return analysis.Analysis(old.name, settings, len(rows), 9, None, updates)

    monkeypatch.setattr(analysis, "analyse", analyse)
    monkeypatch.setattr(analyses, "base_folder", lambda base, _: base.fingerprint_sha256)

    def run(known, on_disk=(), of=EXPERIMENT):
        monkeypatch.setattr(
            analyses,
            "adapter_on_disk",
            lambda planned, *_: f"{planned.base}/adapter" if planned.base in on_disk else None,
        )
        return [*analyse_families(prepared(of), None, known, on_progress=lambda _: None)]

    run.sides = sides
    return run


ALL = (OLD, "v2", "v3")


def test_bases_have_their_adapters_if_all_of_these_exist(missing):
    (found,) = missing((), ALL)
    assert found.method == "LoRA"
    assert missing.sides == [[(label, f"{label}/adapter") for label in ALL]]
    (found,) = missing((), (OLD, "v2"))
    assert found.method == ""
    assert missing.sides[1:] == [[(label, None) for label in ALL]]


def test_an_analysis_is_made_once_and_again_when_there_are_adapters(missing):
    (bare,) = missing(())
    assert missing({bare.key}) == []
    (tuned,) = missing({bare.key}, ALL)
    assert missing({tuned.key}) == missing({tuned.key}, ALL) == []
    assert are_complete(prepared(), {bare.key}) and are_complete(prepared(), {tuned.key})


@pytest.mark.parametrize(
    "change",
    [{"seeds": (7,)}, {"arms": {"a": replace(EXPERIMENT.arms["Trans-PEFT"], masking_p=0.4)}}],
)
def test_other_inputs_are_another_analysis(missing, change):
    (found,) = missing((), ALL)
    other = replace(EXPERIMENT, **change)
    assert len(missing({found.key}, ALL, other)) == 1
    assert current(prepared(other), [found]) == () and current(prepared(), [found]) == (found,)
    assert not are_complete(prepared(other), {found.key})


def test_an_experiment_without_analyses_has_none(missing):
    without = replace(EXPERIMENT, analyses=False)
    assert missing((), ALL, without) == []
    assert are_complete(prepared(without), ())


def test_an_analysis_is_read_again_as_it_was(missing, tmp_path):
    (found,) = missing(())
    ScoreFile(tmp_path / "analyses.jsonl", FamilyAnalysis).append(found)
    (again,) = ScoreFile(tmp_path / "analyses.jsonl", FamilyAnalysis)
    assert repr(again.analysis) == repr(found.analysis)  # NaN differs from itself
