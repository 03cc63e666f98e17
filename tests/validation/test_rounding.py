"""Batch shapes change logits within the derived bound; a shared base does not change them."""

from functools import cache

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from study.rounding import derived, logits, measured
from tests.tiny import tiny_model
from tests.validation.models import model_of
from trans_peft.transfer.load_adapter import attached
from trans_peft.validation.decoding.sampling import NEAR_TIE

pytestmark = pytest.mark.usefixtures("one_thread")

LENGTHS = (1, 2, 9, 14, 30, 3, 61, 8, 20, 2, 5, 90)
BEGINNING = 24


@cache
def prompts():
    draws = torch.Generator().manual_seed(11)
    common = torch.randint(32, 127, (BEGINNING,), generator=draws).tolist()
    return [common + torch.randint(32, 127, (n,), generator=draws).tolist() for n in LENGTHS]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", ["llama", "qwen2", "tiny, 8 layers"])
def test_logits_differ_between_batch_shapes_by_at_most_the_derived_bound(name, seed):
    model = tiny_model(seed, layers=8).eval() if "tiny" in name else model_of(name, seed)
    moved = max(measured(model, prompts(), (1, 2, 5, 12), share=share) for share in (False, True))
    assert 0 < moved < derived(model, prompts())
    assert moved < NEAR_TIE


def test_sharper_attention_allows_larger_differences_of_logits():
    models = [model_of("llama"), model_of("llama")]
    for layer in models[1].model.layers:
        layer.self_attn.q_proj.weight.data *= 4
    plain, sharp = (derived(model, prompts()) for model in models)
    assert sharp > 2 * plain


@pytest.mark.parametrize("size", [1, 5, 12])
def test_a_shared_base_gives_identical_bits_on_the_same_batch(size, tmp_path):
    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    get_peft_model(tiny_model(), config).save_pretrained(tmp_path)
    fresh = PeftModel.from_pretrained(tiny_model(), tmp_path).eval()
    with attached(tiny_model().eval(), tmp_path) as lent:
        for shared in ((), prompts()):
            ours, theirs = (logits(m, prompts()[:size], shared) for m in (lent, fresh))
            assert torch.equal(ours, theirs)
