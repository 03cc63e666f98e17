"""Compensation of an update against dense matrices."""

import json

import numpy as np
import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from tests.perturbation.architectures import ARCHITECTURES
from tests.tiny import tiny_model
from tests.transfer.conftest import edit_config
from trans_peft.bases.drift import weight_pairs
from trans_peft.domain.recipe import Perturbation
from trans_peft.errors import AdapterError
from trans_peft.methods.bottleneck import BottleneckConfig
from trans_peft.perturbation import perturbed
from trans_peft.transfer.compensation import compensate
from trans_peft.transfer.load_adapter import attach
from trans_peft.transfer.low_rank_matrices import not_compensable
from trans_peft.transfer.module_inputs import module_inputs

SEQUENCES = [list(range(start, start + 12)) for start in range(0, 240, 5)]
FFN = ("gate_proj", "up_proj", "down_proj")
FULL = 64
"""No module of the tiny model has a smaller side than this rank."""


@pytest.fixture
def bases(tmp_path):
    """Return a function that writes two bases, the second with other weights in some modules."""

    def write(changed=FFN):
        old, new = tiny_model(), tiny_model()
        torch.manual_seed(7)
        with torch.no_grad():
            for name, weight in new.named_parameters():
                if name.split(".")[-2] in changed:
                    weight += 0.3 * weight.std() * torch.randn_like(weight)
        old.save_pretrained(tmp_path / "old")
        new.save_pretrained(tmp_path / "new")
        return tmp_path / "old", tmp_path / "new"

    return write


def compensation_of(adapter, old, new, rank, target):
    inputs = module_inputs(tiny_model(), adapter, SEQUENCES)
    return compensate(adapter, weight_pairs(old, new), inputs, rank, target)


def logits(base, folder):
    ids = torch.tensor(SEQUENCES)
    with torch.no_grad():
        return attach(type(tiny_model()).from_pretrained(base), folder)(input_ids=ids).logits


@pytest.mark.parametrize("changed", [FFN, ("q_proj", "o_proj"), ("v_proj", "down_proj")])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True, "lora_alpha": 3},
        {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 5}, "lora_alpha": 6},
        {"use_dora": True, "lora_alpha": 6},
        {"target_modules": r".*layers\.1\.mlp\.(up|down)_proj"},
    ],
    ids=["lora", "rslora", "patterns", "dora", "ffn of a layer"],
)
def test_at_full_rank_the_adapter_answers_as_on_the_old_base(
    options, changed, write_adapter, bases, tmp_path
):
    old, new = bases(changed)
    adapter = write_adapter(**options)
    found = compensation_of(adapter, old, new, FULL, tmp_path / "out")
    assert found.explained == pytest.approx(1, abs=1e-6)
    assert found.other_share == 0
    before = logits(old, adapter)
    torch.testing.assert_close(logits(new, found.folder), before, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(new, adapter), before, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    "options",
    [{}, {"target_modules": ["mlp"]}, {"target_modules": ["o_proj", "down_proj"]}],
    ids=["both sub-layers", "ffn", "the last projections"],
)
def test_a_bottleneck_adapter_is_compensated_at_every_update(
    options, write_adapter, bases, tmp_path
):
    old, new = bases()
    config = BottleneckConfig(init_bottleneck_weights=False, task_type="CAUSAL_LM", **options)
    adapter = write_adapter(config=config)
    before = logits(old, adapter)
    found = compensation_of(adapter, old, new, FULL, tmp_path / "out")
    assert found.explained == pytest.approx(1, abs=1e-6)
    torch.testing.assert_close(logits(new, found.folder), before, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(new, adapter), before, rtol=1e-2, atol=1e-2)

    next_base = tmp_path / "next"
    model = type(tiny_model()).from_pretrained(new)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight += 0.01 * torch.randn(32, 32)
            layer.mlp.up_proj.weight += 0.01 * torch.randn(64, 32)
    model.save_pretrained(next_base)
    inputs = module_inputs(type(model).from_pretrained(new), found.folder, SEQUENCES)
    again = compensate(found.folder, weight_pairs(new, next_base), inputs, FULL, tmp_path / "again")
    torch.testing.assert_close(logits(next_base, again.folder), before, rtol=1e-4, atol=1e-4)
    saved = json.loads((again.folder / "adapter_config.json").read_text())
    assert saved["compensation_rank"] == 2 * FULL
    assert len(saved["compensated_modules"]) == 2 * (1 + 3)  # layers x (q and the FFN)


@pytest.mark.parametrize("kind", [{"masking_p": 0.5}, {"dropping_p": 0.5}], ids=str)
def test_a_compensated_bottleneck_adapter_is_perturbed_as_on_the_old_base(
    kind, write_adapter, bases, tmp_path
):
    old, new = bases()
    config = BottleneckConfig(init_bottleneck_weights=False, task_type="CAUSAL_LM")
    adapter = write_adapter(config=config)
    found = compensation_of(adapter, old, new, FULL, tmp_path / "out")

    def perturbed_logits(base, folder):
        model = LlamaForCausalLM.from_pretrained(base)
        model = PeftModel.from_pretrained(model, folder, is_trainable=True).train()
        with perturbed(model, Perturbation(**kind), seed=5):
            return model(input_ids=torch.tensor(SEQUENCES)).logits.detach()

    before = perturbed_logits(old, adapter)
    torch.testing.assert_close(perturbed_logits(new, found.folder), before, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(before, logits(old, adapter), rtol=1e-3, atol=1e-3)


def test_the_compensation_is_the_best_of_its_rank(write_adapter, bases, tmp_path):
    old, new = bases()
    adapter = write_adapter()
    inputs = module_inputs(tiny_model(), adapter, SEQUENCES)
    found = compensate(adapter, weight_pairs(old, new), inputs, 2, tmp_path / "out")
    tensors, before, after = (
        load_file(next(folder.glob("*.safetensors"))) for folder in (found.folder, old, new)
    )
    for name, x in inputs.items():
        change = (before[x.weight] - after[x.weight]).numpy()
        if not change.any():
            continue
        outputs = change @ x.values.numpy().T
        rank = 6  # of the adapter, which does not change this module, and of the compensation
        best = np.linalg.norm(np.linalg.svd(outputs, compute_uv=False)[rank:])
        a, b = (tensors[f"base_model.model.{name}.lora_{side}.weight"].numpy() for side in "AB")
        error = np.linalg.norm(outputs - b @ a @ x.values.numpy().T)
        assert best * (1 - 1e-5) <= error <= best * 1.01


def test_the_inputs_are_those_of_the_adapter_on_the_old_base(write_adapter):
    adapter = write_adapter()
    found = module_inputs(tiny_model(), adapter, SEQUENCES)
    model = PeftModel.from_pretrained(tiny_model(), adapter)
    seen = {}
    layer = model.base_model.model.model.layers[1]
    layer.mlp.down_proj.register_forward_pre_hook(lambda _, inputs: seen.update(down=inputs[0]))
    layer.self_attn.q_proj.register_forward_pre_hook(lambda _, inputs: seen.update(q=inputs[0]))
    with torch.no_grad():
        model(input_ids=torch.tensor(SEQUENCES))
    for name, key in (
        ("model.layers.1.mlp.down_proj", "down"),
        ("model.layers.1.self_attn.q_proj", "q"),
    ):
        torch.testing.assert_close(
            found[name].values, seen[key].flatten(0, 1), rtol=1e-4, atol=1e-5
        )
    assert found["lm_head"].weight == "model.embed_tokens.weight"  # tied
    rows = len(found["model.layers.1.mlp.down_proj"].values)
    assert found["lm_head"].values.shape == (rows, 32)


def test_a_rank_above_the_sides_of_the_modules_is_full_rank(write_adapter, bases, tmp_path):
    old, new = bases()
    found = compensation_of(write_adapter(), old, new, 10**12, tmp_path / "out")
    assert json.loads((found.folder / "adapter_config.json").read_text())["r"] == 4 + FULL


def test_the_written_adapter_has_one_rank_and_scale(write_adapter, bases, tmp_path):
    old, new = bases()
    found = compensation_of(write_adapter(lora_alpha=16), old, new, 3, tmp_path / "out")
    config = json.loads((found.folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (7, 7)
    assert len(config["target_modules"]) == 2 * (2 + 3)  # layers x (q, v, and the FFN)
    assert found.modules == 6
    assert 0.3 < found.explained < 1


def test_a_tied_output_layer_is_compensated(write_adapter, bases, tmp_path):
    old, new = bases(("embed_tokens",))
    found = compensation_of(write_adapter(), old, new, FULL, tmp_path / "out")
    hidden = torch.randn(3, 32)
    before = tiny_model().lm_head(hidden)
    after = attach(type(tiny_model()).from_pretrained(new), found.folder).get_output_embeddings()
    torch.testing.assert_close(after(hidden), before, rtol=1e-4, atol=1e-4)
    assert found.modules == 1


@pytest.mark.parametrize("name", ["opt, pre norm", "qwen2_moe"])
def test_modules_may_receive_the_tokens_of_all_rows_in_one_dimension(name, tmp_path):
    (architecture,) = (one for one in ARCHITECTURES if one.name == name)
    old, new = architecture.model().eval(), architecture.model().eval()
    linear = [
        module.weight for module in new.model.modules() if isinstance(module, torch.nn.Linear)
    ]
    torch.manual_seed(7)
    with torch.no_grad():
        for weight in linear:
            weight += 0.3 * weight.std() * torch.randn_like(weight)
    for folder, model in (("old", old), ("new", new)):
        model.save_pretrained(tmp_path / folder)
    config = LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False)
    config.task_type = "CAUSAL_LM"
    get_peft_model(architecture.model(), config).save_pretrained(tmp_path / "adapter")
    sequences = [[(3 * row + i) % 60 for i in range(12)] for row in range(20)]
    inputs = module_inputs(architecture.model().eval(), tmp_path / "adapter", sequences)
    pairs = weight_pairs(tmp_path / "old", tmp_path / "new")
    found = compensate(tmp_path / "adapter", pairs, inputs, FULL, tmp_path / "out")
    assert found.modules == len(linear)
    ids = torch.tensor(sequences)
    with torch.no_grad():
        before = attach(old, tmp_path / "adapter")(input_ids=ids).logits
        after = attach(new, found.folder)(input_ids=ids).logits
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "saved"),
    [
        ({"lora_alpha": 8}, {"init_lora_weights": "orthogonal"}),  # for even ranks only
        ({"lora_alpha": 8}, {"lora_alpha": None}),
    ],
    ids=["orthogonal", "without lora_alpha"],
)
def test_options_of_the_given_config_do_not_break_the_written_one(
    options, saved, write_adapter, bases, tmp_path
):
    old, new = bases()
    adapter = write_adapter(**options)
    config = json.loads((adapter / "adapter_config.json").read_text()) | saved
    config = {name: value for name, value in config.items() if value is not None}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    found = compensation_of(adapter, old, new, FULL - 1, tmp_path / "out")
    torch.testing.assert_close(
        logits(new, found.folder), logits(old, adapter), rtol=1e-4, atol=1e-4
    )


def untied_bases(tmp_path, edit):
    """Return two bases with an output layer of their own, whose weight `edit` changes."""
    old, new = (LlamaForCausalLM(tiny_model().config) for _ in range(2))
    for model in (old, new):
        model.config.tie_word_embeddings = False
        model.load_state_dict(tiny_model().state_dict())
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    torch.manual_seed(7)
    with torch.no_grad():
        new.model.layers[0].mlp.up_proj.weight += 0.01 * torch.randn(64, 32)
        edit(old.lm_head.weight, new.lm_head.weight)
    old.save_pretrained(tmp_path / "old")
    new.save_pretrained(tmp_path / "new")
    return tmp_path / "old", tmp_path / "new"


def test_a_trained_copy_of_the_output_layer_is_kept(tmp_path):
    def change(_, new):
        new += 0.1

    old, new = untied_bases(tmp_path, change)
    model = LlamaForCausalLM.from_pretrained(old)
    config = LoraConfig(
        r=2, target_modules=["v_proj"], modules_to_save=["lm_head"], init_lora_weights=False,
        task_type="CAUSAL_LM",
    )  # fmt: skip
    adapter = tmp_path / "adapter"
    get_peft_model(model, config).save_pretrained(adapter)
    inputs = module_inputs(LlamaForCausalLM.from_pretrained(old), adapter, SEQUENCES)
    found = compensate(adapter, weight_pairs(old, new), inputs, FULL, tmp_path / "out")
    ids = torch.tensor(SEQUENCES)
    with torch.no_grad():
        before, after = (
            attach(LlamaForCausalLM.from_pretrained(base), folder)(input_ids=ids).logits
            for base, folder in ((old, adapter), (new, found.folder))
        )
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    assert found.modules == 1


def test_dora_leaves_out_an_output_layer_with_rows_of_zeros(write_adapter, tmp_path):
    def change(old, new):
        new += 0.1
        old[250:] = new[250:] = 0

    old, new = untied_bases(tmp_path, change)
    adapter = write_adapter(use_dora=True)
    inputs = module_inputs(LlamaForCausalLM.from_pretrained(old), adapter, SEQUENCES)
    found = compensate(adapter, weight_pairs(old, new), inputs, 4, tmp_path / "out")
    assert (found.modules, found.other_share > 0.9) == (1, True)
    model = attach(LlamaForCausalLM.from_pretrained(new), found.folder)
    with torch.no_grad():
        assert model(input_ids=torch.tensor(SEQUENCES)).logits.isfinite().all()


def test_weights_that_are_not_finite_are_refused(write_adapter, bases, tmp_path):
    old, new = bases()
    path = new / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(AdapterError, match=r"weight model\.layers\.0\.mlp\.up_proj\.weight is not"):
        compensation_of(write_adapter(), old, new, 4, tmp_path / "out")


def test_inputs_that_are_not_finite_are_refused(write_adapter, bases, tmp_path):
    old, new = bases()
    adapter = write_adapter()
    inputs = module_inputs(tiny_model(), adapter, SEQUENCES)
    inputs["model.layers.1.mlp.down_proj"].values[0, 0] = float("inf")
    with pytest.raises(AdapterError, match=r"outputs of model\.layers\.1\.mlp\.down_proj is not"):
        compensate(adapter, weight_pairs(old, new), inputs, 4, tmp_path / "out")


def test_options_that_change_the_product_are_named(write_adapter):
    folder = edit_config(write_adapter(), ensure_weight_tying=True, lora_bias=True)
    assert not_compensable(folder) == "the adapter has ensure_weight_tying, lora_bias"


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"],
                   task_type="CAUSAL_LM"), "no matrices of low rank to an adapter of the type IA3"),
    ],
)  # fmt: skip
def test_other_types_are_refused(config, reason, write_adapter, bases, tmp_path):
    folder = write_adapter(config=config)
    assert reason in not_compensable(folder)
    with pytest.raises(AdapterError, match=reason):
        compensate(folder, weight_pairs(*bases()), {}, 4, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_update_of_no_linear_module_is_refused(write_adapter, bases, tmp_path):
    old, new = bases(())
    path = new / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"] += 0.1
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(AdapterError, match="changes no linear module") as caught:
        compensation_of(write_adapter(), old, new, 4, tmp_path / "out")
    assert "found:    changes of model.norm.weight" in str(caught.value)


def test_an_output_layer_that_the_adapter_has_is_compensated_at_the_next_update_too(
    write_adapter, bases, tmp_path
):
    old, new = bases(("embed_tokens", *FFN))
    adapter = write_adapter()
    first = compensation_of(adapter, old, new, FULL, tmp_path / "first")
    model = LlamaForCausalLM.from_pretrained(new)
    with torch.no_grad():
        model.lm_head.weight += 0.01 * torch.randn(258, 32)
    model.save_pretrained(tmp_path / "next")
    inputs = module_inputs(LlamaForCausalLM.from_pretrained(new), first.folder, SEQUENCES)
    again = compensate(
        first.folder, weight_pairs(new, tmp_path / "next"), inputs, FULL, tmp_path / "again",
        output_layer=False,
    )  # fmt: skip
    assert again.modules == 1
    hidden = torch.randn(3, 32)
    head = attach(LlamaForCausalLM.from_pretrained(tmp_path / "next"), again.folder)
    torch.testing.assert_close(
        head.get_output_embeddings()(hidden), tiny_model().lm_head(hidden), rtol=1e-4, atol=1e-4
    )
