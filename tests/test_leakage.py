"""Training rows that are items of a suite: counted before training, refused above a limit."""

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.edges.examples import draft, peft_folder
from trans_peft.data import Example, pin, read_examples
from trans_peft.data.overlap import near_matches, similarity
from trans_peft.domain.data import DataSource
from trans_peft.domain.evaluation import GatePolicy, Judgment, Suite, Verdict
from trans_peft.domain.harness_task import HarnessTask
from trans_peft.domain.leakage import SuiteLeakage
from trans_peft.edges.file_store import FileStore
from trans_peft.errors import InvalidSpecError
from trans_peft.lifecycle.leakage import count_leakage, leakage_problem, with_leakage

WORDS = ["ada", "bert", "carl", "dora", "emil", "frida", "gustav", "hanna", "ida", "jakob"]
TEXTS = st.lists(
    st.lists(st.sampled_from(WORDS), min_size=4, max_size=7).map(" ".join), min_size=2, max_size=12
)
LEAKY = (SuiteLeakage("exceptions", rows=5, training_rows=200, items=4, suite_items=100),)
PASSED = Judgment(Verdict.PASSED, "kept everything")


@given(TEXTS, TEXTS)
@settings(max_examples=40, deadline=None)
def test_near_matches_are_those_of_a_comparison_of_all_pairs(texts, items):
    texts, items = ["1 first", *texts, "z last"], ["2 first", *items, "y last"]  # nothing shared
    pairs = [[similarity(text, item) >= 0.8 for item in items] for text in texts]
    found = near_matches(texts, items)
    assert found.texts == sum(map(any, pairs))
    assert found.items == sum(map(any, zip(*pairs, strict=True)))


def test_templates_are_not_compared():
    texts = [f"### Instruction:\n{word} went home\n### Response:" for word in WORDS]
    items = [f"Question: {word} went home" for word in WORDS[:3]]
    assert near_matches(texts, items) == (3, 3)


def test_a_part_of_a_word_that_all_share_is_compared():
    assert near_matches(
        [f"{n} is odd" for n in range(20)], [f"1{n:02} is odd" for n in range(9)]
    ) == (0, 0)


def test_equal_prompts_match_if_the_items_share_more_words_than_the_rows():
    rows = [f"What is {a} + {b}?" for a in range(10, 40) for b in range(10, 40)]
    assert near_matches(rows, rows[60:90]).items == 30
    assert near_matches(rows[60:90], rows).texts == 30
    assert near_matches(rows[:60], rows[60:90]) == (0, 0)


@pytest.mark.parametrize("odd_rows", [[], ["Hello there"]])
@pytest.mark.parametrize("odd_items", [[], ["Bye now"]])
def test_equal_prompts_match_if_one_prompt_has_no_template(odd_rows, odd_items):
    template = "Below is an instruction. Write a response. ### Instruction: {} ### Response:"
    prompts = [template.format(f"Say {i} in words") for i in range(100, 150)]
    assert near_matches([*prompts, *odd_rows], [*prompts, *odd_items]) == (50, 50)


def test_prompts_with_5_grams_of_many_items_are_found_if_they_are_equal_or_have_rare_ones():
    template = "Translate the sentence to German. Keep names and numbers as they are: {}"
    items = [template.format(f"{i * 7919 % 10007:05} apples") for i in range(300)] + ["odd one"]
    near = template.format("03912 apples and one pear")
    rows = [*items[:20], near, "x y z"]
    assert near_matches(rows, [*items, near + "s"]).texts == 21


def test_repeated_training_rows_count_each_time():
    assert near_matches(
        ["What is the capital of Peru?"] * 4 + ["x"], ["what is  the capital of peru?", "y"]
    ) == (4, 1)


def test_the_prompts_of_rows_and_items_are_compared(tmp_path):
    def source(name, prompts):
        path = tmp_path / name
        rows = [{"prompt": prompt, "completion": f" {i}"} for i, prompt in enumerate(prompts)]
        path.write_text("\n".join(map(json.dumps, rows)))
        return DataSource(str(path))

    store = FileStore()
    rows = read_examples(source("train.jsonl", ["Who wrote Faust?", "Where is Rome?"]), store)
    data = source("suite.jsonl", ["who wrote  Faust?", "Why is the sky blue?", "Where is Rome?"])
    suites = [Suite("a", data), Suite("b", data, limit=2)]
    assert count_leakage(rows, suites, store) == (
        SuiteLeakage("a", 2, 2, 2, 3),
        SuiteLeakage("b", 1, 2, 1, 2),
    )


@pytest.mark.parametrize(
    ("start", "counted"), [("Who? Goethe. ", 1), ("{i}: other questions for each. ", 0)]
)
def test_items_with_different_answered_questions_are_not_counted(start, counted, tmp_path):
    questions = ["Who wrote Faust?", "Why is the sky?"]
    rows = [
        {"prompt": start.format(i=i) * 5 + question, "completion": " x"}
        for i, question in enumerate(questions)
    ]
    (tmp_path / "suite.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = pin(DataSource(str(tmp_path / "suite.jsonl")), FileStore())
    task = HarnessTask("t", "exact_match", num_fewshot=5, version="0.4", config_sha256="c" * 64)
    found = count_leakage(
        [Example("1", questions[0], " x")], [Suite("s", data, harness=task)], FileStore()
    )
    assert [leaked.items for leaked in found] == [1] * counted


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = peft_folder(tmp_path_factory.mktemp("adapter") / "adapter")
    return replace(draft("chat", "tiny", folder), leakage=LEAKY)


def test_without_a_limit_the_verdict_only_counts(source):
    assert with_leakage(PASSED, GatePolicy(), source) == replace(PASSED, leakage=LEAKY)


@pytest.mark.parametrize(("limit", "verdict"), [(4.0, "passed"), (3.9, "inconclusive")])
def test_a_share_above_the_limit_does_not_pass(source, limit, verdict):
    found = with_leakage(PASSED, GatePolicy(max_leakage_points=limit), source)
    assert found.verdict == verdict
    assert found.reason == (
        "kept everything"
        if verdict == "passed"
        else "training rows are items of the suite: exceptions: 4 of 100 items (4.0 points) are "
        "nearly 5 of 200 training rows, limit 3.9 points; otherwise passed: kept everything"
    )


@pytest.mark.parametrize("verdict", [Verdict.NEEDS_RETUNING, Verdict.RETIRE])
def test_other_verdicts_stay(source, verdict):
    judgment = Judgment(verdict, "because")
    found = with_leakage(judgment, GatePolicy(max_leakage_points=0), source)
    assert (found.verdict, found.reason) == (verdict, "because")


def test_rows_that_were_not_counted_are_refused(source):
    policy = GatePolicy(max_leakage_points=1)
    assert leakage_problem(policy, replace(source, leakage=())) == (
        "exceptions: the training rows were not compared with its items, limit 1 points"
    )


def test_the_limit_is_about_required_suites(source):
    policy = GatePolicy(max_leakage_points=1, required_suites=("other",))
    counted = SuiteLeakage("other", 0, 200, 0, 50)
    assert leakage_problem(policy, replace(source, leakage=(*LEAKY, counted))) is None


@pytest.mark.parametrize("limit", [-1, 100])
def test_an_impossible_limit_is_an_error(limit):
    with pytest.raises(InvalidSpecError, match="max_leakage_points must lie in"):
        GatePolicy(max_leakage_points=limit)
