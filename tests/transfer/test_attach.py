"""`attach` and `attached`, compared with PEFT on a newly loaded base."""

import json

import pytest
import torch
from peft import (
    IA3Config,
    LoraConfig,
    OFTConfig,
    PeftModel,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from tests.tiny import tiny_model
from tests.transfer.conftest import edit_config
from trans_peft.checksums import model_checksums
from trans_peft.errors import AdapterError, UnsupportedModelError
from trans_peft.methods.bottleneck.config import BottleneckConfig
from trans_peft.methods.registration import register_methods
from trans_peft.transfer.load_adapter import attach, attached

register_methods()
TOKENS = torch.tensor([[5, 17, 101, 33, 250, 8]])
LM = {"task_type": "CAUSAL_LM"}
METHODS = {
    "lora": LoraConfig(target_modules=["q_proj"], init_lora_weights=False, **LM),
    "lora on every linear": LoraConfig(
        target_modules="all-linear", init_lora_weights=False, use_rslora=True, **LM
    ),
    "lora by regex, two layers": LoraConfig(
        target_modules=r".*\.1\.mlp\.(up|down)_proj", init_lora_weights=False, **LM
    ),
    "dora": LoraConfig(target_modules=["v_proj"], use_dora=True, init_lora_weights=False, **LM),
    "lora and a whole module": LoraConfig(
        target_modules=["q_proj"], modules_to_save=["norm"], init_lora_weights=False, **LM
    ),
    "lora and new tokens": LoraConfig(
        target_modules=["q_proj"], trainable_token_indices=[3, 4], init_lora_weights=False, **LM
    ),
    "ia3": IA3Config(
        target_modules=["k_proj", "down_proj"],
        feedforward_modules=["down_proj"],
        init_ia3_weights=False,
        **LM,
    ),
    "oft": OFTConfig(target_modules=["q_proj"], oft_block_size=4, init_weights=False, **LM),
    "vera": VeraConfig(target_modules=["q_proj"], r=4, init_weights=False, **LM),
    "bottleneck": BottleneckConfig(init_bottleneck_weights=False, **LM),
    "prompt tuning": PromptTuningConfig(
        num_virtual_tokens=3, num_layers=2, token_dim=32, num_attention_heads=4, **LM
    ),
}


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def state_of(model: torch.nn.Module) -> dict:
    """Return the observable state of a model: types, modes, attributes, hooks, parameter bytes."""
    return {
        name: (
            type(module),
            module.training,
            sorted(vars(module)),
            {k: len(v) for k, v in vars(module).items() if k.endswith("_hooks")},
            {
                key: (id(p), p.requires_grad, p.detach().numpy().tobytes())
                for key, p in module.named_parameters(recurse=False)
            },
        )
        for name, module in model.named_modules()
    }


@pytest.mark.parametrize("method", METHODS)
def test_logits_equal_those_of_peft(method, write_adapter):
    folder = write_adapter(config=METHODS[method])
    with attached(tiny_model(), folder) as model:
        ours = logits(model)
        assert not model.training
        assert not any(weight.requires_grad for weight in model.parameters())
    fresh = PeftModel.from_pretrained(tiny_model(), folder).eval()
    assert torch.equal(ours, logits(fresh))
    assert not torch.equal(ours[:, -6:], logits(tiny_model()))


@pytest.mark.parametrize("method", METHODS)
def test_the_base_is_restored_after_the_block(method, write_adapter):
    model = tiny_model().train()
    model.lm_head.weight.requires_grad_(False)
    before, config = state_of(model), model.config.to_dict()
    with attached(model, write_adapter(config=METHODS[method])) as adapted:
        adapted.generate(input_ids=TOKENS, max_new_tokens=2, do_sample=False)
    assert state_of(model) == before
    assert model.config.to_dict() == config


def test_eight_adapters_share_one_base_without_interference(write_adapter):
    folders = [write_adapter(f"a{seed}", seed=seed, r=1 + seed) for seed in range(8)]
    alone = [logits(PeftModel.from_pretrained(tiny_model(), f).eval()) for f in folders]
    model = tiny_model()
    before = state_of(model)
    for folder, expected in zip(folders, alone, strict=True):
        with attached(model, folder, "mine") as adapted:
            assert torch.equal(logits(adapted), expected)
    assert state_of(model) == before


def test_attach_returns_a_peft_model_and_keeps_the_random_state(write_adapter):
    model, folder = tiny_model(), write_adapter()
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    peft_model = attach(model, folder)
    assert torch.equal(torch.rand(4), expected)
    assert isinstance(peft_model, PeftModel)
    with pytest.raises(AdapterError, match="already has an adapter"):
        attach(model, folder)


def test_hooks_of_the_caller_are_kept(write_adapter):
    model, calls = tiny_model(), []
    handle = model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    with attached(model, write_adapter()) as adapted:
        logits(adapted)
    logits(model)
    assert len(calls) == 2
    handle.remove()
    logits(model)
    assert len(calls) == 2


def test_an_error_in_the_block_restores_the_base(write_adapter):
    model = tiny_model()
    before = state_of(model)
    with pytest.raises(RuntimeError, match="mine"), attached(model, write_adapter()):
        raise RuntimeError("mine")
    assert state_of(model) == before


def test_merging_an_attached_adapter_is_an_error(write_adapter):
    with (
        pytest.raises(UnsupportedModelError, match="merged into them"),
        attached(tiny_model(), write_adapter()) as adapted,
    ):
        adapted.merge_adapter()


def test_changing_weights_of_the_base_is_an_error(write_adapter):
    model = tiny_model()
    with (
        pytest.raises(UnsupportedModelError, match="embed_tokens"),
        attached(model, write_adapter(), "a") as adapted,
        torch.no_grad(),
    ):
        adapted.get_input_embeddings().weight.add_(1)


# Files that PEFT loads partly, or without an error.


def drop_key(folder):
    tensors = load_file(folder / "adapter_model.safetensors")
    del tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"]
    save_file(tensors, folder / "adapter_model.safetensors")


def add_key(folder):
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors["base_model.model.model.layers.7.self_attn.q_proj.lora_B.weight"] = torch.ones(2, 2)
    save_file(tensors, folder / "adapter_model.safetensors")


def add_embedding(folder):
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors["base_model.model.model.embed_tokens.weight"] = torch.ones(258, 32)
    save_file(tensors, folder / "adapter_model.safetensors")


def reshape(folder):
    edit_config(folder, r=8)


def write_nan(folder):
    tensors = load_file(folder / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, folder / "adapter_model.safetensors")


def pickle_it(folder):
    tensors = load_file(folder / "adapter_model.safetensors")
    torch.save(tensors, folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()


def cut_off(folder):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-16])


INVALID = {
    "a key is missing": (drop_key, r"missing from the file \(1\): .*lora_B"),
    "a key too many": (add_key, r"this base does not need \(1\): .*layers.7"),
    "a weight of the base": (
        add_embedding,
        r"(?s)does not need \(1\): .*embed_tokens.*save_embedding_layers=False",
    ),
    "another rank": (reshape, r"another shape \(8\): .*\(4, 32\), the base needs \(8, 32\)"),
    "not finite": (write_nan, "not finite: .*lora_A"),
    "pickle": (pickle_it, r"pickled \(adapter_model.bin\)"),
    "cut off": (cut_off, "cannot be read"),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), "it has no adapter_model"),
    "no tensors": (lambda f: save_file({}, f / "adapter_model.safetensors"), "holds no tensor"),
    "no config": (lambda f: (f / "adapter_config.json").unlink(), "it has no adapter_config"),
    "not JSON": (lambda f: (f / "adapter_config.json").write_text("{"), "is not JSON"),
    "no method": (
        lambda f: (f / "adapter_config.json").write_text("{}"),
        "peft_type must be a name",
    ),
    "unknown method": (lambda f: edit_config(f, peft_type="WARP"), "unknown PEFT method WARP"),
    "an unknown field": (lambda f: edit_config(f, use_flux=True), "ignore .*: use_flux"),
    "other targets": (lambda f: edit_config(f, target_modules=["c_attn"]), "cannot be loaded on"),
    "one target more": (
        lambda f: edit_config(f, target_modules=["q_proj", "v_proj", "k_proj"]),
        r"missing from the file \(4\)",
    ),
    "pissa, not converted": (lambda f: edit_config(f, init_lora_weights="pissa"), "would change"),
}


@pytest.mark.parametrize("case", INVALID)
def test_an_invalid_adapter_is_refused_without_changing_the_base(case, write_adapter):
    damage, message = INVALID[case]
    folder = write_adapter()
    damage(folder)
    model = tiny_model()
    before = state_of(model)
    with pytest.raises(AdapterError, match=message):
        attach(model, folder)
    assert state_of(model) == before


@pytest.mark.parametrize(
    ("layers", "message"), [(1, r"does not need \(4\)"), (3, r"missing from the file \(4\)")]
)
def test_another_number_of_layers_is_refused(layers, message, write_adapter):
    with pytest.raises(AdapterError, match=message):
        attach(tiny_model(layers=layers), write_adapter())


def model_with_biases() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig.from_dict(tiny_model().config.to_dict() | {"attention_bias": True})
    model = LlamaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_()
    return model


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_an_adapter_with_biases_of_the_base_is_refused_before_it_overwrites_them(bias, tmp_path):
    config = LoraConfig(target_modules=["q_proj"], init_lora_weights=False, bias=bias, **LM)
    trained = get_peft_model(model_with_biases(), config)
    for parameter in trained.parameters():
        if parameter.requires_grad:
            parameter.data += 1.0
    trained.save_pretrained(tmp_path)
    model = model_with_biases()
    before, alone = model_checksums(model), logits(model)
    with pytest.raises(AdapterError, match=r"overwrite weights of the base: .*q_proj.*bias"):
        attach(model, tmp_path)
    assert not before.changes(model_checksums(model))
    assert torch.equal(logits(model), alone)


def test_all_problems_are_reported_at_once(write_adapter, tmp_path):
    folder = write_adapter()
    drop_key(folder)
    add_key(folder)
    with pytest.raises(
        AdapterError, match=r"(?s)does not need \(1\): .*; .* missing from the file \(1\)"
    ):
        attach(tiny_model(), folder)
    with pytest.raises(AdapterError, match=r"adapter_config.json; it has no adapter_model"):
        attach(tiny_model(), tmp_path / "nowhere")


def test_an_unknown_field_that_is_off_is_accepted(write_adapter):
    folder = edit_config(write_adapter(), use_flux=False, flux_options=None)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert "use_flux" in config
    with pytest.warns(UserWarning, match="use_flux"), attached(tiny_model(), folder):
        pass
