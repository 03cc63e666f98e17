import pytest

from demo.exceptions import CLASSES, examples
from demo.sources import SourceFile


def _mined(source: str) -> list[tuple[str, str]]:
    return [(e.text, e.label) for e in examples(SourceFile("package/file.py", source))]


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ('"the size must be positive"', "the size must be positive"),
        ('f"the size {size!r} is negative"', "the size {} is negative"),
        ('"the size %d is negative: %(why)s" % size', "the size {} is negative: {}"),
        ('"the size {0} is negative".format(size)', "the size {} is negative"),
        ('"the size " "must be " + "positive"', "the size must be positive"),
        ('(\n        "the size must"\n        " be positive"\n    )', "the size must be positive"),
        ('f"the {kind}"\n        f" must be positive"', "the {} must be positive"),
    ],
)
def test_the_message_is_extracted_as_written(argument: str, message: str):
    assert _mined(f"def f():\n    raise ValueError({argument})\n") == [(message, "ValueError")]


@pytest.mark.parametrize(
    "statement",
    [
        "raise ValueError(message)",
        "raise ValueError('too short')",
        "raise ValueError('a message that goes on and on ' * 9)",
        f"raise ValueError('{'long ' * 40}')",
        "raise OwnError('a message of four words')",
        "raise ValueError",
        "# raise ValueError('a message of four words')",
    ],
)
def test_other_statements_are_excluded(statement: str):
    assert _mined(statement + "\n") == []


@pytest.mark.parametrize("name", CLASSES)
def test_the_answer_is_the_class_and_is_not_in_the_prompt(name: str):
    (example,) = examples(SourceFile("p/f.py", f"raise {name}('this cannot be done')\n"))
    assert example.completion == f" {name}\n"
    assert example.prompt == "# this cannot be done\nraise"
