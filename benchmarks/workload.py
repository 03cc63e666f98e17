"""The adapters, items and gate that every arm of `benchmarks.validate` evaluates."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from study.fleet import FAMILY, class_suite, classes, statements, suite
from trans_peft.bases.fingerprint import fingerprint
from trans_peft.cli.workspace import EvaluationFolder
from trans_peft.data import pin, read_examples
from trans_peft.domain.adapter import AdapterVersion
from trans_peft.domain.base import BaseVersion
from trans_peft.domain.evaluation import BARE, Evaluation, GatePolicy, ItemResult, Suite
from trans_peft.edges.file_store import FileStore
from trans_peft.edges.memory import memory_platform
from trans_peft.lifecycle.base_files import base_folder
from trans_peft.lifecycle.evaluation import EvaluationSubject, evaluate_on
from trans_peft.models import adapter_weights_sha256
from trans_peft.validation.gate import judge
from trans_peft.validation.scoring import make_scorer


class Answers(NamedTuple):
    """A kind of answer: the file of its rows in a study, its suite, and the number of items."""

    rows: Callable[[Path], Path]
    suite: Callable[[Path], Suite]
    items: int


ANSWERS = {
    "class": Answers(classes, class_suite, 1000),
    "statement": Answers(lambda study: statements(study)["eval"], suite, 240),
}


@dataclass(frozen=True)
class Task:
    """The input of an arm, sent to its process as JSON."""

    study: str
    update: str
    adapters: dict[str, str]
    answers: str
    rows: str
    items: int
    batch: int
    margin: float
    clock: str
    threads: int
    references: str


class Workload:
    """The platform of one process: both bases, and the adapters, registered on the old base."""

    def __init__(self, task: Task) -> None:
        self.task, study = task, Path(task.study)
        self.platform = replace(memory_platform(study / "fleet" / "work"), store=FileStore())
        self.known = EvaluationFolder(Path(task.references))
        asked = ANSWERS[task.answers].suite(Path(task.rows))
        self.suite = replace(asked, data=pin(asked.data, FileStore()), limit=task.items)
        self.policy = GatePolicy(margin_points=task.margin)
        bases = []
        for name in ("v1", task.update):
            uri = str(study / "bases" / name)
            made_of = fingerprint(uri, FileStore())
            bases.append(
                self.platform.catalog.make_ready(
                    BaseVersion(FAMILY, name, uri, 0), fingerprint=made_of, source="benchmark"
                )
            )
            base_folder(bases[-1], self.platform)
        self.old, self.new = bases
        self.versions = {
            name: self.platform.registry.register(
                AdapterVersion(
                    adapter=name,
                    number=0,
                    base=self.old.ref,
                    trained_on=self.old.ref,
                    weights_sha256=adapter_weights_sha256(Path(folder)),
                    method=name.partition("-")[0],
                    suites=(self.suite,),
                ),
                Path(folder),
            )
            for name, folder in task.adapters.items()
        }

    @property
    def folder(self) -> Path:
        """The folder of the new base."""
        return base_folder(self.new, self.platform)

    def reference(self, name: str) -> Any:
        """Return the evaluation of an adapter on the old base, made once for all arms."""
        platform = replace(self.platform, evaluations=self.known)
        folder = Path(self.task.adapters[name])
        weights = self.versions[name].weights_sha256
        subject = EvaluationSubject(folder.name, weights, lambda: folder)
        found = evaluate_on(self.old, [self.suite], platform, subject)
        return found[self.suite.name]

    def evaluation(self, texts: Sequence[str], weights_sha256: str) -> Any:
        """Return answers on the new base as an evaluation, scored by the suite's rule."""
        is_right = make_scorer(self.suite)
        examples = read_examples(self.suite.data, self.platform.store, limit=self.suite.limit)
        items = tuple(
            ItemResult(example.id, is_right(text, example.completion), answer=text)
            for example, text in zip(examples, texts, strict=True)
        )
        return Evaluation(
            suite=self.suite.name,
            weights_sha256=weights_sha256,
            base_fingerprint_sha256=self.new.fingerprint_sha256,
            suite_sha256=self.suite.suite_sha256,
            decoding_sha256=self.suite.decoding_sha256,
            items=items,
        )

    def judged(self, texts: Mapping[str, Sequence[str]], bare: Sequence[str]) -> dict[str, Any]:
        """Return each adapter's verdict and answers, given the answers on the new base."""
        name_of = self.suite.name
        beside = {name_of: self.evaluation(bare, BARE)}
        found = {}
        for name, said in texts.items():
            candidate = {name_of: self.evaluation(said, self.versions[name].weights_sha256)}
            reference = {name_of: self.reference(name)}
            judgment = judge(self.policy, reference, candidate, beside)
            found[name] = {"verdict": str(judgment.verdict), "answers": list(said)}
        return found
