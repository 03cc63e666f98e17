"""What holds around the formulas: moments, recomputation, modes, errors, and the way out."""

import copy
import re
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.optim import optimizer as optimizers
from torch.utils.checkpoint import checkpoint

from tests.perturbation.reference import Down, loss_and_gradients, reference_weights
from tests.tiny import tiny_model
from trans_peft.domain.recipe import Perturbation
from trans_peft.errors import InvalidSpecError, UnsupportedModelError
from trans_peft.perturbation import Layout, perturbed
from trans_peft.perturbation.draws import TrainingPosition, draw

LAYERS = 4
BOTH = Perturbation(masking_p=0.3, dropping_p=0.3)
MASKED = Perturbation(masking_p=0.3)
DOWN = Down(("model.layers.{}.mlp.down_proj.weight",))
ATTENTION = Down(("model.layers.{}.self_attn.o_proj.weight",))
IDS = torch.randint(0, 256, (2, 9), generator=torch.Generator().manual_seed(1))
TARGETS = ["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]
LORA = LoraConfig(r=4, target_modules=TARGETS)


def base(**options):
    return tiny_model(layers=LAYERS, **options).train()


def adapted(targets=TARGETS):
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
    return get_peft_model(base(), config).train()


def loss(model, ids=IDS):
    return model(input_ids=ids, labels=ids).loss


def optimizer_of(model):
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def restated(model, position, *, seed=1, rank=0):
    weights = reference_weights(
        model, DOWN, BOTH, layers=LAYERS, seed=seed, rank=rank, position=TrainingPosition(*position)
    )
    return torch.func.functional_call(model, weights, (), {"input_ids": IDS, "labels": IDS}).loss


# --- draws ------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(
    st.integers(0, 2**64 - 1), st.integers(0, 7), st.integers(0, 10**6), st.integers(0, 63),
    st.integers(0, 90),
)  # fmt: skip
def test_a_draw_depends_on_its_position_only(seed, rank, step, micro_step, layer):
    fixed = {"seed": seed, "rank": rank, "layer": layer, "kind": "ffn", "neurons": 40}
    first = draw(BOTH, TrainingPosition(step, micro_step), **fixed)
    again = draw(BOTH, TrainingPosition(step, micro_step), **fixed)
    assert first.dropped == again.dropped
    assert (first.kept == again.kept).all()
    others = [
        draw(BOTH, TrainingPosition(step + 1, micro_step), **fixed),
        draw(BOTH, TrainingPosition(step, micro_step + 1), **fixed),
        *(
            draw(BOTH, TrainingPosition(step, micro_step), **{**fixed, name: value})
            for name, value in (
                ("seed", seed ^ 1), ("rank", rank + 1), ("layer", layer + 1), ("kind", "attention")
            )
        ),
    ]  # fmt: skip
    assert len({draw.kept.tobytes() for draw in (first, *others)}) == 7


def test_draws_have_the_rates_of_the_formula():
    drawn = [
        draw(
            Perturbation(0.2, 0.1),
            TrainingPosition(step, 0),
            seed=1,
            rank=0,
            layer=0,
            kind="ffn",
            neurons=50,
        )
        for step in range(4000)
    ]
    assert abs(sum(d.dropped for d in drawn) / 4000 - 0.1) < 0.02  # 4 standard errors
    assert abs(sum(d.kept.mean() for d in drawn) / 4000 - 0.8) < 0.004


# --- positions --------------------------------------------------------------------------------


def test_each_forward_pass_equals_the_formula_at_its_position():
    model = base()
    optimizer = optimizer_of(model)
    for step in range(3):
        for micro_step in range(2):
            with torch.no_grad():
                expected = restated(model, (step, micro_step))
            with perturbed(model, BOTH, seed=1, step=step):
                for _ in range(micro_step + 1):
                    found = loss(model)
            torch.testing.assert_close(found, expected)
        loss(model).backward()
        optimizer.step()


def test_gradients_accumulate_over_micro_steps_and_a_step_begins_a_new_count():
    model, reference = base(), base()
    ours, theirs = optimizer_of(model), optimizer_of(reference)
    with perturbed(model, BOTH, seed=1) as handle:
        for step in range(3):
            for micro_step in range(2):
                loss(model).backward()
                restated(reference, (step, micro_step)).backward()
            torch.testing.assert_close(gradients(model), gradients(reference))
            for optimizer in (ours, theirs):
                optimizer.step()
                optimizer.zero_grad()
            assert handle.step == step + 1


def test_steps_of_other_optimizers_and_other_models_do_not_count():
    model, other = base(), base()
    half = list(model.parameters())
    pair = [torch.optim.SGD(half[::2], lr=0.1), torch.optim.AdamW(half[1::2], lr=0.1)]
    with perturbed(model, BOTH, seed=1) as handle:
        loss(other).backward()
        optimizer_of(other).step()
        assert handle.step == 0
        loss(model).backward()
        for optimizer in pair:  # two that share one model: one step
            optimizer.step()
        assert handle.step == 1


def test_evaluation_between_forwards_is_unperturbed_and_does_not_count():
    model = base()
    expected = restated(model, (0, 1))
    plain = tiny_model(layers=LAYERS).eval()(IDS).logits
    with perturbed(model, BOTH, seed=1):
        loss(model)
        model.eval()
        assert torch.equal(model(IDS).logits, plain)
        model.train()
        torch.testing.assert_close(loss(model), expected)


def test_a_resumed_run_continues_the_draws():
    def run(model, optimizer, steps, start=0, seek=None):
        with perturbed(model, BOTH, seed=1, step=start) as handle:
            if seek is not None:
                handle.seek(seek)
            for _ in range(steps):
                optimizer.zero_grad()
                loss(model).backward()
                optimizer.step()

    unbroken, killed, sought = base(), base(), base()
    run(unbroken, optimizer_of(unbroken), 4)
    run(killed, optimizer_of(killed), 2)
    sought.load_state_dict(killed.state_dict())
    run(killed, optimizer_of(killed), 2, start=2)
    run(sought, optimizer_of(sought), 2, seek=2)
    for name, value in unbroken.state_dict().items():
        assert torch.equal(killed.state_dict()[name], value)
        assert torch.equal(sought.state_dict()[name], value)


def test_ranks_draw_independently_and_reproducibly():
    model = base()
    for rank in (0, 1):
        expected = restated(model, (0, 0), rank=rank)
        with perturbed(model, BOTH, seed=1, rank=rank):
            torch.testing.assert_close(loss(model), expected)
    assert not torch.equal(restated(model, (0, 0)), restated(model, (0, 0), rank=1))


# --- recomputation ----------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@pytest.mark.parametrize("granularity", ["neuron", "element"])
@pytest.mark.parametrize("where", ["ffn", "both"])
def test_checkpointing_gives_the_gradients_of_not_checkpointing(reentrant, granularity, where):
    perturbation = Perturbation(0.3, 0.3, granularity, where)
    results = []
    for checkpointed in (False, True):
        model = adapted()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        optimizer = optimizer_of(model)
        with perturbed(model, perturbation, seed=1):
            for _ in range(2):
                optimizer.zero_grad()
                loss(model).backward()
                loss(model, IDS.flip(0)).backward()
                optimizer.step()
        results.append(gradients(model))
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_two_forwards_may_share_one_checkpointed_backward(reentrant):
    results = []
    for checkpointed in (False, True):
        model = adapted()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        with perturbed(model, BOTH, seed=1):
            first, second = loss(model), loss(model, IDS.flip(0))
            (first * second).backward()
        results.append(gradients(model))
    torch.testing.assert_close(results[1], results[0])


def test_a_model_checkpointed_as_a_whole_recomputes_the_same_draw():
    results = []
    for checkpointed in (False, True):
        model = base()
        with perturbed(model, BOTH, seed=1):
            for _ in range(2):
                result = (
                    checkpoint(loss, model, use_reentrant=False) if checkpointed else loss(model)
                )
                result.backward()
        results.append(gradients(model))
    torch.testing.assert_close(results[1], results[0])


# --- element-wise, precision, compilation -----------------------------------------------------


def test_element_masks_are_the_authors_formula_given_the_same_bits():
    from trans_peft.perturbation.draws import element_mask

    perturbation = Perturbation(0.3, granularity="element")
    model = base()
    hooks = []
    for index, layer in enumerate(model.model.layers):
        drawn = draw(
            perturbation,
            TrainingPosition(0, 0),
            seed=1,
            rank=0,
            layer=index,
            kind="ffn",
            neurons=64,
        )
        mask = element_mask(drawn.element_seed, 0.3, torch.Size((2, 9, 64)), torch.device("cpu"))
        assert 0.6 < mask.float().mean() < 0.8
        hooks.append(
            layer.mlp.down_proj.register_forward_pre_hook(lambda _, a, m=mask: (a[0] * m.float(),))
        )
    expected = loss_and_gradients(model, IDS)
    for hook in hooks:
        hook.remove()
    with perturbed(model, perturbation, seed=1) as handle:
        found = loss_and_gradients(model, IDS)
    torch.testing.assert_close(found, expected)
    assert handle.multiplied["layer 0 ffn"] == "each element has its own bit"


@pytest.mark.parametrize("granularity", ["neuron", "element"])
def test_bfloat16_stays_bfloat16_and_is_the_formula_within_rounding(granularity):
    torch.manual_seed(0)
    model = adapted().to(torch.bfloat16)
    perturbation = Perturbation(0.3, 0.3, granularity)
    dtypes = set()
    hooks = [
        module.register_forward_hook(lambda _, __, out: dtypes.add(out.dtype))
        for name, module in model.named_modules()
        if name.endswith(("mlp", "proj"))
    ]
    with perturbed(model, perturbation, seed=1):
        found = loss(model)
    assert dtypes == {torch.bfloat16}
    for hook in hooks:
        hook.remove()
    exact = copy.deepcopy(model).float()
    with perturbed(exact, perturbation, seed=1):
        torch.testing.assert_close(found.float(), loss(exact), rtol=2e-2, atol=2e-2)


def test_autocast_slices_in_the_dtype_that_it_computes_in():
    model = adapted()
    with perturbed(model, BOTH, seed=1):
        exact = loss(model)
    with perturbed(model, BOTH, seed=1), torch.autocast("cpu", torch.bfloat16):
        found = loss(model)
        found.backward()
    torch.testing.assert_close(found.float(), exact, rtol=2e-2, atol=2e-2)
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


# --- modes and restoring ----------------------------------------------------------------------


def test_results_are_bit_identical_if_off_or_in_eval_mode():
    model = adapted(["q_proj", "down_proj"])
    model.train()
    expected = loss_and_gradients(model, IDS)
    with perturbed(model, Perturbation(), seed=1) as handle:
        found = loss_and_gradients(model, IDS)
        handle.seek(3)
    assert torch.equal(found[0], expected[0])
    assert all(torch.equal(found[1][name], value) for name, value in expected[1].items())
    with perturbed(model, BOTH, seed=1):
        model.eval()
        assert torch.equal(loss_and_gradients(model, IDS)[0], expected[0])


@pytest.mark.parametrize("failing", [False, True])
@pytest.mark.parametrize("where", ["ffn", "attention", "both"])
@pytest.mark.parametrize("granularity", ["neuron", "element"])
def test_the_model_is_restored_after_the_block(failing, where, granularity):
    model = adapted()
    keys = list(model.state_dict())
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    observers = dict(optimizers._global_optimizer_post_hooks)
    expected = loss_and_gradients(model, IDS)
    try:
        with perturbed(model, Perturbation(0.3, 0.3, granularity, where), seed=1):
            assert list(model.state_dict()) == keys
            loss(model).backward()
            if failing:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert failing
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    assert optimizers._global_optimizer_post_hooks == observers
    assert torch.equal(loss_and_gradients(model, IDS)[0], expected[0])
    with perturbed(model, BOTH, seed=1):
        pass


def test_a_replaced_forward_is_called_and_restored():
    model = base()
    mlp = model.model.layers[0].mlp
    calls = []
    original = mlp.forward
    mlp.forward = lambda x: calls.append(1) or original(x)
    replaced = mlp.forward
    with perturbed(model, Perturbation(dropping_p=0.01), seed=1):
        calls.clear()  # entering has run the layer
        loss(model)
    assert calls == [1]
    assert mlp.forward is replaced


def test_a_copy_made_inside_the_block_is_not_perturbed():
    model = adapted()
    expected = loss(model)
    with perturbed(model, BOTH, seed=1):
        twin = copy.deepcopy(model)
        for parameter in model.parameters():
            parameter.data.zero_()
        torch.testing.assert_close(loss(twin), expected, rtol=0, atol=0)


def test_experts_that_bypass_their_activation_are_refused():
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=258, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, num_local_experts=2,
    )  # fmt: skip
    model = MixtralForCausalLM(config).train()
    experts = model.model.layers[0].mlp.experts
    experts.forward = lambda x, *_: x
    with (
        pytest.raises(UnsupportedModelError, match="MixtralExperts does not call"),
        perturbed(model, MASKED, seed=1),
    ):
        pytest.fail("entered")


def test_spared_layers_are_not_perturbed():
    model = base()
    perturbation = Perturbation(0.3, 0.9, spared_layers=(0, 2))
    weights = reference_weights(model, DOWN, perturbation, layers=LAYERS, seed=1)
    expected = loss_and_gradients(model, IDS, weights)
    with perturbed(model, perturbation, seed=1):
        torch.testing.assert_close(loss_and_gradients(model, IDS), expected)
    assert {name.split(".")[2] for name in weights} == {"1", "3"}


def test_both_perturbs_attention_and_ffn():
    model = base()
    perturbation = Perturbation(0.3, 0.3, where="both")
    weights = reference_weights(
        model, DOWN, perturbation, layers=LAYERS, seed=1
    ) | reference_weights(model, ATTENTION, perturbation, layers=LAYERS, seed=1, kind="attention")
    expected = loss_and_gradients(model, IDS, weights)
    with perturbed(model, perturbation, seed=1):
        torch.testing.assert_close(loss_and_gradients(model, IDS), expected)


def test_dropped_ffns_and_masked_neurons_are_not_computed():
    model = base()
    widths = []
    perturbation = Perturbation(0.5, 0.5)
    drawn = [
        draw(perturbation, TrainingPosition(0, 0), seed=1, rank=0, layer=i, kind="ffn", neurons=64)
        for i in range(LAYERS)
    ]
    assert {d.dropped for d in drawn} == {True, False}
    for layer in model.model.layers:
        layer.mlp.act_fn.register_forward_hook(lambda _, __, out: widths.append(out.shape[-1]))
    with perturbed(model, perturbation, seed=1):
        loss(model)
    kept = [int(d.kept.sum()) for d in drawn if not d.dropped]
    assert widths == [n + -n % 16 for n in kept]
    assert max(widths) < 64


def test_no_slice_is_kept_until_the_backward_pass():
    """Autograd saves only the weights of a sliced layer, which need no further memory."""
    model = base()
    model.requires_grad_(False)
    model.get_input_embeddings().requires_grad_(True)
    ours = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved = []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    with (
        perturbed(model, MASKED, seed=1),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        loss(model)
    weights = [t for t in saved if t.dim() == 2 and 32 in t.shape and 18 not in t.shape]
    assert sum(64 in t.shape for t in weights) == 3 * LAYERS
    assert all(t.untyped_storage().data_ptr() in ours for t in weights)


# --- errors -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda m: m.eval(), {}, r"eval mode: call model.train\(\)"),
        (lambda m: get_peft_model(m.eval(), LORA), {}, r"eval mode: call model.train\(\)"),
        (lambda m: m, {"spared_layers": (1, 4, 9)}, r"\[4, 9\] are out of range"),
        (lambda m: m, {"spared_layers": (0, 1, 2, 3)}, "spared_layers names every layer"),
        (lambda m: m, {"seed": -1}, "seed must lie"),
        (lambda m: m, {"rank": -1}, "rank must lie"),
        (lambda m: m, {"step": -1}, "step must lie"),
    ],
)
def test_bad_input_is_refused_before_anything_changes(change, options, message):
    model = change(base())
    spared = options.pop("spared_layers", ())
    perturbation = Perturbation(0.1, 0.1, spared_layers=spared)
    with (
        pytest.raises(InvalidSpecError, match=message),
        perturbed(model, perturbation, **{"seed": 1, **options}),
    ):
        pytest.fail("entered")
    assert not any("forward" in module.__dict__ for module in model.modules())


@pytest.mark.parametrize(
    ("model", "perturbation", "layout", "error", "message"),
    [
        ("a/folder", BOTH, None, UnsupportedModelError, "str 'a/folder'"),
        (None, BOTH, None, UnsupportedModelError, "NoneType"),
        (nn.Linear(1, 1), 0.1, None, InvalidSpecError, "float, NoneType"),
        (nn.Linear(1, 1), BOTH, "mlp", InvalidSpecError, "Perturbation, str"),
    ],
)
def test_arguments_of_another_type_are_refused(model, perturbation, layout, error, message):
    with (
        pytest.raises(error, match=f"expected: .*\n  found: +{message}.*\n  do: "),
        perturbed(model, perturbation, seed=1, layout=layout),
    ):
        pass


def test_a_full_fine_tune_is_perturbed_with_a_warning_at_the_users_line():
    with (
        pytest.warns(UserWarning, match="without a PEFT adapter") as warned,
        perturbed(base(), BOTH, seed=1) as handle,
    ):
        assert handle.step == 0
    ours = [warning for warning in warned if "PEFT" in str(warning.message)]
    assert [warning.filename for warning in ours] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        with perturbed(adapted(), BOTH, seed=1), perturbed(base(), Perturbation(), seed=1):
            pass


def test_a_model_without_trainable_parameters_is_refused():
    with (
        pytest.raises(InvalidSpecError, match="no parameter requires a gradient"),
        perturbed(base().requires_grad_(False), BOTH, seed=1),
    ):
        pass


def test_all_problems_are_named_at_once():
    with (
        pytest.raises(InvalidSpecError, match=r"seed must.*eval mode.*spared_layers"),
        perturbed(base().eval(), Perturbation(0.1, spared_layers=(7,)), seed=-1),
    ):
        pytest.fail("entered")


def test_a_perturbed_model_is_not_perturbed_again():
    model = adapted()
    with (
        perturbed(model, BOTH, seed=1),
        pytest.raises(InvalidSpecError, match="already perturbed"),
        perturbed(model.get_base_model(), BOTH, seed=1),
    ):
        pytest.fail("entered")


@pytest.mark.parametrize("targets", [["q_proj"], ["down_proj"]])
def test_an_adapter_added_inside_the_block_is_refused(targets):
    model = base()
    with perturbed(model, BOTH, seed=1):
        wrapped = get_peft_model(model, LoraConfig(target_modules=targets)).train()
        with pytest.raises(UnsupportedModelError, match="add the adapter first"):
            loss(wrapped)


def test_a_second_adapter_added_inside_the_block_is_refused():
    model = adapted()
    with perturbed(model, BOTH, seed=1):
        model.add_adapter("other", LoraConfig(target_modules=["down_proj"]))
        with pytest.raises(UnsupportedModelError, match="add the adapter first"):
            loss(model)


def test_the_error_for_a_model_without_an_ffn_names_the_expected_shapes():
    model = nn.Sequential(nn.Linear(4, 4)).train()
    with (
        pytest.raises(UnsupportedModelError, match=r"(?s)projection f -> d.*no ModuleList"),
        perturbed(model, BOTH, seed=1),
    ):
        pytest.fail("entered")


class Odd(nn.Module):
    """A decoder whose FFN has three input projections and is not found by shape."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Module() for _ in range(2))
        for block in self.blocks:
            block.a, block.b, block.c = (nn.Linear(8, 12) for _ in range(3))
            block.out = nn.Linear(12, 8)

    def forward(self, x):
        for block in self.blocks:
            x = x + block.out(block.a(x).tanh() * block.b(x) * block.c(x))
        return x


def test_a_layout_names_an_ffn_that_is_not_found():
    torch.manual_seed(0)
    model, x = nn.ModuleDict({"odd": Odd()}).train(), torch.randn(2, 3, 8)
    layout = Layout("odd.blocks", ffn_inputs=("a", "b", "c"), ffn_down="out")
    weights = reference_weights(
        model, Down(("odd.blocks.{}.out.weight",), biases=("odd.blocks.{}.out.bias",)), BOTH,
        layers=2, seed=1,
    )  # fmt: skip
    expected = torch.func.functional_call(
        model.odd, {name.removeprefix("odd."): value for name, value in weights.items()}, x
    )
    with (
        pytest.raises(UnsupportedModelError, match=re.escape(str(layout))),
        perturbed(model, BOTH, seed=1),
    ):
        pytest.fail("entered")
    with perturbed(model, BOTH, seed=1, layout=layout) as handle:
        torch.testing.assert_close(model.odd(x), expected)
    assert "not compared" in handle.multiplied["layer 0 ffn"]


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (Layout("layers", ("mlp.gate_proj",), "mlp.nope"), "layer 0 has no module mlp.nope"),
        (Layout("nope", ("mlp.gate_proj",), "mlp.down_proj"), r"(?s)nope.*model\.layers"),
    ],
)
def test_a_layout_that_does_not_match_is_refused(layout, message):
    with (
        pytest.raises(UnsupportedModelError, match=message),
        perturbed(base(), BOTH, seed=1, layout=layout),
    ):
        pytest.fail("entered")


@pytest.mark.slow
def test_a_compiled_model_is_perturbed_like_any_other():
    """torch.compile compiles the other modules; the gradients are correct."""
    model = tiny_model(layers=2).train()
    compiled = torch.compile(model, backend="eager")
    drawn = Perturbation(0.3, 0.5)
    weights = reference_weights(model, DOWN, drawn, layers=2, seed=0)
    assert [weight.any() for weight in weights.values()] == [False, True]
    _, expected = loss_and_gradients(model, IDS, weights)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = loss(compiled)
        model.zero_grad()
        with perturbed(model, drawn, seed=0):
            loss(compiled).backward()
        torch.testing.assert_close(gradients(model), expected)
        torch.testing.assert_close(loss(compiled), plain)
