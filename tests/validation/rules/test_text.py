import json
import math
import sys
import time
from collections import Counter
from statistics import mean

import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.validation.peers import LLM_ADAPTERS, disagreements
from trans_peft.domain.bounds import MAX_REFERENCE_CHARACTERS
from trans_peft.domain.data import DataSource
from trans_peft.domain.evaluation import _SCORING_REVISIONS, Suite
from trans_peft.errors import DataError, EvaluationError, InvalidSpecError
from trans_peft.validation.rules import text
from trans_peft.validation.rules.program import PYTHON
from trans_peft.validation.rules.text import (
    bleu,
    chrf,
    exact_match,
    json_equal,
    label_f1,
    regex,
    rouge_l,
)
from trans_peft.validation.scoring import RULES, make_scorer
from trans_peft.validation.suites import named

# sacrebleu 2.6.0, `sentence_chrf(answer, [reference]).score`. Other releases have to score alike.
CHRF = [
    ("Return the sum.", "Return the sum.", 100.0),
    ("", "x", 0.0),
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

# NLTK 3.10.4, `sentence_bleu([reference.split()], answer.split(), smoothing_function=method3)`
# x 100
BLEU = [
    ("the cat sat on the mat", "the cat sat on the mat today", 84.6482),
    ("the the the the the the the", "the cat is on the mat", 7.8098),
    (
        "It is a guide to action which ensures that the military always obeys the commands of the "
        "party",
        "It is a guide to action that ensures that the military will forever heed Party commands",
        41.1804,
    ),
    ("load the model from a file", "load a model from the disk now", 17.2787),
    ("a b c d e f g h", "a b c x e f g h", 50.0),
    ("a b c d", "e f g h", 0.0),
    ("the cat sat on the mat and slept", "the cat sat on the mat", 68.0375),
    ("x a b c d", "a b c d", 66.874),
    ("Loads the model , then stops .", "Load the model , then stop .", 43.4721),
]

# What NLTK does not have, by hand: answers of fewer than four words, and the words of `13a`.
SHORT_BLEU = [
    ("the cat sat", "the cat sat on", 100 * math.exp(1 - 4 / 3)),
    ("a b", "a c", 50.0),  # 1/2 of the words, and smoothed 1/2 of no pairs
    ("a", "a", 100.0),
    ("", "a", 0.0),
    ("A", "a", 0.0),
    ("Stop, now.", "Stop , now .", 100.0),
    ("1,000.5 a-b", "1,000.5 a-b", 100.0),
    ("a &amp; b", "a & b", 100.0),
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

PYTHON_CODE = f"code:{PYTHON}"
WORDS = st.text("ab cé\n", max_size=12)


@pytest.mark.parametrize(("answer", "reference", "score"), BLEU + SHORT_BLEU)
def test_bleu_equals_nltk_and_the_formula(answer, reference, score):
    assert bleu(answer, reference) == pytest.approx(score, abs=1e-4)


@pytest.mark.parametrize(("answer", "reference", "score"), CHRF)
def test_chrf_equals_the_recorded_scores(answer, reference, score):
    assert chrf(answer, reference) == pytest.approx(score, abs=1e-4)


def chrf_by_its_formula(answer, reference):
    """M. Popović's formula, with recall weighted twice, over the orders that both texts have."""
    texts = ["".join(text.split()) for text in (answer, reference)]
    precisions, recalls = [], []
    for order in range(1, min(6, *map(len, texts)) + 1):
        actual, expected = (
            Counter(text[at : at + order] for at in range(len(text) - order + 1)) for text in texts
        )
        shared = (actual & expected).total()
        precisions.append(shared / actual.total())
        recalls.append(shared / expected.total())
    if not any(precisions):
        return 0.0
    precision, recall = mean(precisions), mean(recalls)
    return 100 * 5 * precision * recall / (4 * precision + recall)


@given(WORDS, WORDS.filter(str.strip))
def test_chrf_equals_its_formula(answer, reference):
    assert chrf(answer, reference) == pytest.approx(chrf_by_its_formula(answer, reference))


def test_the_settings_of_sacrebleu_are_those_of_the_suites_hash():
    """A change of `bleu` has to change the hash. `chrf` is older than its signature here."""
    bleu("a", "a")
    chrf("a", "a")
    version = f"version:{sacrebleu.__version__}"
    wanted = f"nrefs:1|{_SCORING_REVISIONS['bleu']}|{version}"
    assert str(text._bleu().get_signature()) == wanted
    wanted = f"nrefs:1|case:mixed|eff:yes|nc:6|nw:0|space:no|{version}"
    assert str(text._chrf().get_signature()) == wanted


@pytest.mark.parametrize(
    ("rule", "package"), [(bleu, "sacrebleu"), (chrf, "sacrebleu"), (rouge_l, "rapidfuzz")]
)
def test_a_missing_package_is_named_with_its_extra(rule, package, monkeypatch):
    for name in {package, *(name for name in sys.modules if name.startswith(f"{package}."))}:
        monkeypatch.setitem(sys.modules, name, None)
    text._bleu.cache_clear()
    text._chrf.cache_clear()
    with pytest.raises(ModuleNotFoundError, match=rf"{package}.*\[eval\]"):
        rule("a", "a")


@pytest.mark.parametrize(("answer", "reference", "score"), ROUGE_SCORE)
def test_rouge_l_equals_rouge_score(answer, reference, score):
    assert rouge_l(answer, reference) == pytest.approx(score, abs=1e-4)


@pytest.mark.parametrize("degree", [bleu, chrf, rouge_l, label_f1])
@given(WORDS, WORDS)
def test_a_score_is_between_0_and_100_and_100_for_the_same_text(degree, answer, reference):
    try:
        found = degree(answer, reference)
    except DataError:
        return
    assert 0 <= found <= 100
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
def test_exact_match_ignores_only_white_space_at_both_ends(answer, reference, right):
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
def test_a_json_value_equals_itself_and_not_a_list_of_it(value):
    text = json.dumps(value)
    assert json_equal(json.dumps(value, indent=3), text) == 100
    assert json_equal(f"[{text}]", text) == 0


PIECES = (
    "true", "false", "True", "answer1", "answer6", "answer 2", "answer4", "answer5", "solution1",
    "Solution2", "solution2", "ending1", "ending3", "option1", "option2", "the correct answer is ",
    "untrue", " ", "\n", ".", "### Response:", "\ufffd",
)  # fmt: skip


@pytest.mark.parametrize(
    ("answer", "reference", "equal"),
    [
        ("1e999", "1e400", False),
        ("0.1", "0.1000000000000000000001", False),
        ("0.10", "1e-1", True),
        ("2.0", "2", True),
        ("1e99999999999999999999", "1", False),
        ('{"n": 1e-99999999999999999999}', '{"n": 1}', False),
    ],
)
def test_json_numbers_are_compared_exactly(answer, reference, equal):
    assert json_equal(answer, reference) == (100 if equal else 0)


@pytest.mark.parametrize("name", LLM_ADAPTERS)
@settings(deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=8).map("".join), st.data())
def test_the_papers_suites_get_the_scores_of_llm_adapters(name, output, data):
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
def test_the_first_group_of_a_match_is_compared(pattern, answer, right):
    assert regex(pattern)(answer, "#### 18") == (100 if right else 0)


def test_a_pattern_with_exponential_time_is_an_error_and_the_next_one_works(monkeypatch):
    monkeypatch.setattr(text, "CPU_LIMIT_S", 0)
    with pytest.raises(EvaluationError, match="takes too long"):
        regex("(a+)+b")("a" * 64, "aab")
    assert regex("(a+)+b")("so aab", "aab") == 100


SLOW_TO_COMPILE = "(?i)" + "[\0-\ufffe]" * 790
"""One class takes 4 to 30 ms: upper and lower case of 65,000 characters are computed."""


def test_a_pattern_that_takes_long_to_compile_is_refused_without_compiling_it_here():
    started = time.process_time()
    with pytest.raises(InvalidSpecError, match="more than 1 s of processor time"):
        regex(SLOW_TO_COMPILE)
    with pytest.raises(InvalidSpecError, match="4004 characters, at most 4000"):
        regex("(?i)" + "[\0-\ufffe]" * 800)
    assert time.process_time() - started < 1
    assert regex("(a)")("ba", "ca") == 100


def test_a_long_answer_and_the_longest_reference_are_compared_within_a_second():
    started = time.process_time()
    words = MAX_REFERENCE_CHARACTERS // 2
    assert rouge_l("a " * 4_000, "a " * words) == pytest.approx(200 * 4_000 / (4_000 + words))
    assert rouge_l("a b " * 2_000, "b " * words) > 0
    assert time.process_time() - started < 3


@pytest.mark.parametrize("degree", [bleu, chrf, rouge_l])
def test_a_longer_reference_is_refused(degree):
    reference = "x" * (MAX_REFERENCE_CHARACTERS + 1)
    with pytest.raises(DataError, match=f"at most {MAX_REFERENCE_CHARACTERS} characters"):
        degree("", reference)


BAD_REFERENCES = {
    "bleu": " ",
    "chrf": " ",
    "regex:(a)": "b",
    "rouge_l": "é",
    "label_f1": ",",
    "json_equal": "[",
    "metamath_gsm8k": "x",
    "metamath_math": "x",
    "paper_gsm8k": "x",
    "paper_math": "x",
    PYTHON_CODE: "x",
}


@pytest.mark.parametrize("scoring", BAD_REFERENCES)
def test_no_error_quotes_a_long_reference_whole(scoring):
    graded = RULES[scoring.partition(":")[0]].is_graded
    suite = Suite(
        "s", DataSource("x", "0" * 64), scoring=scoring, threshold=50.0 if graded else None
    )
    references = [BAD_REFERENCES[scoring] * 50_000]
    if scoring == PYTHON_CODE:
        row = {"prompt": "p", "test": "x = (" * 50_000, "entry_point": "f"}
        references += [
            json.dumps({"prompt": "x" * 50_000}),
            json.dumps(row),
            "[" * 100_000,
            json.dumps({"prompt": "p", "reference": "-" * 90_000 + "1", "test_list": ["f()"]}),
        ]
    for reference in references:
        with pytest.raises(DataError) as caught:
            make_scorer(suite)("x", reference)
        assert len(str(caught.value)) < 1000
