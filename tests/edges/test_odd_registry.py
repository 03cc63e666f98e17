"""Unreadable entries in MLflow are reported and affect no other adapter and no other family."""

import json
import re
from contextlib import contextmanager
from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.edges.examples import evaluation
from tests.edges.fake_tracking import FakeTracking, Model, Version
from tests.edges.one_by_one import one_by_one
from tests.lifecycle.fleet import POLICY, MemoryFleet, obstacle_text
from trans_peft.domain.evaluation import Verdict
from trans_peft.domain.fleet import VerdictsMissing
from trans_peft.domain.promotion import PromotionPolicy
from trans_peft.edges.mlflow_catalog import MlflowCatalog
from trans_peft.edges.mlflow_client import own_tags, tag
from trans_peft.edges.mlflow_evaluations import MlflowEvaluations
from trans_peft.edges.mlflow_outcomes import MlflowOutcomes
from trans_peft.edges.mlflow_registry import MlflowRegistry
from trans_peft.edges.stores import SchemeStore
from trans_peft.errors import InvalidSpecError, StoreError, TransPeftError
from trans_peft.lifecycle.apply_verdicts import apply_verdicts
from trans_peft.lifecycle.bases import ingest, pending
from trans_peft.lifecycle.reconcile import observe, plan, with_cost_estimates
from trans_peft.lifecycle.report import report

ANY_SHARE = PromotionPolicy(min_serving_share=0.0)
NO_ROLLBACK = PromotionPolicy(min_serving_share=0.0, free_rollback=False)
ODD = [
    *("x", "", " ", "0", "-1", "1.5", "true", "null", "[]", "{}", "NaN", '"', "'", "{", "1>2>3"),
    *(
        "[[" * 5000,
        '{"a":' * 5000,
        "größe",
        "\x00",
        "\u202e",
        "A's base",
        "a/b",
        "../..",
        "9" * 5000,
    ),
    *(
        '{"outcome": {}, "time_ms": "x"}',
        '{"outcome": null}',
        '[{"name": "../x"}]',
        "on-",
        "f" * 64,
    ),
    *("latest", "serving", "F" * 64, "0" * 64, "99", "none", "1>none", "x" * 4000, "f" * 64),
]
texts = st.one_of(
    st.sampled_from(ODD),
    st.text(max_size=80),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
        max_leaves=8,
    ).map(json.dumps),
)


class Two:
    """Two families in one registry. `spoilt` has v1 and v2 and two adapters; `other` has one."""

    def __init__(self, folder):
        self.tracking = FakeTracking()
        self.spoilt, self.other = (self.fleet(folder, name) for name in ("spoilt", "other"))
        for fleet, adapters in ((self.spoilt, ("bad", "good")), (self.other, ("apart",))):
            self.v1 = fleet.add_base("v1")
            for name in adapters:
                fleet.add_adapter(name, self.v1)
            fleet.promote(self.v1)
            fleet.apply_verdicts()
            self.v2 = fleet.add_base("v2")
            fleet.complete_tasks(Verdict.PASSED)
            fleet.apply_verdicts()

    def fleet(self, folder, family):
        """Return a fleet on the MLflow adapters of the ports, with dictionaries behind them."""
        (folder / family).mkdir()
        fleet = MemoryFleet(folder / family, family)
        catalog, registry = MlflowCatalog("fake://"), MlflowRegistry("fake://")
        catalog._tracking = registry._tracking = self.tracking
        registry._outcomes = MlflowOutcomes(self.tracking)
        fleet.platform = replace(fleet.platform, catalog=catalog, registry=registry)

        def click(model, alias, number):
            self.tracking.set_alias(model, alias, number)

        fleet.person = replace(fleet.person, sets_on_a_base=click)
        return fleet

    @contextmanager
    def restoring(self):
        """Restore the registry after the block."""
        before = json.dumps([*map(vars, self.tracking.known.values())])
        made = json.dumps([vars(v) for many in self.tracking.made.values() for v in many])
        try:
            yield
        finally:
            self.tracking.known = {m["name"]: Model(**m) for m in json.loads(before)}
            self.tracking.made = {}
            for version in json.loads(made):
                self.tracking.made.setdefault(version["name"], []).append(Version(**version))

    @contextmanager
    def version_tag(self, model, number, name, text):
        """Set a tag of a version within the block."""
        with self.restoring():
            self.tracking.version(model, int(number)).tags[tag(name)] = text
            yield

    @contextmanager
    def model_tag(self, model, name, text):
        """Set a tag of a registered model within the block."""
        with self.restoring():
            self.tracking.known[model].tags[tag(name)] = text
            yield

    def assert_others_continue(self):
        """Read, plan, promote, roll back and report both families; `good` and `apart` are moved."""
        for fleet, adapter in ((self.spoilt, "good"), (self.other, "apart")):
            assert fleet.family in fleet.platform.catalog.families()
            pending(fleet.platform)
            fleet.platform.catalog.set_aside()
            fleet.platform.registry.set_aside()
            found = fleet.platform.registry.fleet(fleet.family)
            live, unreadable = one_by_one(fleet.platform.registry, fleet.family)
            assert (found.live, found.unreadable[: len(unreadable)]) == (live, unreadable)
            for number in (2, 1):
                fleet.person.sets_on_a_base(fleet.family, "champion", number)
                seen = observe(fleet.family, fleet.platform)
                _, changes = apply_verdicts(seen, POLICY, ANY_SHARE, fleet.platform)
                if isinstance(changes.obstacle, VerdictsMissing):  # the damaged adapter has none
                    assert "bad" in changes.obstacle.adapters
                elif changes.obstacle is None:
                    assert fleet.serving == number
            seen = observe(fleet.family, fleet.platform)
            with_cost_estimates(plan(seen, POLICY), seen, fleet.platform)
            (found,) = (one for one in seen.adapters if one.name == adapter)
            assert len(found.versions) == 2
            report(fleet.family, fleet.platform).markdown()
        assert self.other.serving == 1
        return observe("spoilt", self.spoilt.platform)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return Two(tmp_path_factory.mktemp("registry"))


ADAPTER_TAGS = (
    *("adapter", "family", "base_version", "base_fingerprint", "trained_on_version"),
    *("trained_on_fingerprint", "weights_sha256", "method", "suites", "transferred_from"),
    *("recipe", "recipe_sha256", "made_by", "verdict", "verdict_key", "superseded", "OUTCOME"),
)
BASE_TAGS = (
    *("family", "version", "fingerprint", "fingerprint_run", "parent", "ready", "served", "uri"),
    *("source", "manifest", "promotion", "superseded", "adapter"),
)
MODEL_TAGS = ("retired", "ALIAS", "OVERRIDE", "manual-override.x", "alias.'", "kind", "family")
odd = settings(max_examples=20, deadline=None)


@pytest.mark.parametrize("tag", ADAPTER_TAGS)
@odd
@given(text=texts, number=st.sampled_from(["1", "2"]))
@example("x", "2")
@example("{}", "1")
@example("99", "2")
def test_any_text_in_a_tag_of_an_adapter_version(two, tag, text, number):
    name = f"outcome.{two.v2.alias}" if tag == "OUTCOME" else tag
    with two.version_tag("bad", number, name, text):
        two.assert_others_continue()


@pytest.mark.parametrize("tag", MODEL_TAGS)
@odd
@given(text=texts)
@example("x")
def test_any_text_in_a_tag_of_an_adapter(two, tag, text):
    name = {"ALIAS": f"alias.{two.v2.alias}", "OVERRIDE": f"manual-override.{two.v2.alias}"}.get(
        tag, tag
    )
    with two.model_tag("bad", name.replace("'", "-"), text):
        two.assert_others_continue()


@pytest.mark.parametrize("tag", BASE_TAGS)
@odd
@given(text=texts)
@example("x")
@example("v1")
@example("f" * 64)
def test_any_text_in_a_tag_of_a_base_version(two, tag, text):
    with two.version_tag("spoilt", "2", tag, text):
        two.assert_others_continue()


THRESHOLD = '[{"name": "exam", "data": {"uri": "x", "sha256": "0"}, "threshold": %s}]'


@pytest.mark.parametrize(
    ("tag", "text", "message"),
    [
        ("made_by", "x", r"bad: the tag trans_peft.made_by of version 2 of bad cannot be read"),
        ("suites", "{", r"bad: the tag trans_peft.suites of version 2 of bad cannot be read"),
        ("suites", "[]", r"bad: the tag trans_peft.suites of version 2 of bad"),
        ("transferred_from", "one", r"bad: the tag trans_peft.transferred_from of version 2"),
        ("base_fingerprint", "on", r"bad: the tag trans_peft.base_fingerprint of version 2"),
        ("family", "other", r"bad: the records of bad in the registry contradict each other"),
        ("adapter", "good", r"bad: the tag trans_peft.adapter of version 2"),
        ("OUTCOME", "{}", r"bad: the tag trans_peft.outcome.on-[0-9a-f]+ of version 2 of bad"),
        ("OUTCOME", "[[" * 5000, r"bad: the tag trans_peft.outcome"),
        ("suites", THRESHOLD % "NaN", r"bad: the tag trans_peft.suites of version 2 of bad"),
        ("suites", THRESHOLD % "Infinity", r"bad: the tag trans_peft.suites of version 2 of bad"),
        ("suites", THRESHOLD % '"nan"', r"bad: the tag trans_peft.suites of version 2 of bad"),
    ],
)
def test_an_unreadable_tag_is_reported_in_the_plan_and_in_the_report(two, tag, text, message):
    name = f"outcome.{two.v2.alias}" if tag == "OUTCOME" else tag
    with two.version_tag("bad", "2", name, text):
        seen = two.assert_others_continue()
        assert [adapter.name for adapter in seen.adapters] == ["good"]
        (line,) = plan(seen, POLICY).unreadable
        assert re.match(message, line)
        page = report("spoilt", two.spoilt.platform).markdown()
        assert "## Unreadable entries" in page
        assert line.split(":")[1].strip()[:40] in page
    assert [adapter.name for adapter in two.assert_others_continue().adapters] == ["bad", "good"]


def test_an_outcome_of_another_adapter_on_the_version_is_set_aside(two):
    name = f"outcome.{two.v2.alias}"
    good = own_tags(two.tracking.version("good", 2).tags)[name]
    with two.version_tag("bad", "2", name, good):
        (line,) = two.assert_others_continue().unreadable
        assert "belongs to another adapter or base" in line


@pytest.mark.parametrize(
    ("tag", "text", "message"),
    [
        ("version", "v1", "its name v1 is also that of version 1"),
        ("version", "a b", "version must be 1 to 100 ASCII letters"),
        ("fingerprint", "x", "the tag trans_peft.fingerprint of version 2 of spoilt"),
    ],
)
def test_an_unreadable_base_version_is_reported(two, tag, text, message):
    with two.version_tag("spoilt", "2", tag, text):
        seen = two.assert_others_continue()
        assert [base.version for base in seen.bases] == ["v1"]
        (line,) = seen.set_aside
        assert line.startswith("version 2 of spoilt")
        assert message in line
        assert message in report("spoilt", two.spoilt.platform).markdown()


@pytest.mark.parametrize("name", ["A's base", 'say "hi"', "`x`", "a/b", "größe 2", "latest"])
@pytest.mark.parametrize(
    "tags", [{"kind": "base"}, {"kind": "adapter", "family": "spoilt"}], ids=["base", "adapter"]
)
def test_a_registered_model_with_an_invalid_name_is_reported_and_ignored(two, name, tags):
    with two.restoring():
        two.tracking.known[name] = Model(name, {tag(key): value for key, value in tags.items()})
        seen = two.assert_others_continue()
        assert [adapter.name for adapter in seen.adapters] == ["bad", "good"]
        catalog, registry = two.spoilt.platform.catalog, two.spoilt.platform.registry
        aside = registry.fleet("spoilt").unreadable
        lines = catalog.set_aside() if tags["kind"] == "base" else aside
        assert len(lines) == 1
        assert lines[0].isascii()


def test_an_adapter_of_an_unknown_family_is_reported(two):
    with two.model_tag("bad", "family", "spolit"):
        seen = two.assert_others_continue()
        assert [adapter.name for adapter in seen.adapters] == ["good"]
        (line,) = two.spoilt.platform.registry.set_aside()
        assert "'bad' claims the family 'spolit', which does not exist" in line


@pytest.mark.parametrize(
    ("name", "text"),
    [
        *[("kind", kind) for kind in ("Adapter", "ADAPTER", "adapter ", "lora", "base", None)],
        *[("family", family) for family in ("spolit", "Spoilt", "other", None)],
    ],
)
@pytest.mark.parametrize("judged", [True, False], ids=["judged", "new"])
def test_an_adapter_with_a_wrong_tag_of_its_model_blocks_the_promotion(two, name, text, judged):
    with two.restoring():
        if not judged:
            two.spoilt.add_base("v3")
        tags = two.tracking.known["bad"].tags
        del tags[tag(name)]
        if text is not None:
            tags[tag(name)] = text
        champion = 2 if judged else 3
        two.spoilt.person.sets_on_a_base("spoilt", "champion", champion)
        two.spoilt.complete_tasks()
        changes = two.spoilt.apply_verdicts(NO_ROLLBACK)
        assert changes.promoted is None
        assert f"the tag trans_peft.{name} must be" in obstacle_text(changes)
        assert any(line.startswith("bad: the tag") for line in changes.unreadable)
        assert two.spoilt.serving == 1
        assert "spoilt" in two.spoilt.platform.catalog.families()
        two.tracking.known["bad"].tags.update({tag("kind"): "adapter", tag("family"): "spoilt"})
        two.spoilt.complete_tasks()
        assert str(two.spoilt.apply_verdicts(ANY_SHARE).promoted) == f"spoilt/v{champion}"


@pytest.mark.parametrize("name", ["kind", "family"])
def test_a_retired_adapter_with_a_wrong_tag_blocks_nothing(two, name):
    with two.model_tag("bad", "retired", "true"), two.model_tag("bad", name, "x"):
        two.spoilt.person.sets_on_a_base("spoilt", "champion", 2)
        assert str(two.spoilt.apply_verdicts(ANY_SHARE).promoted) == "spoilt/v2"


def test_a_version_with_the_tag_of_another_family_blocks_its_own_family_alone(two):
    with two.version_tag("bad", "2", "family", "other"):
        for fleet in (two.spoilt, two.other):
            fleet.person.sets_on_a_base(fleet.family, "champion", 2)
        assert str(two.other.apply_verdicts(NO_ROLLBACK).promoted) == "other/v2"
        assert "bad" in obstacle_text(two.spoilt.apply_verdicts(NO_ROLLBACK))
        two.other.platform.catalog.set_serving(two.other.platform.catalog.versions("other")[0])


def test_a_copy_of_an_adapter_elsewhere_blocks_nothing(two):
    with two.restoring():
        tags = own_tags(two.tracking.version("good", 1).tags)
        two.tracking.known["prod"] = Model("prod", {})
        two.tracking.make_version("prod", "models:/good/1", tags)
        two.spoilt.person.sets_on_a_base("spoilt", "champion", 2)
        assert str(two.spoilt.apply_verdicts(ANY_SHARE).promoted) == "spoilt/v2"


@pytest.mark.parametrize("kind", ["Base", "bsae", "adapter", None])
def test_a_base_family_with_a_wrong_kind_is_reported(two, kind):
    with two.restoring():
        tags = two.tracking.known["spoilt"].tags
        del tags[tag("kind")]
        if kind is not None:
            tags[tag("kind")] = kind
        catalog = two.spoilt.platform.catalog
        assert catalog.families() == ("other",)
        (line,) = catalog.set_aside()
        assert line.startswith("the base family 'spoilt': the tag trans_peft.kind must be base")


def test_a_model_of_unknown_kind_is_reported_and_a_foreign_one_is_not(two):
    with two.restoring():
        two.tracking.known["theirs"] = Model("theirs", {"team": "x"})
        two.tracking.known["slip"] = Model("slip", {tag("kind"): "Base"})
        (line,) = two.spoilt.platform.catalog.set_aside()
        assert "'slip'" in line and "found 'Base'" in line
        assert two.spoilt.platform.registry.set_aside() == ()


def test_a_name_that_differs_by_case_alone_is_not_registered(two):
    with pytest.raises(InvalidSpecError, match="upper and lower case alone"):
        two.spoilt.add_adapter("BAD", two.v1)
    with pytest.raises(InvalidSpecError, match="upper and lower case alone"):
        two.spoilt.add_base("V1")
    assert two.spoilt.platform.registry.adapters("spoilt") == ("bad", "good")


@pytest.mark.parametrize("source", ["models:/gone/1", "models:/m-0", "dbfs:/x", "x", "", None])
def test_a_version_with_an_invalid_source_does_not_affect_others(two, source):
    with two.restoring():
        two.tracking.make_version("spoilt", source, {})
        two.assert_others_continue()


@pytest.mark.parametrize("alias", ["champion", "serving"])
def test_aliases_of_a_deleted_version_affect_no_other_adapter(two, alias):
    with two.restoring():
        two.tracking.known["spoilt"].aliases[alias] = "99"
        two.tracking.known["bad"].aliases[two.v2.alias] = "99"
        apply_verdicts(
            observe("spoilt", two.spoilt.platform), POLICY, ANY_SHARE, two.spoilt.platform
        )
        two.assert_others_continue()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"suite": "x"}', "null", "[[" * 5000, "OTHER"])
def test_an_unreadable_evaluation_is_stored_again(two, text):
    def new_process():
        store = MlflowEvaluations("fake://")
        store._tracking = two.tracking
        return store

    store = new_process()
    version = two.spoilt.platform.registry.versions("good")[0]
    (suite,) = version.suites
    one = replace(
        evaluation(version.weights_sha256),
        suite=suite.name,
        base_fingerprint_sha256=version.base.fingerprint_sha256,
        suite_sha256=suite.suite_sha256,
        decoding_sha256=suite.decoding_sha256,
    )
    store.put(one)
    assert store.get(one.key) == one
    run_id = two.tracking.oldest_run("evaluations", {"evaluation_key": one.key})
    kept = two.tracking.read_text(run_id, "evaluation.json")
    other = kept.replace(version.weights_sha256, "0" * 64)
    two.tracking.write_text(run_id, "evaluation.json", other if text == "OTHER" else text)
    assert store.get(one.key) == one  # in the memory of the process that read it
    store = new_process()
    assert store.get(one.key) is None
    platform = two.spoilt.platform
    two.spoilt.platform = replace(platform, evaluations=store)
    try:
        two.assert_others_continue()
        store.put(one)
        assert store.get(one.key) == one
    finally:
        two.spoilt.platform = platform
        two.tracking.write_text(run_id, "evaluation.json", kept)
        for other in two.tracking.finished_runs("evaluations", {"evaluation_key": one.key})[1:]:
            del two.tracking._runs[other.id]


class NoAnswer:
    """A store of evaluations whose experiment was deleted."""

    def __init__(self):
        self.calls = 0

    def summary(self, key):
        self.calls += 1
        raise StoreError("the experiment 'trans-peft/evaluations' cannot be used", found="deleted")


def test_a_store_of_evaluations_without_an_answer_stops_no_planning(two):
    with two.restoring():
        two.spoilt.add_base("v3")
        platform = replace(two.spoilt.platform, evaluations=NoAnswer())
        seen = observe("spoilt", platform)
        found = with_cost_estimates(plan(seen, POLICY), seen, platform)
        assert {task.adapter for task in found.tasks} == {"bad", "good"}
        assert {task.estimated_seconds for task in found.tasks} == {None}
        assert platform.evaluations.calls == 1
        page = report("spoilt", platform).markdown()
        assert page.count("the scores of stored evaluations are missing") == 1
        assert platform.evaluations.calls == 2


RECIPE = {
    "adapter": "bad",
    "family": "spoilt",
    "data": {"uri": "x"},
    "suites": [{"name": "exam", "data": {"uri": "x"}}],
}


@pytest.mark.parametrize(
    "odd", [{"optimizer": {"learning_rate": "ODD"}}, {"spec": {"options": {"r": "ODD"}}}]
)
@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize("version", ["1", "2"])
def test_a_recipe_with_a_number_that_is_not_finite_sets_its_adapter_aside(
    two, odd, number, version
):
    text = json.dumps(RECIPE | odd).replace('"ODD"', number)
    with two.version_tag("bad", version, "recipe", text):
        seen = two.assert_others_continue()
        assert [adapter.name for adapter in seen.adapters] == ["good"]
        (line,) = seen.unreadable
        assert line.startswith("bad: ")


@pytest.mark.parametrize("number", ["NaN", "Infinity"])
def test_an_outcome_with_such_a_recipe_sets_its_adapter_aside(two, number):
    name = f"outcome.{two.v2.alias}"
    kept = json.loads(own_tags(two.tracking.version("bad", 2).tags)[name])
    kept["outcome"]["training"] = RECIPE | {"spec": {"options": {"r": float(number)}}}
    with two.version_tag("bad", "2", name, json.dumps(kept)):
        seen = two.assert_others_continue()
        assert [adapter.name for adapter in seen.adapters] == ["good"]
        assert seen.unreadable[0].startswith("bad: ")


@pytest.mark.parametrize(
    "uri", ["file:///a%00b", "/a\x00b", "/a\ud800b", "{loop}", "s3://", "x://y"]
)
def test_a_version_with_an_invalid_uri_does_not_affect_uploads(two, tmp_path, uri):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    uri = uri.replace("{loop}", str(tmp_path / "loop"))
    platform = replace(two.spoilt.platform, store=SchemeStore())
    upload = tmp_path / "bases" / "smol" / "v1"
    upload.mkdir(parents=True)
    (upload / "trans_peft_manifest.json").write_text("{}")
    with two.restoring():
        own = {tag("family"): "spoilt", tag("uri"): uri}
        number = two.tracking.make_version("spoilt", "s3://bases/spoilt/v9", own_tags(own))
        found = pending(platform, root_uri=str(tmp_path / "bases"))
        assert [item.uri for item in found] == [str(upload), uri]
        assert found[1].registered.number == number
        for item in found:
            with pytest.raises(TransPeftError):
                ingest(item, platform)
