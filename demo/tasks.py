"""Split examples from source files into training and evaluation rows without overlap.

Further prompts without answers stand for the recent traffic of an adapter. Three rules keep
evaluation rows out of training. A text occurs once (compared by its words, `demo.sources.words`).
The rows of a file are on one side only. A training row that shares most of its words with an
evaluation row is dropped.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from demo.sources import SourceFile, jaccard, rank, words
from trans_peft.errors import DataError

__all__ = [
    "FILES",
    "Example",
    "HeldOut",
    "Row",
    "Split",
    "Task",
    "is_written",
    "read_held_out",
    "split",
    "write",
]

FILES = ("train.jsonl", "eval.jsonl", "prompts.jsonl", "held_out.json")
"""Files of a split, in the order in which they are written."""

EVALUATION_SHARE = 0.4  # of the files; their remaining rows are not used
MAX_SHARED_WORDS = 0.7  # Jaccard index of a training and an evaluation row, without quoted names


@dataclass(frozen=True)
class Example:
    """A prompt and its completion. `text` must be unique; the rows are balanced by `label`."""

    prompt: str
    completion: str
    text: str
    label: str = ""


@dataclass(frozen=True)
class Row:
    """An example and its source file. `id` depends only on the text."""

    example: Example
    file: str

    @property
    def id(self) -> str:
        """Hash of prompt and completion, 12 hex digits."""
        return sha256(f"{self.example.prompt}\0{self.example.completion}".encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Task:
    """A named source of examples, with the number of rows to keep for each label.

    `files_share` is the share of all files that are read.
    """

    name: str
    examples: Callable[[SourceFile], Iterator[Example]]
    train_per_label: int
    evaluation_per_label: int
    files_share: float = 1.0


@dataclass(frozen=True)
class Split:
    """Rows of one task in the order in which they are written.

    `unused` has the other rows from the files that supply `train`. Only their prompts are written.
    """

    train: tuple[Row, ...]
    evaluation: tuple[Row, ...]
    unused: tuple[Row, ...]


def split(task: Task, files: Iterable[SourceFile], seed: int = 0) -> Split:
    """Extract the task's examples and split them. DataError if a label has too few rows.

    `seed` selects the files for evaluation and the rows of each label that are kept.
    """
    selected = (file for file in files if rank(file.name, seed + 1_000) < task.files_share)
    rows = _unique(Row(example, file.name) for file in selected for example in task.examples(file))
    rows.sort(key=lambda row: rank(row.id, seed))
    evaluation: list[Row] = []
    train: list[Row] = []
    for row in rows:
        side = evaluation if rank(row.file, seed) < EVALUATION_SHARE else train
        side.append(row)
    evaluation = _balanced(evaluation, task.evaluation_per_label)
    available = _apart_from(train, evaluation)
    train = _balanced(available, task.train_per_label)
    ids = {row.id for row in train}
    unused = tuple(row for row in available if row.id not in ids)

    counts = {
        label: (count, Counter(row.example.label for row in train)[label])
        for label, count in Counter(row.example.label for row in evaluation).items()
    }
    short = {label: found for label, found in counts.items() if min(found) < 20}
    if short or not counts:
        raise DataError(
            f"task {task.name}: too few rows in the installed packages",
            expected="20 evaluation and 20 training rows of each label",
            found=short or "none",
        )
    return Split(tuple(train), tuple(evaluation), unused)


def write(parts: Split, folder: Path) -> None:
    """Write train.jsonl and eval.jsonl, prompts.jsonl, and held_out.json for `HeldOut`.

    Rows have prompt, completion and id; those of prompts.jsonl have no completion.
    """
    prompts = [{"prompt": row.example.prompt, "id": row.id} for row in parts.unused]
    held_out = {
        "files": sorted({row.file for row in parts.evaluation}),
        "texts": [row.example.text for row in parts.evaluation],
    }
    contents = (
        _lines(_with_completion(parts.train)),
        _lines(_with_completion(parts.evaluation)),
        _lines(prompts),
        json.dumps(held_out, indent=1),
    )
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in zip(FILES, contents, strict=True):
        (folder / name).write_text(content)


def _with_completion(rows: Iterable[Row]) -> list[dict[str, str]]:
    return [
        {"prompt": row.example.prompt, "completion": row.example.completion, "id": row.id}
        for row in rows
    ]


def _lines(values: Iterable[dict[str, str]]) -> str:
    return "".join(json.dumps(value) + "\n" for value in values)


def is_written(folder: Path) -> bool:
    """Whether the folder has all files that `write` writes."""
    return all((folder / name).exists() for name in FILES)


@dataclass(frozen=True)
class HeldOut:
    """The files and texts of evaluation rows, which must not occur in training."""

    files: frozenset[str]
    texts: tuple[tuple[str, ...], ...]

    def touches(self, file: SourceFile) -> bool:
        """Whether a file supplied an evaluation row, or contains the words of one."""
        if file.name in self.files:
            return True
        content = f" {' '.join(words(file.text))} "
        return any(f" {' '.join(text)} " in content for text in self.texts)


def read_held_out(folders: Iterable[Path]) -> HeldOut:
    """Read the files that `write` wrote to these folders, and combine them."""
    parts = [json.loads((folder / "held_out.json").read_text()) for folder in folders]
    return HeldOut(
        frozenset(name for part in parts for name in part["files"]),
        tuple(words(text) for part in parts for text in part["texts"]),
    )


def _unique(rows: Iterable[Row]) -> list[Row]:
    """Keep the first row of each text, and no row if equal texts have different completions."""
    by_text: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in rows:
        by_text[words(row.example.text)].append(row)
    return [
        same[0] for same in by_text.values() if len({row.example.completion for row in same}) == 1
    ]


def _balanced(rows: Iterable[Row], per_label: int) -> list[Row]:
    kept: Counter[str] = Counter()
    chosen = []
    for row in rows:
        kept[row.example.label] += 1
        if kept[row.example.label] <= per_label:
            chosen.append(row)
    return chosen


def _apart_from(rows: Iterable[Row], others: Iterable[Row]) -> list[Row]:
    """Drop every row that shares more than MAX_SHARED_WORDS of its words with one of the others."""
    taken = [frozenset(words(other.example.text, drop_quoted=True)) for other in others]
    by_word: dict[str, set[int]] = defaultdict(set)
    for index, bag in enumerate(taken):
        for word in bag:
            by_word[word].add(index)
    kept = []
    for row in rows:
        own = frozenset(words(row.example.text, drop_quoted=True))
        near = set().union(*(by_word[word] for word in own)) if own else set()
        if all(jaccard(own, taken[index]) <= MAX_SHARED_WORDS for index in near):
            kept.append(row)
    return kept
