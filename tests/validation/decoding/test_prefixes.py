"""What prompts have in common is read once: the same tokens, fewer of them read."""

from functools import cache

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from tests.validation.models import (
    CONFIGS,
    SHAPE,
    Counting,
    by_transformers,
    ending_with,
    model_of,
)
from trans_peft.validation.decoding.drafts import PASS_OVERHEAD_TOKENS
from trans_peft.validation.decoding.generation import generate
from trans_peft.validation.decoding.likelihoods import log_likelihoods

pytestmark = pytest.mark.usefixtures("one_thread")

RESTS = (1, 2, 9, 30, 45, 9, 1, 4)
MOST = 8
shared = cache(model_of)
BEGINNINGS = (0, 1, 5, 40)


@cache
def prompts(beginning):
    draws = torch.Generator().manual_seed(7)
    common, *rests = (
        torch.randint(32, 127, (n,), generator=draws).tolist() for n in (beginning, *RESTS)
    )
    # One of them is all that they have in common, and the first token of another.
    return [common + rest for rest in rests] + ([[*common, rests[0][0]]] if beginning else [])


@cache
def free(name, beginning):
    """Answers of transformers, prompt by prompt, with only the tokenizer's end token."""
    with ending_with(shared(name), 257):
        return by_transformers(shared(name), prompts(beginning), max_new_tokens=MOST)


@pytest.mark.parametrize("name", CONFIGS)
@settings(
    max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_a_shared_prefix_changes_no_token(name, data, tokenizer):
    beginning = data.draw(st.sampled_from(BEGINNINGS))
    answers, asked = free(name, beginning), prompts(beginning)
    chosen = data.draw(st.permutations(range(len(asked))))[: data.draw(st.integers(1, len(asked)))]
    drafts = data.draw(st.sampled_from([None, answers, [a[::-1] for a in answers]]))
    with ending_with(shared(name), None):
        found = generate(
            shared(name),
            tokenizer,
            [asked[i] for i in chosen],
            max_new_tokens=MOST,
            drafts=drafts and [drafts[i] for i in chosen],
            batch_size=data.draw(st.sampled_from([1, 3, 32])),
        )
    assert found.ids == [answers[i] for i in chosen]


def read(model):
    """How many tokens the model has read, padding and all."""
    return sum(rows * columns for rows, columns in model.shapes)


def test_a_shared_prefix_is_processed_once_for_all_batches(tokenizer):
    model, asked = Counting(shared("llama")), prompts(40)
    generate(model, tokenizer, asked, max_new_tokens=1, batch_size=3)
    assert model.shapes == [(1, 40), (3, 45), (3, 9), (3, 1)]
    assert read(model) < sum(map(len, asked)) / 2


def test_a_shared_prefix_is_processed_again_under_an_adapter(tokenizer):
    torch.manual_seed(5)
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    bare, adapted = model_of("llama"), get_peft_model(model_of("llama"), config).eval()
    asked, models = prompts(40), {"bare": bare, "adapted": adapted}
    expected = {k: by_transformers(m, asked, max_new_tokens=MOST) for k, m in models.items()}
    found = {k: generate(m, tokenizer, asked, max_new_tokens=MOST).ids for k, m in models.items()}
    assert found == expected
    assert found["bare"] != found["adapted"]


def test_a_short_prefix_is_not_shared(tokenizer):
    few = [[65] * (PASS_OVERHEAD_TOKENS // 2) + [i] for i in range(66, 69)]
    model = Counting(shared("llama"))
    generate(model, tokenizer, few, max_new_tokens=1)
    assert model.shapes == [(1, PASS_OVERHEAD_TOKENS // 2), (3, 1)] or model.shapes == [
        (3, PASS_OVERHEAD_TOKENS // 2 + 1)
    ]
    model.shapes.clear()
    generate(model, tokenizer, few[:2], max_new_tokens=1)
    assert model.shapes == [(2, PASS_OVERHEAD_TOKENS // 2 + 1)]


def test_no_prefix_is_shared_with_length_dependent_rotary_frequencies(tokenizer):
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    model = Counting(LlamaForCausalLM(LlamaConfig(**SHAPE, rope_parameters=rope)))
    model.config = model.model.config
    generate(model, tokenizer, prompts(40), max_new_tokens=1)
    assert model.shapes == [(9, 85)]


@pytest.mark.parametrize("beginning", [0, 40])
def test_the_head_gets_contiguous_rows(tokenizer, beginning):
    """Else a CPU takes it row by row, each with the whole head: many times as long."""
    model, seen = shared("llama"), []
    asked = prompts(beginning)
    drafts = [[65, 66, 67]] * len(asked)
    hook = model.lm_head.register_forward_pre_hook(
        lambda _, args: seen.append((tuple(args[0].shape[:2]), args[0].is_contiguous()))
    )
    with hook:
        generate(model, tokenizer, asked, max_new_tokens=MOST, drafts=drafts)
        log_likelihoods(model, [(prompt, [[65], [66, 67]]) for prompt in asked])
    columns = {shape[1] for shape, _ in seen}
    assert len(columns) > 1 and max(columns) < max(map(len, asked))
    assert all(beside for _, beside in seen)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("beginning", BEGINNINGS)
@pytest.mark.parametrize("batch_size", [1, 32])
def test_log_likelihoods_are_those_of_one_pass_each(name, beginning, batch_size):
    draws = torch.Generator().manual_seed(1)
    questions = [
        (
            prompt,
            [torch.randint(32, 127, (n,), generator=draws).tolist() for n in (1, 1, 3, 11)],
        )
        for prompt in prompts(beginning)
    ]
    model = shared(name)
    found = log_likelihoods(model, questions, batch_size=batch_size)
    with torch.no_grad():
        for (prompt, continuations), sums in zip(questions, found, strict=True):
            for continuation, total in zip(continuations, sums, strict=True):
                ids = torch.tensor([prompt + continuation])
                log_p = model(ids, use_cache=False).logits[0].log_softmax(-1)
                at = torch.arange(len(prompt), ids.shape[1])
                one = log_p[at - 1, ids[0, at]].sum().item()
                assert total == pytest.approx(one, abs=2e-4)


def test_a_prompt_is_processed_once_for_all_of_its_choices():
    model, asked = Counting(shared("llama")), prompts(40)
    log_likelihoods(model, [(p, [[65], [66], [67, 68, 69], [70, 71]]) for p in asked])
    # A choice's last token predicts nothing.
    assert model.shapes == [(1, 40), (9, 45), (18, 2)]
    model.shapes.clear()
    log_likelihoods(model, [(p, [[65] * 2] * 30) for p in asked])
    assert model.shapes[1:3] == [(4, 45), (120, 1)]  # of 30 choices each
    model.shapes.clear()
    log_likelihoods(model, [(p, [[65], [66]]) for p in asked])
    assert model.shapes == [(1, 40), (9, 45)]
