"""vLLM as an engine: the contract of engines, and a transfer. Run with `make test-vllm`."""

import json
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

from tests.serving.vllm_server import PYTHON
from tests.tiny import tiny_tokenizer
from tests.validation.engine_contract import MOST, PROMPTS, EngineContract
from tests.validation.models import SHAPE
from trans_peft.bases.publish import publish
from trans_peft.domain.base import Upload
from trans_peft.domain.data import DataSource
from trans_peft.domain.evaluation import DEFAULT_ENGINE, GatePolicy, Suite
from trans_peft.domain.outcome import Reason, TransferTask
from trans_peft.edges.file_store import FileStore
from trans_peft.edges.memory import memory_platform
from trans_peft.lifecycle.adopt import adopt
from trans_peft.lifecycle.bases import ingest
from trans_peft.lifecycle.reconcile import observe_adapter
from trans_peft.lifecycle.resolve import find_base
from trans_peft.lifecycle.transfer import transfer
from trans_peft.models import base_files
from trans_peft.validation import vllm_engine
from trans_peft.validation.engine import LoopEngine
from trans_peft.validation.vllm_engine import VllmBase, VllmEngine, vllm_name

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(not PYTHON.exists(), reason="needs the environment of `make test-vllm`"),
]
ENVIRONMENT = PYTHON.parents[1]
HEADS_OF_32 = {"hidden_size": 128, "intermediate_size": 128}  # vLLM's attention needs them
LORA = {"r": 4, "lora_alpha": 16, "init_lora_weights": False, "task_type": "CAUSAL_LM"}


@pytest.fixture(scope="module", autouse=True)
def _settings():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        patch.setenv("OMP_NUM_THREADS", "1")
        yield
    vllm_engine._stop()


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE | HEADS_OF_32))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    return model.eval()


@pytest.fixture(scope="module")
def base(model, tokenizer, tmp_path_factory):
    return saved(model, tokenizer, tmp_path_factory.mktemp("base"))


def saved(model, tokenizer, folder):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def of_vllm(base):
    return VllmBase(
        ENVIRONMENT, base, base_files(base), "float32", SHAPE["max_position_embeddings"]
    )


def by_loop(model, tokenizer):
    """The default engine, as `VllmEngine` opens it."""
    return lambda: nullcontext(LoopEngine(model, tokenizer))


def ids(answers):
    return [list(one.ids) for one in answers]


class TestVllmEngine(EngineContract):
    @pytest.fixture(scope="class")
    def engine(self, base, model, tokenizer):
        return VllmEngine(of_vllm(base), model, tokenizer, by_loop(model, tokenizer))

    @pytest.fixture
    def broken(self, model, tokenizer, tmp_path):
        base = saved(model, tokenizer, tmp_path)
        broken = AutoModelForCausalLM.from_pretrained(base)
        with torch.no_grad():
            broken.model.norm.weight.fill_(float("nan"))
        of_broken = of_vllm(saved(broken, tokenizer, base))
        return VllmEngine(of_broken, model, tokenizer, by_loop(broken, tokenizer))


def test_adapters_answer_as_with_the_default_engine(base, model, tokenizer, tmp_path):
    engines = []
    for seed, targets in enumerate((["q_proj", "down_proj"], ["q_proj"], ["v_proj", "lm_head"])):
        torch.manual_seed(seed)
        own = AutoModelForCausalLM.from_pretrained(base)
        adapted = get_peft_model(own, LoraConfig(target_modules=targets, **LORA)).eval()
        folder = tmp_path / f"{seed}"
        adapted.save_pretrained(folder, save_embedding_layers=False)
        engines.append(
            (
                LoopEngine(adapted, tokenizer),
                VllmEngine(
                    of_vllm(base), model, tokenizer, by_loop(own, tokenizer), folder, LORA["r"]
                ),
            )
        )
    answers = set()
    for loop, vllm in [*engines, *engines]:  # each adapter after another one
        expected = ids(loop.answers(PROMPTS, max_new_tokens=MOST))
        assert ids(vllm.answers(PROMPTS, max_new_tokens=MOST)) == expected
        answers.add(str(expected))
    assert len(answers) == len(engines)


def test_a_transfer_is_judged_by_vllm(base, model, tokenizer, tmp_path):
    platform = replace(memory_platform(tmp_path / "work"), store=FileStore(), vllm=ENVIRONMENT)
    update = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        for weight in update.parameters():
            weight += 1e-3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    for version, folder in (("v1", base), ("v2", saved(update, tokenizer, tmp_path / "update"))):
        uri = str(tmp_path / "bases" / version)
        publish(folder, uri, family="tiny", version=version, store=FileStore())
        ingest(Upload(uri), platform)
    rows = [{"id": f"{i}", "prompt": f"{i} is", "completion": " odd"} for i in range(8)]
    (tmp_path / "items.jsonl").write_text("\n".join(map(json.dumps, rows)))
    suite = Suite("words", DataSource(str(tmp_path / "items.jsonl")), max_new_tokens=4)
    for name, options in (("plain", {}), ("dora", {"use_dora": True})):
        adapted = get_peft_model(
            AutoModelForCausalLM.from_pretrained(base),
            LoraConfig(target_modules=["q_proj"], **LORA, **options),
        )
        adapted.save_pretrained(tmp_path / name)
        adopt(name, str(tmp_path / name), "tiny", (suite,), platform, base_version="v1")
    for name, engine in (("plain", vllm_name(ENVIRONMENT)), ("dora", DEFAULT_ENGINE)):
        task = TransferTask(name, 1, find_base("tiny", "v2", platform).ref, Reason.NO_VERDICT)
        seen = observe_adapter(name, "tiny", platform)
        by_loop, by_vllm = (
            transfer(task, seen, GatePolicy(margin_points=20.0, engine=kind), platform)
            for kind in (DEFAULT_ENGINE, "vllm")
        )
        assert {found.engine for found in by_vllm.evaluations} == {engine}
        answers = [
            [item.answer_sha256 for found in outcome.evaluations for item in found.items]
            for outcome in (by_loop, by_vllm)
        ]
        assert answers[0] == answers[1]
        (figures,) = by_vllm.judgment.suites
        assert figures.engine == engine
        assert ("use_dora=True" in figures.engine_note) == (name == "dora")
