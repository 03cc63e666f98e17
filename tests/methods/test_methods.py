"""Every method against the behaviours that all of them share: one row a method."""

import pytest
import torch
from peft import PeftModel
from peft.utils import load_peft_weights, set_peft_model_state_dict
from transformers import AutoModelForCausalLM

from tests.perturbation.restated import loss_and_gradients
from tests.tiny import tiny_model, write_tiny_base
from trans_peft.domain.adapter import AdapterSpec
from trans_peft.domain.recipe import Perturbation
from trans_peft.methods.specs import attach
from trans_peft.perturbation import perturbed

QKVO = ["q_proj", "k_proj", "v_proj", "o_proj"]
ALL = [*QKVO, "gate_proj", "up_proj", "down_proj"]
METHODS = {
    "lora": AdapterSpec("LORA", {"r": 4, "target_modules": QKVO}),
    "lora on every projection": AdapterSpec("LORA", {"r": 4, "target_modules": ALL}),
    "rslora": AdapterSpec("LORA", {"r": 4, "use_rslora": True, "target_modules": ALL}),
    "dora": AdapterSpec("LORA", {"r": 4, "use_dora": True, "target_modules": ALL}),
    "houlsby": AdapterSpec("BOTTLENECK", {"bottleneck_dim": 8}),
    "houlsby after the ffn": AdapterSpec("BOTTLENECK", {"target_modules": ["mlp"]}),
    "ia3": AdapterSpec("IA3"),
    "vera": AdapterSpec("VERA", {"r": 8, "target_modules": ["q_proj", "o_proj"]}),
}
methods = pytest.mark.parametrize("spec", METHODS.values(), ids=METHODS)
IDS = torch.randint(0, 256, (2, 9), generator=torch.Generator().manual_seed(1))
NONE = Perturbation()
BOTH = Perturbation(masking_p=0.3, dropping_p=0.3)


def trained(spec, seed=0, steps=3, perturbation=NONE):
    torch.manual_seed(seed)
    model = attach(tiny_model(), spec).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    with perturbed(model, perturbation, seed=seed):
        for _ in range(steps):
            model(input_ids=IDS, labels=IDS).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return model.eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


@methods
def test_training_under_perturbation_changes_the_adapter_alone(spec):
    model = trained(spec, perturbation=BOTH)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(tiny_model()))
    assert not torch.allclose(logits(model), logits(tiny_model()), atol=1e-3)
    base = tiny_model().state_dict()
    for name, value in model.get_base_model().state_dict().items():
        plain = name.replace("base_layer.", "")
        if plain in base:
            assert torch.equal(value, base[plain]), name


@methods
def test_what_is_saved_loads_as_any_peft_adapter(spec, tmp_path):
    model = trained(spec, perturbation=BOTH)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path)
    assert torch.equal(logits(loaded), logits(model))


@methods
def test_the_saved_keys_are_those_of_plain_training(spec, tmp_path):
    trained(spec).save_pretrained(tmp_path / "plain")
    trained(spec, perturbation=BOTH).save_pretrained(tmp_path / "perturbed")
    plain, ours = (load_peft_weights(tmp_path / name) for name in ("plain", "perturbed"))
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in plain.items()}


@methods
def test_many_adapters_share_one_base_and_are_switched(spec, tmp_path):
    first, second = trained(spec), trained(spec, seed=7)
    first.save_pretrained(tmp_path / "first")
    second.save_pretrained(tmp_path / "second")
    model = PeftModel.from_pretrained(tiny_model(), tmp_path / "first", adapter_name="first")
    model.load_adapter(tmp_path / "second", "second")
    assert torch.equal(logits(model), logits(first))
    model.set_adapter("second")
    assert torch.equal(logits(model), logits(second))
    model.delete_adapter("second")
    model.set_adapter("first")
    assert torch.equal(logits(model), logits(first))
    set_peft_model_state_dict(model, load_peft_weights(tmp_path / "second"), "first")
    assert torch.equal(logits(model), logits(second))


@methods
def test_unloading_gives_the_base_back(spec):
    bare = trained(spec).unload()
    assert torch.equal(logits(bare), logits(tiny_model()))
    assert list(bare.state_dict()) == list(tiny_model().state_dict())


@pytest.mark.parametrize(
    "name", ["lora", "houlsby", "ia3"]
)  # PEFT refuses VeRA there, and transformers 5.23 misreads DoRA's magnitudes
def test_transformers_loads_what_is_saved(name, tmp_path):
    model = trained(METHODS[name])
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoModelForCausalLM.from_pretrained(write_tiny_base(tmp_path / "base"))
    loaded.load_adapter(tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded), logits(model))
    loaded.disable_adapters()
    assert torch.equal(logits(loaded), logits(tiny_model()))
    loaded.enable_adapters()
    loaded.delete_adapter("default")
    assert torch.equal(logits(loaded), logits(tiny_model()))


@methods
def test_masking_is_zeroing_columns_of_whatever_takes_the_neurons_in(spec):
    """The restatement is an activation hook here: it says the same for every PEFT layer."""
    from trans_peft.perturbation.draws import Moment, draw

    perturbation = Perturbation(masking_p=0.4)
    model = trained(spec).train()
    hooks = []
    for index, layer in enumerate(model.get_base_model().model.layers):
        kept = draw(
            perturbation, Moment(0, 0), seed=5, rank=0, layer=index, kind="ffn", neurons=64
        ).kept
        mask = torch.from_numpy(kept).float()
        down = layer.mlp.get_submodule("down_proj") if hasattr(layer.mlp, "down_proj") else None
        down = down or layer.mlp.base_layer.down_proj
        hooks.append(down.register_forward_pre_hook(lambda _, args, m=mask: (args[0] * m,)))
    expected = loss_and_gradients(model, IDS)
    for hook in hooks:
        hook.remove()
    with perturbed(model, perturbation, seed=5) as handle:
        found = loss_and_gradients(model, IDS)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    sliced = spec.peft_type in ("LORA", "BOTTLENECK", "VERA") and "use_dora" not in spec.options
    assert bool(handle.multiplied) is not sliced


def test_a_dropped_sub_layer_contributes_nothing_not_even_its_bottleneck():
    """Zeroing the output of the adapter's own layer says the same, gradients included."""
    from trans_peft.perturbation.draws import Moment, draw

    perturbation = Perturbation(dropping_p=0.5, where="both")
    model = trained(METHODS["houlsby"]).train()
    hooks = []
    for index, layer in enumerate(model.get_base_model().model.layers):
        for kind, module in (("ffn", layer.mlp), ("attention", layer.self_attn)):
            z = (
                1.0
                - draw(
                    perturbation, Moment(0, 0), seed=5, rank=0, layer=index, kind=kind, neurons=1
                ).dropped
            )

            def scale(_, __, out, z=z):
                return (out[0] * z, *out[1:]) if isinstance(out, tuple) else out * z

            hooks.append(module.register_forward_hook(scale))
    expected = loss_and_gradients(model, IDS)
    for hook in hooks:
        hook.remove()
    with perturbed(model, perturbation, seed=5):
        found = loss_and_gradients(model, IDS)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
