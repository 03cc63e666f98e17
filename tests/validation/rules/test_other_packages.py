"""Scores of other packages on random texts. Run where the extra `harness` is installed."""

import random

import pytest

from trans_peft.validation.rules.text import bleu, rouge_l

PLAIN = ["the", "a", "model", "loads", "from", "file", "now"]
MIXED = [*PLAIN, "The", "12", "3.5", "it's", "RUN.", "snake_case", "é", "в", "你好", "İ", "\u212a"]


def pairs(words, shortest):
    """Return 300 answers and references; half of the answers are altered references."""
    draw = random.Random(0)
    for number in range(300):
        reference = draw.choices(words, k=draw.randint(shortest, 30))
        answer = draw.choices(words, k=draw.randint(shortest, 30))
        if number % 2:
            answer = [word if draw.random() < 0.7 else draw.choice(words) for word in reference]
        yield " ".join(answer), " ".join(reference)


def test_rouge_l_equals_rouge_score():
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"])
    for answer, start in pairs(MIXED, 0):
        reference = f"{start} a"  # a word at least
        theirs = 100 * scorer.score(reference, answer)["rougeL"].fmeasure
        assert rouge_l(answer, reference) == pytest.approx(theirs)


def test_bleu_equals_nltk():
    """On four words or more: NLTK does not leave out orders that are longer than the answer."""
    nltk = pytest.importorskip("nltk.translate.bleu_score")
    smoothed = nltk.SmoothingFunction().method3
    for answer, reference in pairs(PLAIN, 4):
        theirs = 100 * nltk.sentence_bleu(
            [reference.split()], answer.split(), smoothing_function=smoothed
        )
        assert bleu(answer, reference) == pytest.approx(theirs)
