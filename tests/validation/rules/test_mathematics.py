import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.validation import metamath, peers
from tests.validation.metamath import MARKER
from trans_peft.validation.rules import mathematics
from trans_peft.validation.rules.mathematics import equal, math_verify
from trans_peft.validation.rules.paper import paper_gsm8k, paper_math


@pytest.mark.parametrize(
    ("answer", "reference", "right"),
    [
        ("18", "18", True),
        ("$18", "18", True),
        ("18.00", "18", True),
        ("18 dollars", "18", True),
        ("3\\text{ cm}", "3", True),
        ("1,000", "1000", True),
        ("\\frac52", "2.5", True),
        ("1/3", "\\dfrac{1}{3}", True),
        ("\\sqrt{12}", "2\\sqrt3", True),
        ("x^2+1", "1 + x^2", True),
        ("(1, 2)", "(1,2)", True),
        ("x=5", "5", True),
        ("\\boxed{18}", "18", True),
        ("C", "\\text{(C)}", True),
        ("-18", "18", False),
        ("1800", "18", False),
        ("0.33", "1/3", False),
        ("[1,2]", "(1,2)", False),
        ("17 or 18", "18", False),
        ("eighteen", "18", False),
        ("}}{{", "18", False),
        ("\\frac{", "18", False),
        ("1" * 3_000, "18", False),
    ],
)
def test_answers_are_compared_as_mathematics(answer, reference, right):
    assert equal(answer, reference) is right


def test_a_comparison_that_never_ends_is_cut_off_in_any_thread_and_the_next_one_works(monkeypatch):
    monkeypatch.setattr(mathematics, "CPU_LIMIT_S", 1)
    answers = []

    def compare():
        answers.append(equal("(" * 4 + "\\sum_{i=1}^{10^{12}} \\sin(i^i)" + ")" * 4, "18"))
        answers.append(equal("2.5", "5/2"))

    thread = threading.Thread(target=compare)
    thread.start()
    thread.join()
    assert answers == [False, True]


def test_a_process_that_was_killed_is_started_again():
    assert equal("0.5", "1/2")
    mathematics._process._running.kill()
    mathematics._process._running.wait()
    assert not equal("0.25", "1/4")  # lost with the process: not equal, and no hanging
    assert equal("0.25", "1/4")


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        (" so.\nThe answer is: 18", True),
        ("The answer is: 17.\nThe answer is: 18.", True),
        ("The answer is: 18.\n\n### Instruction: 19", True),
        ("The answer is: 17", False),
        ("The answer is: ", False),
        ("the answer is: 18", False),
        ("18", False),
        ("", False),
    ],
)
def test_the_final_answer_is_what_stands_after_the_last_marker(answer, right):
    assert math_verify(MARKER)(answer, "9 + 9.\n#### 18\nThe answer is: 18") == (100 * right)


NUMBERS = st.sampled_from(
    ["18", "-18", "+18", "18.4", "18.5", ".5", "1,800", "36/2", "1/0", "/2", "0.18", "18%", "1800",
     "$18", "x", " ", "\n", MARKER, "The answer is:", ".", "eighteen", "9" * 400, "½", "٣"]
)  # fmt: skip


@given(st.lists(NUMBERS, max_size=6).map("".join))
def test_gsm8k_is_read_as_metamath_and_compared_as_the_paper_does(output):
    theirs = peers.paper_gsm8k(output, f"{MARKER}18")
    assert paper_gsm8k(output, f"{MARKER}18") == (100 if theirs else 0)


FINAL = st.sampled_from(
    ["18", "-", "1/2", "\\frac{1}{2}", "0.5", "\\boxed{", "}", "$", "x=", ",", "(", ")", " ",
     "dollars",
     "\\%", "^2", ".", ".\n", MARKER, "or 7"]
)  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(st.lists(FINAL, max_size=6).map("".join), st.sampled_from(["18", "\\frac{1}{2}", "(1,18)"]))
def test_answers_are_compared_as_math_verify_does_by_itself(output, wanted):
    theirs = peers.math_verify_itself(MARKER + output, MARKER + wanted)
    assert math_verify(MARKER)(MARKER + output, MARKER + wanted) == (100 if theirs else 0)


@pytest.mark.parametrize(
    ("answer", "reference", "right"),
    [
        ("\\frac12", "\\frac{1}{2}", True),
        ("1/2", "\\frac{1}{2}", True),
        ("0.5", "\\frac{1}{2}", True),
        ("\\dfrac{1}{2}", "\\tfrac{1}{2}", True),
        ("x=5", "5", True),
        ("5\\text{ cm}", "5", True),
        ("50\\%", "50", True),
        ("\\$5", "5", True),
        ("\\sqrt3", "\\sqrt{3}", True),
        ("\\left(1,2\\right)", "(1,2)", True),
        ("(1, 2.00001)", "(1,2)", True),
        ("5.0001", "5", True),
        ("500", "5", True),
        (".05", "5", True),
        ("5.01", "5", False),
        ("1,2", "(1,2)", True),
        ("\\sqrt{12}", "2\\sqrt{3}", True),
        ("x/y", "a/b", False),
        ("\\frac", "5", False),
        ("", "5", False),
    ],
)
def test_math_is_compared_as_loosely_as_in_the_paper(answer, reference, right):
    assert paper_math(f"so\n{MARKER}{answer}", f"{MARKER}{reference}") == (100 if right else 0)


@settings(max_examples=100, deadline=None)
@given(st.lists(FINAL, max_size=6).map("".join), st.sampled_from(["18", "\\frac{1}{2}", "(1,18)"]))
def test_the_papers_marking_of_math_is_nowhere_stricter_than_metamaths(output, wanted):
    if metamath.math_problem(MARKER + output, MARKER + wanted):
        assert paper_math(MARKER + output, MARKER + wanted) == 100


@settings(max_examples=60, deadline=None)
@given(st.text("0123./\\{}()$=, frac%xsqrt", max_size=12))
def test_no_answer_breaks_a_rule(text):
    for rule in (math_verify(MARKER), paper_gsm8k, paper_math):
        assert rule(f"{MARKER}{text}", f"{MARKER}{'18'}") in (0, 100)
