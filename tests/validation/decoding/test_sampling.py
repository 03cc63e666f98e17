"""Sampled answers have transformers' probabilities, and depend on prompt and key alone."""

from collections import Counter

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from tests.tiny import tiny_model
from tests.validation.models import model_of
from trans_peft.errors import EvaluationError, InvalidSpecError
from trans_peft.ports import Sampling
from trans_peft.transfer.mixed_adapters import attached_together
from trans_peft.validation.continuous_batching import ContinuousBatchingEngine
from trans_peft.validation.decoding.generation import generate
from trans_peft.validation.decoding.sampling import gumbel_noise, sampled

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = [[40, 50, 60, 70], [33] * 9, [100, 101, 102] * 5, [40, 50, 60, 70], [77]]
KEYS = [11, 2**127 + 5, 7, 12, 11]
SETTINGS = [(1.0, 1.0), (0.7, 0.9), (2.5, 0.3)]


@pytest.fixture(scope="module")
def model():
    return model_of("llama")


def transformers_logits(logits, temperature, top_p):
    """The logits that `generate(do_sample=True)` samples from, shape (rows, vocabulary)."""
    ids = torch.zeros(len(logits), 1, dtype=torch.long)
    logits = TemperatureLogitsWarper(float(temperature))(ids, logits)
    return TopPLogitsWarper(top_p)(ids, logits) if top_p < 1 else logits


def restated(model, prompt, key, most, temperature, top_p):
    """The definition: one pass over the whole text for each token, and noise in float64."""
    answer = []
    while len(answer) < most:
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *answer]])).logits[:, -1].double()
        philox = np.random.Philox(key=key, counter=[0, len(answer), 0, 0])
        raw = philox.random_raw(len(logits[0]) // 2 + 1).view("<u4")[: len(logits[0])]
        noise = -np.log(-np.log1p(-(raw + 0.5) / 2**32))
        log_p = transformers_logits(logits, temperature, top_p)[0].log_softmax(-1).numpy()
        answer.append(int(np.argmax(log_p + noise)))
        if answer[-1] == 257:
            break
    return answer


@pytest.mark.parametrize(("temperature", "top_p"), SETTINGS)
def test_the_tokens_are_those_of_the_definition_in_any_batch(model, tokenizer, temperature, top_p):
    expected = [
        restated(model, prompt, key, 8, temperature, top_p)
        for prompt, key in zip(PROMPTS, KEYS, strict=True)
    ]
    sampling = Sampling(temperature, top_p, KEYS)
    for options in (
        {"batch_size": 1},
        {"batch_size": 2},
        {"drafts": expected},
        {"drafts": [ids[::-1] for ids in expected]},
    ):
        found = generate(model, tokenizer, PROMPTS, max_new_tokens=8, sampling=sampling, **options)
        assert found.ids == expected
    assert found.near_ties == 0
    assert expected[0] != expected[3]  # one prompt, two keys
    backwards = Sampling(temperature, top_p, KEYS[::-1])
    turned = generate(model, tokenizer, PROMPTS[::-1], max_new_tokens=8, sampling=backwards)
    assert turned.ids[::-1] == expected


def test_a_shared_prefix_and_right_drafts_change_no_answer(model, tokenizer):
    prompts = [[*range(40, 90), 60 + i] for i in range(4)]
    sampling = Sampling(1.0, 0.95, [1, 2, 3, 4])
    expected = [restated(model, prompt, key, 6, 1.0, 0.95) for key, prompt in enumerate(prompts, 1)]
    found = generate(
        model, tokenizer, prompts, max_new_tokens=6, sampling=sampling, drafts=expected
    )
    assert found.ids == expected
    assert found.accepted > 10


@pytest.mark.parametrize(("temperature", "top_p"), SETTINGS)
def test_the_frequencies_are_the_probabilities_of_transformers(temperature, top_p):
    draws = 5_000
    logits = 1.5 * torch.randn(1, 12, generator=torch.Generator().manual_seed(1))
    p = transformers_logits(logits, temperature, top_p)[0].softmax(-1).double().numpy()
    _, tokens, near = sampled(
        logits.expand(draws, 1, -1), range(draws), [3] * draws, temperature=temperature, top_p=top_p
    )
    counts = np.bincount(tokens[:, 0], minlength=12)
    assert set(np.flatnonzero(counts)) <= set(np.flatnonzero(p))
    expected = draws * p[p > 0]
    chi_square = np.sum((counts[p > 0] - expected) ** 2 / expected)
    assert chi_square < 3.5 * max(np.count_nonzero(p) - 1, 1)
    assert near.float().mean() < 0.01


def test_the_noise_is_independent_between_keys_positions_and_tokens():
    noise = gumbel_noise([1, 1, 2], [0, 1, 0], 40_000)
    assert torch.equal(noise[2:], gumbel_noise([2], [0], 40_000))
    assert torch.equal(noise[:, :9], gumbel_noise([1, 1, 2], [0, 1, 0], 9))
    assert abs(torch.corrcoef(torch.cat([noise, noise.roll(1, 1)])) - torch.eye(6)).max() < 0.03
    assert noise.mean(1).tolist() == pytest.approx([np.euler_gamma] * 3, abs=0.03)
    assert noise.std(1).tolist() == pytest.approx([np.pi / 6**0.5] * 3, abs=0.03)


def test_equal_keys_on_similar_distributions_mostly_choose_the_same_token():
    draws = 4_000
    logits = torch.randn(1, 1, 50, generator=torch.Generator().manual_seed(2))
    moved = logits + 0.1 * torch.randn(1, 1, 50, generator=torch.Generator().manual_seed(3))
    _, one, _ = sampled(
        logits.expand(draws, 1, -1), range(draws), [0] * draws, temperature=1.0, top_p=1.0
    )
    same, other = (
        (one == sampled(
            moved.expand(draws, 1, -1), keys, [0] * draws, temperature=1.0, top_p=1.0
        )[1]).float().mean()
        for keys in (range(draws), range(draws, 2 * draws))
    )  # fmt: skip
    p, q = logits[0, 0].softmax(-1), moved[0, 0].softmax(-1)
    distance = (p - q).abs().sum() / 2
    assert same > 1 - 2 * distance / (1 + distance) - 0.02  # the bound of Gumbel coupling
    assert other < 0.1


@pytest.mark.parametrize(
    ("logits", "top_p", "is_near"),
    [
        ([0.0, 1.0, 3.0], 1.0, False),
        ([0.0, 1.0, 3.0], 0.5, False),
        ([2.0, 2.0, -9.0], 0.4, True),  # the lesser of two equal tokens would lie outside
        ([np.log(0.6), np.log(0.4), -99.0], 0.6, True),  # the second lies on the border
    ],
)
def test_a_token_on_the_border_is_a_near_tie(logits, top_p, is_near):
    rows = torch.tensor(logits, dtype=torch.float32).expand(50, 1, -1)
    _, _, near = sampled(rows, range(50), [0] * 50, temperature=1.0, top_p=top_p)
    assert near.any().item() == is_near


def test_nearly_equal_sums_are_a_near_tie():
    noise = gumbel_noise([4], [0], 5)
    _, _, near = sampled(-noise[:, None], [4], [0], temperature=1.0, top_p=1.0)
    assert near.tolist() == [[True]]


def test_adapters_of_a_mixed_batch_answer_as_alone(tokenizer, tmp_path):
    folders = {}
    for seed, name in enumerate(("a", "b")):
        torch.manual_seed(seed)
        config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        folders[name] = tmp_path / name
        get_peft_model(tiny_model(), config).save_pretrained(folders[name])
    names = ["a", "b", None, "b", "a"]
    sampling = Sampling(1.0, 0.9, KEYS)
    with attached_together(tiny_model().eval(), folders) as mixed:
        together = generate(
            mixed, tokenizer, PROMPTS, max_new_tokens=6, adapters=names, sampling=sampling
        )
        alone = [
            generate(
                mixed, tokenizer, [prompt], max_new_tokens=6, adapters=[name],
                sampling=Sampling(1.0, 0.9, [key]),
            ).ids[0]
            for prompt, name, key in zip(PROMPTS, names, KEYS, strict=True)
        ]  # fmt: skip
    assert together.ids == alone
    assert Counter(map(len, alone)).most_common(1)[0][0] == 6


def test_half_precision_and_logits_of_minus_infinity():
    logits = torch.tensor([[[-torch.inf, 1.0, -torch.inf, 2.0]]], dtype=torch.bfloat16)
    _, tokens, _ = sampled(
        logits.expand(200, 1, -1), range(200), [0] * 200, temperature=1.0, top_p=0.9
    )
    assert set(tokens[:, 0].tolist()) == {1, 3}


def test_bad_input_is_refused(model, tokenizer):
    with pytest.raises(InvalidSpecError, match="number of keys is not the number of prompts"):
        generate(model, tokenizer, PROMPTS, max_new_tokens=2, sampling=Sampling(1.0, 1.0, KEYS[1:]))
    broken = tiny_model()
    with torch.no_grad():
        broken.model.norm.weight.fill_(float("nan"))
    with pytest.raises(EvaluationError, match="not finite"):
        generate(broken, tokenizer, PROMPTS, max_new_tokens=2, sampling=Sampling(1.0, 0.9, KEYS))
    engine = ContinuousBatchingEngine(model, tokenizer)
    with pytest.raises(InvalidSpecError, match="cannot sample"):
        engine.answers(PROMPTS, max_new_tokens=2, sampling=Sampling(1.0, 1.0, KEYS))
