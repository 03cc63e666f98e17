"""Analyse each family of bases: figures 1, 2, 3, 8, 9 and theorem 1 of the paper.

As in these figures, the bases have adapters that were trained on them without perturbation, if all
of these adapters are on this machine. Otherwise the bare bases are compared.
"""

from collections.abc import Container, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from trans_peft.domain.experiment import OLD, PLAIN, PlannedTraining
from trans_peft.domain.identity import content_sha256
from trans_peft.experiment.cells import adapter_on_disk
from trans_peft.experiment.prepare import Prepared
from trans_peft.lifecycle.base_files import base_folder
from trans_peft.lifecycle.progress import ProgressCallback, WorkProgress
from trans_peft.models import release_base
from trans_peft.ports import Platform

if TYPE_CHECKING:
    from trans_peft.analysis import Analysis, AnalysisSettings

__all__ = ["FamilyAnalysis", "analyse_families", "are_complete", "current"]


@dataclass(frozen=True)
class FamilyAnalysis:
    """The analysis of a family of bases.

    Attributes:
        key: hash of all inputs.
        family: name of the family.
        method: name of the adapters' method; empty for bare bases.
        fields: the fields of the `Analysis`.
        is_quick: whether it was made with `--quick` and is no result.
    """

    key: str
    family: str
    method: str
    fields: dict[str, Any]
    is_quick: bool = False

    @property
    def cell(self) -> str:
        """What was analyzed, by name."""
        return self.family

    @property
    def analysis(self) -> "Analysis":
        """The analysis."""
        from pydantic import TypeAdapter

        from trans_peft.analysis import Analysis

        return TypeAdapter(Analysis).validate_python(self.fields)


def analyse_families(
    prepared: Prepared,
    platform: Platform,
    known: Container[str],
    *,
    on_progress: ProgressCallback,
    is_quick: bool = False,
) -> Iterator[FamilyAnalysis]:
    """Yield the missing analyses; none if the experiment has no `analyses`.

    Raises what `trans_peft.analysis.analyse` raises.
    """

    from trans_peft.analysis import BaseSide, analyse, public_rows

    def progress(name: str, done: int, total: int) -> None:
        on_progress(WorkProgress(f"analysis of {name}", done, total, "texts", None))

    for family in _families(prepared):
        planned = _trainings(family, prepared)
        found = {label: adapter_on_disk(one, prepared, platform) for label, one in planned.items()}
        has_adapters = all(found.values())
        with_adapters, bare = _keys(family, prepared)
        if with_adapters in known or (bare in known and not has_adapters):
            continue
        release_base()  # that of the last evaluation
        old, *news = (
            BaseSide(
                label,
                base_folder(prepared.bases[family, label], platform),
                adapter if has_adapters else None,
            )
            for label, adapter in found.items()
        )
        analysis = analyse(old, news, public_rows(), _settings(prepared), progress)
        yield FamilyAnalysis(
            with_adapters if has_adapters else bare,
            family,
            planned[OLD].method if has_adapters else "",
            asdict(analysis),
            is_quick,
        )


def are_complete(prepared: Prepared, known: Container[str]) -> bool:
    """Whether each family has an analysis, with or without adapters."""
    return all(
        any(key in known for key in _keys(family, prepared)) for family in _families(prepared)
    )


def current(prepared: Prepared, found: Iterable[FamilyAnalysis]) -> tuple[FamilyAnalysis, ...]:
    """Return the analyses of the experiment's present bases, adapters and settings."""
    keys = {key for family in _families(prepared) for key in _keys(family, prepared)}
    return tuple(one for one in found if one.key in keys)


def _families(prepared: Prepared) -> tuple[str, ...]:
    return tuple(prepared.experiment.families) if prepared.experiment.analyses else ()


def _trainings(family: str, prepared: Prepared) -> dict[str, PlannedTraining]:
    """Return the plain trainings of the first method and seed on each base of a family."""
    experiment = prepared.experiment
    method, labels = next(iter(experiment.methods)), experiment.families[family].labels
    return {
        label: PlannedTraining(family, label, method, PLAIN, experiment.seeds[0], (label,))
        for label in labels
    }


def _settings(prepared: Prepared) -> "AnalysisSettings":
    """Return the settings: the perturbation is that of the first arm."""
    from trans_peft.analysis import AnalysisSettings

    experiment = prepared.experiment
    arm, *_ = experiment.arms.values()
    is_float32 = experiment.training.dtype == "float32"
    return AnalysisSettings(perturbation=arm, dtype="float32" if is_float32 else "bfloat16")


def _keys(family: str, prepared: Prepared) -> tuple[str, str]:
    """Return the keys of the analysis with adapters and of that of the bare bases."""
    from trans_peft.analysis import public_rows

    planned = _trainings(family, prepared)
    bases = [[label, prepared.base(one).fingerprint_sha256] for label, one in planned.items()]
    texts = [[row.prompt, row.completion] for row in public_rows()]
    inputs = ["analysis", bases, asdict(_settings(prepared)), texts]
    recipes = [prepared.recipe(one).sha256 for one in planned.values()]
    return content_sha256([*inputs, recipes]), content_sha256(inputs)
