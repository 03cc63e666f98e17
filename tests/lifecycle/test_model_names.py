"""Adapters are compared by the module names of the loaded model, not by tensor names of files."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, Llama4Config, PreTrainedModel

from tests.tiny import tiny_tokenizer
from trans_peft.bases import model_names
from trans_peft.bases.fingerprint import fingerprint
from trans_peft.bases.model_names import in_model_names
from trans_peft.bases.publish import publish
from trans_peft.domain.base import Upload
from trans_peft.domain.data import DataSource
from trans_peft.domain.evaluation import GatePolicy, Suite
from trans_peft.domain.outcome import Reason, TransferTask
from trans_peft.edges.file_store import FileStore
from trans_peft.edges.memory import memory_platform
from trans_peft.lifecycle.adopt import adopt
from trans_peft.lifecycle.bases import ingest
from trans_peft.lifecycle.reconcile import observe_adapter
from trans_peft.lifecycle.transfer import transfer
from trans_peft.models import load_base
from trans_peft.transfer.compatibility import compare

SHAPE = {
    "vocab_size": 258, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 24, "num_key_value_heads": 2, "bos_token_id": None,
    "eos_token_id": 257, "pad_token_id": 256, "max_position_embeddings": 512,
}  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """One kind of checkpoint: how to write it, and the target modules of LoRA."""

    make: Callable[[], PreTrainedModel]
    targets: tuple[str, ...]
    rename: Callable[[str], str] = lambda name: name


def of(model_type: str, **options: object) -> Callable[[], PreTrainedModel]:
    config = AutoConfig.for_model(model_type, **(SHAPE | options))
    return lambda: AutoModelForCausalLM.from_config(config)


def llama4() -> PreTrainedModel:
    from transformers import Llama4ForConditionalGeneration

    vision = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "image_size": 28,
        "num_attention_heads": 4, "patch_size": 14, "vision_output_dim": 16,
        "projector_input_dim": 16, "projector_output_dim": 16, "pixel_shuffle_ratio": 0.5,
    }  # fmt: skip
    text = SHAPE | {"intermediate_size_mlp": 24, "num_local_experts": 2}
    return Llama4ForConditionalGeneration(Llama4Config(text_config=text, vision_config=vision))


KINDS = {
    "gpt2, the hub's names": Kind(
        of("gpt2"), ("c_attn", "c_fc"), lambda name: name.removeprefix("transformer.")
    ),
    "gpt2 as saved": Kind(of("gpt2"), ("c_attn", "wte")),
    "bloom, the hub's names": Kind(
        of("bloom"), ("query_key_value",), lambda name: name.removeprefix("transformer.")
    ),
    "falcon": Kind(of("falcon"), ("query_key_value", "dense_4h_to_h")),
    "opt, the hub's names": Kind(
        of("opt", ffn_dim=24, word_embed_proj_dim=16),
        ("q_proj", "fc1"),
        lambda name: name.removeprefix("model."),
    ),
    "gpt_neox": Kind(of("gpt_neox"), ("query_key_value", "lm_head")),
    "mixtral, experts one by one": Kind(of("mixtral", num_local_experts=2), ("q_proj", "gate")),
    "llama4, the text of a multimodal checkpoint": Kind(llama4, ("q_proj", "o_proj")),
    "llama with a tied head": Kind(of("llama", tie_word_embeddings=True), ("q_proj", "lm_head")),
}


def write(
    folder: Path, kind: Kind, seed: int = 0, drift: float = 0.0, renamed: bool = True
) -> Path:
    torch.manual_seed(0)
    model = kind.make()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight += drift * weight.std() * torch.randn(weight.shape, generator=generator)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    if renamed:
        tensors = load_file(folder / "model.safetensors")
        tensors = {kind.rename(name): tensor for name, tensor in tensors.items()}
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def write_adapter(folder: Path, base: Path, targets: tuple[str, ...]) -> Path:
    model = load_base(base, "float32", "cpu").model
    config = LoraConfig(
        r=2, target_modules=list(targets), init_lora_weights=False, task_type="CAUSAL_LM"
    )
    get_peft_model(model, config).save_pretrained(folder, save_embedding_layers=False)
    return folder


def named(folder: Path, cache: Path):
    return in_model_names(fingerprint(str(folder), FileStore()), str(folder), FileStore(), cache)


@pytest.mark.parametrize("name", KINDS)
def test_an_adapter_is_compatible_by_the_module_names_of_the_loaded_model(
    name, tmp_path, monkeypatch
):
    monkeypatch.setattr(model_names, "compare_with_built_model", in_process)
    kind = KINDS[name]
    v1 = write(tmp_path / "v1", kind)
    v2 = write(tmp_path / "v2", kind, seed=2, drift=0.05, renamed=False)
    adapter = write_adapter(tmp_path / "adapter", v1, kind.targets)
    old, new = named(v1, tmp_path), named(v2, tmp_path)
    assert set(old.tensors) == set(load_base(v1, "float32", "cpu").model.state_dict())
    for after in (old, new):
        found = compare(old, after, adapter)
        assert found.mismatches == ()
        assert "unknown" not in " ".join(found.notes)
    unrelated = named(write(tmp_path / "v3", kind, seed=3, drift=30.0), tmp_path)
    assert "unrelated" in " ".join(compare(old, unrelated, adapter).mismatches)


def in_process(checkpoint, subject):
    from trans_peft.bases.meta_model import inspect_checkpoint
    from trans_peft.bases.model_check import ModelWeight

    tensors = [(n, t.dtype, t.shape, t.sha256) for n, t in checkpoint.tensors.items()]
    found = inspect_checkpoint(checkpoint.config, tensors, checkpoint.tokenizer)
    return found["problems"], tuple(ModelWeight(n, tuple(s), f) for n, s, f in found["weights"])


def test_a_removed_module_is_a_mismatch(tmp_path, monkeypatch):
    monkeypatch.setattr(model_names, "compare_with_built_model", in_process)
    kind = KINDS["gpt2, the hub's names"]
    old = named(write(tmp_path / "v1", kind), tmp_path)
    adapter = write_adapter(tmp_path / "adapter", tmp_path / "v1", kind.targets)
    shallow = Kind(of("gpt2", num_hidden_layers=1), kind.targets, kind.rename)
    new = named(write(tmp_path / "v2", shallow), tmp_path)
    found = compare(old, new, adapter)
    assert "transformer.h.1.attn.c_attn" in " ".join(found.mismatches)


def test_module_names_are_derived_once_per_fingerprint(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(
        model_names, "compare_with_built_model", lambda *a: calls.append(a) or in_process(*a)
    )
    folder = write(tmp_path / "v1", KINDS["gpt2 as saved"])
    assert named(folder, tmp_path) == named(folder, tmp_path)
    assert len(calls) == 1


def test_a_fingerprint_without_config_reads_it_from_the_base(tmp_path, monkeypatch):
    monkeypatch.setattr(model_names, "compare_with_built_model", in_process)
    folder = write(tmp_path / "v1", KINDS["gpt2, the hub's names"])
    recorded = fingerprint(str(folder), FileStore())
    older = replace(recorded, config="")
    assert older.digest == recorded.digest
    found = in_model_names(older, str(folder), FileStore(), tmp_path / "one")
    assert "transformer.wte.weight" in found.tensors
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"n_layer": 1}))
    assert in_model_names(older, str(folder), FileStore(), tmp_path / "two") == older
    assert in_model_names(older, str(tmp_path / "gone"), FileStore(), tmp_path / "two") == older


def test_gpt2_with_the_hubs_names_is_adopted_and_transferred(tmp_path):
    platform = replace(memory_platform(tmp_path / "work"), store=FileStore())
    kind = KINDS["gpt2, the hub's names"]
    for version, drift in (("v1", 0.0), ("v2", 0.01)):
        folder = write(tmp_path / "files" / version, kind, seed=1, drift=drift)
        uri = str(tmp_path / "bases" / version)
        publish(folder, uri, family="gpt2", version=version, store=platform.store)
        ingest(Upload(uri), platform)
    adapter = write_adapter(tmp_path / "adapter", tmp_path / "files" / "v1", kind.targets)
    rows = [{"prompt": f"{i} is", "completion": " odd"} for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    suite = Suite("parity", DataSource(str(tmp_path / "rows.jsonl")), max_new_tokens=4)
    version = adopt("parity", str(adapter), "gpt2", (suite,), platform, base_version="v1")
    v2 = platform.catalog.versions("gpt2")[1]
    task = TransferTask("parity", version.number, v2.ref, Reason.NO_VERDICT)
    fleet = observe_adapter(task.adapter, "gpt2", platform)
    outcome = transfer(task, fleet, GatePolicy(margin_points=10.0), platform)
    assert outcome.compatibility.ok
    assert outcome.judgment.suites[0].items == 8
