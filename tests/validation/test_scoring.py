import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trans_peft.domain.data import DataSource
from trans_peft.domain.evaluation import Suite
from trans_peft.errors import DataError, EvaluationError, InvalidSpecError
from trans_peft.validation.rules import entry_point
from trans_peft.validation.rules.text import chrf
from trans_peft.validation.scoring import RULES, make_scorer

# rule -> how a suite names it, an answer that is right, one that is wrong, the reference, and a
# reference that nothing could equal (None: there is none)
EXAMPLES = {
    "exact_match": ("exact_match", "ValueError", "valueerror", "ValueError", None),
    "regex": ("regex:true|false", "it is true", "false", "true", "maybe"),
    "json_equal": ("json_equal", '{"a": 1}', "{'a': 1}", '{ "a": 1.0 }', "{a}"),
    "choice": ("choice", " yes", "yes", " yes", None),
    "math_verify": ("math_verify:####", "so #### 1/2.", "1/2", "#### 1/2", "1/2"),
    "metamath_gsm8k": (
        "metamath_gsm8k", "The answer is: 12.3 km", "The answer is: 1200", "The answer is: 12",
        "The answer is: twelve",
    ),
    "metamath_math": (
        "metamath_math", "The answer is: \\dfrac12.", "The answer is: 0.51", "The answer is: 1/2",
        "1/2",
    ),
    "paper_gsm8k": (
        "paper_gsm8k", "The answer is: 12.3 km", "12", "#### 12\nThe answer is: 12", "12",
    ),
    "paper_math": ("paper_math", "The answer is: \\frac12.", "1/2", "The answer is: 0.5", "0.5"),
    "bleu": ("bleu", "Load the model now", "xyz", "Load the model", " \n"),
    "chrf": ("chrf", "Loads the model", "xyz", "Load the model", " \n"),
    "rouge_l": ("rouge_l", "Loads the model!", "Laden", "loads a model", "你好"),
    "harness_match": (
        'harness_match:{"filter": [{"function": "regex", "regex_pattern": "[0-9]+"}]}',
        "it is 12.", "13", '["11", "12"]', "12",
    ),
    "label_f1": ("label_f1", "b, a", "c", "a\nb", " ,"),
}  # fmt: skip


def suite(**options):
    return Suite("docs", DataSource("docs.jsonl", "0" * 64), **options)


def marked(name):
    scoring, *_ = EXAMPLES[name]
    return make_scorer(suite(scoring=scoring, threshold=50.0 if RULES[name].is_graded else None))


@pytest.mark.parametrize("name", sorted(RULES.keys() - {"python", "code", "judge"}))
def test_every_rule_distinguishes_right_and_wrong_answers(name):
    _, right, wrong, reference, unusable = EXAMPLES[name]
    is_right = marked(name)
    assert is_right(right, reference)
    assert is_right(reference, reference)
    assert not is_right(wrong, reference)
    assert not is_right("", reference)
    if unusable is not None:
        with pytest.raises(DataError):
            is_right("", unusable)


def test_a_graded_rule_is_right_at_its_threshold_and_above():
    degree = chrf("Loads the model from a file", "Load a model from disk.")
    for threshold, right in [(degree, True), (degree + 0.01, False)]:
        is_right = make_scorer(suite(scoring="chrf", threshold=threshold))
        assert is_right("Loads the model from a file", "Load a model from disk.") is right


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scoring": "meteor"}, "exact_match, regex"),
        ({"scoring": "chrf", "threshold": 0.0}, "invalid threshold"),
        ({"scoring": "chrf", "threshold": 101.0}, "invalid threshold"),
        ({"scoring": "exact_match", "threshold": 50.0}, "takes no threshold"),
        ({"scoring": "exact_match:x"}, "invalid parameter of the scoring rule exact_match"),
        ({"scoring": "exact_match:"}, "invalid parameter of the scoring rule exact_match"),
        ({"scoring": "regex"}, "regex:PATTERN"),
        ({"scoring": "regex:("}, "unterminated subpattern"),
        ({"scoring": "regex:[z-a]"}, "bad character range"),
        ({"scoring": "regex:(?P<a>x)(?P<a>x)"}, "redefinition of group name"),
        ({"scoring": "regex:a{99999999999999999999}"}, "repetition number is too large"),
        ({"scoring": "regex:(?L)a"}, "bad inline flags"),
        ({"scoring": "regex:" + "(" * 1500 + ")" * 1500}, "recursion"),
        ({"scoring": "regex:" + "a" * 4001}, "4001 characters, at most 4000"),
        ({"scoring": "harness_match"}, "harness_match:SETTINGS"),
        ({"scoring": "harness_match:{"}, "no JSON"),
        ({"scoring": "harness_match:[]"}, "no object"),
        ({"scoring": 'harness_match:{"ignore_case": 1}'}, "'ignore_case' with the value '1'"),
        ({"scoring": 'harness_match:{"regexes_to_ignore": ["("]}'}, "unterminated subpattern"),
        ({"scoring": 'harness_match:{"filter": [{"function": "vote"}]}'}, "is not one of regex"),
        (
            {"scoring": 'harness_match:{"filter": [{"function": "lowercase", "k": 2}]}'},
            "the filter lowercase: 'k' may not be '2'",
        ),
        ({"scoring": "choice:per_word"}, "choice:per_token or"),
        ({"scoring": "python"}, "python:NAME==VERSION"),
    ],
)
def test_an_invalid_scoring_rule_is_refused(options, message):
    with pytest.raises(InvalidSpecError, match=message):
        make_scorer(suite(**options))


@given(st.text("ab(){}[]?*+|\\\\^$.1,<>=!:P-LiumsxakdDwWbBAZ0#\ud800", max_size=12))
@settings(max_examples=200, deadline=None)
def test_any_pattern_is_accepted_or_refused(pattern):
    try:
        make_scorer(suite(scoring=f"regex:{pattern}"))
    except InvalidSpecError as error:
        assert "expression cannot be used" in str(error) or not pattern


@pytest.mark.parametrize(
    "text", ["[" * 5000 + "]" * 5000, "1" * 5000, "\ud800", "NaN", '{"a":1,"a":1}']
)
def test_unreadable_json_is_an_invalid_reference_and_a_wrong_answer(text):
    is_right = make_scorer(suite(scoring="json_equal"))
    if text != "\ud800":
        assert not is_right(text, "[1]")
    with pytest.raises(DataError, match="not JSON"):
        is_right("[1]", text)


class Point:
    """An entry point of an installed package, as importlib.metadata gives it."""

    def __init__(self, name, version, function):
        self.name, self.dist, self._function = name, self, function
        self.version = version

    def load(self):
        return self._function()


@pytest.fixture
def installed(monkeypatch):
    def loaded(function):
        return lambda: function

    def broken():
        raise ImportError("no such module")

    points = [
        Point("longer", "1.2.0", loaded(lambda answer, reference: len(answer) > len(reference))),
        Point("vague", "1.2.0", loaded(lambda answer, reference: 0.7)),
        Point("broken", "1.2.0", broken),
    ]
    monkeypatch.setattr(
        entry_point, "entry_points", lambda group: points if group == "trans_peft.scoring" else []
    )


@pytest.mark.usefixtures("installed")
def test_a_custom_rule_is_loaded_from_an_entry_point():
    is_right = make_scorer(suite(scoring="python:longer==1.2.0"))
    assert is_right("abc", "ab")
    assert not is_right("a", "ab")


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("scoring", "message"),
    [
        ("python:longer", "longer==1.2.0, vague"),
        ("python:longer==1.3.0", "longer==1.2.0"),
        ("python:shorter==1.2.0", "found:    python:shorter==1.2.0"),
        ("python:broken==1.2.0", "ImportError: no such module"),
    ],
)
def test_a_rule_that_is_not_installed_in_that_version_is_refused(scoring, message):
    with pytest.raises(InvalidSpecError, match=message):
        make_scorer(suite(scoring=scoring))


@pytest.mark.usefixtures("installed")
def test_a_custom_rule_must_return_a_bool():
    with pytest.raises(EvaluationError, match="True or False"):
        make_scorer(suite(scoring="python:vague==1.2.0"))("a", "b")
