"""The rule for names, and every function and class that checks it."""

import re
import string

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tasks.training import adopt_adapter
from trans_peft.bases.manifest import parse_manifest
from trans_peft.cli.workspace import adapter_name, base_label
from trans_peft.domain.adapter import AdapterVersion
from trans_peft.domain.base import BaseRef, BaseVersion, Manifest, ManifestFile
from trans_peft.domain.data import DataSource
from trans_peft.domain.evaluation import GatePolicy, Suite
from trans_peft.domain.names import (
    check_case,
    check_names,
    name_problem,
    quoted,
    same_but_for_case,
)
from trans_peft.domain.outcome import Reason, TransferTask
from trans_peft.domain.promotion import PromotionPolicy
from trans_peft.domain.recipe import TrainingRecipe
from trans_peft.errors import InvalidSpecError, UploadError

GOOD = [
    *("a", "7", "smol", "v1", "2026-01", "SmolLM2-135M", "llama_3.1-8b", "a..b", "x" * 100),
    *("on-call-faq", "on-0123456789abc", "latest-news", "champions", "m-1", "none"),
]
BAD = [
    *("", " ", "x" * 101, "x" * 1_000_000, ".", "..", "...", ".hidden", "end.", "-r", "_a", "a-"),
    *("A's base", 'a"b', "a`b", "a/b", "a\\b", "a:b", "a b", "a\tb", "a\n", "\na", "a\x00b", "a%b"),
    *("größe", "模型", "smоl", "ｖ1", "a\u200bb", "ﬁ", "\ud800", "a\u202eb", "１"),  # noqa: RUF001
    *("{{ event.id }}", "${x}", "<b>", "a&b", "a>b", "a@b", "a+b", "a,b", "a;b", "a*b", "a?b"),
    *("latest", "Latest", "champion", "CHAMPION", "serving", "Serving"),
    *("on-0123456789ab", "ON-0123456789AB", "on-ffffffffffff", "m-" + "0" * 32),
    *("v1.as-llama", "V1.AS-LLAMA", "x.as-llama"),
    *(None, 7, True, ["a"], {"a": 1}, b"a"),
]
BAD_TEXT = [name for name in BAD if isinstance(name, str)]
FILE = ManifestFile("config.json", 1, "0" * 64)
DATA = DataSource("s3://data/x.jsonl")
SUITE = Suite("s", DATA)
BASE = BaseRef("f", "v1", "1" * 64)


@pytest.mark.parametrize("name", GOOD)
def test_a_name_that_every_store_allows_is_valid(name):
    assert name_problem("family", name) is None


@pytest.mark.parametrize("name", BAD, ids=lambda name: quoted(name, 20))
def test_any_other_name_is_refused_with_a_printable_message(name):
    problem = name_problem("family", name)
    assert problem is not None
    assert problem.startswith("family ")
    assert problem.isascii()
    assert problem.isprintable()
    assert len(problem) < 400


@given(st.one_of(st.text(max_size=120), st.text(string.ascii_letters + string.digits + "-_./'")))
@example("a" * 100)
def test_a_name_satisfies_the_rules_of_every_store(name):
    if name_problem("x", name) is None:
        assert re.fullmatch(r"[A-Za-z0-9._-]{1,100}", name)  # S3, files, MLflow's metrics
        assert not set(name) & set("/:%&<>'\"`\\ ")  # MLflow's models and filters, Prefect
        assert name == name.strip(".") and name.isascii() and name.isprintable()


@pytest.mark.parametrize(
    "build",
    [
        lambda name: Manifest(name, "v1", None, (FILE,)),
        lambda name: Manifest("f", name, None, (FILE,)),
        lambda name: Manifest("f", "v1", name, (FILE,)),
        lambda name: BaseVersion(name, "v1", "s3://x", 1),
        lambda name: BaseVersion("f", name, "s3://x", 1),
        lambda name: BaseVersion("f", "v1", "s3://x", 1, parent=name),
        lambda name: TransferTask(name, 1, BASE, Reason.NO_VERDICT),
        lambda name: Suite(name, DATA),
        lambda name: TrainingRecipe(name, "f", DATA, (SUITE,)),
        lambda name: TrainingRecipe("a", name, DATA, (SUITE,)),
        lambda name: GatePolicy(required_suites=("s", name)),
        lambda name: PromotionPolicy(required_adapters=("a", name)),
        lambda name: AdapterVersion(name, 1, BASE, BASE, "", "LORA", ()),
        lambda name: BaseRef(name, "v1", "1" * 64),
        lambda name: BaseRef("f", name, "1" * 64),
    ],
)
def test_every_domain_class_refuses_an_invalid_name(build):
    build("fine-1.0")
    for name in BAD_TEXT:
        with pytest.raises(InvalidSpecError):
            build(name)


def test_a_recipe_names_a_version_or_an_alias_and_a_label_may_be_empty():
    for good in ("serving", "champion", "v1", "prod"):
        TrainingRecipe("a", "f", DATA, (SUITE,), base_version=good)
    for name in set(BAD_TEXT) - {"serving", "champion"}:
        with pytest.raises(InvalidSpecError, match="base_version"):
            TrainingRecipe("a", "f", DATA, (SUITE,), base_version=name)
    GatePolicy(label="")
    for name in set(BAD_TEXT) - {""}:
        with pytest.raises(InvalidSpecError, match="label"):
            GatePolicy(label=name)


def test_all_invalid_names_of_a_manifest_are_reported_at_once():
    text = (
        b'{"format": "trans-peft/base-manifest/1", "family": "A\'s", "version": "a b", '
        b'"parent": "../x", "files": [{"name": "a", "size": 1, "sha256": "' + b"0" * 64 + b'"}]}'
    )
    with pytest.raises(UploadError, match=r"family must be .*version must be .*parent must be "):
        parse_manifest(text)
    with pytest.raises(InvalidSpecError, match=r"family .*; base version "):
        check_names("the plan", family="a b", base_version="c d")


def test_names_that_differ_in_case_alone_count_as_one():
    assert same_but_for_case("Smol", ["smal", "Smol", "SMOL"]) == "SMOL"
    check_case("family", "smol", ["smol", "smal"])
    with pytest.raises(InvalidSpecError, match="upper and lower case alone"):
        check_case("family", "smol", ["Smol"])


@given(st.text(max_size=60))
@example("latest")
@example("s3://bucket/on-0123456789ab/adapter")
@example("../модели/v1 (copy)")
def test_default_names_of_the_command_line_are_valid(path):
    for uri in (f"s3://bucket/{path}", f"s3://{path}", f"/models/{path}"):
        if "\x00" not in uri:
            assert name_problem("version", base_label(uri)) is None
            assert name_problem("adapter", adapter_name(uri)) is None
    assert base_label("/a/v1") != base_label("/b/v1")


@pytest.mark.parametrize("name", ["A's adapter", "a/b", "latest", ""])
@pytest.mark.parametrize("field", ["adapter", "family"])
def test_an_adoption_with_an_invalid_name_takes_no_lock_and_writes_nothing(field, name):
    given = {"adapter": "a", "family": "f"} | {field: name}
    with pytest.raises(InvalidSpecError, match=field):
        adopt_adapter.fn(given["adapter"], "s3://x", given["family"], (SUITE,), None)
