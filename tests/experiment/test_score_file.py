"""The file of scores: what is read again, and what is refused."""

import re
from dataclasses import asdict, replace

import pytest

from trans_peft.domain.experiment import OLD, PLAIN
from trans_peft.errors import IntegrityError, InvalidSpecError
from trans_peft.experiment.cells import Score
from trans_peft.experiment.score_file import ScoreFile

RATES = asdict(PLAIN) | {"spared_layers": []}  # as JSON has it
FIRST = Score("k1", "tiny", "LoRA", RATES, 1, None, OLD, OLD, "sums", "0110")
SECOND = replace(FIRST, key="k2", scored_on="v2", right="0010", gpu_seconds=0.1)


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "new" / "scores.jsonl"
    file = ScoreFile(path, Score)
    for score in (FIRST, SECOND):
        file.append(score)
    return path


def test_scores_are_read_again_as_they_were(path):
    assert list(ScoreFile(path, Score)) == [FIRST, SECOND]


def test_a_later_score_of_a_cell_counts(path):
    later = replace(FIRST, key="k3", right="1111")
    ScoreFile(path, Score).append(later)
    again = ScoreFile(path, Score)
    assert list(again) == [later, SECOND]
    assert "k3" in again and "k1" not in again


def test_an_unfinished_line_is_ignored_and_removed_by_the_next_score(path):
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"key": "unfin')
    file = ScoreFile(path, Score)
    assert list(file) == [FIRST, SECOND]
    assert path.read_bytes() == whole + b'{"key": "unfin', "reading changes nothing"
    file.append(replace(FIRST, key="k3"))
    file.append(replace(SECOND, key="k4"))
    assert [score.key for score in ScoreFile(path, Score)] == ["k3", "k4"]


def test_lines_of_earlier_versions_have_no_hash(path):
    path.write_text(re.sub(r', "sha256": "[0-9a-f]{64}"', "", path.read_text()))
    assert list(ScoreFile(path, Score)) == [FIRST, SECOND]


def without_hash(line: bytes) -> bytes:
    return re.sub(rb', "sha256": "[0-9a-f]{64}"', b"", line)


DAMAGE = {
    "cut": (lambda line: line[:40], "Expecting ':' delimiter"),
    "empty": (lambda _: b"", "Expecting value"),
    "no UTF-8": (lambda line: b"\xff\xfe" + line, "can't decode"),
    "a list": (lambda _: b"[1]", "not a JSON object"),
    "an edited answer": (lambda line: line.replace(b'"0010"', b'"1111"'), "it was edited"),
    "an edited name": (lambda line: line.replace(b'"v2"', b'"v3"'), "it was edited"),
    "another field": (lambda line: without_hash(line).replace(b'"key"', b'"id"'), "key: "),
    "another answer": (lambda line: without_hash(line).replace(b'"0010"', b'"00x0"'), "invalid"),
    "no perturbation": (
        lambda line: without_hash(line).replace(b"masking_p", b"masking"),
        "unexpected keyword argument 'masking'",
    ),
    "NaN": (lambda line: without_hash(line).replace(b"0.1", b"NaN"), "invalid values"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_line_is_named_and_nothing_is_changed(path, name):
    change, words = DAMAGE[name]
    first, second = path.read_bytes().splitlines()
    damaged = first + b"\n" + change(second) + b"\n"
    path.write_bytes(damaged)
    with pytest.raises(IntegrityError, match="1 of 2 lines cannot be used") as caught:
        ScoreFile(path, Score)
    (line,) = [line for line in str(caught.value).splitlines() if "line 2: " in line]
    assert words in line
    assert path.read_bytes() == damaged


@pytest.mark.parametrize("value", [{"right": "01 "}, {"loss": float("nan")}])
def test_a_score_has_right_and_wrong_answers_and_finite_numbers(value):
    with pytest.raises(InvalidSpecError, match="invalid values"):
        replace(FIRST, **value)
