import pytest
import torch

from tests.tiny import tiny_model
from trans_peft.data import ChatMessage, Example
from trans_peft.domain.data import DataSource
from trans_peft.domain.evaluation import BARE, Suite
from trans_peft.errors import DataError, EvaluationError
from trans_peft.validation.decoding.likelihoods import choose, log_likelihoods
from trans_peft.validation.evaluate import evaluate
from trans_peft.validation.rules.multiple_choice import Measure
from trans_peft.validation.tokenized_suite import prepare, with_answers

pytestmark = pytest.mark.usefixtures("one_thread")

QUESTIONS = [
    ("Is it true?", (" yes", " no", " it may well be")),
    ("x", (" 1", " 22", " 333", " 4444")),
    ("a rather longer question than the others", (" a", " b")),
]


@pytest.fixture(scope="module")
def model():
    return tiny_model(seed=4).eval()


@pytest.fixture(scope="module")
def plain(model, tokenizer):
    """question -> choice -> log-likelihood: one forward pass each, token by token."""

    def likelihood(prompt, choice):
        start = len(tokenizer(prompt)["input_ids"])
        ids = tokenizer(prompt + choice)["input_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0].double()
        return sum(
            torch.log_softmax(logits[at - 1], -1)[ids[at]].item() for at in range(start, len(ids))
        )

    return {q: {choice: likelihood(q, choice) for choice in choices} for q, choices in QUESTIONS}


def example(number, right=0):
    question, choices = QUESTIONS[number]
    return Example(f"q{number}", question, choices[right], choices=choices)


EXAMPLES = [example(number) for number in range(len(QUESTIONS))]
SUITE = Suite("choices", DataSource("c.jsonl", "0" * 64), scoring="choice:per_token")


def chosen(model, tokenizer, measure, **options):
    asked = prepare(tokenizer, SUITE, EXAMPLES, context=None)
    questions = list(zip(asked.prompts, asked.choices, strict=True))
    found = log_likelihoods(model, questions, **options)
    return choose(asked.examples, asked.choices, found, measure).texts


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_log_likelihoods_are_those_of_one_forward_pass_each(batch_size, model, tokenizer, plain):
    asked = [
        (tokenizer(q)["input_ids"], [tokenizer(choice)["input_ids"] for choice in choices])
        for q, choices in QUESTIONS
    ]
    found = log_likelihoods(model, asked, batch_size=batch_size)
    for likelihoods, q in zip(found, plain.values(), strict=True):
        assert likelihoods == pytest.approx(list(q.values()), abs=1e-4)


@pytest.mark.parametrize("measure", Measure)
def test_the_choice_is_the_likeliest_by_the_suites_measure(measure, model, tokenizer, plain):
    per = {
        Measure.SUM: lambda choice: 1,
        Measure.PER_TOKEN: lambda choice: len(tokenizer(choice)["input_ids"]),
        Measure.PER_CHARACTER: lambda choice: len(choice.strip()),
    }[measure]
    expected = [
        max(choices, key=lambda choice, q=q: plain[q][choice] / per(choice))
        for q, choices in QUESTIONS
    ]
    assert chosen(model, tokenizer, measure=measure, batch_size=3) == expected


def test_measures_differ_where_choices_differ_in_length(model, tokenizer):
    found = {tuple(chosen(model, tokenizer, measure=measure)) for measure in Measure}
    assert len(found) > 1


def test_a_choice_in_a_chat_follows_the_template(model, tokenizer):
    chat = Example("c", "", "yes", (ChatMessage("user", "hi"), ChatMessage("assistant", "yes")))
    (whole,) = with_answers(tokenizer, [(chat, chat.prompt_ids(tokenizer), "no")])
    assert whole == tokenizer("<|user|>hi<eos><|assistant|>no")["input_ids"]


def test_a_batch_that_does_not_fit_is_halved(tokenizer, plain):
    class Full(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = tiny_model(seed=4).eval()

        def get_base_model(self):
            return self.inner

        def forward(self, input_ids, **options):
            if len(input_ids) > self.room:
                raise self.error
            return self.inner(input_ids=input_ids, **options)

    model = Full()
    for model.error in (torch.OutOfMemoryError(), RuntimeError("can't allocate memory")):
        model.room = 4  # one question's choices
        assert chosen(model, tokenizer, measure=Measure.SUM) == [
            max(likelihoods, key=likelihoods.get) for likelihoods in plain.values()
        ]
        model.room = 0
        with pytest.raises(EvaluationError, match="single item"):
            chosen(model, tokenizer, measure=Measure.SUM)


def test_logits_that_are_not_finite_are_an_evaluation_error(tokenizer):
    model = tiny_model()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(EvaluationError, match="not finite"):
        chosen(model, tokenizer, measure=Measure.SUM)


def run(model, tokenizer, examples):
    return evaluate(
        model, tokenizer, SUITE, examples, weights_sha256=BARE, base_fingerprint_sha256="base"
    )


def test_a_choice_suite_is_evaluated_by_log_likelihood(model, tokenizer, plain):
    result = run(model, tokenizer, EXAMPLES)
    best = chosen(model, tokenizer, measure=Measure.PER_TOKEN)
    assert [item.correct for item in result.items] == [
        answer == one.completion for answer, one in zip(best, EXAMPLES, strict=True)
    ]


def test_decoding_settings_do_not_change_the_hash_of_a_choice_suite():
    sums = Suite("choices", SUITE.data, scoring="choice", max_new_tokens=3, stop=())
    assert sums.decoding_sha256 == SUITE.decoding_sha256
    assert sums.suite_sha256 != SUITE.suite_sha256
    greedy = Suite("choices", SUITE.data)
    assert greedy.decoding_sha256 != SUITE.decoding_sha256


def test_all_items_with_invalid_choices_are_listed(model, tokenizer):
    examples = [
        Example("none", "a", "b"),
        Example("long", "x" * 500, "y" * 13, choices=("y" * 13, "z")),
        Example("mute", "x", "", choices=("", "z")),
    ]
    with pytest.raises(DataError) as error:
        run(model, tokenizer, examples)
    for part in ("none: it has no choices", "long: with the choice 'yyyyyyyyyyyyy' it has 513",
                 "mute: the choice '' has no tokens"):  # fmt: skip
        assert part in str(error.value)
