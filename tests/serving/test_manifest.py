"""The serving manifest: the rule of `resolve` for every adapter, and its JSON."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from jsonschema import validate

from tests.lifecycle.fleet import FAMILY, POLICY, MemoryFleet
from trans_peft.domain.evaluation import Verdict
from trans_peft.errors import IntegrityError, NotFoundError, NotServedError
from trans_peft.lifecycle.reconcile import observe
from trans_peft.lifecycle.resolve import find_fingerprint, resolve
from trans_peft.serving.manifest import (
    json_schema,
    manifest_from_json,
    manifest_of,
    manifest_to_json,
    serving_manifest,
)

SCHEMA = Path(__file__).parents[2] / "docs/reference/serving-manifest.json"


@pytest.fixture
def fleet(tmp_path):
    """Every state that an adapter can have on v2; v1 serves."""
    fleet = MemoryFleet(tmp_path)
    v1 = fleet.add_base("v1")
    names = ("approved", "blocked", "elsewhere", "failed", "passed", "retired", "unsure")
    for name in names:
        fleet.add_adapter(name, v1, name)
    fleet.promote(v1)
    fleet.apply_verdicts()
    v2 = fleet.add_base("v2")
    verdicts = {"approved": Verdict.INCONCLUSIVE, "unsure": Verdict.INCONCLUSIVE,
                "failed": Verdict.FAILED}  # fmt: skip
    for task in fleet.tasks():
        fleet.judge(task, verdicts.get(task.adapter, Verdict.PASSED))
    fleet.apply_verdicts()
    fleet.add_adapter("trained", v2, "trained")
    fleet.add_adapter("young", v1, "young")
    fleet.person.sets_on_an_adapter("approved", v2.alias, 2)
    fleet.person.sets_on_an_adapter("blocked", v2.alias, None)
    fleet.person.sets_on_an_adapter("elsewhere", v2.alias, 1)
    fleet.platform.registry.retire_manually("retired")
    return fleet


@pytest.mark.parametrize("base", ["v1", "v2", "serving", "champion"])
def test_the_manifest_holds_exactly_what_resolve_returns_for_each_adapter(fleet, base):
    manifest = serving_manifest(FAMILY, base, fleet.platform)
    found = {
        (adapter.name, adapter.number, adapter.weights_sha256) for adapter in manifest.adapters
    }
    expected, idle = set(), set()
    for name in fleet.platform.registry.adapters(FAMILY):
        try:
            version = resolve(name, fleet.platform, base=base)
            expected.add((name, version.number, version.weights_sha256))
        except NotServedError:
            idle.add(name)
    assert found == expected != set()
    assert {entry.name for entry in manifest.idle} == idle


def test_each_entry_says_how_the_version_was_made_and_why_the_others_do_not_serve(fleet):
    manifest = serving_manifest(FAMILY, "v2", fleet.platform)
    served = {adapter.name: adapter for adapter in manifest.adapters}
    assert {name: (a.verdict, a.is_manual, a.made_by) for name, a in served.items()} == {
        "approved": ("inconclusive", True, "direct"),
        "passed": ("passed", False, "direct"),
        "trained": (None, False, "training"),
    }
    assert served["passed"].policy_sha256 == POLICY.sha256
    assert served["trained"].policy_sha256 == ""
    assert {entry.name: entry.reason for entry in manifest.idle} == {
        "blocked": "blocked manually",
        "elsewhere": "manually set on a version for another base",
        "failed": "failed",
        "unsure": "inconclusive",
        "young": "no verdict",
    }
    assert {entry.name: entry.detail for entry in manifest.idle}["unsure"] == (
        "unsure does not serve on small/v2: verdict inconclusive: given by the test"
    )


def test_the_engine_name_changes_with_the_version_and_with_the_weights(fleet):
    adapter = serving_manifest(FAMILY, "v2", fleet.platform).adapters[0]
    assert adapter.engine_name == f"approved.v2.{adapter.weights_sha256[:12]}"
    others = (replace(adapter, number=3), replace(adapter, weights_sha256="f" * 64))
    assert adapter.engine_name not in {other.engine_name for other in others}


def test_the_aliases_of_the_base_are_those_of_its_content(fleet):
    observed = observe(FAMILY, fleet.platform)
    v1, v2 = observed.bases
    table = [
        (v1, 1, 1, ("serving", "champion"), False),
        (v2, 1, 2, ("champion",), True),
        (v1, 1, 2, ("serving",), False),
        (v2, 2, 2, ("serving", "champion"), False),
        (v2, 1, 1, (), False),
    ]
    for base, serving, champion, aliases, is_next in table:
        manifest = manifest_of(replace(observed, serving=serving, champion=champion), base)
        assert (manifest.base_aliases, manifest.is_next) == (aliases, is_next)


def test_an_adapter_that_cannot_be_read_is_idle_with_the_reason(fleet):
    observed = replace(observe(FAMILY, fleet.platform), unreadable=("odd: a tag is wrong",))
    entry = manifest_of(observed, observed.bases[1]).idle
    assert [(e.reason, e.detail) for e in entry if e.name == "odd"] == [
        ("unreadable", "a tag is wrong")
    ]


def test_a_base_is_found_by_its_fingerprint_whatever_its_label(fleet):
    v2 = observe(FAMILY, fleet.platform).bases[1]
    assert find_fingerprint(FAMILY, v2.fingerprint_sha256, fleet.platform) == v2
    with pytest.raises(NotFoundError, match=r"expected: v1 .*, v2"):
        find_fingerprint(FAMILY, "0" * 64, fleet.platform)


def test_a_manifest_comes_back_from_json_and_follows_the_published_schema(fleet):
    manifest = serving_manifest(FAMILY, "v2", fleet.platform)
    text = manifest_to_json(manifest)
    assert manifest_from_json(text) == manifest
    validate(json.loads(text), json.loads(SCHEMA.read_text()))


def test_the_published_schema_is_that_of_the_code():
    assert json.loads(SCHEMA.read_text()) == json_schema()


def test_a_manifest_of_another_format_or_with_other_types_is_refused(fleet):
    fields = json.loads(manifest_to_json(serving_manifest(FAMILY, "v2", fleet.platform)))
    for text in ("nonsense", "{}", json.dumps({**fields, "format": "trans-peft/manifest/9"}),
                 json.dumps({**fields, "adapters": [{"name": "chat"}]})):  # fmt: skip
        with pytest.raises(IntegrityError, match=r"x\.json"):
            manifest_from_json(text, "x.json")
