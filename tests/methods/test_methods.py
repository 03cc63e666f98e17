"""Properties that every adapter method must have."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from peft import PeftModel
from peft.utils import load_peft_weights, set_peft_model_state_dict
from torch import nn
from transformers import AutoModelForCausalLM

from tests.perturbation.reference import loss_and_gradients
from tests.tiny import tiny_model, tiny_model_in_4_bits, write_tiny_base
from trans_peft.domain.adapter import AdapterSpec
from trans_peft.domain.recipe import Perturbation
from trans_peft.methods.bottleneck import BottleneckConfig, BottleneckLayer
from trans_peft.methods.specs import attach
from trans_peft.perturbation import perturbed

QKVO = ["q_proj", "k_proj", "v_proj", "o_proj"]
ALL = [*QKVO, "gate_proj", "up_proj", "down_proj"]
QUANTIZED = pytest.mark.quantized


@dataclass(frozen=True)
class Method:
    """An adapter, its base, and whether masked neurons of that base are sliced."""

    spec: AdapterSpec
    base: Callable[[], nn.Module] = tiny_model
    sliced: bool = True


COMPENSATED = {"compensated_modules": ["model.layers.0.self_attn.q_proj", "lm_head"]}
LORA_ON_ALL = AdapterSpec("LORA", {"r": 4, "target_modules": ALL})
HOULSBY = AdapterSpec("BOTTLENECK", {"bottleneck_dim": 8})
METHODS = {
    "lora": Method(AdapterSpec("LORA", {"r": 4, "target_modules": QKVO})),
    "lora on every projection": Method(LORA_ON_ALL),
    "rslora": Method(AdapterSpec("LORA", {"r": 4, "use_rslora": True, "target_modules": ALL})),
    "dora": Method(
        AdapterSpec("LORA", {"r": 4, "use_dora": True, "target_modules": ALL}), sliced=False
    ),
    "qlora": Method(LORA_ON_ALL, tiny_model_in_4_bits, sliced=False),
    "houlsby": Method(HOULSBY),
    "houlsby with compensated modules": Method(
        AdapterSpec("BOTTLENECK", {"bottleneck_dim": 8} | COMPENSATED)
    ),
    "houlsby in 4 bits": Method(HOULSBY, tiny_model_in_4_bits, sliced=False),
    "houlsby with compensated modules in 4 bits": Method(
        AdapterSpec("BOTTLENECK", {"bottleneck_dim": 8} | COMPENSATED),
        tiny_model_in_4_bits,
        sliced=False,
    ),
    "houlsby after the ffn": Method(AdapterSpec("BOTTLENECK", {"target_modules": ["mlp"]})),
    "ia3": Method(AdapterSpec("IA3"), sliced=False),
    "vera": Method(AdapterSpec("VERA", {"r": 8, "target_modules": ["q_proj", "o_proj"]})),
}
methods = pytest.mark.parametrize(
    "method",
    [
        pytest.param(method, id=name, marks=[] if method.base is tiny_model else [QUANTIZED])
        for name, method in METHODS.items()
    ],
)
IDS = torch.randint(0, 256, (2, 9), generator=torch.Generator().manual_seed(1))
NONE = Perturbation()
BOTH = Perturbation(masking_p=0.3, dropping_p=0.3)


def trained(method, seed=0, steps=3, perturbation=NONE):
    torch.manual_seed(seed)
    model = attach(method.base(), method.spec).train()
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
def test_training_under_perturbation_changes_the_adapter_alone(method):
    model = trained(method, perturbation=BOTH)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(method.base()))
    assert not torch.allclose(logits(model), logits(method.base()), atol=1e-3)
    base = method.base().state_dict()
    for name, value in model.get_base_model().state_dict().items():
        plain = name.replace("base_layer.", "")
        if plain in base:
            assert torch.equal(value, base[plain]), name


@methods
def test_a_saved_adapter_loads_with_stock_peft(method, tmp_path):
    model = trained(method, perturbation=BOTH)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(method.base(), tmp_path)
    assert torch.equal(logits(loaded), logits(model))


@methods
def test_the_saved_keys_equal_those_of_plain_training(method, tmp_path):
    trained(method).save_pretrained(tmp_path / "plain")
    trained(method, perturbation=BOTH).save_pretrained(tmp_path / "perturbed")
    plain, ours = (load_peft_weights(tmp_path / name) for name in ("plain", "perturbed"))
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in plain.items()}


@methods
def test_many_adapters_share_one_base_and_are_switched(method, tmp_path):
    first, second = trained(method), trained(method, seed=7)
    first.save_pretrained(tmp_path / "first")
    second.save_pretrained(tmp_path / "second")
    model = PeftModel.from_pretrained(method.base(), tmp_path / "first", adapter_name="first")
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
def test_unloading_restores_the_base(method):
    bare = trained(method).unload()
    assert torch.equal(logits(bare), logits(method.base()))
    assert list(bare.state_dict()) == list(method.base().state_dict())


@pytest.mark.parametrize(
    "name", ["lora", "houlsby", "ia3"]
)  # PEFT rejects VeRA there, and transformers 5.23 misreads DoRA's magnitudes
def test_transformers_loads_a_saved_adapter(name, tmp_path):
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
def test_masking_equals_multiplying_the_input_of_the_down_projection(method):
    """The reference multiplies the input of the down projection by the mask in a hook."""
    from trans_peft.perturbation.draws import TrainingPosition, draw

    perturbation = Perturbation(masking_p=0.4)
    model = trained(method).train()
    hooks = []
    for index, layer in enumerate(model.get_base_model().model.layers):
        kept = draw(
            perturbation,
            TrainingPosition(0, 0),
            seed=5,
            rank=0,
            layer=index,
            kind="ffn",
            neurons=64,
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
    assert bool(handle.multiplied) is not method.sliced


@QUANTIZED
def test_a_step_on_4_bits_equals_the_sliced_step_on_the_dequantized_weights():
    """Compare masking by multiplication with masking by slicing, including dropping."""
    import bitsandbytes

    spec = AdapterSpec("LORA", {"r": 4, "target_modules": ALL, "init_lora_weights": False})
    base, rounded = tiny_model_in_4_bits(), tiny_model()
    for name, module in base.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            weight = module.weight
            rounded.get_submodule(name).weight.data = bitsandbytes.functional.dequantize_4bit(
                weight.data, weight.quant_state
            )
    found = []
    for model in (base, rounded):
        torch.manual_seed(0)
        adapted = attach(model, spec).train()
        with perturbed(adapted, Perturbation(0.4, 0.4), seed=0) as handle:
            found.append((loss_and_gradients(adapted, IDS), handle.multiplied))
    (ours, multiplied), (expected, nothing) = found
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)
    assert nothing == {}
    assert set(multiplied) == {"layer 0 ffn", "layer 1 ffn"}
    assert set(multiplied.values()) == {"Linear4bit is not a plain linear layer"}


def test_a_bottleneck_follows_the_device_of_quantized_weights():
    quantized = nn.Module()
    packed = torch.zeros(4, dtype=torch.uint8, device="meta")
    quantized.weight = nn.Parameter(packed, requires_grad=False)
    layer = BottleneckLayer(quantized, 8, "default", BottleneckConfig())
    up = layer.bottleneck_up["default"].weight
    assert (up.device.type, up.dtype) == ("meta", torch.float32)


@methods
def test_a_dropped_sub_layer_and_its_adapter_contribute_nothing(method):
    """The reference multiplies the output of the sub-layer and its adapter by zero in a hook."""
    from trans_peft.perturbation.draws import TrainingPosition, draw

    perturbation = Perturbation(dropping_p=0.5, where="both")
    model = trained(method).train()
    hooks = []
    for index, layer in enumerate(model.get_base_model().model.layers):
        for kind, module in (("ffn", layer.mlp), ("attention", layer.self_attn)):
            z = (
                1.0
                - draw(
                    perturbation,
                    TrainingPosition(0, 0),
                    seed=5,
                    rank=0,
                    layer=index,
                    kind=kind,
                    neurons=1,
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
