"""Name every difference between an experiment and the paper, as far as the file shows it.

The settings are those of Appendix C and of the scripts that the authors published
(gccnlp/Trans-PEFT @f4a065f).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from trans_peft.domain.evaluation import Suite
from trans_peft.domain.experiment import Experiment
from trans_peft.experiment.tables import literal

__all__ = ["deviations"]

_COMMONSENSE = frozenset(
    {"boolq", "piqa", "social_i_qa", "hellaswag", "winogrande", "arc_easy", "arc_challenge",
     "openbookqa"}
)  # fmt: skip
_MATH = frozenset({"gsm8k", "math"})
_CODE = frozenset({"humaneval", "mbpp", "mbpp_plus"})


@dataclass(frozen=True)
class _Paper:
    """The settings of one kind of task in the paper."""

    suites: frozenset[str]
    rank: int
    data: str
    words: tuple[str, ...]
    schedule: str
    masking_p: tuple[float, ...]
    train_on_prompt: bool = False


_RATES = (0.1, 0.2, 0.3)
_TASKS = (
    _Paper(_COMMONSENSE, 32, "Commonsense170K", ("170k",), "linear", _RATES, True),
    _Paper(_MATH, 64, "100,000 rows of MetaMathQA", ("metamath",), "cosine", (0.01, 0.05, 0.1)),
    _Paper(_CODE, 64, "CodeFeedback105K", ("codefeedback",), "cosine", (0.01, 0.05, 0.1)),
)


def deviations(experiment: Experiment) -> tuple[str, ...]:
    """Return a sentence for each difference from the paper. Equal settings are not listed."""
    names = {suite.name for suite in experiment.all_suites}
    found = [
        *_of_scoring(experiment.all_suites, names),
        *_of_perturbations(experiment),
        *_of_training(experiment),
    ]
    if unknown := sorted(names - _COMMONSENSE - _MATH - _CODE):
        found.append(f"Suites that the paper does not have: {', '.join(unknown)}.")
    return tuple(found)


def _of_scoring(suites: Sequence[Suite], names: set[str]) -> Iterator[str]:
    if names & _COMMONSENSE:
        yield "Answers are decoded greedily; LLM-Adapters, which the paper follows, uses 4 beams."
    if any(suite.name in _MATH and suite.scoring.startswith("math_verify") for suite in suites):
        yield (
            "Mathematical answers are compared by math-verify; the paper's checker also accepts "
            "answers that differ by a factor of 100 (scoring rules paper_gsm8k and paper_math)."
        )
    if "mbpp" in names:
        yield "`mbpp` has the 500 tasks of the test split; the paper has 378 (suite `mbpp_plus`)."
    for suite in suites:
        if suite.limit is not None:
            yield f"`{suite.name}` has its first {suite.limit} items only."


def _of_perturbations(experiment: Experiment) -> Iterator[str]:
    arms = experiment.arms.values()
    if any(arm.granularity == "neuron" for arm in arms):
        yield (
            "A mask is drawn for each neuron, as in eq. 4; the authors' code draws a bit for each "
            "element of (batch, sequence, d_ff) (`granularity: element`)."
        )
    yield (
        "Masks and drops come from a counter and keep the dtype of the activations; the authors' "
        "code takes drops from Python's random and raises masked activations to float32."
    )
    has_houlsby = any(spec.peft_type == "BOTTLENECK" for spec in experiment.methods.values())
    if has_houlsby:
        yield (
            "Houlsby adapters have no biases, as in eq. 2, and PyTorch's initial weights; the "
            "authors' code has biases, and W_down from N(0, 0.02)."
        )
    if has_houlsby and any(arm.dropping_p for arm in arms):
        yield (
            "A dropped FFN drops the Houlsby adapter behind it as well; in the authors' code that "
            "adapter still runs."
        )
    if any(arm.spared_layers for arm in arms):
        yield "Some layers are spared; the paper perturbs all layers alike."
    if experiment.selection is not None:
        yield (
            "Rates are chosen by the loss on held-out training rows, with a seed that is not "
            "reported; the paper does not say on which rows it chose them."
        )


def _of_training(experiment: Experiment) -> Iterator[str]:
    shared = experiment.training
    optimizer = shared.optimizer
    rows = optimizer.rows_per_step(shared.processes)
    for what, value, paper in (
        ("rows of a step", rows, 16),
        ("learning rate", optimizer.learning_rate, 3e-4),
        ("dtype", shared.dtype, "bfloat16"),
        ("seeds", list(experiment.seeds), [42]),
    ):
        if value != paper:
            yield f"{what.capitalize()}: {value}; the paper's: {paper}."
    if optimizer.epochs != 3:
        yield f"Length: {optimizer.duration}; the paper's: 3 epochs."
    tasks = {family: _tasks(experiment, family) for family in experiment.families}
    for task in _TASKS:
        families = [family for family in tasks if task in tasks[family]]
        if not families:
            continue
        sources = [source.uri for family in families for source in experiment.sources_of(family)]
        uris = ", ".join(dict.fromkeys(sources))
        if optimizer.schedule != task.schedule:
            yield f"Schedule: {optimizer.schedule}; the paper's for these suites: {task.schedule}."
        if not any(word in uris.lower().replace("_", "").replace("-", "") for word in task.words):
            yield f"Training rows: {literal(uris)}; the paper's for these suites: {task.data}."
        if shared.train_on_prompt != task.train_on_prompt:
            loss = {True: "prompts and answers", False: "answers"}
            yield (
                f"Loss: on {loss[shared.train_on_prompt]}; the authors' scripts for these suites: "
                f"on {loss[task.train_on_prompt]}."
            )
        for name, spec in experiment.methods.items():
            rank = spec.options.get("r", spec.options.get("bottleneck_dim"))
            if rank != task.rank:
                yield f"Rank of {name}: {rank}; the paper's for these suites: {task.rank}."
        rates = {arm.masking_p for arm in experiment.arms.values()} - {0.0, *task.masking_p}
        if experiment.selection is None and rates:
            yield f"p_m: {sorted(rates)}; the paper chooses from {list(task.masking_p)}."
    if any(len(of) > 1 for of in tasks.values()):
        yield "One adapter is trained for several kinds of tasks; the paper trains one for each."


def _tasks(experiment: Experiment, family: str) -> list[_Paper]:
    """Return the kinds of tasks that a family's suites have."""
    names = {suite.name for suite in experiment.suites_of(family)}
    return [task for task in _TASKS if task.suites & names]
