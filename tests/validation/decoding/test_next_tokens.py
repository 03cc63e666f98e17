"""Next-token distributions and KL, compared with whole distributions without batches or padding."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.validation.models import model_of
from trans_peft.errors import EvaluationError, InvalidSpecError
from trans_peft.validation.decoding.next_tokens import NextTokens, mean_kl, next_tokens

pytestmark = pytest.mark.usefixtures("one_thread")

PAIRS = [([65, 66, 67], [68, 69]), ([70], []), ([71, 72, 73, 74, 75], [76]), ([66, 66], [65] * 7)]


def full_kl(old, new, pairs=PAIRS):
    """Return KL(old || new) over the whole vocabulary, pair by pair, averaged over positions."""
    found = []
    for prompt, answer in pairs:
        ids = torch.tensor([[*prompt, *answer]])
        with torch.no_grad():
            p, q = (
                model(input_ids=ids).logits[0, len(prompt) - 1 :].double().log_softmax(-1)
                for model in (old, new)
            )
        found += (p.exp() * (p - q)).sum(-1).tolist()
    return sum(found) / len(found)


@pytest.fixture(scope="module")
def models():
    return model_of("llama", 0), model_of("llama", 1)


def kl_between(models, **options):
    old = next_tokens(models[0], PAIRS, **options)
    return mean_kl(old, next_tokens(models[1], PAIRS, like=old, **options))


def test_with_all_tokens_it_equals_the_full_kl(models):
    assert kl_between(models, k=258) == pytest.approx(full_kl(*models), rel=1e-4)


def test_kl_grows_with_k_up_to_the_full_kl(models):
    found = [kl_between(models, k=k) for k in (1, 4, 64, 257, 1000)]
    assert found == sorted(found)
    assert found[-1] == pytest.approx(full_kl(*models), rel=1e-4)
    assert found[0] > 0


def test_kl_of_a_model_with_itself_is_zero(models):
    assert kl_between((models[0], models[0])) == pytest.approx(0, abs=1e-6)


def test_there_is_one_position_before_each_token_and_one_after_the_last(models):
    old = next_tokens(models[0], PAIRS, k=3)
    assert old.tokens.shape == old.log_p.shape == (sum(len(a) + 1 for _, a in PAIRS), 3)
    assert torch.allclose(old.log_p.exp().sum(-1) + old.rest.exp(), torch.ones(len(old.rest)))


@pytest.mark.parametrize("name", ["gpt2", "falcon, alibi", "gemma3, window 8"])
def test_padding_does_not_change_the_kl(name):
    models = model_of(name, 0), model_of(name, 1)
    assert kl_between(models, k=258) == pytest.approx(full_kl(*models), rel=1e-3)


@settings(max_examples=50)
@given(st.lists(st.lists(st.floats(0.01, 1), min_size=6, max_size=6), min_size=2, max_size=2),
       st.integers(1, 6))  # fmt: skip
def test_kl_equals_the_definition_with_merged_tokens(weights, k):
    p, q = (torch.tensor(w, dtype=torch.double) / sum(w) for w in weights)

    def merged(values):
        rest = values[k:].sum().log() if k < 6 else torch.tensor(-torch.inf)
        return NextTokens(torch.arange(k)[None], values[:k].log()[None], rest[None])

    expected = sum(a * math.log(a / b) for a, b in zip(p[:k].tolist(), q[:k].tolist(), strict=True))
    if k < 6:
        a, b = p[k:].sum().item(), q[k:].sum().item()
        expected += a * math.log(a / b)
    assert mean_kl(merged(p), merged(q)) == pytest.approx(max(0, expected), abs=1e-9)


def test_different_tokens_are_rejected(models):
    with pytest.raises(InvalidSpecError, match="`like`"):
        mean_kl(*(next_tokens(model, PAIRS, k=4) for model in models))


def test_logits_that_are_not_finite_are_an_error():
    broken = model_of("llama")
    broken.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(EvaluationError, match="not finite"):
        next_tokens(broken, PAIRS)
