import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.validation.peers import LLM_ADAPTERS, disagreements
from trans_peft.errors import DataError, EvaluationError
from trans_peft.validation.rules import text
from trans_peft.validation.rules.text import (
    chrf,
    exact_match,
    json_equal,
    label_f1,
    regex,
    rouge_l,
)
from trans_peft.validation.scoring import make_scorer
from trans_peft.validation.suites import named

# sacrebleu 2.6.0, `sentence_chrf(answer, [reference]).score`
SACREBLEU = [
    ("Return the sum.", "Return the sum.", 100.0),
    ("", "x", 0.0),
    ("x", "", 0.0),
    ("abc", "xyz", 0.0),
    ("Load a model from disk.", "Loads the model from a file", 44.3763),
    ("a", "a", 100.0),
    ("ab", "abcdefgh", 23.4043),
    ("Return  the\tsize\n", "Return the size of x", 81.0746),
    ("héllo wörld", "hello world", 31.2235),
    ("the the the", "the", 61.4919),
    ("Parse arguments and run", "Run the command line", 14.5542),
    ("none a open folder in is files", "in ü of list list the is 12", 10.4976),
    ("files none ü", "folder the a raise ü 12", 9.2126),
    ("a folder the ü ü the found none", "raise", 6.8182),
    ("open files found of or open", "is a the", 5.4348),
    ("found 12 folder files open list", "is or 12 raise or a", 13.41),
    ("files open of is return 12 open", "the none", 14.8732),
    ("ü found ü", "found folder folder open of if found", 10.4364),
    ("or a if 12 ü is the", "folder raise", 16.815),
    ("open none the of", "files is the", 13.2729),
    ("found of is", "return raise", 8.0255),
    ("in in", "return return", 4.8077),
    ("none folder none", "ü", 0.0),
]

# rouge-score 0.1.2, `RougeScorer(["rougeL"]).score(reference, answer)["rougeL"].fmeasure` x 100
ROUGE_SCORE = [
    ("Loads the model from a file", "Load a model from disk.", 36.3636),
    ("", "x", 0.0),
    ("the the the", "the", 50.0),
    ("héllo wörld", "hello world", 0.0),
    ("Return  the\tsize\n", "Return the size of x", 75.0),
    ("a b c d e", "e d c b a", 20.0),
    ("it's 3.5-fold", "its 3 5 fold", 66.6667),
    ("RUN", "run", 100.0),
    ("one two three four five six", "two four six eight", 60.0),
    ("snake_case", "snake case", 100.0),
]

WORDS = st.text("ab cé\n", max_size=12)


@pytest.mark.parametrize(("answer", "reference", "score"), SACREBLEU)
def test_chrf_is_sacrebleus(answer, reference, score):
    assert chrf(answer, reference) == pytest.approx(score, abs=1e-4)


@pytest.mark.parametrize(("answer", "reference", "score"), ROUGE_SCORE)
def test_rouge_l_is_that_of_rouge_score(answer, reference, score):
    assert rouge_l(answer, reference) == pytest.approx(score, abs=1e-4)


@pytest.mark.parametrize("degree", [chrf, rouge_l, label_f1])
@given(WORDS, WORDS)
def test_a_degree_lies_between_0_and_100_and_is_100_for_the_same_text(degree, answer, reference):
    try:
        found = degree(answer, reference)
    except DataError:
        return
    assert 0 <= found <= 100 + 1e-9
    if reference.strip():
        assert degree(reference, reference) == pytest.approx(100)


@pytest.mark.parametrize(
    ("answer", "reference", "right"),
    [
        (" ValueError\n", "ValueError", True),
        ("ValueError", " ValueError", True),
        ("valueerror", "ValueError", False),
        ("ValueError.", "ValueError", False),
        ("Value Error", "ValueError", False),
        ("", "ValueError", False),
    ],
)
def test_exact_match_leaves_aside_only_the_white_space_around(answer, reference, right):
    assert exact_match(answer, reference) == (100 if right else 0)


@pytest.mark.parametrize(
    ("answer", "reference", "f1"),
    [
        ("a", "a", 100),
        ("b, a", "a,b", 100),
        ("a\na\n b ", "a, b", 100),
        ("a", "a, b", 200 / 3),
        ("a, c", "a, b", 50),
        ("A", "a", 0),
        ("", "a", 0),
    ],
)
def test_labels_are_compared_as_sets(answer, reference, f1):
    assert label_f1(answer, reference) == pytest.approx(f1)


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ('{"b": [1, true, null], "a": "x"}', True),
        (' {"a":"x","b":[1.0,true,null]}\n', True),
        ('{"a": "x", "b": [true, true, null]}', False),
        ('{"a": "x", "b": [1, 1, null]}', False),
        ('{"a": "x", "b": [1, null, true]}', False),
        ('{"a": "x", "a": "x", "b": [1, true, null]}', False),
        ('{"a": "x", "b": [1, true, NaN]}', False),
        ('Here it is: {"a": "x", "b": [1, true, null]}', False),
        ("[" * 100_000, False),
        ("9" * 5_000, False),
        ("", False),
    ],
)
def test_json_is_compared_as_values(answer, right):
    assert json_equal(answer, '{"a": "x", "b": [1, true, null]}') == (100 if right else 0)


@given(st.recursive(st.none() | st.booleans() | st.integers(), st.lists, max_leaves=4))
def test_a_json_value_equals_itself_and_no_list_around_it(value):
    text = json.dumps(value)
    assert json_equal(json.dumps(value, indent=3), text) == 100
    assert json_equal(f"[{text}]", text) == 0


PIECES = (
    "true", "false", "True", "answer1", "answer6", "answer 2", "answer4", "answer5", "solution1",
    "Solution2", "solution2", "ending1", "ending3", "option1", "option2", "the correct answer is ",
    "untrue", " ", "\n", ".", "### Response:", "\ufffd",
)  # fmt: skip


@pytest.mark.parametrize("name", LLM_ADAPTERS)
@settings(deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=8).map("".join), st.data())
def test_the_papers_suites_are_marked_as_llm_adapters_does(name, output, data):
    suite = named(name)
    label = data.draw(st.sampled_from(LLM_ADAPTERS[name].split("|")))
    row = {
        "output": output.partition(suite.stop[0])[0],  # where our decoding ends
        "reference": f" the correct answer is {label}",
    }
    assert disagreements(name, make_scorer(suite), [row]) == []


@pytest.mark.parametrize(
    ("pattern", "answer", "right"),
    [
        (r"#### (\d+)", "so #### 18", True),
        (r"#### (\d+)", "so #### 18 #### 19", True),
        (r"#### (\d+)", "so #### 19 #### 18", False),
        (r"#### (\d+)", "18", False),
        (r"#### \d+", "#### 18 or so", True),
        (r"#### (\d+)( or)?", "#### 18 or", True),
    ],
)
def test_a_group_is_what_counts_of_a_match(pattern, answer, right):
    assert regex(pattern)(answer, "#### 18") == (100 if right else 0)


def test_a_pattern_that_would_search_for_ever_is_an_error_and_the_next_one_works(monkeypatch):
    monkeypatch.setattr(text, "CPU_LIMIT_S", 0)
    with pytest.raises(EvaluationError, match="does not come to an end"):
        regex("(a+)+b")("a" * 64, "aab")
    assert regex("(a+)+b")("so aab", "aab") == 100
