import pytest
from hypothesis import given
from hypothesis import strategies as st

from trans_peft.domain.data import DataSource
from trans_peft.domain.evaluation import Suite
from trans_peft.errors import InvalidSpecError
from trans_peft.validation.scoring import RULES, chrf, exact_match, marker

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

WORDS = st.text("ab cé\n", max_size=12)


def suite(**options):
    return Suite("docs", DataSource("docs.jsonl", "0" * 64), **options)


@pytest.mark.parametrize(("answer", "reference", "score"), SACREBLEU)
def test_chrf_is_sacrebleus(answer, reference, score):
    assert chrf(answer, reference) == pytest.approx(score, abs=1e-4)


@given(WORDS, WORDS)
def test_chrf_lies_between_0_and_100_and_is_100_for_the_same_text(answer, reference):
    assert 0 <= chrf(answer, reference) <= 100 + 1e-9
    if reference.strip():
        assert chrf(reference, reference) == pytest.approx(100)


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
    assert marker(suite())(answer, reference) is right


def test_a_graded_rule_is_right_at_its_threshold_and_above():
    degree = chrf("Loads the model from a file", "Load a model from disk.")
    for threshold, right in [(degree, True), (degree + 0.01, False)]:
        is_right = marker(suite(scoring="chrf", threshold=threshold))
        assert is_right("Loads the model from a file", "Load a model from disk.") is right


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"scoring": "bleu"}, "exact_match, chrf"),
        ({"scoring": "chrf"}, "needs a threshold"),
        ({"scoring": "chrf", "threshold": 0.0}, "needs a threshold"),
        ({"scoring": "chrf", "threshold": 101.0}, "needs a threshold"),
        ({"scoring": "exact_match", "threshold": 50.0}, "takes no threshold"),
    ],
)
def test_a_suite_that_cannot_be_marked_is_refused(options, told):
    with pytest.raises(InvalidSpecError, match=told):
        marker(suite(**options))


@pytest.mark.parametrize("name", RULES)
def test_every_rule_knows_a_right_answer_from_a_wrong_one(name):
    rule = RULES[name]
    assert rule.degree("ValueError", "ValueError") == pytest.approx(100)
    assert rule.degree("xyz", "ValueError") == 0
