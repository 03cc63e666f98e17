"""The pages name what exists, and the API reference names all that users import."""

import ast
import re
import subprocess
from pathlib import Path
from pkgutil import resolve_name
from types import ModuleType

import pytest

import trans_peft as tp

ROOT = Path(__file__).parents[1]
TRACKED = subprocess.run(
    ["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True
).stdout.splitlines()
# Decisions and the changelog keep the names of their time. The table of architectures is generated.
PAGES = [
    path
    for path in TRACKED
    if path.endswith(".md") and path.startswith(("README", "CONTRIBUTING", "docs/", "infra/"))
    if not path.startswith("docs/decisions/") and path != "docs/architectures.md"
]
CODE = (".py", ".yaml", ".toml", ".json", "Makefile", "Containerfile", ".sh")
REFERENCE = [
    path
    for page in ("api", "errors")
    for path in re.findall(
        r"^::: (\S+)", (ROOT / f"docs/reference/{page}.md").read_text(), flags=re.MULTILINE
    )
]


@pytest.fixture(scope="module")
def documented():
    found = []
    for path in REFERENCE:
        value = resolve_name(path)
        found += [getattr(value, n) for n in value.__all__] if isinstance(value, ModuleType) else []
        found.append(value)
    return found


def imports():
    """Yield (page, module, name) for each import from the library in the pages."""
    for path in [*PAGES, "docs/tutorial.py"]:
        for line in (ROOT / path).read_text().splitlines():
            if re.match(r"from trans_peft[.\w]* import \w", line):
                (statement,) = ast.parse(line).body
                yield from ((path, statement.module, alias.name) for alias in statement.names)


def test_the_reference_documents_each_object_once(documented):
    assert len(set(REFERENCE)) == len(REFERENCE)
    assert [value for value in documented if not value.__doc__] == []


def test_every_public_name_is_in_the_reference(documented):
    assert [name for name in tp.__all__ if getattr(tp, name) not in documented] == []


def test_what_pages_import_is_in_the_reference(documented):
    missing = [i for i in imports() if resolve_name(f"{i[1]}:{i[2]}") not in documented]
    assert list(imports())
    assert missing == []


def test_identifiers_in_pages_exist_in_the_code():
    words = {
        word
        for path in TRACKED
        if path.endswith(CODE) and (ROOT / path).is_file()
        for word in re.findall(r"\w+", (ROOT / path).read_text())
    }
    unknown = [
        f"{path}: {code}"
        for path in PAGES
        for code in re.findall(
            r"(?<!`)`([A-Za-z_][\w.]*)(?:\(\))?`(?!`)", (ROOT / path).read_text()
        )
        if "_" in code and not code.isupper()
        if not set(code.split(".")) <= words
    ]
    assert unknown == []
