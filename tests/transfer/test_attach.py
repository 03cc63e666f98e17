"""The reference is PEFT itself on a freshly loaded base."""

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


def looks(model: torch.nn.Module) -> dict:
    """Everything about a model that somebody else could notice, values by their bytes."""
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
def test_attached_says_what_peft_says_on_a_fresh_base(method, write_adapter):
    folder = write_adapter(config=METHODS[method])
    with attached(tiny_model(), folder) as model:
        ours = logits(model)
        assert not model.training
        assert not any(weight.requires_grad for weight in model.parameters())
    fresh = PeftModel.from_pretrained(tiny_model(), folder).eval()
    assert torch.equal(ours, logits(fresh))
    assert not torch.equal(ours[:, -6:], logits(tiny_model()))


@pytest.mark.parametrize("method", METHODS)
def test_the_base_comes_back_as_it_was(method, write_adapter):
    model = tiny_model().train()
    model.lm_head.weight.requires_grad_(False)
    before, config = looks(model), model.config.to_dict()
    with attached(model, write_adapter(config=METHODS[method])) as adapted:
        adapted.generate(input_ids=TOKENS, max_new_tokens=2, do_sample=False)
    assert looks(model) == before
    assert model.config.to_dict() == config


def test_eight_adapters_on_one_base_are_each_as_on_a_base_of_their_own(write_adapter):
    folders = [write_adapter(f"a{seed}", seed=seed, r=1 + seed) for seed in range(8)]
    alone = [logits(PeftModel.from_pretrained(tiny_model(), f).eval()) for f in folders]
    model = tiny_model()
    before = looks(model)
    for folder, expected in zip(folders, alone, strict=True):
        with attached(model, folder, "mine") as adapted:
            assert torch.equal(logits(adapted), expected)
    assert looks(model) == before


def test_attach_leaves_an_adapter_on_and_torchs_random_state_alone(write_adapter):
    model, folder = tiny_model(), write_adapter()
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    peft_model = attach(model, folder)
    assert torch.equal(torch.rand(4), expected)
    assert isinstance(peft_model, PeftModel)
    with pytest.raises(AdapterError, match="already carries an adapter"):
        attach(model, folder)


def test_hooks_of_others_stay_theirs(write_adapter):
    model, calls = tiny_model(), []
    handle = model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    with attached(model, write_adapter()) as adapted:
        logits(adapted)
    logits(model)
    assert len(calls) == 2
    handle.remove()
    logits(model)
    assert len(calls) == 2


def test_an_error_inside_the_block_gives_the_base_back(write_adapter):
    model = tiny_model()
    before = looks(model)
    with pytest.raises(RuntimeError, match="mine"), attached(model, write_adapter()):
        raise RuntimeError("mine")
    assert looks(model) == before


def test_merging_into_a_lent_base_is_told(write_adapter):
    with (
        pytest.raises(UnsupportedModelError, match="merged into them"),
        attached(tiny_model(), write_adapter()) as adapted,
    ):
        adapted.merge_adapter()


def test_writing_to_a_lent_base_is_told(write_adapter):
    model = tiny_model()
    with (
        pytest.raises(UnsupportedModelError, match="embed_tokens"),
        attached(model, write_adapter(), "a") as adapted,
        torch.no_grad(),
    ):
        adapted.get_input_embeddings().weight.add_(1)


# What PEFT itself lets pass or half loads.


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


def poison(folder):
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


BROKEN = {
    "a key is missing": (drop_key, "1 places on this base have no key in the file: .*lora_B"),
    "a key too many": (add_key, "1 keys of the file have no place on this base: .*layers.7"),
    "a weight of the base": (
        add_embedding,
        r"(?s)have no place on this base: .*embed_tokens.*save_embedding_layers=False",
    ),
    "another rank": (reshape, r"8 tensors have another shape: .*\(4, 32\) for \(8, 32\)"),
    "not finite": (poison, "not finite: .*lora_A"),
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
    "unknown method": (lambda f: edit_config(f, peft_type="WARP"), "unknown method WARP"),
    "a field from the future": (lambda f: edit_config(f, use_flux=True), "not know use_flux"),
    "other targets": (lambda f: edit_config(f, target_modules=["c_attn"]), "cannot be put on"),
    "one target more": (
        lambda f: edit_config(f, target_modules=["q_proj", "v_proj", "k_proj"]),
        "4 places on this base have no key",
    ),
    "pissa, not converted": (lambda f: edit_config(f, init_lora_weights="pissa"), "rewrite"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_adapter_is_refused_and_the_base_untouched(case, write_adapter):
    damage, message = BROKEN[case]
    folder = write_adapter()
    damage(folder)
    model = tiny_model()
    before = looks(model)
    with pytest.raises(AdapterError, match=message):
        attach(model, folder)
    assert looks(model) == before


@pytest.mark.parametrize(
    ("layers", "message"), [(1, "4 keys of the file have no place"), (3, "4 places on this base")]
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
def test_an_adapter_that_brings_biases_of_the_base_is_refused_before_it_writes_them(bias, tmp_path):
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


def test_both_differences_and_every_problem_are_told_at_once(write_adapter, tmp_path):
    folder = write_adapter()
    drop_key(folder)
    add_key(folder)
    with pytest.raises(AdapterError, match=r"(?s)1 keys of the file .*; 1 places on this base"):
        attach(tiny_model(), folder)
    with pytest.raises(AdapterError, match=r"adapter_config.json; it has no adapter_model"):
        attach(tiny_model(), tmp_path / "nowhere")


def test_a_future_field_that_is_off_is_no_reason_to_refuse(write_adapter):
    folder = edit_config(write_adapter(), use_flux=False, flux_options=None)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert "use_flux" in config
    with pytest.warns(UserWarning, match="use_flux"), attached(tiny_model(), folder):
        pass
