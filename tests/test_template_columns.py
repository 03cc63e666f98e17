"""What every template takes for a label, and that it refuses anything else by row and column."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trans_peft.data.rows import InvalidRow, examples_from
from trans_peft.data.templates import TEMPLATES, through_template
from trans_peft.errors import DataError

TEXT = "text"
LLM_ADAPTERS = {
    "boolq": ["true", "false"],
    "piqa": ["solution1", "solution2"],
    "social_i_qa": ["answer1", "answer2", "answer3"],
    "hellaswag": ["ending1", "ending2", "ending3", "ending4"],
    "winogrande": ["option1", "option2"],
    "arc": ["answer1", "answer2", "answer3", "answer4", "answer5"],
    "openbookqa": ["answer1", "answer2", "answer3", "answer4"],
}
FOUR = {"text": ["a", "b", "c", "d"], "label": ["A", "B", "C", "D"]}

# template -> a row, and of its columns that are no plain text the values that the data set has
ROWS = {
    "boolq": ({"question": "q", "answer": True}, {"answer": [True, False]}),
    "piqa": ({"goal": "g", "sol1": "a", "sol2": "b", "label": 0}, {"label": [0, 1]}),
    "social_i_qa": (
        {"context": "c", "question": "q", "answerA": "a", "answerB": "b", "answerC": "c",
         "label": "1"},
        {"label": ["1", "2", "3", "1\n", "2\n", "3\n"]},
    ),
    "hellaswag": (
        {"activity_label": "x", "ctx": "c", "endings": ["a", "b", "c", "d"], "label": "0"},
        {"label": ["0", "1", "2", "3", 0, 1, 2, 3], "endings": []},
    ),
    "winogrande": (
        {"sentence": "a _", "option1": "a", "option2": "b", "answer": "1"}, {"answer": ["1", "2"]}
    ),
    "arc": (
        {"question": "q", "choices": FOUR, "answerKey": "A"},
        {"answerKey": ["A", "B", "C", "D"], "choices": []},
    ),
    "openbookqa": (
        {"question_stem": "q", "choices": FOUR, "answerKey": "A"},
        {"answerKey": ["A", "B", "C", "D"], "choices": []},
    ),
    "commonsense170k": (
        {"instruction": "q\n\nAnswer format: true/false", "output": "the correct answer is true"},
        {"output": ["the correct answer is true"]},
    ),
    "metamathqa": ({"query": "q", "response": "r"}, {}),
    "codefeedback": ({"query": "q", "response": "r"}, {}),
    "gsm8k": ({"question": "q", "answer": "so 4\n#### 4"}, {"answer": []}),
    "math": ({"problem": "p", "solution": "\\boxed{4}"}, {"solution": []}),
    "humaneval": (
        {"task_id": "HumanEval/0", "prompt": "def f(x):\n", "canonical_solution": "    return x\n",
         "entry_point": "f", "test": "def check(candidate):\n    assert candidate(1) == 1\n"},
        {"prompt": [], "entry_point": [], "test": []},
    ),
    "mbpp": (
        {"task_id": 11, "text": "t", "code": "def f(): pass", "test_setup_code": "",
         "test_list": ["assert f()", "assert f()", "assert f()"]},
        {"task_id": [*range(1, 975)], "test_list": [], "test_setup_code": ["", TEXT, None]},
    ),
    "mbpp_plus": (
        {"task_id": 2, "prompt": "t", "code": "def f(): pass", "test_imports": [],
         "test_list": ["assert f()"]},
        {"task_id": [*range(1, 975)], "test_list": [], "test_imports": [[]]},
    ),
}  # fmt: skip

# (template, column) -> least and most texts that the column takes
LISTS = {
    ("hellaswag", "endings"): (4, 4),
    ("mbpp", "test_list"): (3, 3),
    ("mbpp_plus", "test_list"): (1, 9),
    ("mbpp_plus", "test_imports"): (0, 9),
}

anything = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 9), st.integers(), st.floats(),
    st.sampled_from(["", " ", "\n", "true", "false", "True", "-1", "0", "1", "1\n", "2", "3", "4",
                     "5", "1.0", "01", " 1", "A", "E", "F", "a", "AB", "१", "٣"]),
    st.lists(st.one_of(st.none(), st.integers(), st.sampled_from(["", "a", "1"])), max_size=5),
    st.dictionaries(st.sampled_from(["text", "label"]), st.lists(st.text(max_size=1)), max_size=2),
    st.binary(max_size=2),
)  # fmt: skip


def read(name, row):
    ((_, value),) = through_template([("line 7", row)], name) or [(None, None)]
    return value


def same(first, second):
    return type(first) is type(second) and first == second


def is_free_text(name, column, value):
    if (name, column) == ("mbpp", "test_setup_code"):
        return isinstance(value, str)  # may be blank
    if (name, column) in LISTS:
        least, most = LISTS[name, column]
        return (
            isinstance(value, list)
            and least <= len(value) <= most
            and all(isinstance(text, str) and text.strip() for text in value)
        )
    return False


def test_every_template_is_tested():
    assert ROWS.keys() == TEMPLATES.keys()


@pytest.mark.parametrize("name", ROWS)
def test_every_value_of_the_data_set_is_accepted(name):
    row, values = ROWS[name]
    for column, known in values.items():
        for value in known:
            read_row = read(name, row | {column: value})
            assert not isinstance(read_row, InvalidRow), (column, value)


@pytest.mark.parametrize(
    ("name", "column", "value"),
    [
        ("mbpp_plus", "test_list", ["a"]),
        ("mbpp_plus", "test_imports", ["import math"]),
        ("hellaswag", "endings", ["a", "1", "a", "1"]),
        ("mbpp", "test_list", ["a", "a", "1"]),
    ],
)
def test_any_list_of_texts_is_accepted(name, column, value):
    assert not isinstance(read(name, ROWS[name][0] | {column: value}), InvalidRow)


@pytest.mark.parametrize("name", ROWS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_other_value_is_refused_by_row_and_column(name, data):
    row, values = ROWS[name]
    column = data.draw(st.sampled_from(sorted(row)))
    value = data.draw(anything)
    known = values.get(column)
    if known is None and isinstance(value, str) and value.strip():
        return  # a text column
    if any(same(value, other) for other in known or []):
        return
    if is_free_text(name, column, value):
        return
    with pytest.raises(DataError) as caught:
        examples_from(through_template([("line 7", row | {column: value})], name), "mine.jsonl")
    assert f"line 7: not a row of {name}: " in str(caught.value)
    assert column in str(caught.value)


@pytest.mark.parametrize("name", ROWS)
def test_a_missing_column_is_refused(name):
    row, _ = ROWS[name]
    for column in row.keys() - {"test_setup_code"}:
        value = read(name, {key: value for key, value in row.items() if key != column})
        assert isinstance(value, InvalidRow)
        assert "is missing" in value.reason


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("boolq", {"answer": "false"}, "answer must be one of True, False, found 'false'"),
        ("boolq", {"answer": 0}, "answer must be"),
        ("piqa", {"label": -1}, "label must be a whole number from 0 to 1, found -1"),
        ("piqa", {"label": 1.0}, "label must be"),
        ("piqa", {"label": True}, "label must be"),
        ("piqa", {"label": "1"}, "label must be"),
        ("piqa", {"sol2": ""}, "sol2 must be text"),
        ("social_i_qa", {"label": ""}, "label must be"),
        ("social_i_qa", {"label": "0"}, "label must be"),
        ("social_i_qa", {"label": "4"}, "label must be"),
        ("hellaswag", {"label": ""}, "label must be"),
        ("hellaswag", {"label": "4"}, "label must be"),
        ("hellaswag", {"endings": ["a", "b", "c"]}, "endings must be a list of 4 texts"),
        ("hellaswag", {"endings": ["a", "b", "c", ""]}, "endings must be"),
        ("hellaswag", {"endings": "abcd"}, "endings must be"),
        ("winogrande", {"answer": ""}, "answer must be"),
        ("winogrande", {"answer": "3"}, "answer must be"),
        ("arc", {"answerKey": "E"}, "answerKey 'E' is not one of the labels"),
        ("arc", {"answerKey": "1"}, "answerKey '1' is not one of the labels"),
        ("arc", {"answerKey": ""}, "answerKey must be"),
        ("arc", {"choices": FOUR | {"label": ["A", "B", "C"]}}, "choices must be"),
        ("arc", {"choices": FOUR | {"label": ["A", "B", "C", "C"]}}, "choices must be"),
        ("arc", {"choices": FOUR | {"label": ["A", "B", "C", "4"]}}, "choices must be"),
        ("arc", {"choices": FOUR | {"label": [1, 2, 3, 4]}}, "choices must be"),
        ("arc", {"choices": {"text": ["a"], "label": ["A"]}}, "choices must be"),
        ("openbookqa", {"choices": {"text": list("abc"), "label": list("ABC")}}, "4 texts"),
        ("gsm8k", {"answer": "4"}, "no solution before"),
        ("gsm8k", {"answer": "so\n#### "}, "'#### ' and a number"),
        ("gsm8k", {"answer": "so\n#### four"}, "'#### ' and a number"),
        ("gsm8k", {"answer": "so\n#### 1,00"}, "'#### ' and a number"),
        ("gsm8k", {"answer": "so\n#### 4\n#### 5"}, "'#### ' and a number"),
        ("math", {"solution": "4"}, "no \\boxed"),
        ("math", {"solution": "\\boxed{4"}, "is not closed"),
        ("math", {"solution": "so \\boxed"}, "last \\boxed is empty"),
        ("humaneval", {"entry_point": "g"}, "does not define the entry_point 'g'"),
        ("humaneval", {"entry_point": "f()"}, "a Python identifier"),
        ("humaneval", {"test": "pass"}, "does not define check"),
        ("mbpp", {"task_id": 975}, "task_id must be"),
        ("mbpp", {"task_id": "11"}, "task_id must be"),
        ("mbpp", {"test_list": []}, "test_list must be"),
        ("mbpp", {"test_list": ["assert 1", "assert 1"]}, "test_list must be"),
        ("mbpp_plus", {"test_list": []}, "test_list must be"),
    ],
)
def test_an_unknown_label_is_refused_with_its_reason(name, changes, message):
    value = read(name, ROWS[name][0] | changes)
    assert isinstance(value, InvalidRow)
    assert message in value.reason


@pytest.mark.parametrize("labels", [list("ABC"), list("ABCDE"), list("123"), list("12345")])
def test_arc_has_three_to_five_choices_with_letters_or_digits(labels):
    row = {"question": "q", "choices": {"text": list("vwxyz")[: len(labels)], "label": labels}}
    for number, key in enumerate(labels, start=1):
        asked = read("arc", row | {"answerKey": key})
        assert asked["completion"] == f" the correct answer is answer{number}"


@pytest.mark.parametrize("name", LLM_ADAPTERS)
def test_the_answer_of_an_llm_adapters_row_must_be_in_its_instruction(name):
    names = LLM_ADAPTERS[name]
    instruction = f"Choose.\n\nAnswer format: {'/'.join(names)}"
    for own in names:
        row = {"instruction": instruction, "input": "", "output": f"the correct answer is {own}"}
        assert read(name, row)["completion"] == f" {row['output']}"
        assert read(name, row | {"answer": own}) == read(name, row)
    row["output"] = f"the correct answer is {names[0]}"
    for changes, message in [
        ({"output": "the correct answer is answer9"}, "output must be one of"),
        ({"output": names[0]}, "output must be one of"),
        ({"output": ""}, "output must be one of"),
        ({"answer": names[1]}, f"but answer is '{names[1]}'"),
        ({"answer": "x"}, "answer must be one of"),
        ({"input": "more"}, "input must be one of ''"),
        ({"instruction": "Choose.\n\nAnswer format: x/y"}, "the instruction lists 'x/y'"),
        ({"instruction": " "}, "instruction must be text"),
    ]:
        assert message in read(name, row | changes).reason


def test_all_faults_of_a_row_are_listed():
    value = read("piqa", {"goal": "", "sol1": "a", "label": 2})
    assert "goal must be" in value.reason
    assert "'sol2' is missing" in value.reason
    assert "label must be" in value.reason


@pytest.mark.parametrize("row", [[], "x", 5, None, True])
@pytest.mark.parametrize("name", ROWS)
def test_a_row_that_is_not_an_object_is_refused(name, row):
    assert "must be an object" in read(name, row).reason


def test_an_import_above_a_docstring_of_humaneval_moves_to_the_front():
    """As evalplus gives HumanEval/115; elsewhere nothing moves."""
    row, _ = ROWS["humaneval"]
    inside = '\ndef f(grid):\n    import math\n    """\n    Fill.\n    """\n'
    asked = read("humaneval", row | {"prompt": inside})
    assert asked["prompt"] == 'import math\n\ndef f(grid):\n    """\n    Fill.\n    """\n'
    compile(asked["prompt"] + "    return math.pi\n", "x", "exec")
    for prompt in (
        "import math\n\ndef f(x):\n    return 1\n",
        "def f(x):\n    import math\n    return x\n",
        'def f(x):\n    """Import.\n    import math\n    """\n',
    ):
        assert read("humaneval", row | {"prompt": prompt})["prompt"] == prompt
