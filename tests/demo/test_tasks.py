import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from demo import exceptions
from demo.sources import SourceFile, jaccard, rank, words
from demo.tasks import MAX_SHARED_WORDS, Example, Task, is_written, read_held_out, split, write
from trans_peft.data import parse_examples
from trans_peft.errors import DataError

NOUNS = [
    "apple",
    "bridge",
    "castle",
    "dragon",
    "engine",
    "forest",
    "garden",
    "hammer",
    "island",
    "jacket",
    "kettle",
    "ladder",
]
VERBS = [
    "breaks",
    "carries",
    "drops",
    "enters",
    "finds",
    "gives",
    "holds",
    "invites",
    "joins",
    "keeps",
    "loses",
    "moves",
]


def _package(files: int = 60) -> list[SourceFile]:
    """Many files that raise two classes; some messages stand in several files."""
    made = []
    for number in range(files):
        a, b, c = (NOUNS[(number * step) % 12] for step in (1, 5, 7))
        verb = VERBS[number % 11]
        source = (
            f"raise TypeError('{a} {verb} {b} {number} never')\n"
            f"raise KeyError('{c} {verb} the {a} near {VERBS[number % 7]} {b}')\n"
            "raise TypeError('the same everywhere in here')\n"
        )
        made.append(SourceFile(f"package/module_{number}.py", source))
    return made


TASK = Task("toy", exceptions.examples, train_per_label=30, evaluation_per_label=20)


@pytest.mark.parametrize("seed", range(4))
def test_training_and_evaluation_rows_do_not_overlap(seed: int):
    parts = split(TASK, _package(400), seed)
    assert parts.train and parts.evaluation
    assert not {row.file for row in parts.train} & {row.file for row in parts.evaluation}
    seen = [words(row.example.text) for row in (*parts.train, *parts.evaluation)]
    assert len(set(seen)) == len(seen)
    closest = max(
        jaccard(words(a.example.text), words(b.example.text))
        for a in parts.train
        for b in parts.evaluation
    )
    assert closest <= MAX_SHARED_WORDS


def test_a_split_depends_only_on_its_seed():
    files = _package(400)
    assert split(TASK, files, 1) == split(TASK, list(files), 1)
    assert split(TASK, files, 1) != split(TASK, files, 2)


def test_no_label_has_more_rows_than_the_limit():
    parts = split(TASK, _package(400))
    assert max(Counter(row.example.label for row in parts.train).values()) <= 30
    assert max(Counter(row.example.label for row in parts.evaluation).values()) <= 20


def test_equal_texts_with_different_answers_are_dropped():
    def two_answers(file: SourceFile):
        yield Example("q", " a", text="the very same words", label="a")
        yield Example("q", f" {file.name}", text="The very, same words!", label="b")

    with pytest.raises(DataError, match="too few rows"):
        split(Task("toy", two_answers, 10, 10), _package())


def test_rows_are_written_as_training_reads_them(tmp_path: Path):
    parts = split(TASK, _package(400))
    write(parts, tmp_path)
    for name, rows in (("train.jsonl", parts.train), ("eval.jsonl", parts.evaluation)):
        read = parse_examples((tmp_path / name).read_bytes(), name)
        assert [(e.id, e.prompt, e.completion) for e in read] == [
            (row.id, row.example.prompt, row.example.completion) for row in rows
        ]


def test_prompts_are_neither_training_nor_evaluation_rows_and_have_no_answers(tmp_path: Path):
    parts = split(TASK, _package(400))
    write(parts, tmp_path)
    assert is_written(tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "prompts.jsonl").read_text().splitlines()]
    assert rows and all(row.keys() == {"prompt", "id"} for row in rows)
    used = {row.id for row in (*parts.train, *parts.evaluation)}
    assert not used & {row["id"] for row in rows}
    files = {row.file for row in parts.evaluation}
    assert not files & {row.file for row in parts.unused}
    (tmp_path / "prompts.jsonl").unlink()
    assert not is_written(tmp_path)


def test_held_out_files_are_recognized(tmp_path: Path):
    parts = split(TASK, _package(400))
    write(parts, tmp_path)
    held_out = read_held_out([tmp_path])
    row = parts.evaluation[0]
    assert held_out.touches(SourceFile(row.file, ""))
    assert held_out.touches(SourceFile("other/copy.py", f"raise E('{row.example.text}')"))
    assert not held_out.touches(SourceFile("other/free.py", "nothing of the kind is said here"))


@given(st.text(), st.integers(0, 9))
def test_a_rank_is_deterministic(name: str, seed: int):
    assert 0 <= rank(name, seed) < 1
    assert rank(name, seed) == rank(name, seed)


@given(st.lists(st.sampled_from(NOUNS), min_size=1), st.lists(st.sampled_from(NOUNS), min_size=1))
def test_the_share_of_common_words_is_symmetric(a: list[str], b: list[str]):
    assert jaccard(a, b) == jaccard(b, a)
    assert jaccard(a, a) == 1.0
    assert (jaccard(a, b) == 0.0) == (not set(a) & set(b))
