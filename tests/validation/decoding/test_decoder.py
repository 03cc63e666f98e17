from functools import cache
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.validation.models import CONFIGS, Counting, by_transformers, ending_with, model_of
from trans_peft.validation.decoding import decoder as decoding
from trans_peft.validation.decoding.drafts import PASS_OVERHEAD_TOKENS
from trans_peft.validation.decoding.generation import generate

pytestmark = pytest.mark.usefixtures("one_thread")

LENGTHS = (1, 2, 3, 3, 7, 12, 20, 12, 33, 5)
MOST = 18
ANY_TOKEN = st.integers(0, 257)
shared = cache(model_of)  # tests that change a model create their own


@pytest.fixture(scope="module")
def prompts():
    draws = torch.Generator().manual_seed(3)
    return [torch.randint(32, 127, (n,), generator=draws).tolist() for n in LENGTHS]


@pytest.fixture(scope="module")
def free(prompts):
    """What transformers answers when nothing ends an answer, by name of the model."""
    found = {}

    def of(name):
        if name not in found:
            with ending_with(shared(name), None):
                found[name] = by_transformers(shared(name), prompts, max_new_tokens=MOST)
        return found[name]

    return of


def drafts_of(answer):
    """Whatever a draft may be: right, empty, wrong here or there, too long, or of another text."""
    at = st.integers(0, len(answer) - 1)
    return st.one_of(
        st.just(answer),
        st.just([]),
        st.builds(lambda i, t: [*answer[:i], t, *answer[i + 1 :]], at, ANY_TOKEN),
        st.builds(lambda i, t: [*answer[:i], t, *answer[i:]], at, ANY_TOKEN),
        st.builds(lambda i: answer[:i] + answer[i + 1 :], at),
        st.builds(lambda i: answer[:i], at),
        st.builds(lambda more: answer + more, st.lists(ANY_TOKEN, max_size=MOST)),
        st.lists(ANY_TOKEN, max_size=2 * MOST),
        st.lists(st.sampled_from(answer), max_size=2 * MOST),
    )


def cut(answer, tokenizer, end, stop):
    """An answer's tokens up to the one that ends it, found with no regard to how it came about."""
    for n in range(1, len(answer) + 1):
        text = tokenizer.decode(answer[:n])
        if answer[n - 1] in end or any(part in text for part in stop):
            return answer[:n]
    return answer


@pytest.mark.parametrize("name", CONFIGS)
@settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_no_draft_changes_a_token(name, data, tokenizer, prompts, free):
    model, answers = shared(name), free(name)
    asked = data.draw(st.permutations(range(len(prompts))))[: data.draw(st.integers(1, 10))]
    drafts = [data.draw(drafts_of(answers[i])) for i in asked]
    said = sorted({token for answer in answers for token in answer})
    end = data.draw(st.lists(st.sampled_from(said), max_size=2))
    text = tokenizer.decode(answers[asked[0]])
    parts = sorted({text[i : i + 2] for i in range(len(text) - 1) if text[i : i + 2].isascii()})
    stop = data.draw(st.sampled_from([(), *((part,) for part in parts)]))
    most = data.draw(st.integers(1, MOST))
    # The tokenizer's end token ends an answer too.
    expected = [cut(answers[i][:most], tokenizer, {*end, 257}, stop) for i in asked]
    with ending_with(model, end):
        found = generate(
            model,
            tokenizer,
            [prompts[i] for i in asked],
            max_new_tokens=most,
            stop=stop,
            drafts=drafts,
            batch_size=data.draw(st.integers(1, 10)),
        )
    assert found.ids == expected
    assert found.near_ties == 0
    assert 0 <= found.accepted <= found.drafted


@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon, alibi"])
@pytest.mark.parametrize("batch_size", [1, 4, 32])
def test_right_drafts_take_one_forward_pass_a_batch(name, batch_size, tokenizer, prompts, free):
    model = Counting(shared(name))
    drafts = [cut(answer[:9], tokenizer, {257}, ()) for answer in free(name)]
    with ending_with(model.model, None):
        found = generate(
            model, tokenizer, prompts, max_new_tokens=9, drafts=drafts, batch_size=batch_size
        )
    assert found.ids == drafts
    assert len(model.shapes) == -(-len(prompts) // batch_size)
    assert found.accepted == found.drafted == sum(len(answer) - 1 for answer in drafts)


@pytest.mark.parametrize("batch_size", [1, 4, 32])
def test_right_drafts_take_one_pass_also_if_answers_end_with_an_end_token(
    batch_size, tokenizer, prompts, free
):
    model, options = Counting(shared("llama")), {"max_new_tokens": MOST, "batch_size": batch_size}
    with ending_with(model.model, [answer[5 + i % 3] for i, answer in enumerate(free("llama"))]):
        plain = generate(model, tokenizer, prompts, **options).ids
        model.shapes.clear()
        found = generate(model, tokenizer, prompts, drafts=plain, **options)
    assert found.ids == plain
    assert len({len(answer) for answer in plain}) > 1
    assert len(model.shapes) == -(-len(prompts) // batch_size)


def test_the_token_that_ends_an_answer_need_not_be_drafted(tokenizer, prompts, free):
    model, answer = Counting(shared("llama")), free("llama")[5]
    stop = (tokenizer.decode(answer)[4:7],)
    whole = generate(model, tokenizer, prompts[5:6], max_new_tokens=MOST, stop=stop)
    model.shapes.clear()
    for draft in (whole.ids[0], whole.ids[0][:-1], answer):
        found = generate(
            model, tokenizer, prompts[5:6], max_new_tokens=MOST, stop=stop, drafts=[draft]
        )
        assert found == whole or (found.ids, found.texts) == (whole.ids, whole.texts)
    assert len(model.shapes) == 3


def cost(model, *args, **options):
    """The tokens that the model had to read, padding and all, and what its passes cost besides."""
    model.shapes.clear()
    answers = generate(model, *args, **options)
    return answers, sum(rows * columns + PASS_OVERHEAD_TOKENS for rows, columns in model.shapes)


def test_one_wrong_token_costs_few_passes(tokenizer, prompts, free):
    model = Counting(shared("llama"))
    with ending_with(model.model, None):
        drafts = [[*a[:9], (a[9] + 1) % 256, *a[10:]] for a in free("llama")]
        found, _ = cost(model, tokenizer, prompts, max_new_tokens=MOST, drafts=drafts)
    assert found.ids == free("llama")
    assert len(model.shapes) <= 5


@pytest.mark.parametrize(("batch_size", "times"), [(1, 1), (4, 4), (32, 32)])
def test_wrong_drafts_cost_few_tokens(batch_size, times, tokenizer, prompts, free):
    model = Counting(shared("llama"))
    options = {"max_new_tokens": MOST, "batch_size": batch_size}
    with ending_with(model.model, None):
        unsaid = min(set(range(256)) - {token for answer in free("llama") for token in answer})
        many = prompts * times
        plain, least = cost(model, tokenizer, many, **options)
        passes = len(model.shapes)
        found, most = cost(
            model, tokenizer, many, drafts=[[unsaid] * MOST for _ in many], **options
        )
    assert found.ids == plain.ids
    assert found.accepted == 0
    assert most <= 1.05 * least
    assert len(model.shapes) <= passes


@pytest.mark.parametrize(("short", "passes"), [(3, 2), (31, 1)])
def test_rows_are_decoded_separately_if_padding_would_cost_more(
    short, passes, tokenizer, prompts, monkeypatch
):
    model = Counting(shared("llama"))
    asked = [prompts[8]] * 4 + [prompts[8][::-1][:short]] * 8
    with ending_with(model.model, None):
        answers = by_transformers(model.model, asked, max_new_tokens=3)
        options = {"max_new_tokens": 3, "drafts": answers}
        cut, least = cost(model, tokenizer, asked, **options)
        assert len(model.shapes) == passes
        monkeypatch.setattr(decoding.Decoder, "keep_together", lambda _, batch: len(batch))
        whole, most = cost(model, tokenizer, asked, **options)
    assert cut.ids == whole.ids == answers
    assert least <= most


@pytest.mark.parametrize(
    ("device", "expected", "lengths", "rows"),
    [
        ("cpu", 1, [40, 40, 8, 8], 2),
        ("cpu", 3, [40, 40, 8, 8], 4),  # three passes cost more than what they spare
        ("cpu", 3, [40, 40, 24, 4, 4, 4], 3),
        ("cpu", 0, [400, 8, 8], 3),  # of as many passes as one likes
        ("cpu", 1, [40], 1),
        ("cuda", 1, [40, 40, 8, 8], 4),
    ],
)
def test_the_number_of_rows_decoded_together(device, expected, lengths, rows):
    decoder = decoding.Decoder(SimpleNamespace(device=torch.device(device)), lambda _: True)
    batch = [decoding.DecodingRow([1] * length, [2] * expected) for length in lengths]
    assert decoder.keep_together(batch) == rows


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3, window 8", "lfm2, convolution"])
@pytest.mark.parametrize("expected", [0, 2])
def test_answers_longer_than_their_batch_are_postponed_and_continued_together(
    name, expected, tokenizer, prompts, free, monkeypatch
):
    model, asked = Counting(shared(name)), prompts * 4
    # Some answers go on to the end, the others do not get far.
    most = [MOST if i % 5 == 0 else 2 for i in range(len(prompts))]
    ends = {free(name)[i][1] for i in range(len(prompts)) if most[i] == 2}
    answers = [cut(answer, tokenizer, {*ends, 257}, ()) for answer in free(name)] * 4
    options = {"max_new_tokens": MOST, "batch_size": 8, "drafts": [a[:expected] for a in answers]}
    progress = []
    with ending_with(model.model, sorted(ends)):
        found, together = cost(
            model, tokenizer, asked, on_progress=lambda *done: progress.append(done), **options
        )
        monkeypatch.setattr(decoding, "_is_worth_postponing", lambda *_: False)
        alone, apart = cost(model, tokenizer, asked, **options)
    assert len({len(answer) for answer in answers}) > 1
    assert found.ids == alone.ids == answers
    assert found.near_ties == alone.near_ties == 0
    # Of the others too many answers end at once, or none.
    assert together < (0.95 if name == "llama" else 1.1) * apart
    assert progress == sorted(progress)
    assert progress[-1] == (len(asked), len(asked))


def test_nothing_is_proposed_after_a_sliding_window_has_moved(tokenizer, prompts, free):
    name = "mistral, window 24"
    far = [i for i, prompt in enumerate(prompts) if len(prompt) > 24]
    found = generate(
        shared(name),
        tokenizer,
        [prompts[i] for i in far] * 3,
        max_new_tokens=MOST,
        drafts=[free(name)[i][::-1] for i in far] * 3,
        batch_size=1,
    )
    assert far
    assert found.ids == [free(name)[i] for i in far] * 3
    assert found.drafted == 0


def test_a_recurrent_model_decodes_without_drafts(tokenizer, prompts, free):
    name = "lfm2, convolution"
    drafts = [answer[::-1] for answer in free(name)]
    with ending_with(shared(name), None):
        found = generate(shared(name), tokenizer, prompts, max_new_tokens=MOST, drafts=drafts)
    assert found.ids == free(name)
    assert found.drafted == 0


def test_near_ties_are_counted(tokenizer, prompts):
    model = model_of("llama", seed=1)
    with torch.no_grad():
        twins = {65, 66}
        model.lm_head.weight[66] = model.lm_head.weight[65]
        model.lm_head.weight[[65, 66]] *= 3  # loud enough to be heard
    plain = generate(model, tokenizer, prompts, max_new_tokens=MOST)
    heard = sum(token in twins for answer in plain.ids for token in answer)
    assert plain.near_ties == heard > 0
    drafted = generate(model, tokenizer, prompts, max_new_tokens=MOST, drafts=plain.ids)
    assert (drafted.ids, drafted.near_ties) == (plain.ids, heard)


def test_out_of_memory_over_drafts_halves_the_batch_and_goes_on(tokenizer, prompts, free):
    model = Counting(shared("llama"), room=3)
    with ending_with(model.model, None):
        found = generate(
            model, tokenizer, prompts, max_new_tokens=MOST, drafts=free("llama"), batch_size=8
        )
    assert found.ids == free("llama")
