"""`python -m study.label_free`: how well can the loss of an adapter be predicted without labels?

For every finished adapter of the study that was trained on v1, this measures figures that need no
labels on 64 prompts: agreement and KL (`trans_peft.validation`), and the predictors of
`study.triage`, which do not run the adapter on the new base. It compares them with the loss by the
labels of the other items of the task. study/label_free.jsonl has one line for each adapter and
update; finished lines are not computed again. One thread.
"""

import argparse
import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from study.cells import Prepared, log, prepare
from study.label_free_report import PAGE, page_with
from study.plan import CANDIDATES, STEPS, STUDY, TASKS, UPDATES, V1, scores
from study.triage import Activations, record_activations, risks
from trans_peft.cli.show import progress
from trans_peft.cli.workspace import LOCAL, Workspace
from trans_peft.data import Example, parse_examples
from trans_peft.domain.evaluation import BARE
from trans_peft.domain.experiment import OLD, PLAIN, Experiment
from trans_peft.domain.identity import content_sha256
from trans_peft.domain.recipe import Perturbation
from trans_peft.errors import NotFoundError
from trans_peft.experiment.cells import adapter_on_disk
from trans_peft.experiment.prepare import pinned
from trans_peft.files import open_atomic

__all__ = ["PROMPTS", "Adapter", "Measured", "measured", "prompts_of", "results"]

PROMPTS = 64
MEASURED = Path(__file__).with_name("label_free.jsonl")


class Adapter(NamedTuple):
    """An adapter of the study's experiments that was trained on v1, by names."""

    task: str
    arm: str
    steps: int
    seed: int


@dataclass(frozen=True)
class Measured:
    """The label-free figures of one adapter (or of the base, `arm` "bare") under one update.

    `equal` of `prompts` answers are the same as on v1. `kl` is in nats per token. `risks` are the
    predictors of `study.triage`, by name.
    """

    key: str
    task: str
    arm: str
    steps: int
    seed: int
    update: str
    prompts: int
    equal: int
    kl: float
    risks: dict[str, float]

    @property
    def adapter(self) -> Adapter:
        """The adapter."""
        return Adapter(self.task, self.arm, self.steps, self.seed)


@dataclass(frozen=True)
class StudyAdapter:
    """An adapter on this machine, with the hash of its recipe and the updates it was scored on."""

    names: Adapter
    identity: str
    folder: Path
    updates: frozenset[str]


def main() -> None:
    """Measure what is missing, then write the tables."""
    parser = argparse.ArgumentParser(prog="python -m study.label_free", description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path(".study"), help="folder of the study")
    parser.add_argument("--report", action="store_true", help="write the tables only")
    options = parser.parse_args()
    if not options.report:
        import torch

        torch.set_num_threads(1)
        prepared = prepare(options.folder.resolve())
        found = candidates(prepared.folder)
        log(f"{len(found)} adapters")
        measure(prepared, found)
    page = page_with(PAGE.read_text(), results(), measured(), _excluded(options.folder))
    PAGE.write_text(page)
    print(PAGE)


def measured(path: Path = MEASURED) -> tuple[Measured, ...]:
    """Return all stored measurements."""
    lines = path.read_text().splitlines() if path.exists() else []
    return tuple(Measured(**json.loads(line)) for line in lines)


def prompts_of(examples: Sequence[Example]) -> list[int]:
    """Return the positions of the items that are answered. The loss is taken from the others."""
    ranked = sorted(
        range(len(examples)),
        key=lambda i: hashlib.sha256(f"label-free {examples[i].id}".encode()).digest(),
    )
    return sorted(ranked[:PROMPTS])


def results() -> dict[Adapter, dict[str, str]]:
    """Return the marks of the items of each adapter that was trained on v1, by base."""
    found: dict[Adapter, dict[str, str]] = {}
    for experiment in (STUDY, CANDIDATES):
        names = _arm_names(experiment)
        for score in scores(experiment):
            if score.method != BARE and score.trained_on == OLD:
                steps = score.steps or STEPS[0]
                adapter = Adapter(score.family, names[score.arm], steps, score.seed)
                found.setdefault(adapter, {})[score.scored_on] = score.right
    return found


def candidates(folder: Path) -> list[StudyAdapter]:
    """Return every adapter of the experiments on this machine that was scored on v1 and an update.

    `folder` is that of the study, which has the state of the experiments.
    """
    found, scored = [], results()
    with progress() as shown:
        workspace = Workspace.at(folder / "state", shown)
        for experiment in (STUDY, CANDIDATES):
            opened = pinned(experiment, lambda uri: workspace.base(uri, LOCAL), workspace.platform)
            names = _arm_names(experiment)
            on_v1 = (planned for planned in experiment.trainings() if planned.base == OLD)
            for planned in on_v1:
                steps = planned.steps or STEPS[0]
                adapter = Adapter(planned.family, names[planned.perturbation], steps, planned.seed)
                bases = scored.get(adapter, {}).keys()
                on_disk = adapter_on_disk(planned, opened, workspace.platform)
                if on_disk is not None and len(bases) > 1:
                    sha256 = opened.recipe(planned).sha256
                    found.append(StudyAdapter(adapter, sha256, on_disk, frozenset(bases - {OLD})))
    return found


def _arm_names(experiment: Experiment) -> Mapping[Perturbation, str]:
    return {PLAIN: "plain"} | {arm: name for name, arm in experiment.arms.items()}


def measure(prepared: Prepared, found: Sequence[StudyAdapter]) -> None:
    """Append the missing line of each adapter and update, base by base."""
    known = {line.key for line in measured()}
    wanted = [
        (candidate, update)
        for candidate in found
        for update in UPDATES
        if update in candidate.updates
        and _key(prepared, candidate.identity, candidate.names.task, update) not in known
    ]
    if not wanted:
        return
    activations: dict[tuple[str, str], Activations] = {}
    for base in (V1, *UPDATES):
        for task in TASKS:
            with _Session(prepared, base, task, BARE, None) as bare:
                activations[base, task] = record_activations(bare.model, bare.prompts)
                if base != V1:
                    key = _key(prepared, BARE, task, base)
                    if key not in known:
                        equal, kl = bare.compared(_answers_on_v1(prepared, task, BARE, None))
                        _append(Measured(key, task, BARE, 0, 0, base, PROMPTS, equal, kl, {}))
                else:
                    _answers_on_v1(prepared, task, BARE, None, bare)
        for candidate in {id(c): c for c, update in wanted if base in (V1, update)}.values():
            task = candidate.names.task
            with _Session(prepared, base, task, candidate.identity, candidate.folder) as adapter:
                if base == V1:
                    _answers_on_v1(prepared, task, candidate.identity, candidate.folder, adapter)
                    continue
                old = _answers_on_v1(prepared, task, candidate.identity, candidate.folder)
                equal, kl = adapter.compared(old)
                line = Measured(
                    _key(prepared, candidate.identity, task, base), *candidate.names, base,
                    PROMPTS, equal, kl,
                    risks(
                        candidate.folder, prepared.base(V1), prepared.base(base),
                        activations[V1, task], activations[base, task],
                    ),
                )  # fmt: skip
                _append(line)
                log(f"{candidate.names}, {base}: {equal} of {PROMPTS}, KL {kl:.3f}")


@dataclass(frozen=True)
class _Recorded:
    """The answers on v1 as token ids, and the probabilities of the likeliest next tokens."""

    answers: list[list[int]]
    expected: Any


class _Session:
    """A loaded base, with an adapter or without, and the prompts."""

    def __init__(
        self, prepared: Prepared, base: str, task: str, identity: str, folder: Path | None
    ) -> None:
        from trans_peft.models import load_base
        from trans_peft.transfer.load_adapter import attached

        loaded = load_base(prepared.base(base), "float32")
        rows = prepared.rows(task) / "eval.jsonl"
        examples = parse_examples(rows.read_bytes(), rows.name)
        self.tokenizer = loaded.tokenizer
        self.prompts = [examples[i].prompt_ids(loaded.tokenizer) for i in prompts_of(examples)]
        self._suite = prepared.suites[task]
        self._attached = (
            nullcontext(loaded.model) if folder is None else attached(loaded.model, folder)
        )

    def __enter__(self) -> "_Session":
        self.model: Any = self._attached.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._attached.__exit__(*error)

    def answers(self, drafts: Sequence[Sequence[int]] | None = None) -> list[list[int]]:
        """Return the token ids of the greedy answers."""
        from trans_peft.validation.decoding.generation import generate

        suite = self._suite
        return generate(
            self.model, self.tokenizer, self.prompts,
            max_new_tokens=suite.max_new_tokens, stop=suite.stop, drafts=drafts,
        ).ids  # fmt: skip

    def compared(self, old: _Recorded) -> tuple[int, float]:
        """Return the number of answers that equal the recorded ones, and the KL along these."""
        from trans_peft.validation.decoding.next_tokens import mean_kl, next_tokens

        new = self.answers(drafts=old.answers)
        equal = sum(a == b for a, b in zip(old.answers, new, strict=True))
        pairs = list(zip(self.prompts, (a[:-1] for a in old.answers), strict=True))
        return equal, mean_kl(old.expected, next_tokens(self.model, pairs, like=old.expected))


def _answers_on_v1(
    prepared: Prepared,
    task: str,
    identity: str,
    folder: Path | None,
    session: _Session | None = None,
) -> _Recorded:
    """Return the answers of an adapter on v1. `session` records them if they are missing."""
    import torch

    from trans_peft.validation.decoding.next_tokens import NextTokens, next_tokens

    key = _key(prepared, identity, task, V1)
    path = prepared.folder / "agreement" / f"{key[:24]}.pt"
    if not path.exists():
        if session is None:
            raise NotFoundError(
                f"the answers on {V1} are missing: {path}",
                do="run python -m study.label_free from the start",
            )
        answers = session.answers()
        pairs = list(zip(session.prompts, (answer[:-1] for answer in answers), strict=True))
        expected = next_tokens(session.model, pairs)
        with open_atomic(path) as file:
            torch.save({"answers": answers, **vars(expected)}, file)
    kept = torch.load(path, weights_only=True)
    return _Recorded(kept.pop("answers"), NextTokens(**kept))


def _key(prepared: Prepared, identity: str, task: str, base: str) -> str:
    return content_sha256(["label-free", PROMPTS, prepared.key(identity, task, base)])


def _append(line: Measured) -> None:
    with MEASURED.open("a") as file:
        file.write(json.dumps(asdict(line)) + "\n")


def _excluded(folder: Path) -> dict[str, list[int]]:
    """Return the positions of the answered items, by task."""
    kept = MEASURED.with_name("label_free_prompts.json")
    if folder.is_dir() and (folder / "rows").is_dir():
        positions = {}
        for task in TASKS:
            rows = folder / "rows" / task / "eval.jsonl"
            positions[task] = prompts_of(parse_examples(rows.read_bytes(), rows.name))
        kept.write_text(json.dumps(positions) + "\n")
    return dict(json.loads(kept.read_text()))


if __name__ == "__main__":
    main()
