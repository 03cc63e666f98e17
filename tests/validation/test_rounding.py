"""How far logits may move with the shape of the batch that they come from, derived and measured.

Two shapes add the same products in another order. In fp32 one addition rounds by at most u = 2^-24
of its result, as often up as down. A sum of n products of alike size grows like sqrt(k) on its way,
so its rounding errors add up to u sqrt(n / 6) of the sum's own size (N. Higham, T. Mary, "A new
approach to probabilistic rounding error analysis", SIAM J. Sci. Comput. 41 (2019) A2815-A2835).
Each sub-layer adds to the residual stream what has gone through a few such sums, one behind the
other; independent errors add in quadrature, and no sub-layer is taken to make an error larger in
relation to the stream that it reads. So the final state h is off by u sqrt(N / 6) of its size,
where N is the length of all inner products on one way through the model: in each layer the
projections before attention (d), a score (d_head), the mean of values (the text), the projection
after it (d), gate or up (d) and down (d_ff); then the head (d). An error of no particular direction
moves a token's logit by its share |w| rms(h), w being the token's row of the head. Both shapes
round, which is another sqrt(2), and six standard deviations hold for a thousand million logits:

    6 sqrt(2) u sqrt(N / 6) max|w| rms(h)

Measured on SmolLM2-135M (48 prompts of 12 to 34 tokens, alone and in batches of 2 to 48): at most
4.1e-5 bare and 2.6e-5 under a LoRA adapter, where this says 1.0e-3 and 0.9e-3: shapes share most of
their order. So two logits within 1e-4 may change places, and others were not seen to.
"""

import math
from functools import cache

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from tests.tiny import tiny_model
from tests.validation.models import model_of
from trans_peft.transfer.transplant import attached
from trans_peft.validation.decoding import NEAR_TIE
from trans_peft.validation.reading import Part, Reader

pytestmark = pytest.mark.usefixtures("one_thread")

LENGTHS = (1, 2, 9, 14, 30, 3, 61, 8, 20, 2, 5, 90)
BEGINNING = 24


@cache
def prompts():
    draws = torch.Generator().manual_seed(11)
    common = torch.randint(32, 127, (BEGINNING,), generator=draws).tolist()
    return [common + torch.randint(32, 127, (n,), generator=draws).tolist() for n in LENGTHS]


def logits(model, asked, shared=()):
    """The logits behind each prompt, read as the engine reads a batch."""
    with torch.no_grad():
        reader = Reader(model, shared)
        cache_, columns, cached = reader.begin(asked)
        parts = [Part(there, p[there:]) for p, there in zip(asked, cached, strict=True)]
        return reader.read(parts, cache_, columns).logits[:, -1]


def derived(model):
    """The bound for one model over all prompts: the longest of them counts."""
    config, states = model.config, []
    hook = model.model.norm.register_forward_hook(lambda *called: states.append(called[2]))
    for prompt in prompts():
        logits(model, [prompt])
    hook.remove()
    rms = max(state.pow(2).mean(-1).sqrt().max().item() for state in states)
    d, head = config.hidden_size, config.hidden_size // config.num_attention_heads
    layer = d + head + max(map(len, prompts())) + d + d + config.intermediate_size
    n = config.num_hidden_layers * layer + d
    largest = model.lm_head.weight.norm(dim=1).max().item()
    return 6 * math.sqrt(2) * 2**-24 * math.sqrt(n / 6) * largest * rms


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", ["llama", "qwen2", "tiny, 8 layers"])
def test_no_shape_of_a_batch_moves_a_logit_further_than_derived(name, seed):
    model = tiny_model(seed, layers=8).eval() if "tiny" in name else model_of(name, seed)
    alone = torch.cat([logits(model, [prompt]) for prompt in prompts()])
    bound, largest = derived(model), 0.0
    for shared in ((), prompts()):
        for size in (1, 2, 5, 12):
            found = torch.cat(
                [logits(model, prompts()[i : i + size], shared) for i in range(0, 12, size)]
            )
            largest = max(largest, (found - alone).abs().max().item())
    assert 0 < largest < bound
    assert largest < NEAR_TIE


@pytest.mark.parametrize("size", [1, 5, 12])
def test_on_the_same_batch_a_lent_base_gives_the_very_same_bits(size, tmp_path):
    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    get_peft_model(tiny_model(), config).save_pretrained(tmp_path)
    fresh = PeftModel.from_pretrained(tiny_model(), tmp_path).eval()
    with attached(tiny_model().eval(), tmp_path) as lent:
        for shared in ((), prompts()):
            ours, theirs = (logits(m, prompts()[:size], shared) for m in (lent, fresh))
            assert torch.equal(ours, theirs)
