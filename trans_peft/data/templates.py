"""What the rows of public data sets say, as prompt/completion rows: one template for each of them.

Prompts and answers are those of the peers that the paper follows, character for character:

- commonsense: AGI-Edgerunners/LLM-Adapters, the rows of its `dataset/*/test.json` and the prompt of
  its `commomsense_evaluate.py` (with its indentation). The same rows can be read from the data
  sets' own hub pages; the instruction is then put together as LLM-Adapters did.
- GSM8K and MATH: meta-math/MetaMath, `eval_gsm8k.py` and `eval_math.py`; a completion ends with
  "The answer is: ", as MetaMathQA's do.
- HumanEval: openai/human-eval, the prompt as evalplus gives it. MBPP+ (378 tasks): evalplus'.
  MBPP (the 500 tasks 11 to 510): the same docstring prompt, with all three tests in it.

What differs: the last space of LLM-Adapters' prompt opens the completion instead, so that prompt
and answer are cut into the same tokens apart as together; the text of both is the same. Training
data can be read through the same templates, so that an adapter is trained on the prompt that it is
judged by.
"""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from trans_peft.data.rows import Row, Unreadable
from trans_peft.errors import InvalidSpecError

__all__ = ["TEMPLATES", "Template", "through_template"]

Template = Callable[[Mapping[str, Any]], dict[str, Any] | None]
"""Turns a raw row into a prompt/completion row; None for a row of another split."""

_INDENT = " " * 16
_LLM_ADAPTERS = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request. \n\n"
    f"{_INDENT}### Instruction:\n{_INDENT}{{}}\n\n{_INDENT}### Response:\n{_INDENT}"
)
_METAMATH = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{}\n\n### Response: Let's think step by step."
)
_CALCULATOR = re.compile(r"<<.*?>>")
_MBPP_TEST_SPLIT = range(11, 511)


def _commonsense(instruct: Callable[[Mapping[str, Any]], tuple[str, str]]) -> Template:
    """Return the template that takes LLM-Adapters' rows, or raw ones through `instruct`."""

    def template(row: Mapping[str, Any]) -> dict[str, Any]:
        if "instruction" in row:
            instruction, output = row["instruction"], row["output"]
        else:
            instruction, answer = instruct(row)
            output = f"the correct answer is {answer}"
        prompt = _LLM_ADAPTERS.format(instruction)
        return {"prompt": prompt[:-1], "completion": prompt[-1] + output}

    return template


def _boolq(row: Mapping[str, Any]) -> tuple[str, str]:
    return (
        f"Please answer the following question with true or false, question: {row['question']}?"
        "\n\nAnswer format: true/false",
        str(bool(row["answer"])).lower(),
    )


def _piqa(row: Mapping[str, Any]) -> tuple[str, str]:
    return (
        f"Please choose the correct solution to the question: {row['goal']}\n\n"
        f"Solution1: {row['sol1']}\n\nSolution2: {row['sol2']}\n\n"
        "Answer format: solution1/solution2",
        f"solution{int(row['label']) + 1}",
    )


def _social_i_qa(row: Mapping[str, Any]) -> tuple[str, str]:
    answers = [row["answerA"], row["answerB"], row["answerC"]]
    return (
        f"Please choose the correct answer to the question: {row['context']} {row['question']}"
        f"\n\n{_options('answer', answers)}",
        f"answer{int(row['label'])}",
    )


def _hellaswag(row: Mapping[str, Any]) -> tuple[str, str]:
    return (
        "Please choose the correct ending to complete the given sentence: "
        f"{row['activity_label']}: {row['ctx']}\n\n{_options('ending', row['endings'])}",
        f"ending{int(row['label']) + 1}",
    )


def _winogrande(row: Mapping[str, Any]) -> tuple[str, str]:
    return (
        "Please choose the correct answer to fill in the blank to complete the given sentence: "
        f"{row['sentence']}\n\nOption1: {row['option1']} Option2: {row['option2']} "
        "Answer format: option1/option2",
        f"option{int(row['answer'])}",
    )


def _science(row: Mapping[str, Any]) -> tuple[str, str]:
    question = row["question_stem"] if "question_stem" in row else row["question"]
    answers = _options("answer", row["choices"]["text"])
    return (
        f"Please choose the correct answer to the question: {question}\n\n{answers}",
        f"answer{row['choices']['label'].index(row['answerKey']) + 1}",
    )


def _options(kind: str, texts: list[str]) -> str:
    names = [f"{kind}{number}" for number in range(1, len(texts) + 1)]
    listed = " ".join(f"{n.title()}: {text}" for n, text in zip(names, texts, strict=True))
    return f"{listed}\n\nAnswer format: {'/'.join(names)}"


def _gsm8k(row: Mapping[str, Any]) -> dict[str, Any]:
    solution, _, answer = row["answer"].rpartition("#### ")
    if not solution:
        raise ValueError("the answer has no '#### '")
    solution = _CALCULATOR.sub("", row["answer"])
    return _step_by_step(row["question"], solution, answer.replace(",", ""))


def _math(row: Mapping[str, Any]) -> dict[str, Any]:
    return _step_by_step(row["problem"], row["solution"], _last_boxed(row["solution"]))


def _step_by_step(question: str, solution: str, answer: str) -> dict[str, Any]:
    return {
        "prompt": _METAMATH.format(question),
        "completion": f" {solution}\nThe answer is: {answer}",
    }


def _last_boxed(solution: str) -> str:
    """Return what the last \\boxed holds: braces in balance, or the word after a space."""
    _, found, rest = solution.rpartition("\\boxed")
    if not found:
        raise ValueError("the solution has no \\boxed")
    if not rest.startswith("{"):
        return rest.split("$", 1)[0].strip()
    depth = 0
    for at, sign in enumerate(rest):
        depth += (sign == "{") - (sign == "}")
        if not depth:
            return rest[1:at]
    raise ValueError("the solution's last \\boxed is not closed")


def _human_eval(row: Mapping[str, Any]) -> dict[str, Any]:
    prompt = row["prompt"].strip() + "\n"
    tests = {"test": row["test"], "entry_point": row["entry_point"]}
    return _program(row, prompt, row["canonical_solution"], tests)


def _mbpp(row: Mapping[str, Any]) -> dict[str, Any] | None:
    if row["task_id"] not in _MBPP_TEST_SPLIT:
        return None
    return _asserted(row, row["text"], shown=3, setup=row.get("test_setup_code") or "")


def _mbpp_plus(row: Mapping[str, Any]) -> dict[str, Any]:
    return _asserted(row, row["prompt"], shown=1, setup="\n".join(row["test_imports"]))


def _asserted(row: Mapping[str, Any], text: str, *, shown: int, setup: str) -> dict[str, Any]:
    solution = row["code"].replace("\r\n", "\n")
    prompt = "\n".join(['"""', text, *row["test_list"][:shown], '"""', ""])
    tests = {"test_list": row["test_list"], "reference": solution, "setup": setup}
    return _program(row, prompt, solution, tests)


def _program(
    row: Mapping[str, Any], prompt: str, solution: str, tests: Mapping[str, Any]
) -> dict[str, Any]:
    """Return a row whose answer is marked by running it (`trans_peft.validation.rules.program`)."""
    reference = json.dumps({"prompt": prompt, **tests}, ensure_ascii=False)
    return {
        "id": row["task_id"],
        "prompt": prompt,
        "completion": solution,
        "reference": reference,
    }


TEMPLATES: Mapping[str, Template] = {
    "boolq": _commonsense(_boolq),
    "piqa": _commonsense(_piqa),
    "social_i_qa": _commonsense(_social_i_qa),
    "hellaswag": _commonsense(_hellaswag),
    "winogrande": _commonsense(_winogrande),
    "arc": _commonsense(_science),
    "openbookqa": _commonsense(_science),
    "gsm8k": _gsm8k,
    "math": _math,
    "humaneval": _human_eval,
    "mbpp": _mbpp,
    "mbpp_plus": _mbpp_plus,
}


def through_template(rows: list[Row], name: str) -> list[Row]:
    """Return the rows as the named template reads them; what it cannot read is told there.

    InvalidSpecError if there is no such template.
    """
    template = TEMPLATES.get(name)
    if template is None:
        raise InvalidSpecError(
            "there is no such template for rows", expected=", ".join(TEMPLATES), found=repr(name)
        )
    read = [(where, _read(template, name, row)) for where, row in rows]
    return [(where, row) for where, row in read if row is not None]


def _read(template: Template, name: str, row: Any) -> Any:
    if isinstance(row, Unreadable):
        return row
    try:
        return template(row)
    except KeyError as error:
        return Unreadable(f"not a row of {name}: the field {error} is missing")
    except (AttributeError, IndexError, TypeError, ValueError) as error:
        return Unreadable(f"not a row of {name}: {error}")
