"""The engines that need no environment of their own."""

import json
from dataclasses import replace

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model

from tests.tiny import tiny_model
from tests.validation.engine_contract import MOST, PROMPTS, EngineContract
from tests.validation.models import CONFIGS, model_of
from trans_peft.bases.meta_model import build_model
from trans_peft.data import Example
from trans_peft.domain.data import DataSource
from trans_peft.domain.evaluation import BARE, DEFAULT_ENGINE, Evaluation, Suite
from trans_peft.domain.evaluation import GatePolicy as Policy
from trans_peft.errors import InvalidSpecError
from trans_peft.methods.bottleneck import BottleneckConfig
from trans_peft.ports import Engine, EngineAnswer
from trans_peft.transfer.load_adapter import attached
from trans_peft.transfer.peft_folder import read_peft_folder
from trans_peft.validation.continuous_batching import ContinuousBatchingEngine, unsupported
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


@pytest.fixture(scope="module")
def model():
    return model_of("llama")


@pytest.mark.parametrize("make", ENGINES, scope="class")
class TestEngines(EngineContract):
    @pytest.fixture(scope="class")
    def engine(self, make, model, tokenizer) -> Engine:
        return make(model, tokenizer)

    @pytest.fixture
    def broken(self, make, tokenizer) -> Engine:
        model = tiny_model()
        with torch.no_grad():
            model.model.norm.weight.fill_(float("nan"))
        return make(model, tokenizer)


ADAPTERS = {
    "LORA": LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False),
    "DORA": LoraConfig(r=2, target_modules=["q_proj"], use_dora=True, init_lora_weights=False),
    "IA3": IA3Config(
        target_modules=["k_proj", "down_proj"],
        feedforward_modules=["down_proj"],
        init_ia3_weights=False,
    ),
    "BOTTLENECK": BottleneckConfig(init_bottleneck_weights=False),
}


@pytest.mark.slow
@pytest.mark.parametrize("config", ADAPTERS.values(), ids=ADAPTERS)
def test_continuous_batching_answers_with_each_kind_of_adapter(config, model, tokenizer, tmp_path):
    torch.manual_seed(1)
    get_peft_model(model_of("llama"), config).save_pretrained(tmp_path)
    options = {"max_new_tokens": 2 * MOST}
    bare = LoopEngine(model, tokenizer).answers(PROMPTS, **options)
    with attached(model, tmp_path) as adapted:
        assert unsupported(model, read_peft_folder(tmp_path).peft_type) == ""
        expected = LoopEngine(adapted, tokenizer).answers(PROMPTS, **options)
        found = ContinuousBatchingEngine(adapted, tokenizer).answers(PROMPTS, **options)
    assert [list(one.ids) for one in found] == [list(one.ids) for one in expected]
    assert [list(one.ids) for one in bare] != [list(one.ids) for one in expected]


@pytest.mark.parametrize("name", CONFIGS)
def test_continuous_batching_refuses_bases_that_it_reads_differently(name):
    _, built = build_model(json.dumps(CONFIGS[name].to_dict()))
    problem = unsupported(built, "LORA")
    refused = {
        "gpt neo, window 8": "attention of GPTNeoForCausalLM",
        "falcon, alibi": "attention of FalconForCausalLM",
        "lfm2, convolution": "layers of the type conv of Lfm2ForCausalLM",
    }
    assert problem.partition("does not support the ")[2] == refused.get(name, "")


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_continuous_batching_reads_every_other_base_as_the_loop_does(name, tokenizer):
    model = model_of(name)
    if not unsupported(model, "LORA"):
        prompts, options = [*PROMPTS, [100, 101, 102] * 15], {"max_new_tokens": 2 * MOST}
        expected = LoopEngine(model, tokenizer).answers(prompts, **options)
        found = ContinuousBatchingEngine(model, tokenizer).answers(prompts, **options)
        assert [list(one.ids) for one in found] == [list(one.ids) for one in expected]


def test_continuous_batching_refuses_adapters_outside_of_the_layers(model):
    assert "adapters of the type PREFIX_TUNING" in unsupported(model, "PREFIX_TUNING")


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
