import pytest

from demo.functions import ANNOTATIONS, docstrings, returns, signatures
from demo.sources import SourceFile

SOURCE = '''
class A:
    def is_empty(self, rows: list) -> bool:
        """Tell whether no row is left.

        More.
        """
        return not rows

    def load(self, path) -> "Tensor":
        """load it"""
        return read(path)
'''


def test_the_prompt_does_not_contain_the_answer():
    file = SourceFile("p/f.py", SOURCE)
    assert [(e.label, "->" in e.prompt, "row is left" in e.prompt) for e in returns(file)] == [
        ("bool", False, False),
        ("torch.Tensor", False, False),
    ]
    (line,) = docstrings(file)
    assert line.completion == " Tell whether no row is left.\n"
    assert line.prompt == ("def is_empty(self, rows: list):\n    return not rows\n# what it does:")


def test_a_signature_is_the_first_line_alone():
    shown = [(e.prompt, e.completion) for e in signatures(SourceFile("p/f.py", SOURCE))]
    assert shown == [
        ("def is_empty(self, rows: list):\n# returns:", " bool\n"),
        ("def load(self, path):\n# returns:", " torch.Tensor\n"),
    ]


def test_functions_are_found_in_every_kind_of_block():
    blocks = (
        "if x:\n    {}\nelse:\n    {}",
        "try:\n    {}\nexcept E:\n    {}\nelse:\n    {}\nfinally:\n    {}",
        "with x:\n    {}\nfor i in x:\n    {}\nelse:\n    {}\nwhile x:\n    {}",
        "match x:\n  case 1:\n    {}\n  case _:\n    {}",
        "class A:\n    {}",
        "def outer():\n    {}\n    return inner",
    )
    for block in blocks:
        count = block.count("{}")
        text = block.format(*(f"def made_{i}(x) -> int: return x" for i in range(count)))
        assert len(list(signatures(SourceFile("p/f.py", text)))) == count, block


@pytest.mark.parametrize("name", ANNOTATIONS)
def test_every_annotation_is_found(name: str):
    (example,) = returns(SourceFile("p/f.py", f"def made() -> {name}:\n    return thing\n"))
    assert example.completion == f" {name}\n"


def test_a_file_that_does_not_parse_has_no_examples():
    assert list(returns(SourceFile("p/f.py", "print 'python 2'"))) == []
