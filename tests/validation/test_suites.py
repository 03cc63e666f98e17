"""The suites as data. Their prompts are tested in tests/test_templates.py, the rules in rules/."""

import json
import re
from pathlib import Path

import pytest

from trans_peft.data import pin, read_examples
from trans_peft.data.templates import TEMPLATES
from trans_peft.domain.data import DataSource
from trans_peft.edges.file_store import FileStore
from trans_peft.errors import NotFoundError
from trans_peft.validation.scoring import RULES, make_scorer
from trans_peft.validation.suites import PUBLISHED, named

PAPER = {
    "boolq", "piqa", "social_i_qa", "hellaswag", "winogrande", "arc_easy", "arc_challenge",
    "openbookqa", "gsm8k", "math", "humaneval", "mbpp", "mbpp_plus",
}  # fmt: skip


def test_the_papers_twelve_are_there_and_mbpp_twice():
    assert PUBLISHED.keys() == PAPER


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_suite_has_a_template_and_a_scoring_rule(name):
    suite, published = named(name, "s3://bucket/data/"), PUBLISHED[name]
    assert suite.data == DataSource(f"s3://bucket/data/{published.file}", "", published.template)
    assert named(name).data.uri == f"hub:{published.hub}"
    assert len(named(name).data.uri.split(":")) == 4  # the split is explicit
    assert suite.data.template in TEMPLATES
    make_scorer(suite)
    assert 0 <= suite.chance_points <= 50


def test_an_unknown_suite_is_not_found():
    with pytest.raises(NotFoundError, match="boolq, piqa"):
        named("squad")


def test_chance_is_the_score_of_random_choices():
    """From how many rows of the test files show how many options ("Answer format: ...")."""
    rows = {"arc_easy": {4: 2365, 3: 7, 5: 4}, "arc_challenge": {4: 1165, 3: 4, 5: 3},
            "boolq": {2: 3270}, "social_i_qa": {3: 1954}, "hellaswag": {4: 10_042}}  # fmt: skip
    for name, counts in rows.items():
        expected = sum(100 / options * count for options, count in counts.items())
        assert named(name).chance_points == pytest.approx(expected / sum(counts.values()))


def test_a_local_suite_is_pinned_and_answered(tmp_path):
    row = {
        "instruction": "Is it?\n\nAnswer format: true/false", "input": "",
        "output": "the correct answer is false", "answer": "false",
    }  # fmt: skip
    file = tmp_path / "commonsense" / "boolq" / "test.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps([row]))
    store, suite = FileStore(), named("boolq", str(tmp_path))
    (example,) = read_examples(pin(suite.data, store), store)
    is_right = make_scorer(suite)
    assert is_right("the correct answer is false", example.completion)
    assert is_right("it is false, not true", example.completion)
    assert not is_right("true or false", example.completion)
    assert re.search("Is it", example.prompt)


PAGE = (Path(__file__).parents[2] / "docs" / "suites.md").read_text()


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_page_lists_every_suite(name):
    row = next(line for line in PAGE.splitlines() if line.startswith(f"| `{name}` |"))
    assert f"{PUBLISHED[name].file}" in row
    assert PUBLISHED[name].hub.split(":")[0] in row
    assert float(row.split("|")[-2]) == pytest.approx(PUBLISHED[name].chance_points, abs=0.05)


@pytest.mark.parametrize("rule", RULES)
def test_the_page_explains_every_rule(rule):
    assert re.search(rf"^\| [^|]*`{rule}[:`]", PAGE, re.MULTILINE)
