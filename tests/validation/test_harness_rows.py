"""Items from tasks of the harness. Run where the extra `harness` is installed."""

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.harness_tasks import ROWS
from tests.tiny import tiny_model, tiny_tokenizer
from trans_peft.domain.data import DataSource
from trans_peft.domain.evaluation import BARE, Suite
from trans_peft.domain.harness_task import HarnessTask
from trans_peft.domain.places import Places
from trans_peft.errors import AccessError, DataError, InvalidSpecError, NotFoundError
from trans_peft.validation.evaluate import evaluate
from trans_peft.validation.rules.harness_match_process import compared, filtered

pytest.importorskip("lm_eval", reason="needs the extra `harness`")

import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.api.metrics import exact_match_hf_evaluate
from lm_eval.filters import build_filter_ensemble
from lm_eval.models.huggingface import HFLM

from trans_peft.validation.harness_rows import harness_items
from trans_peft.validation.harness_tasks import load_task, task_manager

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore"),  # the harness's own
]


@pytest.fixture(scope="module")
def model():
    return tiny_model(seed=4).eval()


def ours(model, harness, harness_tasks, **options):
    """The results by item, from a suite with the items of a task."""
    items = harness_items(harness, folder=harness_tasks, **options)
    suite = Suite("s", DataSource("s.jsonl", "0" * 64), harness=items.task, **items.fields)
    found = evaluate(
        model, tiny_tokenizer(), suite, items.examples,
        weights_sha256=BARE, base_fingerprint_sha256="base",
    )  # fmt: skip
    return {item.id: float(item.correct) for item in found.items}


def theirs(model, harness, harness_tasks):
    """The results by item of the harness, with its own model."""
    task = load_task(harness.task, folder=harness_tasks)
    name, _, filter_ = harness.metric.partition(",")
    results = lm_eval.simple_evaluate(
        HFLM(pretrained=model, tokenizer=tiny_tokenizer(), batch_size=1),
        tasks=[task], num_fewshot=harness.num_fewshot, bootstrap_iters=0,
        task_manager=task_manager(harness_tasks),
        random_seed=None, numpy_random_seed=None, torch_random_seed=None,
    )  # fmt: skip
    return {
        str(sample["doc_id"]): float(sample[name])
        for sample in results["samples"][harness.task]
        if sample["filter"] == (filter_ or "none")
    }


@pytest.mark.parametrize(
    ("task", "metric", "shots"),
    [
        ("tiny_choice", "acc", None),
        ("tiny_choice", "acc_norm", 2),
        ("tiny_spaced", "acc_norm", None),
        ("tiny_filtered", "exact_match,strict", None),
        ("tiny_filtered", "exact_match,last", 1),
    ],
)
def test_results_equal_those_of_the_harness_item_by_item(task, metric, shots, model, harness_tasks):
    harness = HarnessTask(task, metric, shots)
    found = ours(model, harness, harness_tasks)
    assert found == theirs(model, harness, harness_tasks)
    assert len(found) == len(ROWS)
    assert 0 < sum(found.values()) < len(ROWS)
    first = ours(model, harness, harness_tasks, limit=4)
    assert first == {number: found[number] for number in "0123"}


_TEXTS = st.text("abzAZ09 .,!#\n\tßİ", max_size=12)
_FILTERS = st.lists(
    st.sampled_from(
        [
            {"function": "lowercase"},
            {"function": "uppercase"},
            {"function": "remove_whitespace"},
            {"function": "regex", "regex_pattern": "(a+)|(z+)", "group_select": -1},
            {"function": "regex", "regex_pattern": "[0-9a-z ]+", "fallback": " x "},
            {"function": "regex", "regex_pattern": "(b*)(,?)", "group_select": 1},
        ]
    ),
    max_size=3,
)


@given(
    _TEXTS,
    _TEXTS,
    _FILTERS,
    st.fixed_dictionaries(
        {},
        optional={
            "regexes_to_ignore": st.lists(st.sampled_from([",", "[0-9]", "(?s).*#"]), max_size=2),
            "ignore_case": st.booleans(),
            "ignore_punctuation": st.booleans(),
            "ignore_numbers": st.booleans(),
        },
    ),
)
@settings(max_examples=200, deadline=None)
def test_filters_and_comparisons_equal_those_of_the_harness(answer, right, steps, options):
    components = [
        [step["function"], {k: v for k, v in step.items() if k != "function"}] for step in steps
    ]
    instance = Instance("generate_until", {}, ("",), 0, resps=[answer])
    try:
        build_filter_ensemble("f", [*components, ["take_first", {}]]).apply([instance])
    except IndexError:
        return  # the harness has no result if a text has fewer matches than group_select
    expected = instance.filtered_resps["f"]
    for step in steps:
        answer = filtered(answer, step)
    assert answer == expected
    score = exact_match_hf_evaluate([expected], [right], **options)["exact_match"]
    assert (compared(answer, options) == compared(right, options)) == bool(score)


def test_items_are_those_of_the_task(harness_tasks):
    found = harness_items(HarnessTask("tiny_spaced", "acc"), folder=harness_tasks, limit=2)
    first = found.examples[0]
    assert [example.id for example in found.examples] == ["0", "1"]
    assert first.prompt == "Is snow cold? Answer:"  # white space belongs to the choices
    assert (first.completion, first.choices) == ("  yes", ("  yes", "  no"))
    assert found.fields == {"scoring": "choice", "chance_points": pytest.approx(100 * 5 / 12)}
    assert found.task.num_fewshot == 0
    assert found.task.version == lm_eval.__version__
    filtered_items = harness_items(
        HarnessTask("tiny_filtered", "exact_match,last"), folder=harness_tasks
    )
    assert filtered_items.fields["max_new_tokens"] == 12
    assert filtered_items.fields["stop"] == ("Q:", "xx")  # the harness cuts at it first
    assert filtered_items.examples[0].reference == '["D", "x"]'


def test_documents_that_a_task_shuffles_are_those_of_the_harness(
    harness_tasks, tmp_path, monkeypatch
):
    """As gpqa does, with the generators of the process, which the harness seeds."""

    def with_new_cache(name):
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / name)

    found = []
    for seed in (1, 2):
        with_new_cache(str(seed))
        random.seed(seed)
        before = random.getstate()
        items = harness_items(HarnessTask("tiny_shuffled", "acc"), folder=harness_tasks)
        assert random.getstate() == before
        found.append([list(example.choices) for example in items.examples])
    with_new_cache("theirs")
    results = lm_eval.simple_evaluate(
        "dummy", tasks=["tiny_shuffled"], bootstrap_iters=0,
        task_manager=task_manager(harness_tasks),
    )  # fmt: skip
    samples = results["samples"]["tiny_shuffled"]
    theirs = [[f" {choice}" for choice in sample["doc"]["choices"]] for sample in samples]
    assert found[0] == found[1] == theirs
    assert theirs != [[f" {choice}" for choice in row["choices"]] for row in ROWS]


def test_equal_tasks_have_equal_hashes_and_other_settings_others(harness_tasks):
    def suite(harness):
        items = harness_items(harness, folder=harness_tasks)
        return Suite("s", DataSource("s.jsonl", "0" * 64), harness=items.task, **items.fields)

    first = suite(HarnessTask("tiny_choice", "acc"))
    assert first == suite(HarnessTask("tiny_choice", "acc", 0))
    others = [
        suite(HarnessTask("tiny_choice", "acc", 1)),
        suite(HarnessTask("tiny_choice", "acc_norm")),
        suite(HarnessTask("tiny_zero", "acc")),
        replace(first, harness=replace(first.harness, version="0.0")),
        replace(first, data=first.data.pinned("1" * 64)),
    ]
    assert len({suite.suite_sha256 for suite in [first, *others]}) == 6


@pytest.mark.parametrize(
    ("task", "metric", "shots", "error", "message"),
    [
        ("tiny_choise", "acc", None, NotFoundError, "such as tiny_choice"),
        ("tiny_group", "acc", None, InvalidSpecError, "tiny_choice, tiny_answer"),
        ("tiny_choice", "bleu", None, NotFoundError, "acc, acc_norm, mcc"),
        ("tiny_choice", "mcc", None, InvalidSpecError, "metric mcc is not acc or acc_norm"),
        ("tiny_choice", "acc,strict", None, NotFoundError, "expected: acc,none"),
        ("tiny_filtered", "exact_match", None, NotFoundError, "exact_match,strict, exact"),
        ("tiny_filtered", "exact_match,vote", None, InvalidSpecError, "majority_vote"),
        ("tiny_zero", "acc", 2, InvalidSpecError, "no answered questions"),
        ("tiny_choice", "acc", 50, DataError, "Sample larger than population"),
        ("tiny_sampled", "exact_match", None, InvalidSpecError, "decodes with sampling"),
        ("tiny_warm", "exact_match", None, InvalidSpecError, "decodes with sampling"),
        ("tiny_beams", "exact_match", None, InvalidSpecError, "generates with num_beams"),
        ("tiny_repeated", "exact_match", None, InvalidSpecError, "each question 3 times"),
        ("tiny_likelihood", "acc", None, InvalidSpecError, "output_type is loglikelihood"),
        ("tiny_own", "exact_match", None, InvalidSpecError, "process_results"),
        ("tiny_inputs", "acc", None, InvalidSpecError, "parts of the prompt"),
    ],
)  # fmt: skip
def test_what_cannot_be_expressed_is_refused(task, metric, shots, error, message, harness_tasks):
    with pytest.raises(error, match=message):
        harness_items(HarnessTask(task, metric, shots), folder=harness_tasks)


def test_one_error_lists_all_documents_that_are_no_items(harness_tasks):
    with pytest.raises(DataError) as refused:
        harness_items(HarnessTask("tiny_odd", "acc_norm"), folder=harness_tasks)
    text = str(refused.value)
    assert "3 of 4 documents" in text
    assert "document 0: its right answer repeats an earlier choice" in text
    assert "document 1: it does not have one right answer among its choices" in text
    assert "document 3: acc_norm counts white space" in text
    assert "evaluate_harness" in text


def test_a_data_set_must_be_listed_and_reachable(harness_tasks, monkeypatch):
    harness = HarnessTask("arc_easy", "acc_norm")
    with pytest.raises(AccessError, match="allenai/ai2_arc"):
        harness_items(harness, places=Places((), ("openai/*",)), folder=harness_tasks)

    def unreachable(*_, **__):
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    with pytest.raises(DataError, match=r"(?s)no route to the hub.*pinned elsewhere"):
        harness_items(harness, places=Places((), ("allenai/*",)), folder=harness_tasks)
