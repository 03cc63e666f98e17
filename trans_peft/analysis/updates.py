"""Analyse updates of a base: weights, activations and the terms of theorem 1.

Needs no training and no labels. One base is in memory at a time.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Literal

from trans_peft.analysis.activations import Activations, measure_activations
from trans_peft.analysis.distances import (
    Distances,
    Interval,
    compare_activations,
    influence,
    profile,
)
from trans_peft.analysis.pair import drift_of_versions
from trans_peft.analysis.theorem import BoundTerms, bound_terms
from trans_peft.bases.drift import Drift
from trans_peft.data import Example, full_ids, parse_examples
from trans_peft.domain.field_checks import choice_problems, count_problems
from trans_peft.domain.recipe import Perturbation
from trans_peft.errors import DataError, InvalidSpecError, listed
from trans_peft.models import load_base, load_tokenizer, release_base
from trans_peft.transfer.load_adapter import attached

__all__ = ["Analysis", "AnalysisSettings", "BaseSide", "UpdateAnalysis", "analyse", "public_rows"]

Dtype = Literal["float32", "bfloat16", "float16"]

Progress = Callable[[str, int, int], None]
"""Called with the name of the running base, the texts that are done, and all texts."""


@dataclass(frozen=True)
class BaseSide:
    """One base to analyse.

    Attributes:
        name: how figures and tables name it.
        folder: Hugging Face folder with safetensors.
        adapter: PEFT folder of an adapter that was trained on this base, as in the paper's figures;
            None for the bare base.
    """

    name: str
    folder: Path
    adapter: Path | None = None


@dataclass(frozen=True)
class AnalysisSettings:
    """Settings of an analysis. InvalidSpecError for values out of range.

    Attributes:
        tokens: tokens of each text to use, from its start; at least 2.
        perturbation: the training whose regularizer theorem 1 contains.
        dtype: torch dtype in which the bases run.
    """

    tokens: int = 256
    perturbation: Perturbation = field(default_factory=lambda: Perturbation(0.1, 0.1))
    dtype: Dtype = "float32"

    def __post_init__(self) -> None:
        problems = count_problems(self, {"tokens": (2, 1_000_000)})
        problems += choice_problems(self, dtype=Dtype)
        if problems:
            raise InvalidSpecError(f"the analysis has invalid settings: {'; '.join(problems)}")


@dataclass(frozen=True)
class Measured:
    """The activations of one base, by layer. None for a layer without the sub-layer.

    Attributes:
        influence: of the FFN on the magnitude of activations (fig. 3).
        attention: where the attention's activations are large (`distances.profile`; fig. 1, 8).
        ffn: where the FFN's activations are large (fig. 2, 9).
    """

    influence: tuple[Interval | None, ...]
    attention: tuple[tuple[float, ...] | None, ...]
    ffn: tuple[tuple[float, ...] | None, ...]


@dataclass(frozen=True)
class UpdateAnalysis:
    """One update: the change of weights, the terms of theorem 1 and the change of activations.

    `distances` and `measured` are None if no text was used.
    """

    name: str
    drift: Drift
    terms: BoundTerms
    distances: Distances | None = None
    measured: Measured | None = None


@dataclass(frozen=True)
class Analysis:
    """The analysis of all updates of one base.

    Attributes:
        old: name of the old base.
        settings: the settings.
        texts: number of texts that the bases read; 0 if only weights were compared.
        tokens: number of their tokens.
        measured: of the old base; None without texts.
        updates: the updates in the order of theorem 1: the smallest FFN shift first.
    """

    old: str
    settings: AnalysisSettings
    texts: int
    tokens: int
    measured: Measured | None
    updates: tuple[UpdateAnalysis, ...]


def public_rows() -> tuple[Example, ...]:
    """Return the texts that come with the library: 24 short passages of prose, sums and code.

    The prose is in the public domain or written for this file.
    """
    name = "public_text.jsonl"
    return parse_examples(files("trans_peft.analysis").joinpath(name).read_bytes(), name)


def analyse(
    old: BaseSide,
    news: Sequence[BaseSide],
    rows: Sequence[Example],
    settings: AnalysisSettings | None = None,
    on_progress: Progress = lambda name, done, total: None,
) -> Analysis:
    """Compare a base with one or several updates of it, and order the updates by theorem 1.

    Without `rows`, no model runs: the result has weights and the terms of the theorem only. The
    tokenizer of the old base encodes the rows for all bases.

    Example::

        analyse(BaseSide("v1", v1), [BaseSide("v2", v2)], public_rows())

    Raises:
        UnsupportedModelError: a base is no update of the old one (before a model is loaded), or its
            FFNs are not found.
        InvalidSpecError: there is no update, or two bases have one name.
        DataError: there is only one text, or a text has fewer than two tokens.
        AdapterError: an adapter cannot be loaded on its base.
    """
    settings = settings or AnalysisSettings()
    names = [side.name for side in (old, *news)]
    if not news or len(set(names)) < len(names):
        raise InvalidSpecError(
            "the bases cannot be compared",
            expected="an old base and at least one update, each with its own name",
            found=", ".join(names),
        )
    drifts = [drift_of_versions(old.folder, side.folder) for side in news]
    updates = [
        UpdateAnalysis(side.name, drift, bound_terms(drift, settings.perturbation))
        for side, drift in zip(news, drifts, strict=True)
    ]
    if not rows:
        return Analysis(old.name, settings, 0, 0, None, _ordered(updates))
    texts = _encoded(rows, old.folder, settings.tokens)
    before = _activations(old, texts, settings.dtype, on_progress)
    for number, side in enumerate(news):
        after = _activations(side, texts, settings.dtype, on_progress)
        updates[number] = replace(
            updates[number],
            distances=compare_activations(before, after),
            measured=_measured(after),
        )
    release_base()
    tokens = sum(map(len, texts))
    return Analysis(old.name, settings, len(texts), tokens, _measured(before), _ordered(updates))


def _ordered(updates: Sequence[UpdateAnalysis]) -> tuple[UpdateAnalysis, ...]:
    return tuple(sorted(updates, key=lambda update: update.terms.ffn_shift))


def _encoded(rows: Sequence[Example], folder: Path, tokens: int) -> list[list[int]]:
    texts = [ids[:tokens] for ids in full_ids(rows, load_tokenizer(folder))]
    short = [row.location for row, ids in zip(rows, texts, strict=True) if len(ids) < 2]
    if short or len(texts) < 2:
        raise DataError(
            "the texts are too few or too short to analyse activations",
            expected="at least two texts, each of at least two tokens",
            found=f"{len(texts)} texts; too short: {listed(short)}" if short else len(texts),
            do="use more rows (--data, --rows), or compare the weights alone (--rows 0)",
        )
    return texts


def _activations(
    side: BaseSide, texts: Sequence[Sequence[int]], dtype: str, on_progress: Progress
) -> Activations:
    model = load_base(side.folder, dtype).model
    with nullcontext(model) if side.adapter is None else attached(model, side.adapter) as running:
        return measure_activations(running, texts, partial(on_progress, side.name))


def _measured(found: Activations) -> Measured:
    attention, ffn = (
        tuple(None if moments is None else profile(moments) for moments in layers)
        for layers in (found.attention, found.ffn)
    )
    return Measured(influence(found), attention, ffn)
