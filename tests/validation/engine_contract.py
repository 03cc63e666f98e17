"""The contract of every engine: transformers' plain `generate` and one forward pass each."""

import pytest
import torch

from tests.validation.models import by_transformers, ending_with
from trans_peft.errors import EvaluationError

PROMPTS = [[40, 50, 60, 70], [33] * 9, [100, 101, 102] * 5, [77]]
MOST = 6


def log_p(model, context, tokens):
    """The log-probabilities at the positions of the tokens, from one pass over the whole text."""
    with torch.no_grad():
        logits = model(torch.tensor([[*context, *tokens]])).logits[0].double()
    return logits[len(context) - 1 : -1].log_softmax(-1)


class EngineContract:
    """Tests of `engine`, which has `model` and `tokenizer`, and of `broken` with weights of NaN."""

    @pytest.fixture(scope="class")
    def free(self, model):
        """The answers of transformers, prompt by prompt."""
        with ending_with(model, 257):
            return by_transformers(model, PROMPTS, max_new_tokens=MOST)

    def test_answers_are_those_of_greedy_decoding(self, engine, free, tokenizer):
        found = engine.answers(PROMPTS, max_new_tokens=MOST)
        assert [list(one.ids) for one in found] == free
        assert [one.text for one in found] == [tokenizer.decode(ids) for ids in free]
        assert engine.answers([], max_new_tokens=MOST) == []

    def test_an_answer_ends_with_an_end_token_or_before_a_stop_string(
        self, engine, free, tokenizer
    ):
        end = free[0][2]
        ended = engine.answers(PROMPTS[:1], max_new_tokens=MOST, end_tokens=frozenset({end}))
        assert list(ended[0].ids) == free[0][: free[0].index(end) + 1]
        stop = tokenizer.decode(free[2][3:4])
        (stopped,) = engine.answers(PROMPTS[2:3], max_new_tokens=MOST, stop=[stop])
        assert stopped.text == tokenizer.decode(free[2]).partition(stop)[0]

    def test_drafts_change_no_answer(self, engine, free):
        for drafts in (free, [ids[::-1] for ids in free]):
            found = engine.answers(PROMPTS, max_new_tokens=MOST, drafts=drafts)
            assert [list(one.ids) for one in found] == free

    def test_likelihoods_are_those_of_one_pass_each(self, engine, model):
        questions = [(prompt, [[65], [66, 67, 68]]) for prompt in PROMPTS]
        expected = [
            [
                log_p(model, prompt, choice).gather(1, torch.tensor(choice)[:, None]).sum().item()
                for choice in choices
            ]
            for prompt, choices in questions
        ]
        found = engine.likelihoods(questions)
        assert [list(sums) for sums in found] == [
            pytest.approx(sums, abs=1e-3) for sums in expected
        ]

    def test_scores_are_those_of_one_pass_each(self, engine, model, free):
        texts = [(prompt, [*ids, 65]) for prompt, ids in zip(PROMPTS, free, strict=True)]
        found = engine.scores([*texts, (PROMPTS[0], [])])
        assert found[-1] == []
        for (context, tokens), scores in zip(texts, found, strict=False):
            rows = log_p(model, context, tokens)
            own = rows.gather(1, torch.tensor(tokens)[:, None])[:, 0].tolist()
            assert [one.log_p for one in scores] == pytest.approx(own, abs=1e-3)
            best = [
                token == likeliest for token, likeliest in zip(tokens, rows.argmax(1), strict=True)
            ]
            assert [one.is_best for one in scores] == best
            assert best[:-1] == [True] * (len(tokens) - 1)

    def test_logits_that_are_not_finite_are_an_evaluation_error(self, broken):
        with pytest.raises(EvaluationError, match="not finite"):
            broken.answers(PROMPTS, max_new_tokens=2)
        with pytest.raises(EvaluationError, match="not finite"):
            broken.likelihoods([(PROMPTS[0], [[65, 66]])])
        with pytest.raises(EvaluationError, match="not finite"):
            broken.scores([(PROMPTS[0], [65, 66])])
