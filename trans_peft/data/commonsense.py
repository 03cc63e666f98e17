"""Templates of the commonsense data sets, with the prompts of LLM-Adapters.

Source: AGI-Edgerunners/LLM-Adapters, the rows of `dataset/*/test.json` and the prompt of
`commomsense_evaluate.py` with its indentation. The same rows can be read from the data sets' own
pages on the hub; their instruction is then built as in LLM-Adapters.

Commonsense170K joins the training rows of all eight. Its template has the prompt that the paper
trains with (gccnlp/Trans-PEFT, `generate_prompt` of `training_utils.py`), which has other white
space than the prompt of the evaluation.

The last space of LLM-Adapters' prompt is moved to the start of the completion. Tokenizing prompt
and completion separately then gives the same tokens as tokenizing them together.
"""

from collections.abc import Callable, Mapping
from typing import Any

from trans_peft.data.columns import TEXT, Column, Form, Template, one_of, texts, whole
from trans_peft.domain.excerpts import excerpt

__all__ = [
    "ARC",
    "BOOLQ",
    "COMMONSENSE_170K",
    "HELLASWAG",
    "OPENBOOKQA",
    "PIQA",
    "SOCIAL_I_QA",
    "WINOGRANDE",
]

_INDENT = " " * 16
_PROMPT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request. \n\n"
    f"{_INDENT}### Instruction:\n{_INDENT}{{}}\n\n{_INDENT}### Response:\n{_INDENT}"
)
_TRAINING_PROMPT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.  \n\n"
    f"{_INDENT}### Instruction:\n{_INDENT}{{}}\n{_INDENT}\n{_INDENT}### Response:\n{_INDENT}"
)
_OUTPUT = "the correct answer is "
_FORMAT = "Answer format: "
_LETTERS, _DIGITS = "ABCDE", "12345"

_Row = Mapping[str, Any]


def _template(names: tuple[str, ...], *own: Form) -> Template:
    """Return the template of one data set, for LLM-Adapters' rows and for those of its own page.

    `names` are LLM-Adapters' names of the answers ("answer1"). `own` are the forms of the data
    set's page; they build an instruction and the name of the right answer.
    """

    def with_prompt(form: Form) -> Form:
        return Form(form.columns, lambda row: _row(*form.build(row)))

    return Template((_llm_adapters(names), *map(with_prompt, own)))


def _llm_adapters(names: tuple[str, ...], prompt: str = _PROMPT) -> Form:
    """Return the form of LLM-Adapters' rows, whose answers have these names."""

    def from_llm_adapters(row: _Row) -> dict[str, Any]:
        name = row["output"].removeprefix(_OUTPUT)
        _, found, options = row["instruction"].rpartition(_FORMAT)
        if found and name not in options.strip().split("/"):
            raise ValueError(
                f"output names {name!r}, but the instruction lists {excerpt(options, 60)}"
            )
        if row.get("answer") not in (None, name):
            raise ValueError(f"output names {name!r}, but answer is {row['answer']!r}")
        return _row(row["instruction"], name, prompt)

    columns = {
        "instruction": TEXT,
        "output": one_of(*(_OUTPUT + name for name in names)),
        "answer": one_of(*names, optional=True),
        "input": one_of("", optional=True),
    }
    return Form(columns, from_llm_adapters)


def _row(instruction: str, name: str, prompt: str = _PROMPT) -> dict[str, Any]:
    prompt = prompt.format(instruction)
    return {"prompt": prompt[:-1], "completion": f"{prompt[-1]}{_OUTPUT}{name}"}


def _boolq(row: _Row) -> tuple[str, str]:
    return (
        f"Please answer the following question with true or false, question: {row['question']}?"
        "\n\nAnswer format: true/false",
        "true" if row["answer"] else "false",
    )


def _piqa(row: _Row) -> tuple[str, str]:
    return (
        f"Please choose the correct solution to the question: {row['goal']}\n\n"
        f"Solution1: {row['sol1']}\n\nSolution2: {row['sol2']}\n\n"
        "Answer format: solution1/solution2",
        f"solution{row['label'] + 1}",
    )


def _social_i_qa(row: _Row) -> tuple[str, str]:
    answers = [row["answerA"], row["answerB"], row["answerC"]]
    return (
        f"Please choose the correct answer to the question: {row['context']} {row['question']}"
        f"\n\n{_options('answer', answers)}",
        f"answer{row['label'].strip()}",
    )


def _hellaswag(row: _Row) -> tuple[str, str]:
    return (
        "Please choose the correct ending to complete the given sentence: "
        f"{row['activity_label']}: {row['ctx']}\n\n{_options('ending', row['endings'])}",
        f"ending{int(row['label']) + 1}",
    )


def _winogrande(row: _Row) -> tuple[str, str]:
    return (
        "Please choose the correct answer to fill in the blank to complete the given sentence: "
        f"{row['sentence']}\n\nOption1: {row['option1']} Option2: {row['option2']} "
        "Answer format: option1/option2",
        f"option{row['answer']}",
    )


def _science(question: str) -> Callable[[_Row], tuple[str, str]]:
    """Return `Form.build` for questions with lettered or numbered choices.

    `question` is the name of the question's column.
    """

    def build(row: _Row) -> tuple[str, str]:
        labels, key = list(row["choices"]["label"]), row["answerKey"]
        if key not in labels:
            raise ValueError(f"answerKey {key!r} is not one of the labels {labels!r}")
        answers = _options("answer", row["choices"]["text"])
        return (
            f"Please choose the correct answer to the question: {row[question]}\n\n{answers}",
            f"answer{labels.index(key) + 1}",
        )

    return build


def _options(kind: str, choices: list[str]) -> str:
    names = _names(kind, len(choices))
    listed = " ".join(f"{n.title()}: {text}" for n, text in zip(names, choices, strict=True))
    return f"{listed}\n\n{_FORMAT}{'/'.join(names)}"


def _names(kind: str, count: int) -> tuple[str, ...]:
    return tuple(f"{kind}{number}" for number in range(1, count + 1))


def _choices(least: int, most: int) -> Column:
    """Return the column of ARC and OpenBookQA: texts, and a letter or a digit for each."""

    def holds(value: Any) -> bool:
        if not isinstance(value, Mapping) or not texts(least, most).holds(value.get("text")):
            return False
        labels = value.get("label")
        if not isinstance(labels, (list, tuple)) or len(labels) != len(value["text"]):
            return False
        kinds = (_LETTERS, _DIGITS)
        known = any(all(isinstance(x, str) and x in [*kind] for x in labels) for kind in kinds)
        return known and len(set(labels)) == len(labels)

    ends = f"{least}" if least == most else f"{least} to {most}"
    return Column(
        f"text: {ends} texts that are not blank, and label: for each of them a different one of "
        "A to E, or of 1 to 5",
        holds,
    )


def _science_form(question: str, least: int, most: int) -> Form:
    columns = {
        question: TEXT,
        "choices": _choices(least, most),
        "answerKey": one_of(*_LETTERS, *_DIGITS),
    }
    return Form(columns, _science(question))


BOOLQ = _template(
    ("true", "false"), Form({"question": TEXT, "answer": one_of(True, False)}, _boolq)
)
PIQA = _template(
    _names("solution", 2),
    Form({"goal": TEXT, "sol1": TEXT, "sol2": TEXT, "label": whole(range(2))}, _piqa),
)
SOCIAL_I_QA = _template(
    _names("answer", 3),
    Form(
        {
            "context": TEXT,
            "question": TEXT,
            "answerA": TEXT,
            "answerB": TEXT,
            "answerC": TEXT,
            # the hub's older versions kept the line break of the file of labels
            "label": one_of("1", "2", "3", "1\n", "2\n", "3\n"),
        },
        _social_i_qa,
    ),
)
HELLASWAG = _template(
    _names("ending", 4),
    Form(
        {
            "ctx": TEXT,
            "activity_label": TEXT,
            "endings": texts(4, 4),
            # a number in the authors' files, its text on the hub
            "label": one_of("0", "1", "2", "3", 0, 1, 2, 3),
        },
        _hellaswag,
    ),
)
WINOGRANDE = _template(
    _names("option", 2),
    Form(
        {"sentence": TEXT, "option1": TEXT, "option2": TEXT, "answer": one_of("1", "2")},
        _winogrande,
    ),
)
ARC = _template(_names("answer", 5), _science_form("question", 3, 5))
OPENBOOKQA = _template(
    _names("answer", 4), _science_form("question_stem", 4, 4), _science_form("question", 4, 4)
)
COMMONSENSE_170K = Template(
    (
        _llm_adapters(
            (
                *("true", "false"),
                *_names("solution", 2),
                *_names("answer", 5),
                *_names("ending", 4),
                *_names("option", 2),
            ),
            _TRAINING_PROMPT,
        ),
    )
)
