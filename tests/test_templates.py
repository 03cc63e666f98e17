import gzip
import json

import pytest

from trans_peft.data import parse_examples, pin, read_examples, write_examples
from trans_peft.data.templates import TEMPLATES
from trans_peft.domain.data import DataSource
from trans_peft.domain.evaluation import Suite
from trans_peft.domain.recipe import TrainingRecipe
from trans_peft.edges.file_store import FileStore
from trans_peft.errors import DataError, InvalidSpecError

STORE = FileStore()


def llm_adapters(instruction):
    """`generate_prompt` of LLM-Adapters' commomsense_evaluate.py, restated."""
    return f"""Below is an instruction that describes a task. Write a response that appropriately completes the request. 

                ### Instruction:
                {instruction}

                ### Response:
                """  # noqa: E501


METAMATH = (  # `problem_prompt` of MetaMath's eval_gsm8k.py and eval_math.py, restated
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response: Let's think step by step."
)

# template -> a row as its hub page has it, the instruction that LLM-Adapters makes of it, its label
COMMONSENSE = {
    "boolq": (
        {"question": "is snow cold", "answer": True, "passage": "Snow is frozen water."},
        "Please answer the following question with true or false, question: is snow cold?\n\n"
        "Answer format: true/false",
        "true",
    ),
    "piqa": (
        {"goal": "cool tea", "sol1": "add ice", "sol2": "add fire", "label": 0},
        "Please choose the correct solution to the question: cool tea\n\nSolution1: add ice\n\n"
        "Solution2: add fire\n\nAnswer format: solution1/solution2",
        "solution1",
    ),
    "social_i_qa": (
        {
            "context": "Kim fell.", "question": "How would Kim feel?",
            "answerA": "hurt", "answerB": "proud", "answerC": "tall", "label": "1",
        },
        "Please choose the correct answer to the question: Kim fell. How would Kim feel?\n\n"
        "Answer1: hurt Answer2: proud Answer3: tall\n\nAnswer format: answer1/answer2/answer3",
        "answer1",
    ),
    "hellaswag": (
        {
            "activity_label": "Cooking", "ctx": "A man boils water. he",
            "endings": ["flies.", "adds rice.", "sings.", "sleeps."], "label": "1",
        },
        "Please choose the correct ending to complete the given sentence: Cooking: A man boils "
        "water. he\n\nEnding1: flies. Ending2: adds rice. Ending3: sings. Ending4: sleeps.\n\n"
        "Answer format: ending1/ending2/ending3/ending4",
        "ending2",
    ),
    "winogrande": (
        {"sentence": "Ann thanked Bea, as _ had helped.", "option1": "Ann", "option2": "Bea",
         "answer": "2"},
        "Please choose the correct answer to fill in the blank to complete the given sentence: "
        "Ann thanked Bea, as _ had helped.\n\nOption1: Ann Option2: Bea "
        "Answer format: option1/option2",
        "option2",
    ),
    "arc": (
        {"question": "What is ice?", "answerKey": "2",
         "choices": {"text": ["a gas", "a solid", "a wave"], "label": ["1", "2", "3"]}},
        "Please choose the correct answer to the question: What is ice?\n\nAnswer1: a gas "
        "Answer2: a solid Answer3: a wave\n\nAnswer format: answer1/answer2/answer3",
        "answer2",
    ),
    "openbookqa": (
        {"question_stem": "The sun is", "answerKey": "C",
         "choices": {"text": ["a pet", "a car", "a star", "a sea"], "label": list("ABCD")}},
        "Please choose the correct answer to the question: The sun is\n\nAnswer1: a pet "
        "Answer2: a car Answer3: a star Answer4: a sea\n\n"
        "Answer format: answer1/answer2/answer3/answer4",
        "answer3",
    ),
}  # fmt: skip


def read(folder, template, *rows, name="rows.jsonl"):
    data = "\n".join(map(json.dumps, rows)).encode()
    if name.endswith(".json"):
        data = json.dumps(rows, indent=2).encode()
    (folder / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return read_examples(DataSource(str(folder / name), template=template), STORE)


@pytest.mark.parametrize("name", COMMONSENSE)
def test_commonsense_prompts_are_those_of_llm_adapters(name, tmp_path):
    raw, instruction, label = COMMONSENSE[name]
    (example,) = read(tmp_path, name, raw)
    output = f"the correct answer is {label}"
    assert example.prompt + example.completion == llm_adapters(instruction) + output
    assert example.completion == f" {output}"
    theirs = {"instruction": instruction, "input": "", "output": output, "answer": label}
    assert read(tmp_path, name, theirs, name="test.json") == (example,)


def trained_by_the_authors(row):
    """`SupervisedDataset` of gccnlp/Trans-PEFT's training_utils.py, restated."""
    instruction, *more = row["query"].split("\n")
    given = "\n".join(more)
    paired = ", paired with an input that provides further context" if given else ""
    middle = f"### Input:\n{given}\n\n" if given else ""
    return (
        f"Below is an instruction that describes a task{paired}. "
        "Write a response that appropriately completes the request.\n\n"
        f"### Instruction:\n{instruction}\n\n{middle}### Response:{row['response']}"
    )


@pytest.mark.parametrize("name", ["metamathqa", "codefeedback"])
@pytest.mark.parametrize("query", ["Two and {two}?", "Add:\n2\n\n3", "One line.\n"])
def test_rows_with_a_query_become_the_prompts_that_the_paper_trains_with(name, query, tmp_path):
    row = {"query": query, "response": "It is 4.\nThe answer is: 4", "type": "GSM_Rephrased"}
    (example,) = read(tmp_path, name, row)
    assert example.prompt + example.completion == trained_by_the_authors(row)
    assert example.completion == f":{row['response']}"


def test_the_authors_data_set_of_code_has_the_column_answer_instead_of_response(tmp_path):
    row = {"query": "Add.", "answer": "2 + 2", "resource": "evol", "lang": "python"}
    (example,) = read(tmp_path, "codefeedback", row)
    same = {"query": "Add.", "response": "2 + 2"}
    assert (example,) == read(tmp_path, "codefeedback", same)
    with pytest.raises(DataError, match="the field 'response' is missing"):
        read(tmp_path, "metamathqa", row)


@pytest.mark.parametrize("name", COMMONSENSE)
def test_commonsense170k_has_the_prompts_that_the_paper_trains_with(name, tmp_path):
    _, instruction, label = COMMONSENSE[name]
    output = f"the correct answer is {label}"
    row = {"instruction": instruction, "input": "", "output": output, "answer": label}
    (example,) = read(tmp_path, "commonsense170k", row)
    indent = " " * 16
    assert example.prompt + example.completion == (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.  \n\n"
        f"{indent}### Instruction:\n{indent}{instruction}\n{indent}\n"
        f"{indent}### Response:\n{indent}{output}"
    )
    with pytest.raises(DataError, match="output names"):
        read(tmp_path, "commonsense170k", row | {"answer": "true" if label != "true" else "false"})


def test_gsm8k_prompts_are_those_of_metamath(tmp_path):
    row = {"question": "Two and two?", "answer": "2 + 2 = <<2+2=4>>4, or 4,000 m.\n#### 4,000"}
    (example,) = read(tmp_path, "gsm8k", row)
    assert example.prompt == METAMATH.format(instruction="Two and two?")
    assert example.completion == " 2 + 2 = 4, or 4,000 m.\n#### 4,000\nThe answer is: 4000"


@pytest.mark.parametrize(
    ("solution", "answer"),
    [
        ("It is \\boxed{4}.", "4"),
        ("First \\boxed{1}, then $\\boxed{\\frac{1}{2}}$.", "\\frac{1}{2}"),
        ("So it is $\\boxed 2$.", "2"),
        ("\\boxed{\\{1,2\\}}", "\\{1,2\\}"),
        ("So \\boxed {5}. Thus done.", "5"),
    ],
)
def test_math_prompts_are_those_of_metamath(solution, answer, tmp_path):
    (example,) = read(tmp_path, "math", {"problem": "How many {x}?", "solution": solution})
    assert example.prompt == METAMATH.format(instruction="How many {x}?")
    assert example.completion == f" {solution}\nThe answer is: {answer}"


@pytest.mark.parametrize("solution", ["\\boxed 5. Thus done.", "\\boxed{5", "\\boxed", "It is 5."])
def test_a_solution_without_a_clear_answer_is_refused(solution, tmp_path):
    with pytest.raises(DataError, match="boxed"):
        read(tmp_path, "math", {"problem": "How many?", "solution": solution})


MBPP = {
    "task_id": 11, "text": "Add one.", "test_setup_code": "",
    "code": "def inc(x):\r\n  return x + 1",
    "test_list": ["assert inc(1) == 2", "assert inc(2) == 3", "assert inc(0) == 1"],
}  # fmt: skip


def test_prompts_of_programs_have_docstrings_and_references_have_tests(tmp_path):
    row = {
        "task_id": "HumanEval/0", "prompt": '\ndef inc(x):\n    """Add one."""\n',
        "canonical_solution": "    return x + 1\n", "entry_point": "inc",
        "test": "def check(candidate):\n    assert candidate(1) == 2\n",
    }  # fmt: skip
    (example,) = read(tmp_path, "humaneval", row, name="rows.jsonl.gz")
    assert example.id == "HumanEval/0"
    assert example.prompt == 'def inc(x):\n    """Add one."""\n'
    assert example.completion == "    return x + 1\n"
    assert json.loads(example.reference) == {
        "prompt": example.prompt, "test": row["test"], "entry_point": "inc",
    }  # fmt: skip

    outside = [MBPP | {"task_id": number} for number in (10, 511)]
    (example,) = read(tmp_path, "mbpp", outside[0], MBPP, outside[1])
    assert example.id == "11"
    assert example.prompt == '"""\nAdd one.\n' + "\n".join(MBPP["test_list"]) + '\n"""\n'
    assert json.loads(example.reference) == {
        "prompt": example.prompt, "test_list": MBPP["test_list"], "setup": "",
        "reference": "def inc(x):\n  return x + 1",
    }  # fmt: skip

    plus = MBPP | {"prompt": MBPP["text"], "test_imports": ["import math"], "task_id": 2}
    (example,) = read(tmp_path, "mbpp_plus", plus)
    assert example.prompt == '"""\nAdd one.\nassert inc(1) == 2\n"""\n'
    assert json.loads(example.reference)["setup"] == "import math"


@pytest.mark.parametrize("name", TEMPLATES)
def test_all_rows_that_a_template_refuses_are_listed(name, tmp_path):
    with pytest.raises(DataError) as error:
        read(tmp_path, name, {"task_id": 11, "answer": 5, "label": "x"}, ["no object"])
    assert "2 of 2 rows are invalid" in str(error.value)
    assert f"line 1: not a row of {name}: " in str(error.value)


def test_an_unknown_template_is_refused(tmp_path):
    with pytest.raises(InvalidSpecError, match="boolq, piqa"):
        read(tmp_path, "squad", {})


def test_a_broken_archive_is_refused(tmp_path):
    (tmp_path / "rows.jsonl.gz").write_bytes(b"no archive")
    with pytest.raises(DataError, match="cannot be decompressed"):
        read_examples(DataSource(str(tmp_path / "rows.jsonl.gz")), STORE)


def test_the_template_is_part_of_a_suites_hash_and_the_pin_is_of_the_raw_bytes(tmp_path):
    read(tmp_path, "mbpp", MBPP)
    raw = pin(DataSource(str(tmp_path / "rows.jsonl")), STORE)
    through = pin(DataSource(raw.uri, template="mbpp"), STORE)
    assert through.sha256 == raw.sha256
    hashes = {Suite("s", data).suite_sha256 for data in (raw, through)}
    assert len(hashes) == 2


def test_new_fields_do_not_change_old_hashes():
    """Hashes that were stored before data had templates and suites a chance level."""
    suite = Suite("sums", DataSource("x.jsonl", "ab" * 32), "chrf", threshold=50.0, limit=7)
    assert suite.suite_sha256.startswith("bf67d7cb47efe001")
    assert suite.decoding_sha256.startswith(
        "a1e7b2686178c845"
    )  # since the third revision of decoding
    recipe = TrainingRecipe("a", "f", DataSource("t.jsonl", "cd" * 32), (suite,))
    assert recipe.sha256.startswith("096bbd18ea57998c")
    later = TrainingRecipe("a", "f", DataSource("t.jsonl", "cd" * 32, "gsm8k"), (suite,))
    assert later.sha256 != recipe.sha256


CHOOSING = {"id": "1", "prompt": "p", "completion": "a", "choices": ["a", "b"], "reference": "r"}


def test_choices_and_references_are_read_and_written(tmp_path):
    (example,) = read(tmp_path, "", CHOOSING)
    assert (example.choices, example.reference) == (("a", "b"), "r")
    path = write_examples([example], tmp_path / "out.jsonl")
    assert parse_examples(path.read_bytes(), "out.jsonl") == (example,)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"choices": "ab"}, "must be a list of texts"),
        ({"choices": ["a", 1]}, "must be a list of texts"),
        ({"choices": ["a"]}, "at least two different texts"),
        ({"choices": ["a", "b", "a"]}, "at least two different texts"),
        ({"choices": ["b", "c"]}, "the answer 'a' is not one of the choices"),
        ({"reference": 5}, "reference must be text"),
        ({"reference": " "}, "reference is empty"),
    ],
)
def test_invalid_choices_and_references_are_refused(changes, message, tmp_path):
    with pytest.raises(DataError, match=message):
        read(tmp_path, "", CHOOSING | changes)
