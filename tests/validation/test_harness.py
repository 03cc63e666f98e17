"""Run where the extra `harness` is installed, and skipped elsewhere."""

import json

import pytest
import torch

from tests.harness_tasks import ROWS
from tests.tiny import tiny_model, tiny_tokenizer
from trans_peft.data import parse_examples
from trans_peft.domain.data import DataSource
from trans_peft.domain.evaluation import BARE, Suite
from trans_peft.errors import IntegrityError, InvalidSpecError, NotFoundError
from trans_peft.validation.evaluate import evaluate

pytest.importorskip("lm_eval", reason="needs the extra `harness`")

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from trans_peft.validation.engine import LoopEngine
from trans_peft.validation.harness import evaluate_harness, harness_model, harness_suite

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore"),  # the harness's own
]


@pytest.fixture(scope="module")
def model():
    return tiny_model(seed=4).eval()


def run(model, suite, harness_tasks, tokenizer=None):
    return evaluate_harness(
        model, tokenizer or tiny_tokenizer(), suite, folder=harness_tasks, batch_size=2,
        weights_sha256=BARE, base_fingerprint_sha256="base",
    )  # fmt: skip


@pytest.mark.parametrize(("metric", "scoring"), [("acc", ""), ("acc_norm", ":per_character")])
def test_the_harness_gives_the_same_choices(metric, scoring, model, harness_tasks):
    """The independent reference of `choice`, item by item."""
    rows = [
        {
            "id": number, "prompt": f"{row['q']}? Answer:",
            "completion": f" {row['choices'][row['gold']]}",
            "choices": [f" {choice}" for choice in row["choices"]],
        }
        for number, row in enumerate(ROWS)
    ]  # fmt: skip
    examples = parse_examples("\n".join(map(json.dumps, rows)).encode(), "rows")
    ours = evaluate(
        model, tiny_tokenizer(),
        Suite("s", DataSource("x.jsonl", "0" * 64), scoring=f"choice{scoring}"),
        examples, weights_sha256=BARE, base_fingerprint_sha256="base",
    )  # fmt: skip
    theirs = run(model, harness_suite("tiny_choice", metric, folder=harness_tasks), harness_tasks)
    assert [(item.id, item.correct) for item in theirs.items] == [
        (item.id, item.correct) for item in ours.items
    ]
    assert 0 < theirs.score < 100


def requests(kind, *arguments):
    return [Instance(kind, {}, args, number) for number, args in enumerate(arguments)]


def test_the_engine_answers_requests_as_the_harness_own_model_does(model):
    """The independent reference of all three kinds of requests."""
    context = 40
    theirs = HFLM(pretrained=model, tokenizer=tiny_tokenizer(), batch_size=1, max_length=context)
    ours = harness_model(LoopEngine(model, tiny_tokenizer()), tiny_tokenizer(), context)
    pairs = [("Is it", " late"), ("Is it ", "late"), ("", "late"), ("y" * 60, " no"), ("x", " a")]
    pairs += [(text, ours_best(model, text)) for text in ("ab", "Is snow cold? Answer:")]
    found = ours.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)
    expected = theirs.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)
    assert [log_p for log_p, _ in found] == pytest.approx([p for p, _ in expected], abs=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert {greedy for _, greedy in found} == {True, False}

    texts = [("short",), ("a text of more than two contexts " * 3,)]
    rolling = ours.loglikelihood_rolling(requests("loglikelihood_rolling", *texts))
    assert rolling == pytest.approx(
        theirs.loglikelihood_rolling(requests("loglikelihood_rolling", *texts), disable_tqdm=True),
        abs=1e-3,
    )

    options = {"until": ["\n", "~"], "max_gen_toks": 6, "do_sample": False}
    asked = [("Is it", options), ("z" * 60, options), ("q", options | {"max_gen_toks": 3})]
    assert ours.generate_until(requests("generate_until", *asked)) == theirs.generate_until(
        requests("generate_until", *asked), disable_tqdm=True
    )


def ours_best(model, text):
    """The likeliest next token after a text."""
    tokenizer = tiny_tokenizer()
    with torch.no_grad():
        logits = model(torch.tensor([tokenizer(text)["input_ids"]])).logits[0, -1]
    return tokenizer.decode(logits[:256].argmax())


def test_an_evaluation_has_a_key_and_changes_no_state(model, harness_tasks):
    model.train()
    state, tokenizer = torch.get_rng_state(), tiny_tokenizer()
    tokenizer.pad_token = None
    suite = harness_suite("tiny_answer", "exact_match", folder=harness_tasks, limit=3)
    result = run(model, suite, harness_tasks, tokenizer)
    assert result.key == suite.evaluation_key(BARE, "base")
    assert [item.id for item in result.items] == ["0", "1", "2"]
    assert {item.answer for item in result.items} == {None}
    assert all(module.training for module in model.modules())
    assert torch.equal(state, torch.get_rng_state())
    assert tokenizer.pad_token is None
    model.eval()


def test_the_same_task_has_the_same_hash_and_another_metric_another(harness_tasks):
    first, again, other = (
        harness_suite("tiny_choice", metric, folder=harness_tasks)
        for metric in ("acc", "acc", "acc_norm")
    )
    assert first == again
    assert first.data == other.data
    assert first.suite_sha256 != other.suite_sha256


def test_a_task_that_changed_is_refused(model, harness_tasks):
    suite = harness_suite("tiny_choice", "acc", folder=harness_tasks)
    moved = Suite(suite.name, suite.data.pinned("0" * 64), scoring=suite.scoring)
    with pytest.raises(IntegrityError, match="has changed"):
        run(model, moved, harness_tasks)


@pytest.mark.parametrize(
    ("task", "metric", "error", "message"),
    [
        ("tiny_missing", "acc", NotFoundError, "unknown task"),
        ("tiny_choice", "bleu", NotFoundError, "acc, acc_norm"),
        ("tiny_sampled", "exact_match", InvalidSpecError, "decodes with sampling"),
    ],
)
def test_a_task_that_cannot_be_a_suite_is_refused(task, metric, error, message, harness_tasks):
    with pytest.raises(error, match=message):
        harness_suite(task, metric, folder=harness_tasks)


def test_an_unknown_filter_is_not_found(model, harness_tasks):
    suite = harness_suite("tiny_answer", "exact_match,strict", folder=harness_tasks)
    with pytest.raises(NotFoundError, match="exact_match,none"):
        run(model, suite, harness_tasks)
