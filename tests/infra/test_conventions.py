"""Names that several processes share are written once, in `trans_peft.domain.conventions`."""

import ast
import re
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from infra.stack.prefect_objects import QUEUES
from trans_peft.domain import conventions
from trans_peft.domain.base import BaseRef
from trans_peft.domain.conventions import ADAPTER_ALIAS, GPU_LIMIT, Deployment, Event
from trans_peft.domain.names import name_problem

ROOT = Path(__file__).parents[2]
CODE = ("benchmarks", "demo", "flows", "infra", "study", "tasks", "trans_peft")
FILES = [path for folder in CODE for path in (ROOT / folder).rglob("*.py")]
FLOWS = yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]

NO_TAG = {"trans_peft.scoring", "trans_peft.bridge"}  # an entry point group, a logger
SHARED = re.compile(
    r"\.as-llama"
    r"|^(alias|by-hand|manual-override)\."
    r"|^trans-peft\."
    r"|^on-(\[|\{|$)"
    r"|^[a-z]+(-[a-z]+)?/default$"
)


def literals(path):
    """Yield every string constant of a file but its docstrings, with its line."""
    tree = ast.parse(path.read_text())
    documentation = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree):
        is_text = isinstance(node, ast.Constant) and isinstance(node.value, str)
        if is_text and id(node) not in documentation:
            yield node.lineno, node.value


def is_tag(text):
    if not text.startswith("trans_peft.") or text in NO_TAG or " " in text:
        return False
    module = text.partition(":")[0]
    return text == "trans_peft." or find_spec(module) is None


def test_no_shared_name_is_written_a_second_time():
    home = Path(conventions.__file__)
    found = [
        f"{path.relative_to(ROOT)}:{line}: {text!r}"
        for path in FILES
        if path != home
        for line, text in literals(path)
        if SHARED.search(text) or is_tag(text)
    ]
    assert not found, "import these from trans_peft.domain.conventions:\n" + "\n".join(found)


@pytest.mark.parametrize(
    "text",
    ["v1.as-llama", "alias.on-", "trans-peft.adapter.judged", "on-", "reconcile/default"],
)
def test_the_search_finds_shared_names(text, tmp_path):
    path = tmp_path / "module.py"
    path.write_text(f'"""{text} in a docstring."""\n\nNAME = "{text}"\nOTHER = "on-call"\n')
    assert [line for line, found in literals(path) if SHARED.search(found)] == [3]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("trans_peft.reconcile", True),
        ("trans_peft.", True),
        ("trans_peft.training.worker", False),
        ("trans_peft.scoring", False),
    ],
)
def test_a_tag_is_told_from_a_module(text, expected):
    assert is_tag(text) is expected


def test_deployments_are_those_of_prefect_yaml():
    names = set()
    for deployment in FLOWS:
        path, function = deployment["entrypoint"].split(":")
        flow = getattr(import_module(path.removesuffix(".py").replace("/", ".")), function)
        names.add(f"{flow.name}/{deployment['name']}")
    assert names == set(Deployment)


def test_the_event_that_starts_reconcile_is_a_trigger_in_prefect_yaml():
    (reconcile,) = [d for d in FLOWS if d["entrypoint"].endswith(":reconcile")]
    assert [Event.RECONCILE_REQUESTED] in [trigger["expect"] for trigger in reconcile["triggers"]]


def test_the_gpu_limit_and_the_gpu_queue_have_one_name():
    assert QUEUES[GPU_LIMIT].is_limited


def test_the_alias_of_a_base_matches_its_pattern_and_is_no_name():
    alias = BaseRef("smol", "v1", "0123456789abcdef" * 4).alias
    assert ADAPTER_ALIAS.fullmatch(alias)
    assert name_problem("adapter", alias)
