"""Prompts of the study that are no prompts of a task."""

from study.distillation import sentences
from trans_peft.analysis.updates import public_rows
from trans_peft.data import Example
from trans_peft.domain.recovery import MIN_PROMPTS


def test_sentences_are_distinct_and_no_fragments():
    first, second = "The bread is ready when it sounds hollow.", "Is it ready when it sounds so?"
    texts = [Example("1", f"{first} Yes: {first}", f"\n{second} No."), Example("2", second, " No.")]
    assert [row.prompt for row in sentences(texts)] == [first, second]


def test_the_public_texts_have_enough_sentences():
    assert len(sentences(public_rows())) > 2 * MIN_PROMPTS
