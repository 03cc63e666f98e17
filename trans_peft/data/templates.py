"""Templates that convert rows of public data sets to prompt/completion rows.

Prompts and answers are, character for character, those of the projects that the paper follows:

- commonsense (`commonsense`): AGI-Edgerunners/LLM-Adapters.
- GSM8K and MATH: meta-math/MetaMath, `eval_gsm8k.py` and `eval_math.py`; a completion ends with
  "The answer is: ", as MetaMathQA's do.
- Commonsense170K, MetaMathQA and CodeFeedback, for training: gccnlp/Trans-PEFT,
  `training_utils.py`. The first line of a query is the instruction, and the others are its input.
- HumanEval: openai/human-eval, with the prompt of evalplus. MBPP+ (378 tasks): evalplus.
  MBPP (the 500 tasks 11 to 510): the same docstring prompt, with all three tests in it.

Every column that a template reads is checked first (`trans_peft.data.columns`): a label outside its
range, the empty answer of a hidden test split, or a value of another type is an error. Training
data can use the same templates, so that an adapter is trained on the prompt of its evaluation.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

from trans_peft.data import commonsense
from trans_peft.data.columns import TEXT, Column, Form, Template, texts, whole
from trans_peft.data.fields import unsupported_fields
from trans_peft.data.rows import InvalidRow, Row
from trans_peft.domain.excerpts import excerpt
from trans_peft.errors import InvalidSpecError

__all__ = ["TEMPLATES", "through_template"]

_METAMATH = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{}\n\n### Response: Let's think step by step."
)
# gccnlp/Trans-PEFT, PROMPT_DICT. The colon after this text is the start of the completion, because
# some tokenizers (Qwen2's) join it with a letter that follows.
_QUERY = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{}\n\n### Response"
)
_QUERY_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{}\n\n### Input:\n{}\n\n### Response"
)
_CALCULATOR = re.compile(r"<<.*?>>")
_NUMBER = re.compile(r"[-+]?(\d{1,3}(,\d{3})+|\d+)(\.\d+)?", re.ASCII)
_MBPP_TASKS, _MBPP_TEST_SPLIT = range(1, 975), range(11, 511)
# HumanEval/115 has an import between the signature and the docstring, which is then no docstring.
_IMPORT_ABOVE_DOCSTRING = re.compile(r"(def [^\n]*:\n)[ \t]+(import [^\n]+\n)(?=[ \t]+\"\"\")")

_Row = Mapping[str, Any]


def _gsm8k(row: _Row) -> dict[str, Any]:
    before, found, answer = row["answer"].partition("#### ")
    answer = answer.strip()
    if not found or not before.strip():
        raise ValueError("answer has no solution before '#### '")
    if not _NUMBER.fullmatch(answer):
        raise ValueError(f"answer must end with '#### ' and a number, found {answer[:80]!r}")
    solution = _CALCULATOR.sub("", row["answer"])
    return _step_by_step(row["question"], solution, answer.replace(",", ""))


def _math(row: _Row) -> dict[str, Any]:
    # In two training rows of MATH, with \boxed{}, the answer is the empty text.
    return _step_by_step(row["problem"], row["solution"], _last_boxed(row["solution"]))


def _step_by_step(question: str, solution: str, answer: str) -> dict[str, Any]:
    return {
        "prompt": _METAMATH.format(question),
        "completion": f" {solution}\nThe answer is: {answer}",
    }


def _query(answer: str) -> Form:
    """Return the form of rows with a query and a column `answer`."""

    def build(row: _Row) -> dict[str, Any]:
        instruction, _, more = row["query"].partition("\n")
        prompt = _QUERY_WITH_INPUT.format(instruction, more) if more else _QUERY.format(instruction)
        return {"prompt": prompt, "completion": f":{row[answer]}"}

    return Form({answer: TEXT, "query": TEXT}, build)


def _last_boxed(solution: str) -> str:
    """Return the content of the last \\boxed: balanced braces, or the text before the next $."""
    _, found, rest = solution.rpartition("\\boxed")
    if not found:
        raise ValueError("the solution has no \\boxed")
    rest = rest.lstrip()
    if not rest.startswith("{"):
        text, end, _ = rest.partition("$")
        if not text.strip():
            raise ValueError("the solution's last \\boxed is empty")
        if not end:
            raise ValueError("the solution's last \\boxed has neither braces nor a $ behind it")
        return text.strip()
    depth = 0
    for at, sign in enumerate(rest):
        depth += (sign == "{") - (sign == "}")
        if not depth:
            return rest[1:at]
    raise ValueError("the solution's last \\boxed is not closed")


def _human_eval(row: _Row) -> dict[str, Any]:
    if f"def {row['entry_point']}(" not in row["prompt"]:
        raise ValueError(f"prompt does not define the entry_point {row['entry_point'][:80]!r}")
    if "def check(" not in row["test"]:
        raise ValueError("test does not define check")
    prompt = _IMPORT_ABOVE_DOCSTRING.sub(r"\1", row["prompt"])
    for _, line in _IMPORT_ABOVE_DOCSTRING.findall(row["prompt"]):
        prompt = line + prompt
    tests = {"test": row["test"], "entry_point": row["entry_point"]}
    return _program(row, prompt.strip() + "\n", row["canonical_solution"], tests)


def _mbpp(row: _Row) -> dict[str, Any] | None:
    if row["task_id"] not in _MBPP_TEST_SPLIT:
        return None
    return _asserted(row, row["text"], shown=3, setup=row.get("test_setup_code") or "")


def _mbpp_plus(row: _Row) -> dict[str, Any]:
    return _asserted(row, row["prompt"], shown=1, setup="\n".join(row["test_imports"]))


def _asserted(row: _Row, text: str, *, shown: int, setup: str) -> dict[str, Any]:
    solution = row["code"].replace("\r\n", "\n")
    prompt = "\n".join(['"""', text, *row["test_list"][:shown], '"""', ""])
    tests = {"test_list": row["test_list"], "reference": solution, "setup": setup}
    return _program(row, prompt, solution, tests)


def _program(row: _Row, prompt: str, solution: str, tests: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row whose answer is scored by running it (`trans_peft.validation.rules.program`)."""
    reference = json.dumps({"prompt": prompt, **tests}, ensure_ascii=False)
    return {
        "id": row["task_id"],
        "prompt": prompt,
        "completion": solution,
        "reference": reference,
    }


_IDENTIFIER = Column(
    "a Python identifier", lambda value: isinstance(value, str) and value.isidentifier()
)
_ANY_TEXT = Column("text", lambda value: isinstance(value, str), optional=True)
_MBPP_COLUMNS = {"task_id": whole(_MBPP_TASKS), "code": TEXT}

TEMPLATES: Mapping[str, Template] = {
    "boolq": commonsense.BOOLQ,
    "piqa": commonsense.PIQA,
    "social_i_qa": commonsense.SOCIAL_I_QA,
    "hellaswag": commonsense.HELLASWAG,
    "winogrande": commonsense.WINOGRANDE,
    "arc": commonsense.ARC,
    "openbookqa": commonsense.OPENBOOKQA,
    "commonsense170k": commonsense.COMMONSENSE_170K,
    "metamathqa": Template((_query("response"),)),
    # fxmeng/CodeFeedback-Python105K, and m-a-p/CodeFeedback-Filtered-Instruction
    "codefeedback": Template((_query("response"), _query("answer"))),
    "gsm8k": Template((Form({"question": TEXT, "answer": TEXT}, _gsm8k),)),
    "math": Template((Form({"problem": TEXT, "solution": TEXT}, _math),)),
    "humaneval": Template(
        (
            Form(
                {
                    "task_id": TEXT,
                    "prompt": TEXT,
                    "canonical_solution": TEXT,
                    "entry_point": _IDENTIFIER,
                    "test": TEXT,
                },
                _human_eval,
            ),
        )
    ),
    "mbpp": Template(
        (
            Form(
                _MBPP_COLUMNS
                | {"text": TEXT, "test_list": texts(3, 3), "test_setup_code": _ANY_TEXT},
                _mbpp,
            ),
        )
    ),
    "mbpp_plus": Template(
        (Form(_MBPP_COLUMNS | {"prompt": TEXT, "test_list": texts(1), "test_imports": texts(0)},
              _mbpp_plus),)
    ),
}  # fmt: skip


def through_template(rows: list[Row], name: str) -> list[Row]:
    """Return the rows converted by the named template; an `InvalidRow` for each that it refuses.

    Rows of other splits are omitted. InvalidSpecError if there is no such template.
    """
    template = TEMPLATES.get(name)
    if template is None:
        raise InvalidSpecError(
            "unknown template of a data source",
            expected=", ".join(TEMPLATES),
            found=excerpt(name),
            do="correct `template`, or remove it if the rows need none",
        )
    converted = [(where, _converted(template, name, row)) for where, row in rows]
    return [(where, row) for where, row in converted if row is not None]


def _converted(template: Template, name: str, row: Any) -> Any:
    if isinstance(row, InvalidRow):
        return row
    if not isinstance(row, Mapping):
        return InvalidRow(f"not a row of {name}: must be an object, found {type(row).__name__}")
    columns = template.form(row).columns
    reasons = [*template.reasons(row), *unsupported_fields(row, frozenset(columns), None)]
    if not reasons:
        try:
            return template(row)
        except ValueError as error:
            reasons = [str(error)]
    return InvalidRow(f"not a row of {name}: {'; '.join(reasons)}")
