"""AdapterSpec to PEFT config and back, and attaching an adapter."""

import warnings

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer

from tests.tiny import tiny_model
from trans_peft.domain.adapter import AdapterSpec
from trans_peft.errors import InvalidSpecError
from trans_peft.methods.specs import attach, to_config, to_spec

LORA = AdapterSpec("LORA", {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]})


def test_a_spec_gives_the_config_that_peft_builds():
    expected = LoraConfig(
        r=4, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
    )
    assert to_config(LORA) == expected


@pytest.mark.parametrize(
    "spec",
    [
        LORA,
        AdapterSpec("LORA", {"use_dora": True, "target_modules": "all-linear"}),
        AdapterSpec("BOTTLENECK", {"bottleneck_dim": 8, "non_linearity": "gelu"}),
        AdapterSpec("IA3", {"feedforward_modules": ["down_proj"], "target_modules": ["down_proj"]}),
        AdapterSpec("VERA", {"r": 16, "target_modules": ["q_proj"]}),
    ],
    ids=str,
)
def test_a_config_gives_its_spec_and_back(spec, tmp_path):
    config = to_config(spec)
    assert to_spec(config) == spec
    config.save_pretrained(tmp_path)
    assert to_spec(PeftConfig.from_pretrained(tmp_path)) == spec


def test_every_problem_of_a_spec_is_named_at_once():
    with pytest.raises(InvalidSpecError) as caught:
        to_config(AdapterSpec("LORA", {"rank": 4, "r": "four", "lora_dropout": "no"}))
    message = str(caught.value)
    for part in ("'rank'", "lora_alpha", "r must be int", "lora_dropout must be float"):
        assert part in message


def test_an_unknown_method_lists_the_known_ones():
    with pytest.raises(InvalidSpecError, match=r"BOTTLENECK.*LORA.*\n.*NOPE"):
        to_config(AdapterSpec("NOPE"))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (AdapterSpec("LORA", {"target_modules": ["query", "v_proj"]}), "query.*\n.*q_proj"),
        (AdapterSpec("LORA", {"target_modules": "no.*such"}), "no.*such"),
        (AdapterSpec("LORA", {"target_modules": ["q_proj", "mlp"]}), "LlamaMLP"),
        (AdapterSpec("LORA", {"target_modules": ["q_proj"], "r": 0}), "positive"),
        (AdapterSpec("BOTTLENECK", {"bottleneck_dim": 0}), "bottleneck_dim"),
    ],
)
def test_a_refused_adapter_leaves_the_model_unchanged(spec, message):
    model = tiny_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(InvalidSpecError, match=message):
        attach(model, spec)
    assert list(before) == list(model.state_dict())
    assert not any(isinstance(module, BaseTunerLayer) for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert attach(model, LORA)(torch.arange(4)[None]).logits.shape == (1, 4, 258)


@pytest.mark.parametrize("wrapped", [True, False])
def test_a_second_adapter_is_refused(wrapped):
    model = attach(tiny_model(), LORA)
    with pytest.raises(InvalidSpecError, match="already has an adapter"):
        attach(model if wrapped else model.get_base_model(), LORA)


def test_attaching_passes_on_no_warning_about_the_old_name_of_checkpointing(monkeypatch):
    """A warning about something else is passed on."""
    model = tiny_model()
    attached = PeftModel.__init__

    def warn_too(*arguments, **options):
        warnings.warn("about something else", UserWarning, stacklevel=1)
        attached(*arguments, **options)

    monkeypatch.setattr(PeftModel, "__init__", warn_too)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        attach(model, AdapterSpec("LORA", {"target_modules": ["q_proj"]}))
    assert [str(warning.message) for warning in caught] == ["about something else"]
