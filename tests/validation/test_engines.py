"""One contract for every engine: transformers' plain `generate` and one forward pass each."""

from dataclasses import replace

import pytest
import torch

from tests.tiny import tiny_model
from tests.validation.models import by_transformers, ending_with, model_of
from trans_peft.data import Example
from trans_peft.domain.data import DataSource
from trans_peft.domain.evaluation import BARE, DEFAULT_ENGINE, Evaluation, Suite
from trans_peft.domain.evaluation import GatePolicy as Policy
from trans_peft.errors import EvaluationError, InvalidSpecError
from trans_peft.ports import Engine, EngineAnswer
from trans_peft.validation.continuous_batching import ContinuousBatchingEngine
from trans_peft.validation.engine import LoopEngine
from trans_peft.validation.evaluate import answer, answer_with
from trans_peft.validation.gate import judge
from trans_peft.validation.tokenized_suite import prepare

pytestmark = pytest.mark.usefixtures("one_thread")

ENGINES = [
    pytest.param(LoopEngine, id="loop"),
    # Slow: each call starts a thread and allocates the pages of its cache.
    pytest.param(ContinuousBatchingEngine, id="continuous batching", marks=pytest.mark.slow),
]
PROMPTS = [[40, 50, 60, 70], [33] * 9, [100, 101, 102] * 5, [77]]
MOST = 6


@pytest.fixture(scope="module")
def model():
    return model_of("llama")


@pytest.fixture(scope="module", params=ENGINES)
def engine(request, model, tokenizer) -> Engine:
    return request.param(model, tokenizer)


@pytest.fixture(scope="module")
def free(model):
    """The answers of transformers, prompt by prompt."""
    with ending_with(model, 257):
        return by_transformers(model, PROMPTS, max_new_tokens=MOST)


def log_p(model, context, tokens):
    """The log-probabilities at the positions of the tokens, from one pass over the whole text."""
    with torch.no_grad():
        logits = model(torch.tensor([[*context, *tokens]])).logits[0].double()
    return logits[len(context) - 1 : -1].log_softmax(-1)


def test_answers_are_those_of_greedy_decoding(engine, free, tokenizer):
    found = engine.answers(PROMPTS, max_new_tokens=MOST)
    assert [list(one.ids) for one in found] == free
    assert [one.text for one in found] == [tokenizer.decode(ids) for ids in free]
    assert engine.answers([], max_new_tokens=MOST) == []


def test_an_answer_ends_with_an_end_token_or_before_a_stop_string(engine, free, tokenizer):
    end = free[0][2]
    ended = engine.answers(PROMPTS[:1], max_new_tokens=MOST, end_tokens=frozenset({end}))
    assert list(ended[0].ids) == free[0][: free[0].index(end) + 1]
    stop = tokenizer.decode(free[2][3:4])
    (stopped,) = engine.answers(PROMPTS[2:3], max_new_tokens=MOST, stop=[stop])
    assert stopped.text == tokenizer.decode(free[2]).partition(stop)[0]


def test_drafts_change_no_answer(engine, free):
    for drafts in (free, [ids[::-1] for ids in free]):
        found = engine.answers(PROMPTS, max_new_tokens=MOST, drafts=drafts)
        assert [list(one.ids) for one in found] == free


def test_likelihoods_are_those_of_one_pass_each(engine, model):
    questions = [(prompt, [[65], [66, 67, 68]]) for prompt in PROMPTS]
    expected = [
        [
            log_p(model, prompt, choice).gather(1, torch.tensor(choice)[:, None]).sum().item()
            for choice in choices
        ]
        for prompt, choices in questions
    ]
    found = engine.likelihoods(questions)
    assert [list(sums) for sums in found] == [pytest.approx(sums, abs=1e-3) for sums in expected]


def test_scores_are_those_of_one_pass_each(engine, model, free):
    texts = [(prompt, [*ids, 65]) for prompt, ids in zip(PROMPTS, free, strict=True)]
    found = engine.scores([*texts, (PROMPTS[0], [])])
    assert found[-1] == []
    for (context, tokens), scores in zip(texts, found, strict=False):
        rows = log_p(model, context, tokens)
        own = rows.gather(1, torch.tensor(tokens)[:, None])[:, 0].tolist()
        assert [one.log_p for one in scores] == pytest.approx(own, abs=1e-3)
        best = [token == likeliest for token, likeliest in zip(tokens, rows.argmax(1), strict=True)]
        assert [one.is_best for one in scores] == best
        assert best[:-1] == [True] * (len(tokens) - 1)


@pytest.mark.parametrize("make", ENGINES)
def test_logits_that_are_not_finite_are_an_evaluation_error(make, tokenizer):
    broken = tiny_model()
    with torch.no_grad():
        broken.model.norm.weight.fill_(float("nan"))
    engine = make(broken, tokenizer)
    with pytest.raises(EvaluationError, match="not finite"):
        engine.answers(PROMPTS, max_new_tokens=2)
    with pytest.raises(EvaluationError, match="not finite"):
        engine.likelihoods([(PROMPTS[0], [[65, 66]])])
    with pytest.raises(EvaluationError, match="not finite"):
        engine.scores([(PROMPTS[0], [65, 66])])


class Parrot:
    """An engine of its own kind, which gives one answer."""

    name, dtype = "parrot 1", "float32"

    def answers(self, prompts, **options):
        return [EngineAnswer("a", [97]) for _ in prompts]

    def likelihoods(self, questions, **options):
        return [[-1.0] * len(choices) for _, choices in questions]

    def scores(self, texts):
        raise AssertionError


SUITE = Suite("words", DataSource("w.jsonl", "0" * 64), max_new_tokens=2)
KEYS = {"weights_sha256": BARE, "base_fingerprint_sha256": "base"}


@pytest.fixture(scope="module")
def questions(tokenizer):
    examples = [Example(f"{i}", f"say {i}", " a") for i in range(3)]
    return prepare(tokenizer, SUITE, examples, context=None)


def test_an_engine_is_part_of_the_key_unless_it_is_the_default(questions, model):
    ours, theirs = answer(model, questions, **KEYS), answer_with(Parrot(), questions, **KEYS)
    assert (ours.engine, theirs.engine) == (DEFAULT_ENGINE, "parrot 1")
    assert ours.key == SUITE.evaluation_key(BARE, "base")
    assert theirs.key == SUITE.evaluation_key(BARE, "base", "parrot 1") != ours.key
    # A key that was stored before there were engines.
    stored = Evaluation("s", "w", "b", "c", "d", ours.items)
    assert stored.key == "3c3c55e1447c37d212412cf487dd27a0275d5529c68d60630612d1cb539525b5"
    assert theirs.score == 100.0


def test_an_engine_of_another_precision_is_refused(questions):
    half = Parrot()
    half.dtype = "bfloat16"
    with pytest.raises(InvalidSpecError, match=r"expected: float32\n  found: +bfloat16"):
        answer_with(half, questions, **KEYS)


def test_a_verdict_compares_results_of_one_engine_and_precision(questions, model):
    ours = answer(model, questions, **KEYS)
    adapter = replace(ours, weights_sha256="adapter")
    policy = Policy(margin_points=5.0)
    for other, problem in (
        (answer_with(Parrot(), questions, **KEYS), "engine differs: loop .*, parrot 1"),
        (
            replace(ours, decoding_sha256=replace(SUITE, dtype="bfloat16").decoding_sha256),
            "decoding_sha256 differs",
        ),
    ):
        with pytest.raises(InvalidSpecError, match=problem):
            judge(policy, {"words": adapter}, {"words": adapter}, {"words": other})
