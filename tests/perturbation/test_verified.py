"""What is taken for a FFN, what refuses a model, and that looking leaves no trace."""

import random
import re
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn

from tests.perturbation import toys
from tests.perturbation.reference import START
from tests.tiny import tiny_model, tiny_model_in_4_bits
from trans_peft.domain.recipe import Perturbation
from trans_peft.errors import UnsupportedModelError
from trans_peft.perturbation import Layout, layer_criticality, perturbed
from trans_peft.perturbation.draws import draw
from trans_peft.perturbation.slicing import neurons_to_compute, sliced_linear

IDS = torch.arange(10)[None] * 3 % toys.VOCABULARY
MASKED = Perturbation(masking_p=0.4)
RARELY_MASKED = Perturbation(masking_p=0.05)
DROPPED = Perturbation(dropping_p=0.5)
SEED = 3


def with_weights(model, weights):
    return torch.func.functional_call(model, weights, (IDS,))


def masked_columns(model, perturbation, downs):
    """The down projections of each layer with the columns of masked neurons set to zero."""
    weights = {}
    own = dict(model.named_parameters())
    for layer in range(len(model.layers)):
        sizes = [toys.NEURONS] * len(downs)
        drawn = draw(
            perturbation, START, seed=SEED, rank=0, layer=layer, kind="ffn", neurons=sum(sizes)
        )
        for name, kept in zip(downs, torch.from_numpy(drawn.kept).split(sizes), strict=True):
            weights[f"layers.{layer}.{name}"] = own[f"layers.{layer}.{name}"] * kept
    return weights


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def refused(model, match, perturbation=MASKED, **options):
    with (
        pytest.raises(UnsupportedModelError, match=match),
        perturbed(model, perturbation, seed=SEED, **options),
    ):
        pytest.fail("entered")


# --- masking ----------------------------------------------------------------------------------


@pytest.mark.parametrize("perturbation", [MASKED, RARELY_MASKED], ids=["0.4", "0.05"])
@pytest.mark.parametrize(
    ("ffns", "downs", "reason"),
    [
        ([toys.Plain], ["ffn_0.down.weight"], None),
        ([toys.Inline], ["ffn_0.down.weight"], None),
        ([toys.Residual], ["ffn_0.down.weight"], None),
        ([toys.PostNorm], ["ffn_0.mlp.down.weight"], None),
        ([toys.Plain, toys.Inline], ["ffn_0.down.weight", "ffn_1.down.weight"], None),
        ([toys.Normed], ["ffn_0.down.weight"], "raises RuntimeError"),
        ([toys.Fixed], ["ffn_0.down.weight"], "raises RuntimeError"),
        ([toys.Sparse], ["ffn_0.down.weight"], "differs from the multiplied one by"),
        ([toys.Permuted], ["ffn_0.down.weight"], "differs from the multiplied one by"),
        ([toys.Interleaved], ["ffn_0.down.weight"], "differs from the multiplied one by"),
        ([toys.GatedExperts], ["ffn_0.down_proj"], "experts are not sliced"),
        (
            [toys.Mixture],
            ["ffn_0.experts.down_proj", "ffn_0.shared.down.weight"],
            "experts are not sliced",
        ),
    ],
    ids=str,
)
def test_masking_equals_the_formula_for_every_form_of_ffn(ffns, downs, reason, perturbation):
    model = toys.decoder(*ffns)
    with torch.no_grad():
        expected = with_weights(model, masked_columns(model, perturbation, downs))
        with perturbed(model, perturbation, seed=SEED) as handle:
            close(model(IDS), expected)
    reasons = set(handle.multiplied.values())
    assert not reasons if reason is None else all(reason in found for found in reasons)


def test_one_layer_of_each_kind_is_verified():
    makers = [
        lambda: toys.Layer(toys.Plain()),
        lambda: toys.Layer(toys.Normed()),
        lambda: toys.Layer(toys.Mixture()),
        lambda: toys.Layer(),
        lambda: toys.Layer(toys.Normed()),
    ]
    model = toys.Decoder(*makers).train()
    with perturbed(model, MASKED, seed=SEED) as handle:
        assert list(handle.multiplied) == ["layer 1 ffn", "layer 2 ffn", "layer 4 ffn"]
        assert handle.without_ffn == (3,)


def test_layers_that_differ_in_one_attribute_are_of_two_kinds():
    class Sometimes(toys.Sparse):
        sparse = False

        def neurons(self, x):
            return super().neurons(x) if self.sparse else toys.Plain.neurons(self, x)

    model = toys.decoder(Sometimes)
    model.layers[1].ffn_0.sparse = True
    with torch.no_grad(), perturbed(model, MASKED, seed=SEED) as handle:
        found = model(IDS)
    assert list(handle.multiplied) == ["layer 1 ffn"]
    expected = with_weights(model, masked_columns(model, MASKED, ["ffn_0.down.weight"]))
    close(found, expected)


@given(st.integers(1, 70).flatmap(lambda n: st.lists(st.booleans(), min_size=n, max_size=n)))
def test_computed_neurons_are_in_order_and_padding_adds_nothing(kept):
    kept = np.array(kept)
    computed = neurons_to_compute(kept, 2, torch.device("cpu"))
    if kept.all():
        assert computed is None
        return
    first, second = computed.indices.chunk(2)
    assert torch.equal(second, first + len(kept))
    assert first.tolist() == sorted(set(first.tolist()) | set(kept.nonzero()[0].tolist()))
    assert len(first) % 16 == 0 or len(first) == len(kept)
    assert len(first) < int(kept.sum()) + 16
    down, x = nn.Linear(len(kept), 3), torch.randn(2, len(kept))
    one = neurons_to_compute(kept, 1, torch.device("cpu"))
    torch.testing.assert_close(
        sliced_linear(down, "input", x[:, one.indices], one), down(x * torch.from_numpy(kept))
    )


# --- other modules, and unsupported models ----------------------------------------------------


@pytest.mark.parametrize(
    ("ffns", "names"),
    [
        ([toys.Plain, toys.ThreeInputs], "ffn_1"),
        ([toys.Plain, toys.Table], "ffn_1"),
        ([toys.Plain, toys.Experts], "ffn_1"),
        ([lambda: toys.Mixture(toys.Experts)], r"ffn_0\.experts"),
        ([toys.LeakyExperts], "does not mask all neurons"),
    ],
)
def test_an_unassigned_weight_makes_the_model_unsupported(ffns, names):
    refused(toys.decoder(*ffns), rf"layers 0 to 2 \(Layer\).*{names}")


def test_every_unsupported_kind_of_layer_is_named():
    makers = [lambda: toys.Layer(toys.Table()), lambda: toys.Layer(toys.Plain(), toys.Experts())]
    refused(toys.Decoder(*makers).train(), r"(?s)layer 0 .*ffn_0.*layer 1 .*ffn_1")


def test_a_gate_on_another_input_is_not_an_ffn():
    model = toys.Decoder(*[lambda: toys.LayerWithGate(("some_gate", "some_projection"))] * 2)
    refused(model.train(), "some_projection")


@pytest.mark.parametrize(
    "make",
    [
        lambda: toys.LayerWithGate(("per_layer_input_gate", "per_layer_projection")),
        toys.LayerWithBorrowedKeys,
    ],
    ids=["known gate", "attention with borrowed keys"],
)
def test_other_modules_are_not_perturbed(make):
    model = toys.Decoder(make, make).train()
    with torch.no_grad():
        expected = with_weights(model, masked_columns(model, MASKED, ["ffn_0.down.weight"]))
        with perturbed(model, MASKED, seed=SEED):
            close(model(IDS), expected)


def test_a_model_whose_layers_only_mix_tokens_is_refused():
    refused(toys.decoder(), "no layer has an FFN")


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (Layout("layers", ("ffn_0.a", "ffn_0.b"), "ffn_0.out"), "ffn_0"),
        (Layout("layers", ("mixer.v_proj",), "mixer.o_proj"), "mixes tokens"),
    ],
)
def test_an_incomplete_or_wrong_layout_is_refused(layout, message):
    refused(toys.decoder(toys.ThreeInputs), message, layout=layout)


@pytest.mark.parametrize("down", ["mlp.down_proj", "self_attn.o_proj"])
def test_a_wrong_layout_of_a_real_model_is_refused(down):
    parts = {"mlp.down_proj": ("mlp.gate_proj",), "self_attn.o_proj": ("self_attn.q_proj",)}
    refused(tiny_model().train(), "layout|mlp", layout=Layout("layers", parts[down], down))


def test_masking_with_a_complete_layout_equals_the_formula():
    model = toys.decoder(toys.ThreeInputs)
    layout = Layout("layers", ("ffn_0.a", "ffn_0.b", "ffn_0.c"), "ffn_0.out")
    refused(model, re.escape(str(layout)))  # the advice is what works
    with torch.no_grad():
        expected = with_weights(model, masked_columns(model, MASKED, ["ffn_0.out.weight"]))
        with perturbed(model, MASKED, seed=SEED, layout=layout) as handle:
            close(model(IDS), expected)
    assert not handle.multiplied


def test_a_model_without_token_ids_is_verified_by_shape_and_multiplied():
    class OfVectors(toys.Decoder):
        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    def layer(*ffns):
        return toys.Layer(*(make() for make in ffns))

    model = OfVectors(lambda: layer(toys.Plain)).train()
    with perturbed(model, MASKED, seed=SEED) as handle:
        assert "not compared" in handle.multiplied["layer 0 ffn"]
    model = OfVectors(lambda: layer(toys.Plain, toys.Experts)).train()
    refused(model, r"ffn_1\.gate_up_proj, ffn_1\.down_proj")


# --- dropping ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ffns",
    [
        [toys.Plain],
        [toys.Biased],
        [toys.Normed],
        [toys.Residual],
        [toys.PostNorm],
        [toys.Mixture],
        [toys.Plain, toys.Inline],
        [toys.GatedExperts, toys.Residual],
    ],
    ids=str,
)
def test_a_dropped_ffn_adds_nothing(ffns):
    model = toys.decoder(*ffns)
    zeros = {toys.Residual: lambda x: x}
    with torch.no_grad(), perturbed(model, DROPPED, seed=SEED):
        found = model(IDS)
    dropped = [
        draw(DROPPED, START, seed=SEED, rank=0, layer=n, kind="ffn", neurons=1).dropped
        for n in range(3)
    ]
    assert set(dropped) == {True, False}
    for layer, is_dropped in zip(model.layers, dropped, strict=True):
        for number, make in enumerate(ffns if is_dropped else ()):
            getattr(layer, f"ffn_{number}").forward = zeros.get(make, torch.zeros_like)
    close(found, model(IDS))


def test_criticality_covers_the_whole_mixture_and_is_zero_without_a_ffn():
    class WithLoss(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = toys.Decoder(
                lambda: toys.Layer(toys.Mixture()), toys.Layer, lambda: toys.Layer(toys.Biased())
            )

        def forward(self, input_ids, labels=None):
            logits = self.model(input_ids)
            loss = None if labels is None else logits.square().mean()
            return type("Output", (), {"loss": loss})

    model = WithLoss().train()
    batch = {"input_ids": IDS, "labels": IDS}
    with torch.no_grad():
        whole = model(**batch).loss
        added = layer_criticality(model, [batch])
        for index in range(3):
            ffn = getattr(model.model.layers[index], "ffn_0", None)
            if ffn is not None:
                ffn.forward = torch.zeros_like
            assert added[index] == pytest.approx((model(**batch).loss - whole).item(), rel=1e-4)
            if ffn is not None:
                del ffn.forward
    assert added[1] == 0


# --- no side effects --------------------------------------------------------------------------


class WithSideEffects(toys.Plain):
    """Has every kind of side effect in each call."""

    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(3))
        self.register_buffer("mean", torch.zeros(2), persistent=False)
        self.used = nn.Parameter(torch.zeros(1))
        self.calls, self.seen, self.cache = 0, [], {}

    def forward(self, x):
        self.count += 1
        self.mean = self.mean + 1
        self.calls += 1
        self.seen.append(x.shape)
        self.cache[len(self.cache)] = x
        self.fresh = x
        self.used.data += 1
        x = x * (1 + torch.rand(1) + random.random() + float(np.random.rand()))
        return super().forward(nn.functional.dropout(x, 0.1, self.training))


def states(model):
    ffn = model.layers[0].ffn_0
    return (
        random.getstate(),
        np.random.get_state()[1].tolist(),
        torch.get_rng_state().tolist(),
        {name: tensor.tolist() for name, tensor in model.state_dict().items()},
        {name: parameter.grad for name, parameter in model.named_parameters()},
        (ffn.mean.tolist(), ffn.calls, list(ffn.seen), dict(ffn.cache), hasattr(ffn, "fresh")),
        [module.training for module in model.modules()],
        ["forward" in module.__dict__ for module in model.modules()],
    )


@pytest.mark.parametrize("supported", [True, False], ids=["entered", "refused"])
def test_verification_has_no_side_effects(supported):
    model = (
        toys.decoder(WithSideEffects) if supported else toys.decoder(WithSideEffects, toys.Table)
    )
    model.layers[2].ffn_0.eval()
    hooked = []
    model.layers[0].ffn_0.register_forward_hook(lambda *_: hooked.append(1))
    model.layers[0].register_forward_pre_hook(lambda *_: hooked.append(1))
    parameters = {name: id(parameter) for name, parameter in model.named_parameters()}
    before = states(model)
    if supported:
        with perturbed(model, MASKED, seed=SEED):
            inside = states(model)
        assert inside[:-1] == before[:-1]
    else:
        refused(model, "ffn_1")
    assert states(model) == before
    assert not hooked
    assert parameters == {name: id(parameter) for name, parameter in model.named_parameters()}
    assert torch.is_grad_enabled()


def test_dropout_does_not_affect_the_comparison():
    class Dropout(toys.Plain):
        def neurons(self, x):
            return nn.functional.dropout(super().neurons(x), 0.5, self.training)

    with perturbed(toys.decoder(Dropout), MASKED, seed=SEED) as handle:
        assert not handle.multiplied


def dora(model):
    return get_peft_model(model, LoraConfig(target_modules=["up_proj", "q_proj"], use_dora=True))


def lora(model):
    targets = ["gate_proj", "up_proj", "down_proj", "q_proj"]
    return get_peft_model(model, LoraConfig(target_modules=targets, lora_dropout=0.3))


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: lora(tiny_model()), None),
        (lambda: lora(tiny_model().to(torch.bfloat16)), None),
        (lambda: lora(tiny_model().to(torch.float16)), None),
        (lambda: dora(tiny_model()), "DoraLinearVariant needs the whole weight"),
        (lambda: lora(tiny_model_in_4_bits()), "not a plain linear layer|Linear4bit"),
    ],
    ids=["lora", "lora in bfloat16", "lora in float16", "dora", "lora on nf4"],
)
def test_verification_leaves_adapters_and_quantized_layers_unchanged(model, reason):
    if reason and "4bit" in reason:
        pytest.importorskip("bitsandbytes")
    model = model().train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random_state = torch.get_rng_state()
    with perturbed(model, MASKED, seed=SEED) as handle:
        reasons = set(handle.multiplied.values())
        assert model.base_model.model.model.gradient_checkpointing
    assert not reasons if reason is None else all(re.search(reason, found) for found in reasons)
    assert torch.equal(torch.get_rng_state(), random_state)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert all(parameter.grad is None for parameter in model.parameters())


# --- weights that are used without calling their modules ---------------------------------------


def functional(mlp, x):
    hidden = mlp.act_fn(F.linear(x, mlp.gate_proj.weight)) * F.linear(x, mlp.up_proj.weight)
    return F.linear(hidden, mlp.down_proj.weight)


def down_alone(mlp, x):
    return F.linear(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x), mlp.down_proj.weight)


def in_training_alone(mlp, x):
    return functional(mlp, x) if mlp.training else type(mlp).forward(mlp, x)


def fused_with_lora(mlp, x):
    """As a fused LoRA kernel computes an adapted FFN, out of the weights of its layers."""

    def projected(layer, x):
        weight = layer.base_layer.weight
        for name, a in layer.lora_A.items():
            weight = weight + layer.scaling[name] * layer.lora_B[name].weight @ a.weight
        return F.linear(x, weight)

    hidden = mlp.act_fn(projected(mlp.gate_proj, x)) * projected(mlp.up_proj, x)
    return projected(mlp.down_proj, hidden)


def with_forward(model, forward, layers=slice(None)):
    for layer in model.get_decoder().layers[layers]:
        layer.mlp.forward = partial(forward, layer.mlp)
    return model.train()


BYPASSED = r"mlp\.down_proj are used without calling"


@pytest.mark.parametrize("forward", [functional, down_alone, in_training_alone])
@pytest.mark.parametrize("perturbation", [MASKED, DROPPED], ids=["masked", "dropped"])
def test_a_ffn_that_reads_its_weights_without_calling_its_modules_is_refused(forward, perturbation):
    refused(with_forward(tiny_model(), forward), BYPASSED, perturbation)


def test_a_fused_kernel_over_adapted_projections_is_refused():
    model = get_peft_model(
        tiny_model(),
        LoraConfig(r=2, target_modules=["gate_proj", "up_proj", "down_proj"]),
    )
    refused(with_forward(model, fused_with_lora), BYPASSED)


@pytest.mark.parametrize("change", ["own forward", "private flag", "partial", "function"])
def test_one_layer_with_other_code_is_judged_by_itself(change):
    model = tiny_model()
    mlp = model.model.layers[1].mlp

    class Switched(type(mlp)):
        _fused = False
        run = staticmethod(type(mlp).forward)

        def forward(self, x):
            return functional(self, x) if self._fused else self.run(self, x)

    if change == "own forward":
        with_forward(model, functional, slice(1, 2))
    else:
        for layer in model.model.layers:
            layer.mlp.__class__ = Switched
            layer.mlp.run = partial(Switched.run) if change == "partial" else Switched.run
        if change == "private flag":
            mlp._fused = True
        else:
            mlp.run = partial(functional) if change == "partial" else functional
    refused(model.train(), f"layer 1 .*{BYPASSED}")


def test_a_second_ffn_in_the_code_of_the_layer_is_named():
    model = tiny_model()

    class Doubled(type(model.model.layers[0])):
        def forward(self, *args, **kwargs):
            x = super().forward(*args, **kwargs)
            return x + F.linear(F.silu(F.linear(x, self.fc_in.weight)), self.fc_out.weight)

    width = model.config.hidden_size
    for layer in model.model.layers:
        layer.__class__ = Doubled
        layer.fc_in, layer.fc_out = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
    refused(model.train(), "no FFN was recognized in fc_in, fc_out")


def test_weights_that_are_never_used_refuse_nothing():
    model = tiny_model()
    width = model.config.hidden_size
    for layer in model.model.layers:
        layer.fc_in, layer.fc_out = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
    with perturbed(model.train(), MASKED, seed=SEED) as handle:
        assert handle.multiplied == {}


# --- modules that two layers share, and modules that cannot be overridden -----------------------


@pytest.mark.parametrize("shared", ["mlp", "mlp.up_proj", "mlp.down_proj", "layer"])
@pytest.mark.parametrize("granularity", ["neuron", "element"])
def test_a_module_that_two_layers_share_is_refused(shared, granularity):
    model = tiny_model()
    first, second = model.model.layers[:2]
    if shared == "layer":
        model.model.layers[1] = first
    else:
        owner, _, name = shared.rpartition(".")
        setattr(second.get_submodule(owner), name, first.get_submodule(shared))
    perturbation = Perturbation(masking_p=0.2, granularity=granularity)
    refused(model.train(), r"layers 0 and 1 share mlp\.", perturbation)


def test_weights_that_two_modules_share_have_masks_of_each_layer():
    model = tiny_model().train()
    model.model.layers[1].mlp.down_proj.weight = model.model.layers[0].mlp.down_proj.weight
    with perturbed(model, MASKED, seed=SEED) as handle:
        assert handle.multiplied == {}


def test_a_compiled_script_in_a_layer_is_refused():
    model = tiny_model()
    mlp = model.model.layers[1].mlp
    model.model.layers[1].mlp = torch.jit.trace(mlp, torch.zeros(1, 2, model.config.hidden_size))
    refused(model.train(), "layer 1: mlp.* is TorchScript")
