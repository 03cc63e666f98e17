import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from tests.tiny import tiny_model, tiny_tokenizer, write_tiny_base
from trans_peft.errors import UnsupportedModelError
from trans_peft.models import load_base


@pytest.fixture
def base(tmp_path):
    return write_tiny_base(tmp_path / "base")


def edit(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def configure(folder: Path, **fields: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


def loading_error(folder: Path) -> str:
    with pytest.raises(UnsupportedModelError) as refused:
        load_base(folder, "float32", "cpu")
    return str(refused.value)


def test_a_base_without_its_untied_head_is_refused(base):
    configure(base, tie_word_embeddings=False)
    assert "missing from the files, which would be random: lm_head.weight" in loading_error(base)


def test_a_missing_layer_is_refused_by_name(base):
    configure(base, num_hidden_layers=3)
    assert "model.layers.2.mlp.down_proj.weight" in loading_error(base)


def test_all_differences_are_reported_at_once(base):
    def change(tensors):
        tensors["model.final_norm.weight"] = tensors.pop("model.norm.weight")
        tensors["model.layers.0.mlp.up_proj.weight"] = torch.ones(3, 32)
        tensors["model.layers.1.mlp.up_proj.weight"] = torch.ones(64, 33)

    edit(base, change)
    text = loading_error(base)
    assert "random: model.norm.weight" in text
    assert "does not have: model.final_norm.weight" in text
    assert "2 tensors of another shape: model.layers.0.mlp.up_proj.weight is (3, 32)" in text


def test_a_vocabulary_of_another_size_than_the_embedding_is_refused(base):
    configure(base, vocab_size=260)
    assert "model.embed_tokens.weight is (258, 32), the model needs (260, 32)" in loading_error(
        base
    )


def test_experts_that_cannot_be_merged_are_refused(tmp_path):
    config = AutoConfig.for_model(
        "mixtral", vocab_size=258, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=2,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    load_base(tmp_path, "float32", "cpu")
    expert = "model.layers.0.block_sparse_moe.experts.1"
    edit(tmp_path, lambda tensors: tensors.pop(f"{expert}.w1.weight"))
    assert "do not convert" in loading_error(tmp_path)


def test_old_checkpoints_with_other_names_and_saved_masks_load(tmp_path):
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=258,
            n_positions=64,
            n_embd=16,
            n_layer=2,
            n_head=4,
            bos_token_id=256,
            eos_token_id=256,
        )
    )
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)

    def change(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        for layer in range(2):
            tensors[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 64, 64, dtype=torch.bool)
            tensors[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)

    edit(tmp_path, change)
    loaded = load_base(tmp_path, "float32", "cpu").model
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


def test_a_saved_copy_of_a_tied_head_loads(base):
    embedding = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    edit(base, lambda tensors: tensors.update({"lm_head.weight": embedding.clone()}))
    assert torch.equal(load_base(base, "float32", "cpu").model.lm_head.weight, embedding)


def test_two_loads_of_a_base_have_equal_logits(base, tmp_path):
    again = Path(shutil.copytree(base, tmp_path / "again"))
    ids = torch.arange(12)[None]
    with torch.inference_mode():
        first = load_base(base, "float32", "cpu").model(ids).logits
        second = load_base(again, "float32", "cpu").model(ids).logits
        assert torch.equal(first, second)
        assert torch.equal(first, tiny_model().eval()(ids).logits)
