import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model

from tests.tiny import tiny_model, tiny_tokenizer
from tests.validation.models import CONFIGS, Counting, by_transformers, ending_with, model_of
from trans_peft.errors import EvaluationError, InvalidSpecError, UnsupportedModelError
from trans_peft.validation.decoding.batching import evaluating
from trans_peft.validation.decoding.generation import generate
from trans_peft.validation.decoding.likelihoods import log_likelihoods

pytestmark = pytest.mark.usefixtures("one_thread")

LENGTHS = (1, 2, 3, 3, 7, 12, 20, 12, 33, 5, 60)


@pytest.fixture(scope="module")
def prompts():
    draws = torch.Generator().manual_seed(3)
    return [torch.randint(32, 127, (n,), generator=draws).tolist() for n in LENGTHS]


@pytest.fixture(scope="module")
def llama():
    return model_of("llama")


@pytest.fixture(scope="module")
def free(llama, prompts):
    """The llama's answers by transformers, eight tokens each, unless something ends them."""
    return by_transformers(llama, prompts, max_new_tokens=8)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_tokens_are_those_of_generate_prompt_by_prompt(name, tokenizer, prompts):
    model = model_of(name)
    expected = by_transformers(model, prompts, max_new_tokens=6)
    assert len({token for answer in expected for token in answer}) > 20
    for batch_size in (1, 4, None):
        found = generate(model, tokenizer, prompts, max_new_tokens=6, batch_size=batch_size)
        assert found.ids == expected


def test_an_answer_ends_with_an_end_token_and_leaves_the_others_going(
    llama, tokenizer, prompts, free
):
    ending = free[0][2]
    with ending_with(llama, [257, ending]):
        expected = by_transformers(llama, prompts, max_new_tokens=8)
        found = generate(llama, tokenizer, prompts, max_new_tokens=8)
    assert found.ids == expected
    assert {len(answer) for answer in found.ids} >= {3, 8}
    assert found.texts == [tokenizer.decode(a[:-1] if a[-1] == ending else a) for a in expected]


def test_a_stop_string_ends_an_answer_as_in_transformers_and_is_cut_off(
    llama, tokenizer, prompts, free
):
    texts = [tokenizer.decode(ids) for ids in free]
    inside = next(text[2:4] for text in texts if text[2:4].isascii() and text[2] not in text[:2])
    stop = ("never there", inside)
    expected = by_transformers(
        llama, prompts, max_new_tokens=8, stop_strings=list(stop), tokenizer=tokenizer
    )
    found = generate(llama, tokenizer, prompts, max_new_tokens=8, stop=stop)
    assert found.ids == expected
    assert min(map(len, found.ids)) < 8
    assert found.texts == [text.split(inside)[0] for text in texts]


def test_a_stop_string_that_is_a_special_token_stops(llama, prompts, free):
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with ending_with(llama, None):
        assert generate(llama, tokenizer, prompts[:1], max_new_tokens=8).ids == free[:1]
        stopped = _Named(tokenizer, "<end>", free[0][2])
        found = generate(llama, stopped, prompts[:1], max_new_tokens=8, stop=("<end>",))
    assert found.ids == [free[0][:3]]


class _Named:
    """A tokenizer in which one more text is a special token."""

    def __init__(self, tokenizer, text, id_):
        self._tokenizer, self._added = tokenizer, {text: id_}

    def get_added_vocab(self):
        return self._added

    def __getattr__(self, name):
        return getattr(self._tokenizer, name)


def test_the_tokens_are_those_of_generate_with_an_adapter(tokenizer, prompts):
    torch.manual_seed(5)
    model = get_peft_model(
        model_of("llama"), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    ).eval()
    expected = by_transformers(model, prompts[:5], max_new_tokens=4)
    assert generate(model, tokenizer, prompts[:5], max_new_tokens=4).ids == expected
    with model.disable_adapter():
        assert generate(model, tokenizer, prompts[:5], max_new_tokens=4).ids != expected


def test_an_adapter_with_virtual_tokens_is_refused(tokenizer, prompts):
    model = get_peft_model(
        model_of("llama"), PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    )
    with pytest.raises(UnsupportedModelError, match="PROMPT_TUNING"):
        generate(model, tokenizer, prompts, max_new_tokens=2)
    with pytest.raises(UnsupportedModelError, match="PROMPT_TUNING"):
        log_likelihoods(model, [([5, 6], [[7], [8, 9]])])


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("no room"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried ..."),
    ],
)
def test_out_of_memory_halves_the_batch_and_goes_on(error, llama, tokenizer, prompts, free):
    model = Counting(llama, room=3, error=error)
    assert generate(model, tokenizer, prompts, max_new_tokens=8, batch_size=8).ids == free
    assert max(rows for rows, _ in model.shapes) == 2


def test_a_single_prompt_that_does_not_fit_is_an_evaluation_error(llama, tokenizer, prompts):
    with pytest.raises(EvaluationError, match="60 tokens"):
        generate(Counting(llama, room=0), tokenizer, prompts, max_new_tokens=4)


def test_another_runtime_error_is_not_treated_as_out_of_memory(llama, tokenizer, prompts):
    model = Counting(llama, room=0, error=RuntimeError("shape mismatch"))
    with pytest.raises(RuntimeError, match="shape mismatch"):
        generate(model, tokenizer, prompts, max_new_tokens=4)


def test_prompts_of_similar_length_share_a_batch_and_are_processed_once(llama, tokenizer, prompts):
    model = Counting(llama)
    generate(model, tokenizer, prompts, max_new_tokens=2, batch_size=4)
    assert model.shapes == [(4, 60), (4, 1), (4, 12), (4, 1), (3, 3), (3, 1)]


def test_a_batch_shrinks_as_answers_end_and_stops_when_all_have(llama, tokenizer, prompts, free):
    model = Counting(llama)
    with ending_with(llama, [answer[at] for at, answer in enumerate(free[:6])]):
        found = generate(model, tokenizer, prompts, max_new_tokens=8)
    lengths = [len(ids) for ids in found.ids]
    rows = [rows for rows, _ in model.shapes]
    assert rows == [sum(n > step for n in lengths) for step in range(max(lengths))]
    assert rows[-1] < rows[0]


def test_progress_ends_with_all_done(tokenizer, prompts):
    progress = []
    generate(
        tiny_model(),
        tokenizer,
        prompts,
        max_new_tokens=1,
        batch_size=4,
        on_progress=lambda done, total: progress.append((done, total)),
    )
    assert progress == [(4, 11), (8, 11), (11, 11)]


def test_logits_that_are_not_finite_are_an_evaluation_error(tokenizer, prompts):
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(EvaluationError, match="not finite"):
        generate(model, tokenizer, prompts, max_new_tokens=2)


def test_a_prompt_without_tokens_is_refused(tokenizer):
    with pytest.raises(InvalidSpecError, match=r"\[1\]"):
        generate(tiny_model(), tokenizer, [[1], []], max_new_tokens=2)


def test_max_new_tokens_below_one_is_refused(tokenizer, prompts):
    with pytest.raises(InvalidSpecError, match="max_new_tokens must be at least 1"):
        generate(tiny_model(), tokenizer, prompts, max_new_tokens=0)


def test_the_number_of_drafts_is_the_number_of_prompts(tokenizer, prompts):
    with pytest.raises(InvalidSpecError, match="11 drafts"):
        generate(tiny_model(), tokenizer, prompts, max_new_tokens=2, drafts=[[1]])


def test_no_prompts_give_no_answers(tokenizer):
    assert generate(tiny_model(), tokenizer, [], max_new_tokens=2).ids == []


def test_the_mode_of_every_module_is_restored():
    model = tiny_model()
    model.train()
    model.model.layers[1].eval()
    before = [module.training for module in model.modules()]
    with pytest.raises(KeyError), evaluating(model):
        assert not any(module.training for module in model.modules())
        raise KeyError
    assert [module.training for module in model.modules()] == before
