"""Reference implementations: the scoring of the projects that the paper follows.

Each function takes an output and the item's reference in our suite (`Example.reference`, or the
completion), and returns whether the project's code accepts the output. The functions restate that
code and do not use our rules. An output for which that code raises an exception is wrong.
"""

import json
import math
import re

from tests.validation import metamath
from tests.validation.metamath import MARKER
from trans_peft.sandbox.run import run_script

# The patterns of LLM-Adapters' `extract_answer` (commomsense_evaluate.py), by data set.
LLM_ADAPTERS = {
    "boolq": r"true|false",
    "piqa": r"solution1|solution2",
    "social_i_qa": r"answer1|answer2|answer3|answer4|answer5",
    "hellaswag": r"ending1|ending2|ending3|ending4",
    "winogrande": r"option1|option2",
    "arc_easy": r"answer1|answer2|answer3|answer4|answer5",
    "arc_challenge": r"answer1|answer2|answer3|answer4|answer5",
    "openbookqa": r"answer1|answer2|answer3|answer4|answer5",
}


def llm_adapters(pattern):
    def right(output, reference):
        label = reference.split()[-1]  # its rows: "the correct answer is answer3"
        found = re.findall(pattern, output.split("### Response:")[0].strip())
        return (found[0] if found else "") == label

    return right


def paper_gsm8k(output, reference):
    """The paper's `gsm8k_infer.py`: MetaMath's number, or a hundredth or hundredfold of it."""
    wanted = int(reference.split(MARKER)[-1].replace(",", ""))
    try:
        number = metamath.number(output)
    except (OverflowError, ValueError, ZeroDivisionError):
        return False
    return number is not None and any(
        math.isclose(value, number, rel_tol=1e-4) for value in (wanted / 100, wanted, wanted * 100)
    )


def math_verify_itself(output, reference):
    """math-verify, called as its documentation shows, on MetaMath's final answer."""
    from math_verify import parse, verify

    answers = []
    for text in (reference, output):
        parts = text.split(MARKER)
        if len(parts) < 2:
            return False
        answers.append(parts[-1].split(".\n")[0].strip().removesuffix(".").strip())
    if not all(answers):
        return False
    as_formula, as_text = parse(f"${answers[1]}$"), parse(answers[1])
    words = re.search(r"(?<![\\A-Za-z{])[A-Za-z]{3,}", answers[1])
    wanted = parse(f"${answers[0]}$")
    return answers[0] == answers[1] or verify(wanted, as_formula + (as_text if words else []))


def evalplus(sanitized, reference):
    """The tests of openai/human-eval and MBPP on what evalplus made of prompt and output.

    Program and tests run as one script, as in those harnesses, judged by its exit code; a hostile
    program could fool that. `sanitized` is `evalplus.sanitize.sanitize(prompt + output, name)`.
    """
    row = json.loads(reference)
    if "entry_point" in row:
        script = f"{row['prompt']}\n{sanitized}\n{row['test']}\ncheck({row['entry_point']})"
    else:
        script = "\n".join([sanitized, row["setup"], *row["test_list"]])
    return run_script(script).exit.returncode == 0


PEERS = {
    **{name: llm_adapters(pattern) for name, pattern in LLM_ADAPTERS.items()},
    "gsm8k": math_verify_itself,
    "math": math_verify_itself,
    "humaneval": evalplus,
    "mbpp": evalplus,
    "mbpp_plus": evalplus,
}
"""Suite -> the scoring function of the project that it comes from."""


def disagreements(suite, is_right, rows):
    """Return the rows to which our rule and the reference implementation give different scores.

    A row is `{"output", "reference"}`, and "sanitized" where the peer is evalplus.
    """
    return [
        row
        for row in rows
        if bool(is_right(row["output"], row["reference"]))
        != bool(PEERS[suite](row.get("sanitized", row["output"]), row["reference"]))
    ]
