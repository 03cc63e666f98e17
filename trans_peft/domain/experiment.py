"""An experiment: adapters on two or more versions of a base, compared as the paper compares them.

It states bases, methods, arms, data, suites and seeds. `trans_peft.experiment` enumerates the
trainings, runs them and writes the report. docs/experiments.md has a worked example.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from typing import ClassVar, Literal

from trans_peft.domain import FORBID_EXTRA_FIELDS
from trans_peft.domain.compute import ComputeSettings
from trans_peft.domain.data import DataSource, TrainingSource
from trans_peft.domain.evaluation import BARE, Suite
from trans_peft.domain.field_checks import choice_problems, count_problems, is_whole
from trans_peft.domain.names import name_problem
from trans_peft.domain.numbers import is_finite_number
from trans_peft.domain.optimizer import OptimizerSettings
from trans_peft.domain.recipe import Perturbation
from trans_peft.domain.spec import AdapterSpec
from trans_peft.errors import InvalidSpecError

__all__ = [
    "OLD",
    "PLAIN",
    "BaseFamily",
    "Cost",
    "Experiment",
    "PlannedTraining",
    "QuickProfile",
    "Rows",
    "Selection",
    "Sweep",
    "TrainingSettings",
    "rates_text",
]

OLD = "old"
"""The label of the old base of a family."""

PLAIN = Perturbation()
"""The arm that every experiment has: fine-tuning without masking and dropping."""

Rows = DataSource | tuple[TrainingSource, ...]
"""Training rows: one source, or several. An empty tuple: none are given."""

_Dtype = Literal["float32", "bfloat16", "nf4"]
_Swept = Literal["masking_p", "dropping_p", "where"]
_SEED = (0, 2**31 - 1)
_CURRENCY = re.compile(r"[^\W\d_]{1,10}|[$¢£¥€₩₹]")


@dataclass(frozen=True)
class BaseFamily:
    """The versions of one base.

    Attributes:
        old: the base on which adapters are trained once: a local folder, `s3://...`, or
            `hub:OWNER/NAME[@REVISION]`. In the flow `experiment`: FAMILY/VERSION of the catalog.
        new: its updates, by label. Several labels are domain updates (fig. 5).
        data: training rows of this family, instead of those of `training`.
        suites: suites of this family, instead of those of the experiment.
    """

    __pydantic_config__: ClassVar = FORBID_EXTRA_FIELDS

    old: str
    new: Mapping[str, str]
    data: Rows = ()
    suites: tuple[Suite, ...] = ()

    def __post_init__(self) -> None:
        problems = [p for name in self.new if (p := name_problem("the label of a new base", name))]
        if OLD in self.new:
            problems.append(f"a new base must not have the label {OLD!r}")
        if not self.new:
            problems.append("new must name at least one base")
        if not (self.old and all(self.new.values())):
            problems.append("every base needs a folder, s3://... or hub:OWNER/NAME")
        _raise("the base family is invalid", problems)

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels of all bases, the old one first."""
        return (OLD, *self.new)

    def uri(self, label: str) -> str:
        """Return the place of the base with a label."""
        return self.old if label == OLD else self.new[label]


@dataclass(frozen=True)
class TrainingSettings:
    """The settings that all trainings of an experiment share. See `TrainingRecipe`."""

    __pydantic_config__: ClassVar = FORBID_EXTRA_FIELDS

    data: Rows = ()
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    dtype: _Dtype = "float32"
    processes: int = 1
    packing: bool = False
    checkpoint_steps: int = 50
    compute: ComputeSettings = field(default_factory=ComputeSettings)
    train_on_prompt: bool = False


@dataclass(frozen=True)
class Sweep:
    """Trainings that differ in one field of the perturbation (fig. 6, and fig. 10 for `where`).

    Attributes:
        field: the field.
        values: its values.
        family: the family of bases.
        method: the method.
        at: the other fields.
    """

    __pydantic_config__: ClassVar = FORBID_EXTRA_FIELDS

    field: _Swept
    values: tuple[float | str, ...]
    family: str
    method: str
    at: Perturbation = PLAIN

    def __post_init__(self) -> None:
        problems = choice_problems(self, field=_Swept)
        if len(self.values) < 2 or len(set(self.values)) < len(self.values):
            problems.append(f"values must be two or more, each once, not {list(self.values)}")
        if not problems:
            try:
                _ = self.perturbations
            except InvalidSpecError as error:
                problems.append(str(error))
        _raise("the sweep is invalid", problems)

    @property
    def perturbations(self) -> Mapping[float | str, Perturbation]:
        """The perturbation of each value."""
        return {value: replace(self.at, **{self.field: value}) for value in self.values}  # type: ignore[arg-type]


@dataclass(frozen=True)
class Selection:
    """How the rates of an arm are chosen: on held-out training rows, never on items of a suite.

    The candidates are all pairs of `masking_p` and `dropping_p`. Each is trained on the old base
    without the held-out rows. The candidate with the lowest loss on them on the new base is
    selected.

    Attributes:
        arm: the arm that gets the rates. Its other fields stay.
        family: the family on which the rates are chosen.
        new: the label of the new base on which the loss is computed.
        method: the method with which they are chosen.
        masking_p: candidates of p_m.
        dropping_p: candidates of p_d.
        seed: the seed of these trainings. The experiment must not report it.
        share: the share of the training rows that is held out, chosen by the hash of their prompts.
    """

    __pydantic_config__: ClassVar = FORBID_EXTRA_FIELDS

    arm: str
    family: str
    new: str
    method: str
    masking_p: tuple[float, ...]
    dropping_p: tuple[float, ...]
    seed: int = 0
    share: float = 0.02

    def __post_init__(self) -> None:
        problems = count_problems(self, {"seed": _SEED})
        if not (is_finite_number(self.share) and 0 < self.share <= 0.5):
            problems.append(f"share must be above 0 and at most 0.5, not {self.share!r}")
        if len(self.masking_p) * len(self.dropping_p) < 2:
            problems.append("masking_p and dropping_p must give at least two candidates")
        if 0 in self.masking_p and 0 in self.dropping_p:
            problems.append("masking_p and dropping_p are both 0 in a candidate, which is plain")
        _raise("the selection is invalid", problems)

    def candidates(self, arm: Perturbation) -> tuple[Perturbation, ...]:
        """Return the candidates for an arm."""
        pairs = product(self.masking_p, self.dropping_p)
        return tuple(replace(arm, masking_p=p_m, dropping_p=p_d) for p_m, p_d in pairs)


@dataclass(frozen=True)
class Cost:
    """What a GPU hour costs, and how many adapters a platform has (fig. 7).

    Attributes:
        price_per_gpu_hour: price of a GPU hour, in `currency`.
        currency: the currency.
        adapters: number of adapters for which hours and prices are given.
        training_gpu_hours: expected GPU hours of one training, for the estimate of a dry run.
            Measured trainings replace it. None: unknown.
        evaluation_gpu_hours: expected GPU hours of all suites on one base, likewise.
    """

    __pydantic_config__: ClassVar = FORBID_EXTRA_FIELDS

    price_per_gpu_hour: float = 0.0
    currency: str = "USD"
    adapters: int = 1000
    training_gpu_hours: float | None = None
    evaluation_gpu_hours: float | None = None

    def __post_init__(self) -> None:
        problems = count_problems(self, {"adapters": (1, 10_000_000)})
        if not _CURRENCY.fullmatch(self.currency):
            problems.append(f"currency must be letters or a sign, as USD or €: {self.currency!r}")
        for name in ("price_per_gpu_hour", "training_gpu_hours", "evaluation_gpu_hours"):
            value = getattr(self, name)
            if value is not None and not (is_finite_number(value) and value >= 0):
                problems.append(f"{name} must be finite and at least 0, not {value!r}")
        _raise("the cost is invalid", problems)


@dataclass(frozen=True)
class QuickProfile:
    """What `--quick` changes, to try an experiment in minutes. Its figures are no results.

    Attributes:
        rows: training rows.
        items: items of each suite.
        steps: optimizer steps.
        families: small bases that replace families of the same name, with the rows and suites of
            these families. If there are some, families without a replacement are left out.
    """

    __pydantic_config__: ClassVar = FORBID_EXTRA_FIELDS

    rows: int = 200
    items: int = 50
    steps: int = 20
    families: Mapping[str, BaseFamily] = field(default_factory=dict)

    def __post_init__(self) -> None:
        limits = {"rows": (2, 100_000), "items": (1, 100_000), "steps": (2, 100_000)}
        _raise("the quick profile is invalid", count_problems(self, limits))

    def fewer_rows(self, data: Rows) -> Rows:
        """Return training rows with a limit for each source."""
        sources = _sources(data)
        return tuple(
            replace(source, limit=min(limit, source.limit or limit))
            for limit in [-(-self.rows // max(1, len(sources)))]
            for source in sources
        )

    def fewer_items(self, suites: tuple[Suite, ...]) -> tuple[Suite, ...]:
        """Return suites with a limit for each."""
        return tuple(
            replace(suite, limit=min(self.items, suite.limit or self.items)) for suite in suites
        )


@dataclass(frozen=True)
class PlannedTraining:
    """One adapter to train, and the bases to score it on.

    Attributes:
        family: name of the family of bases.
        base: label of the base to train on.
        method: name of the method.
        perturbation: the perturbation.
        seed: the seed.
        scored_on: labels of the bases to score it on.
        data_seed: seed of the order of rows, if it differs from `seed`.
        held_out: share of the training rows that is held out, for the selection; 0 otherwise.
        steps: optimizer steps, if they are not those of the experiment.
    """

    __pydantic_config__: ClassVar = FORBID_EXTRA_FIELDS

    family: str
    base: str
    method: str
    perturbation: Perturbation
    seed: int
    scored_on: tuple[str, ...]
    data_seed: int | None = None
    held_out: float = 0.0
    steps: int | None = None

    def __str__(self) -> str:
        order = "" if self.data_seed is None else f", data seed {self.data_seed}"
        held_out = ", rates to select" if self.held_out else ""
        length = "" if self.steps is None else f", {self.steps} steps"
        return (
            f"{self.family}/{self.base}, {self.method}, {rates_text(self.perturbation)}, "
            f"seed {self.seed}{order}{held_out}{length}"
        )


@dataclass(frozen=True)
class Experiment:
    """An experiment. InvalidSpecError, with all problems at once, for a value outside its range.

    Attributes:
        name: name of the experiment.
        families: the bases: one old and one or more new ones for each family.
        methods: adapters by name. All are trained in every arm.
        training: the settings of all trainings.
        arms: perturbations by name. Plain fine-tuning is always there and has no name here.
        suites: what the adapters are scored on. In a file, a suite of the paper may be its name.
        seeds: seeds of the trainings. Tables have the mean over them (table 4 shows each).
        data_seeds: further trainings with the first seed and other orders of rows (table 3).
        longer: optimizer steps of further trainings of all arms on the old base, with each seed,
            to compare arms at an equal score on the old base. In ascending order.
        sweeps: trainings that differ in one field of the perturbation (fig. 6 and 10).
        analyses: whether the report analyses each family's bases, with plain adapters of the first
            method and seed (fig. 1, 2, 3, 8 and 9, and theorem 1).
        selection: how the rates of an arm are chosen. None: they are those of `arms`.
        cost: prices for fig. 7, and expected hours for a dry run.
        quick: what `--quick` changes.
    """

    __pydantic_config__: ClassVar = FORBID_EXTRA_FIELDS

    name: str
    families: Mapping[str, BaseFamily]
    methods: Mapping[str, AdapterSpec]
    training: TrainingSettings
    arms: Mapping[str, Perturbation]
    suites: tuple[Suite, ...] = ()
    seeds: tuple[int, ...] = (42,)
    data_seeds: tuple[int, ...] = ()
    longer: tuple[int, ...] = ()
    sweeps: tuple[Sweep, ...] = ()
    analyses: bool = False
    selection: Selection | None = None
    cost: Cost = field(default_factory=Cost)
    quick: QuickProfile = field(default_factory=QuickProfile)

    def __post_init__(self) -> None:
        problems = [p for p in [name_problem("name", self.name)] if p]
        for kind in ("families", "methods", "arms"):
            named = getattr(self, kind)
            problems += [p for name in named if (p := name_problem(f"a name in {kind}", name))]
            if not named:
                problems.append(f"{kind} must name at least one")
        if BARE in self.methods:
            problems.append(
                f"no method may have the name {BARE!r}, which scores of bare bases have"
            )
        problems += self._arm_problems() + self._seed_problems() + self._length_problems()
        problems += self._row_problems() + self._reference_problems()
        _raise(f"the experiment {self.name!r} is invalid", problems)

    def _arm_problems(self) -> list[str]:
        chosen = self.selection.arm if self.selection else None
        return [
            f"arms.{name} perturbs nothing: the plain arm is always there"
            for name, arm in self.arms.items()
            if arm.is_off and name != chosen
        ]

    def _seed_problems(self) -> list[str]:
        problems = []
        for kind, least in (("seeds", 1), ("data_seeds", 0)):
            values = getattr(self, kind)
            in_range = all(is_whole(v) and _SEED[0] <= v <= _SEED[1] for v in values)
            if len(values) < least or len(set(values)) < len(values) or not in_range:
                problems.append(
                    f"{kind} must be different whole numbers from 0 to {_SEED[1]:,}, not "
                    f"{list(values)}"
                )
        if self.selection and self.selection.seed in (*self.seeds, *self.data_seeds):
            problems.append(
                f"selection.seed={self.selection.seed} is also a seed of the tables: choose another"
            )
        return problems

    def _length_problems(self) -> list[str]:
        steps, lengths = self.training.optimizer.steps, list(self.longer)
        if not lengths:
            return []
        if steps is None:
            return ["longer needs training.optimizer.steps, not epochs"]
        if sorted({steps, *lengths}) != [steps, *lengths]:
            return [f"longer must be ascending numbers of steps above {steps}, not {lengths}"]
        return []

    def _row_problems(self) -> list[str]:
        """Return a problem for each family without rows or suites, or with suites of one name."""
        problems = []
        for family in self.families:
            if not self.sources_of(family):
                problems.append(f"training.data is missing, and so is families.{family}.data")
            names = [suite.name for suite in self.suites_of(family)]
            if not names:
                problems.append(f"suites must name at least one suite, or families.{family}.suites")
            if len(set(names)) != len(names):
                problems.append(f"suites share a name: {names}")
        return list(dict.fromkeys(problems))

    def _reference_problems(self) -> list[str]:
        """Return a problem for each name that a sweep, the selection or the profile lacks."""
        used = [(f"sweeps.{n}", s.family, s.method) for n, s in enumerate(self.sweeps)]
        if self.selection:
            used.append(("selection", self.selection.family, self.selection.method))
        problems = []
        for where, family, method in used:
            if family not in self.families:
                problems.append(f"{where}.family {family!r} is not in families")
            if method not in self.methods:
                problems.append(f"{where}.method {method!r} is not in methods")
        if (chosen := self.selection) is not None:
            if chosen.arm not in self.arms:
                problems.append(f"selection.arm {chosen.arm!r} is not in arms")
            family_of = self.families.get(chosen.family)
            if family_of is not None and chosen.new not in family_of.new:
                problems.append(f"selection.new {chosen.new!r} is not in families.{chosen.family}")
        for name, small in self.quick.families.items():
            if name not in self.families or set(small.new) != set(self.families[name].new):
                problems.append(
                    f"quick.families.{name} must replace a family, with the same labels of new "
                    "bases"
                )
            if small.data or small.suites:
                problems.append(
                    f"quick.families.{name} has the rows and suites of the family that it replaces"
                )
        return problems

    def data_of(self, family: str) -> Rows:
        """Return the training rows of a family."""
        return self.families[family].data or self.training.data

    def sources_of(self, family: str) -> tuple[TrainingSource, ...]:
        """Return the sources of the training rows of a family."""
        return _sources(self.data_of(family))

    def suites_of(self, family: str) -> tuple[Suite, ...]:
        """Return the suites of a family."""
        return self.families[family].suites or self.suites

    @property
    def all_suites(self) -> tuple[Suite, ...]:
        """The suites of all families, each once."""
        return tuple(dict.fromkeys(s for family in self.families for s in self.suites_of(family)))

    def optimizer(self, steps: int | None = None) -> OptimizerSettings:
        """Return the optimizer settings of a training of so many steps; None: the usual number.

        The warm-up of a longer training is longer in proportion.
        """
        usual = self.training.optimizer
        if steps is None:
            return usual
        assert usual.steps is not None  # see _length_problems
        return replace(usual, steps=steps, warmup_steps=usual.warmup_steps * steps // usual.steps)

    def with_rows(
        self, data: Callable[[Rows], Rows], suites: Callable[[tuple[Suite, ...]], tuple[Suite, ...]]
    ) -> "Experiment":
        """Return the experiment with all training rows and suites changed by two functions."""
        families = {
            name: replace(family, data=data(family.data), suites=suites(family.suites))
            for name, family in self.families.items()
        }
        training = replace(self.training, data=data(self.training.data))
        return replace(self, families=families, training=training, suites=suites(self.suites))

    @property
    def orders(self) -> tuple[tuple[int, int | None], ...]:
        """The seed and data seed of the first seed's trainings with each order of the rows."""
        first, *_ = self.seeds
        return tuple((first, None if order == first else order) for order in self.data_seeds)

    def as_quick(self) -> "Experiment":
        """Return the experiment with the changes of its quick profile."""
        families = {
            name: replace(small, data=self.families[name].data, suites=self.families[name].suites)
            for name, small in self.quick.families.items()
        } or self.families
        optimizer = self.training.optimizer.for_steps(self.quick.steps, warmup_steps=1)
        chosen = self.selection
        quick = replace(
            self,
            families=families,
            training=replace(self.training, optimizer=optimizer),
            longer=tuple(self.quick.steps * n for n, _ in enumerate(self.longer, start=2)),
            sweeps=tuple(sweep for sweep in self.sweeps if sweep.family in families),
            selection=chosen if chosen and chosen.family in families else None,
        )
        return quick.with_rows(self.quick.fewer_rows, self.quick.fewer_items)

    def with_rates(self, chosen: Perturbation) -> "Experiment":
        """Return the experiment with the selected rates in their arm, and no selection."""
        assert self.selection is not None
        return replace(self, arms={**self.arms, self.selection.arm: chosen}, selection=None)

    def trainings(self) -> tuple[PlannedTraining, ...]:
        """Return the trainings of the report, each once, those of the main tables first.

        With a selection, its first candidate takes the place of the rates to select.
        """
        chosen = self.selection
        if chosen is not None:
            first, *_ = chosen.candidates(self.arms[chosen.arm])
            return self.with_rates(first).trainings()
        return tuple(dict.fromkeys(self._trainings()))

    def selection_trainings(self) -> tuple[PlannedTraining, ...]:
        """Return the trainings from which the rates are chosen; none without a selection."""
        chosen = self.selection
        if chosen is None:
            return ()
        return tuple(
            PlannedTraining(
                chosen.family, OLD, chosen.method, candidate, chosen.seed, (OLD, chosen.new),
                held_out=chosen.share,
            )
            for candidate in chosen.candidates(self.arms[chosen.arm])
        )  # fmt: skip

    def _trainings(self) -> Iterator[PlannedTraining]:
        first, *others = self.seeds
        yield from self._of_seed(first)
        for sweep in self.sweeps:
            labels = self.families[sweep.family].labels
            for perturbation in sweep.perturbations.values():
                yield PlannedTraining(
                    sweep.family, OLD, sweep.method, perturbation, first, labels
                )  # fmt: skip
        for seed, data_seed in self.orders:
            yield from self._on_old(seed, data_seed)
        for seed in others:
            yield from self._of_seed(seed)
        for steps in self.longer:
            for seed in self.seeds:
                yield from self._on_old(seed, steps=steps)

    def _of_seed(self, seed: int) -> Iterator[PlannedTraining]:
        yield from self._on_old(seed)
        for family, bases in self.families.items():
            for label in bases.new:  # Fine-tune(new)
                for method in self.methods:
                    yield PlannedTraining(family, label, method, PLAIN, seed, (label,))

    def _on_old(
        self, seed: int, data_seed: int | None = None, steps: int | None = None
    ) -> Iterator[PlannedTraining]:
        for family, bases in self.families.items():
            for method in self.methods:
                for perturbation in (PLAIN, *self.arms.values()):
                    yield PlannedTraining(
                        family, OLD, method, perturbation, seed, bases.labels, data_seed,
                        steps=steps,
                    )  # fmt: skip


def rates_text(perturbation: Perturbation) -> str:
    """Return a perturbation in a few words."""
    if perturbation.is_off:
        return "plain"
    parts = [f"p_m {perturbation.masking_p:g}", f"p_d {perturbation.dropping_p:g}"]
    if perturbation.where != "ffn":
        parts.append(perturbation.where)
    if perturbation.granularity != "neuron":
        parts.append(perturbation.granularity)
    if perturbation.spared_layers:
        parts.append(f"without layers {', '.join(map(str, perturbation.spared_layers))}")
    return ", ".join(parts)


def _sources(data: Rows) -> tuple[TrainingSource, ...]:
    if isinstance(data, DataSource):
        return (TrainingSource(data.uri, data.sha256, data.template),)
    return data


def _raise(what: str, problems: list[str]) -> None:
    if problems:
        raise InvalidSpecError(f"{what}: {'; '.join(problems)}")
