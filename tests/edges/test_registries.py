"""One contract for every adapter registry: in memory and in MLflow."""

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.edges.examples import draft, evaluation, outcome, peft_folder, transferred
from tests.edges.one_by_one import one_by_one
from trans_peft import connect
from trans_peft.domain.adapter import AdapterVersion, AliasState, ManualOverride
from trans_peft.domain.evaluation import Verdict, verdict_key
from trans_peft.domain.fleet import FamilyAdapters
from trans_peft.edges.memory import MemoryRegistry
from trans_peft.edges.mlflow_client import logged_model_id
from trans_peft.edges.mlflow_model import MODEL_FILES
from trans_peft.edges.mlflow_search import entry_of
from trans_peft.errors import IntegrityError, InvalidSpecError, NotFoundError
from trans_peft.lifecycle.preflight import check_registration
from trans_peft.ports import AdapterRegistry


@dataclass
class Place:
    """A registry, an adapter name that is free in it, and what a person can do there."""

    registry: AdapterRegistry
    adapter: str
    person: Any
    folder: Path

    @property
    def family(self) -> str:
        return f"{self.adapter}-family"

    def trained(self, name: str = "", seed: int = 0) -> AdapterVersion:
        folder = self.peft_folder(seed)
        return self.registry.register(draft(name or self.adapter, self.family, folder), folder)

    def peft_folder(self, seed: int = 0) -> Path:
        folder = self.folder / str(seed)
        return folder if folder.exists() else peft_folder(folder, seed)


class MlflowPerson:
    """What a person does in MLflow's pages."""

    def __init__(self) -> None:
        from mlflow import MlflowClient

        self.client = MlflowClient()

    def retire_manually(self, adapter: str) -> None:
        self.client.set_registered_model_tag(adapter, "trans_peft.retired", "true")

    def set_owner_manually(self, adapter: str, owner: str) -> None:
        self.client.set_registered_model_tag(adapter, "owner", owner)

    def set_alias_manually(self, adapter: str, alias: str, number: int | None) -> None:
        if number is None:
            self.client.delete_registered_model_alias(adapter, alias)
        else:
            self.client.set_registered_model_alias(adapter, alias, str(number))


def place_in_mlflow(servers: Any, unique: str, folder: Path) -> Place:
    from trans_peft.edges.mlflow_registry import MlflowRegistry

    return Place(MlflowRegistry(servers.mlflow_url), unique, MlflowPerson(), folder)


@pytest.fixture(params=["memory", pytest.param("mlflow", marks=pytest.mark.servers)])
def place(request: pytest.FixtureRequest, unique: str, tmp_path: Path) -> Iterator[Place]:
    if request.param == "memory":
        registry = MemoryRegistry()
        yield Place(registry, unique, registry, tmp_path)
    else:
        yield place_in_mlflow(request.getfixturevalue("servers"), unique, tmp_path)


class TestEveryRegistry:
    def test_an_unknown_adapter_is_not_found(self, place):
        assert place.registry.adapters(place.family) == ()
        for ask in (place.registry.versions, place.registry.outcomes):
            with pytest.raises(NotFoundError):
                ask(place.adapter)
        with pytest.raises(NotFoundError):
            place.registry.alias(place.adapter, "on-1")

    def test_a_name_is_found_in_either_case(self, place):
        assert place.registry.registered_name(place.adapter) is None
        place.trained()
        for name in (place.adapter, place.adapter.upper()):
            assert place.registry.registered_name(name) == place.adapter
        assert place.registry.registered_name(f"{place.adapter}-2") is None
        place.person.retire_manually(place.adapter)
        assert place.registry.registered_name(place.adapter) == place.adapter

    def test_a_version_comes_back_as_it_went_in(self, place):
        version = place.trained()
        asked = draft(place.adapter, place.family, place.peft_folder())
        assert version == replace(asked, number=1)
        assert place.registry.versions(place.adapter) == (version,)
        assert place.registry.adapters(place.family) == (place.adapter,)

    def test_one_read_returns_what_the_single_methods_return(self, place):
        registry, version = place.registry, place.trained()
        registry.set_alias(place.adapter, version.base.alias, version.number)
        registry.record(outcome(version))
        found = registry.adapter(place.adapter)
        assert (found.name, found.family, found.is_live) == (place.adapter, place.family, True)
        assert found.versions == registry.versions(place.adapter)
        assert found.outcomes == registry.outcomes(place.adapter) != ()
        assert found.aliases == registry.aliases(place.adapter) != {}
        assert found.owner == ""
        place.person.set_owner_manually(place.adapter, "search team")
        place.person.retire_manually(place.adapter)
        changed = replace(found, owner="search team", is_live=False)
        assert registry.adapter(place.adapter) == changed
        with pytest.raises(NotFoundError):
            registry.adapter("unknown-adapter")

    def test_a_fleet_is_read_as_its_adapters_are_one_by_one(self, place):
        registry = place.registry
        names = [f"{place.adapter}-{i}" for i in range(5)]
        firsts = [place.trained(name) for name in names]
        registry.register(transferred(firsts[1]), place.peft_folder())
        registry.record(outcome(firsts[1], new_number=2))
        registry.set_alias(names[1], "on-222222222222", 2)
        registry.record(outcome(firsts[2], Verdict.FAILED))
        registry.register(draft(names[3], place.family, place.peft_folder(1)), place.peft_folder(1))
        place.person.set_alias_manually(names[3], "on-222222222222", 2)
        place.person.retire_manually(names[4])
        found = registry.fleet(place.family)
        assert (found.live, found.unreadable) == one_by_one(registry, place.family)
        assert [adapter.name for adapter in found.live] == names[:4]
        assert found.unreadable == ()
        assert registry.fleet("no-such-family") == FamilyAdapters(())

    def test_a_name_that_breaks_the_rule_is_refused_before_anything_is_written(self, place):
        place.trained()
        folder = place.peft_folder()
        for name in ("a b", "A's", "latest", place.adapter.upper()):
            with pytest.raises(InvalidSpecError):
                place.registry.register(draft(name, place.family, folder), folder)
        assert place.registry.adapters(place.family) == (place.adapter,)
        assert place.registry.fleet(place.family).unreadable == ()
        assert place.registry.family(place.adapter) == place.family
        with pytest.raises(NotFoundError):
            place.registry.family("nobody-there")

    def test_a_transferred_version_is_a_second_one(self, place):
        first = place.trained()
        second = place.registry.register(transferred(first), place.peft_folder())
        assert (second.number, second.transferred_from, second.is_trained) == (2, 1, False)
        assert place.registry.versions(place.adapter) == (first, second)

    def test_the_same_bytes_on_the_same_base_are_one_version(self, place):
        first = place.trained()
        assert place.trained() == first
        assert len(place.registry.versions(place.adapter)) == 1

    def test_other_bytes_on_the_same_base_are_another_version(self, place):
        place.trained()
        assert place.trained(seed=1).number == 2

    def test_a_name_belongs_to_one_family(self, place):
        place.trained()
        folder = place.peft_folder(1)
        with pytest.raises(InvalidSpecError, match="another name"):
            place.registry.register(draft(place.adapter, "other-family", folder), folder)
        assert place.registry.adapters("other-family") == ()

    def test_live_adapters_of_a_family_are_listed(self, place):
        names = [f"{place.adapter}-{i}" for i in (2, 0, 1)]
        for name in names:
            place.trained(name)
        place.person.retire_manually(names[0])
        assert place.registry.adapters(place.family) == tuple(sorted(names[1:]))

    def test_the_newest_version_of_a_family_changes_with_each_registration(self, place):
        seen = [place.registry.newest(place.family)]
        for name, seed in (("a", 1), ("b", 1), ("a", 2)):
            time.sleep(0.002)  # MLflow's times have milliseconds
            version = place.trained(f"{place.adapter}-{name}", seed)
            seen.append(place.registry.newest(place.family))
        assert len(set(seen)) == 4
        place.registry.set_alias(version.adapter, version.base.alias, version.number)
        place.person.retire_manually(f"{place.adapter}-b")
        assert place.registry.newest(place.family) == seen[-1]
        assert place.registry.newest("other-family") == place.registry.newest("no-such-family")

    def test_the_folder_comes_back_byte_by_byte(self, place, tmp_path):
        version = place.trained()
        found = place.registry.download(version, str(tmp_path / "downloaded"))
        assert found == tmp_path / "downloaded"
        for original in place.peft_folder().iterdir():
            assert (found / original.name).read_bytes() == original.read_bytes()
        assert len(list(found.iterdir())) == 2

    def test_a_version_is_never_written_between_other_files(self, place, tmp_path):
        version = place.trained()
        (tmp_path / "used").mkdir()
        place.registry.download(version, tmp_path / "used")  # it was empty
        with pytest.raises(InvalidSpecError, match="is not empty"):
            place.registry.download(version, tmp_path / "used")

    def test_a_missing_version_cannot_be_downloaded(self, place, tmp_path):
        with pytest.raises(NotFoundError):
            place.registry.download(replace(place.trained(), number=7), tmp_path / "downloaded")

    def test_an_outcome_marks_the_version_it_made(self, place):
        first = place.trained()
        second = place.registry.register(transferred(first), place.peft_folder())
        passed = outcome(first, new_number=2)
        place.registry.record(passed)
        state = place.registry.versions(place.adapter)[1].state
        key = verdict_key((evaluation(first.weights_sha256).key,), passed.policy_sha256)
        assert (state.verdict, state.verdict_key) == ("passed", key)
        assert place.registry.versions(place.adapter)[0] == first
        assert place.registry.outcomes(place.adapter) == (replace(passed, evaluations=()),)
        assert second.state.verdict is None

    def test_an_outcome_without_a_version_leaves_its_source_alone(self, place):
        first = place.trained()
        refused = outcome(first, Verdict.INCOMPATIBLE)
        place.registry.record(refused)
        assert place.registry.versions(place.adapter) == (first,)
        assert place.registry.outcomes(place.adapter) == (replace(refused, evaluations=()),)

    def test_the_newest_outcome_per_base_counts(self, place):
        first = place.trained()
        place.registry.register(transferred(first), place.peft_folder())
        for verdict, number, base in (
            (Verdict.FAILED, None, "2"),
            (Verdict.INCONCLUSIVE, 2, "2"),
            (Verdict.INCOMPATIBLE, None, "0"),
            (Verdict.PASSED, 2, "2"),
        ):
            place.registry.record(outcome(first, verdict, new_number=number, base=base * 64))
        found = [(o.base.fingerprint_sha256[0], o.verdict.value)
                 for o in place.registry.outcomes(place.adapter)]  # fmt: skip
        assert found == [("0", "incompatible"), ("2", "passed")]

    def test_attempts_that_fail_are_counted_per_policy(self, place):
        first = place.trained()
        counted = []
        for verdict, policy in (
            (Verdict.FAILED, "6"), (Verdict.FAILED, "6"), (Verdict.FAILED, "6"),
            (Verdict.FAILED, "7"), (Verdict.INCOMPATIBLE, "7"), (Verdict.FAILED, "7"),
        ):  # fmt: skip
            place.registry.record(outcome(first, verdict, policy=policy * 64))
            counted.append(place.registry.outcomes(place.adapter)[0].attempts)
        assert counted == [1, 2, 3, 1, 1, 1]

    def test_no_outcome_is_kept_for_a_version_that_is_not_there(self, place):
        first = place.trained()
        with pytest.raises(NotFoundError, match="version 7"):
            place.registry.record(outcome(first, new_number=7))
        assert place.registry.outcomes(place.adapter) == ()

    def test_an_alias_is_moved_and_removed(self, place):
        first, alias = place.trained(), "on-222222222222"
        place.registry.register(transferred(first), place.peft_folder())
        assert place.registry.alias(place.adapter, alias) is None
        for number in (1, 2, None, None, 1):
            place.registry.set_alias(place.adapter, alias, number)
            assert place.registry.alias(place.adapter, alias) == number
            assert place.registry.owns_alias(place.adapter, alias)
        with pytest.raises(NotFoundError):
            place.registry.set_alias(place.adapter, alias, 7)
        assert place.registry.alias(place.adapter, alias) == 1
        assert place.registry.owns_alias(place.adapter, alias)

    @pytest.mark.parametrize(
        ("ours", "theirs"),
        [(1, 2), (1, None), (None, 1)],
        ids=["moved", "taken-away", "set"],
    )
    def test_a_manual_change_of_an_alias_is_detected(self, place, ours, theirs):
        first, alias = place.trained(), "on-222222222222"
        place.registry.register(transferred(first), place.peft_folder())
        assert place.registry.owns_alias(place.adapter, alias)
        if ours is not None:
            place.registry.set_alias(place.adapter, alias, ours)
        place.person.set_alias_manually(place.adapter, alias, theirs)
        assert not place.registry.owns_alias(place.adapter, alias)
        assert place.registry.alias(place.adapter, alias) == theirs

    @pytest.mark.parametrize(
        ("ours", "theirs"),
        [(1, 2), (1, None), (None, 1)],
        ids=["moved", "taken-away", "set"],
    )
    def test_a_manual_override_is_never_overwritten(self, place, ours, theirs):
        first, alias = place.trained(), "on-222222222222"
        place.registry.register(transferred(first), place.peft_folder())
        if ours is not None:
            assert place.registry.set_alias(place.adapter, alias, ours)
        place.person.set_alias_manually(place.adapter, alias, theirs)
        for number in (1, 2, None):
            if number != theirs:
                assert not place.registry.set_alias(place.adapter, alias, number)
            assert place.registry.alias(place.adapter, alias) == theirs

    def test_restoring_an_alias_ends_the_manual_override(self, place):
        first, alias = place.trained(), "on-222222222222"
        place.registry.register(transferred(first), place.peft_folder())
        place.registry.set_alias(place.adapter, alias, 2)
        for number in (None, 2):
            place.person.set_alias_manually(place.adapter, alias, number)
        assert place.registry.set_alias(place.adapter, alias, None)
        assert place.registry.alias(place.adapter, alias) is None

    def test_a_manual_override_is_recorded_and_removed(self, place):
        place.trained()
        alias, override = (
            "on-222222222222",
            ManualOverride(None, 2, "passed", "2026-11-24T00:00:00+00:00"),
        )
        for record in (override, replace(override, number=1), None, None):
            place.registry.record_manual_override(place.adapter, alias, record)
            state = place.registry.aliases(place.adapter).get(alias, AliasState())
            assert state == AliasState(recorded=record)

    def test_parallel_registrations_return_the_same_live_version(self, place):
        first, folder = place.trained(), place.peft_folder()
        with ThreadPoolExecutor(3) as pool:
            found = list(
                pool.map(lambda _: place.registry.register(transferred(first), folder), range(3))
            )
        live = [v for v in place.registry.versions(place.adapter) if not v.state.superseded]
        assert live == [first, found[0]]
        assert {version.number for version in found} == {2}


@pytest.mark.servers
class TestMlflow:
    @pytest.fixture
    def place(self, servers, unique, tmp_path):
        return place_in_mlflow(servers, unique, tmp_path)

    def test_a_download_with_mlflow_is_a_plain_peft_folder(self, place, tmp_path):
        import mlflow

        place.trained()
        uri = f"models:/{place.adapter}/1"
        found = Path(mlflow.artifacts.download_artifacts(uri, dst_path=str(tmp_path / "d")))
        files = {p.name for p in found.iterdir()}
        assert files - MODEL_FILES == {"adapter_config.json", "adapter_model.safetensors"}
        assert "MLmodel" in files

    def test_tags_describe_the_version(self, place):
        folder = place.peft_folder()
        place.registry.register(
            draft(place.adapter, place.family, folder), folder, tags={"masking_p": "0.1"}
        )
        tags = place.person.client.get_model_version(place.adapter, "1").tags
        assert tags["trans_peft.masking_p"] == "0.1"
        assert tags["trans_peft.base_version"] == "v1"
        assert tags["trans_peft.method"] == "LORA"
        assert "trans_peft.transferred_from" not in tags

    def test_a_tag_of_the_registrys_own_name_is_refused(self, place):
        folder = place.peft_folder()
        with pytest.raises(InvalidSpecError, match="family"):
            place.registry.register(
                draft(place.adapter, place.family, folder), folder, tags={"family": "x"}
            )
        assert place.registry.adapters(place.family) == ()

    def test_a_name_may_contain_a_dot(self, place):
        assert place.trained(f"{place.adapter}-2.5").number == 1

    def test_racing_registrations_keep_one_version(self, place, monkeypatch):
        from trans_peft.edges.mlflow_registry import MlflowRegistry

        first, folder = place.trained(), place.peft_folder()
        both_looked, looks, same = threading.Barrier(2), threading.local(), MlflowRegistry._same

        def look(self, asked):
            found = same(self, asked)
            if not getattr(looks, "done", False):
                looks.done = True
                both_looked.wait(timeout=60)
            return found

        monkeypatch.setattr(MlflowRegistry, "_same", look)
        with ThreadPoolExecutor(2) as pool:
            both = [pool.submit(place.registry.register, transferred(first), folder)
                    for _ in range(2)]  # fmt: skip
        assert [found.result().number for found in both] == [2, 2]
        states = [v.state.superseded for v in place.registry.versions(place.adapter)]
        assert states == [False, False, True]

    def test_a_run_that_trained_it_is_linked(self, place, servers):
        from trans_peft.edges.mlflow_runs import MlflowRunLog

        folder = place.peft_folder()
        with MlflowRunLog(servers.mlflow_url).run("train", tags={}) as run:
            asked = replace(draft(place.adapter, place.family, folder), run_id=run.id)
            assert place.registry.register(asked, folder).run_id == run.id

    @pytest.mark.parametrize("trained", [True, False])
    def test_scores_belong_to_the_model_and_to_the_data_of_the_suite(self, place, servers, trained):
        from trans_peft.edges.mlflow_runs import MlflowRunLog

        folder, client = place.peft_folder(), place.person.client
        asked = draft(place.adapter, place.family, folder)
        with MlflowRunLog(servers.mlflow_url).run("train", tags={}) as run:
            asked = replace(asked, run_id=run.id if trained else None)
            place.registry.register(asked, folder, scores={"exceptions": 62.5})
        model = client.get_logged_model(
            logged_model_id(client.get_model_version(place.adapter, "1"))
        )
        (metric,) = model.metrics
        assert (metric.key, metric.value) == ("exceptions/score", 62.5)
        assert (metric.dataset_name, metric.dataset_digest) == ("exceptions", "ab" * 18)
        assert trained == (metric.run_id == run.id)

    def test_the_run_of_an_outcome_lists_the_flipped_items(self, place):
        source = place.trained()
        made = place.registry.register(transferred(source), place.peft_folder())
        old, new = (
            replace(
                evaluation(source.weights_sha256, right),
                suite="exceptions",
                base_fingerprint_sha256=base.fingerprint_sha256,
            )
            for base, right in ((source.base, 3), (made.base, 1))
        )
        judged = replace(outcome(source, new_number=made.number), evaluations=(old, new))
        place.registry.record(judged)
        client = place.person.client
        model = client.get_logged_model(
            logged_model_id(client.get_model_version(place.adapter, str(made.number)))
        )
        figures = {metric.key: metric.value for metric in model.metrics}
        assert figures["exceptions/score"] == 79.0
        run_id = model.metrics[0].run_id
        table = client.load_table(
            client.get_run(run_id).info.experiment_id, "flipped-items.json", [run_id]
        )
        assert table[["suite", "item", "change"]].values.tolist() == [
            ["exceptions", "item-1", "lost"],
            ["exceptions", "item-2", "lost"],
        ]
        (used,) = client.get_run(run_id).inputs.dataset_inputs
        assert used.dataset.name == "exceptions"

    def test_a_late_registration_of_a_lost_shard_is_superseded(self, place):
        first = place.trained()
        second = place.registry.register(transferred(first), place.peft_folder())
        found = place.person.client.get_model_version(place.adapter, "2")
        place.person.client.create_model_version(
            place.adapter,
            found.source,
            tags=found.tags,
            model_id=found.source.removeprefix("models:/"),
        )
        again = place.registry.register(transferred(first), place.peft_folder())
        assert again == second
        states = [v.state.superseded for v in place.registry.versions(place.adapter)]
        assert states == [False, False, True]

    def test_a_crash_between_two_writes_is_not_a_manual_override(self, place, monkeypatch):
        place.trained()
        alias = "on-222222222222"

        def killed(*arguments):
            raise KeyboardInterrupt

        from mlflow import MlflowClient

        for method, stands in (("set_registered_model_alias", None),
                               ("set_registered_model_tag", 1)):  # fmt: skip
            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                if stands is None:
                    patch.setattr(MlflowClient, method, killed)
                else:
                    patch.setattr(
                        place.registry, "_record_alias", _only_once(place.registry._record_alias)
                    )
                place.registry.set_alias(place.adapter, alias, 1)
            assert place.registry.alias(place.adapter, alias) == stands
            assert place.registry.owns_alias(place.adapter, alias)

    def test_replaced_weights_are_an_integrity_error(self, place, tmp_path):
        version = place.trained()
        with pytest.raises(IntegrityError, match="differ from the registered ones"):
            place.registry.download(replace(version, weights_sha256="0" * 64), tmp_path / "d")
        assert not list((tmp_path / "d").iterdir())  # where no server would load them

    def test_a_promoted_copy_is_not_an_adapter(self, place):
        place.trained()
        name = f"{place.adapter}-production"
        place.person.client.copy_model_version(f"models:/{place.adapter}/1", name)
        with pytest.raises(NotFoundError, match="is not an adapter"):
            place.registry.versions(name)

    def test_a_copy_within_the_adapter_is_not_a_version(self, place):
        version = place.trained()
        client = place.person.client
        client.copy_model_version(f"models:/{place.adapter}/1", place.adapter)
        assert len(client.search_model_versions(f"name='{place.adapter}'")) == 2
        assert place.registry.versions(place.adapter) == (version,)
        assert place.trained() == version

    def test_a_copy_in_another_adapter_is_not_a_version(self, place):
        place.trained()
        other = place.trained(f"{place.adapter}-other", seed=1)
        place.person.client.copy_model_version(f"models:/{place.adapter}/1", other.adapter)
        assert place.registry.versions(other.adapter) == (other,)

    def test_an_interrupted_write_is_detected_and_completed(self, place, monkeypatch):
        """An unfinished record would hide a later manual override."""
        place.trained()
        alias = "on-222222222222"
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(place.registry, "_record_alias", _only_once(place.registry._record_alias))
            place.registry.set_alias(place.adapter, alias, 1)
        assert place.registry.aliases(place.adapter)[alias] == AliasState(1, is_unfinished=True)
        place.registry.set_alias(place.adapter, alias, 1)
        assert place.registry.aliases(place.adapter)[alias] == AliasState(1)
        place.person.set_alias_manually(place.adapter, alias, None)
        assert not place.registry.owns_alias(place.adapter, alias)

    def test_manual_overrides_are_shown_as_tags(self, place):
        place.trained()
        override = ManualOverride(None, 2, "passed", "2026-11-24T00:00:00+00:00")
        place.registry.record_manual_override(place.adapter, "on-222222222222", override)
        tags = place.person.client.get_registered_model(place.adapter).tags
        assert json.loads(tags["trans_peft.manual-override.on-222222222222"]) == {
            "number": None, "wanted": 2, "why": "passed", "by": "unknown",
            "first_seen": "2026-11-24T00:00:00+00:00",
        }  # fmt: skip

    def test_a_verdict_that_was_cut_off_before_its_tag_is_kept_in_one_run(self, place, monkeypatch):
        first = place.trained()
        verdicts = (Verdict.INCOMPATIBLE, Verdict.FAILED)
        for verdict in verdicts:
            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr(place.registry._tracking, "tag_version", _interrupted)
                place.registry.record(outcome(first, verdict))
            place.registry.record(outcome(first, verdict))
        client = place.person.client
        experiment = client.get_experiment_by_name("trans-peft/transfers").experiment_id
        runs = client.search_runs([experiment], f"tags.`trans_peft.adapter` = '{place.adapter}'")
        kept = [run.data.tags["trans_peft.verdict"] for run in runs]
        assert sorted(kept) == ["failed", "failed", "incompatible"]  # each attempt is its own

    def test_a_verdict_replaces_earlier_failures(self, place):
        first = place.trained()
        place.registry.register(transferred(first), place.peft_folder())
        client = place.person.client
        untouched = client.get_model_version(place.adapter, "1").tags
        for _ in range(2):
            place.registry.record(outcome(first, Verdict.FAILED))
        failed = client.get_model_version(place.adapter, "1").tags
        assert failed["trans_peft.verdict.on-222222222222"] == "failed"
        place.registry.record(outcome(first, new_number=2))
        assert client.get_model_version(place.adapter, "1").tags == untouched
        assert client.get_model_version(place.adapter, "2").tags["trans_peft.verdict"] == "passed"

    def test_a_long_outcome_is_cut_in_its_tag_and_complete_in_its_run(self, place):
        first = place.trained()
        long = outcome(first, Verdict.INCOMPATIBLE)
        lines = tuple(f"layer {i}: \u00e4{'x' * 2000}" for i in range(500))
        long = replace(long, compatibility=replace(long.compatibility, mismatches=lines))
        place.registry.record(long)
        (found,) = place.registry.outcomes(place.adapter)
        assert found.compatibility.mismatches[-1] == "and 480 more"
        client = place.person.client
        experiment = client.get_experiment_by_name("trans-peft/transfers").experiment_id
        (run,) = client.search_runs([experiment], f"tags.`trans_peft.adapter` = '{place.adapter}'")
        assert run.data.metrics["exceptions/versus_old_base/lower"] == -4.5
        assert "exceptions/versus_old_base/non_inferior" not in run.data.metrics
        text = Path(client.download_artifacts(run.info.run_id, "outcome.json")).read_text()
        assert text.count("layer ") == 500


def _interrupted(*arguments):
    raise KeyboardInterrupt


def _only_once(remember):
    calls = []

    def limited(*arguments):
        if calls:
            raise KeyboardInterrupt
        calls.append(arguments)
        remember(*arguments)

    return limited


@pytest.mark.servers
def test_invalid_tags_and_names_are_set_aside_with_the_reason(servers, unique, tmp_path):
    place = place_in_mlflow(servers, unique, tmp_path)
    version = place.trained()
    client = place.person.client
    client.create_registered_model(
        f"{unique}'s", tags={"trans_peft.kind": "adapter", "trans_peft.family": place.family}
    )
    client.set_model_version_tag(place.adapter, str(version.number), "trans_peft.made_by", "x")
    assert place.registry.adapters(place.family) == (place.adapter,)
    unreadable, line = place.registry.fleet(place.family).unreadable
    assert unreadable.startswith(f"{place.adapter}: the tag trans_peft.made_by of version 1")
    assert "must be 1 to 100 ASCII letters" in line
    assert any(place.adapter in line for line in place.registry.set_aside())
    with pytest.raises(IntegrityError, match=r"the tag trans_peft\.made_by of version 1"):
        place.registry.versions(place.adapter)
    client.set_model_version_tag(place.adapter, "1", "trans_peft.made_by", version.made_by.value)
    assert place.registry.versions(place.adapter) == (version,)
    client.set_registered_model_tag(place.adapter, "trans_peft.retired", "yes")
    assert place.registry.adapters(place.family) == ()
    lines = place.registry.fleet(place.family).unreadable
    assert any("must be true or false" in line for line in lines)


@pytest.mark.servers
def test_a_check_of_a_name_does_not_read_the_family(servers, unique, tmp_path, monkeypatch):
    place = place_in_mlflow(servers, unique, tmp_path)
    place.trained()
    platform = connect(servers.mlflow_url, work_dir=tmp_path / "work")
    check_registration(place.adapter, place.family, platform)  # finds MLflow's experiment
    sent, send = [], requests.Session.send

    def sending(session: Any, request: Any, **options: Any) -> Any:
        sent.append(request.url)
        response = send(session, request, **options)
        models = response.json().get("registered_models", ())
        assert [model["name"] for model in models] in ([], [place.adapter])
        return response

    monkeypatch.setattr(requests.Session, "send", sending)
    counted = []
    for size in (2, 20):
        with monkeypatch.context() as patch:
            patch.setattr(requests.Session, "send", send)
            for number in range(len(place.registry.adapters(place.family)), size):
                _copy_adapter(place.person.client, place.adapter, f"{unique}-{number}")
        sent.clear()
        check_registration(f"new-{unique}", place.family, platform)
        check_registration(place.adapter, place.family, platform)
        with pytest.raises(InvalidSpecError, match="upper and lower case alone"):
            check_registration(place.adapter.upper(), place.family, platform)
        with pytest.raises(InvalidSpecError, match="belongs to another family"):
            check_registration(place.adapter, "other", platform)
        counted.append(len(sent))
    assert counted[0] == counted[1] > 0


@pytest.mark.servers
def test_the_requests_for_a_fleet_do_not_depend_on_its_size(servers, unique, tmp_path, monkeypatch):
    place = place_in_mlflow(servers, unique, tmp_path)
    first = place.trained()
    place.registry.register(transferred(first), place.peft_folder())
    place.registry.record(outcome(first, new_number=2))
    client, sent = place.person.client, []
    send = requests.Session.send
    counted = []
    for size in (3, 40):
        for number in range(len(place.registry.adapters(place.family)), size):
            _copy_adapter(client, place.adapter, f"{unique}-{number}")
        with monkeypatch.context() as patch:
            patch.setattr(
                requests.Session, "send", lambda *a, **k: sent.append(a[1].url) or send(*a, **k)
            )
            found = place.registry.fleet(place.family)
        assert (len(found.live), found.unreadable) == (size, ())
        counted.append(len(sent))
        sent.clear()
    assert counted == [2, 2]


def _copy_adapter(client: Any, original: str, name: str) -> None:
    """Register the first version of an adapter under another name: its tags alone, no files."""
    client.create_registered_model(name, tags=client.get_registered_model(original).tags)
    found = client.get_model_version(original, "1")
    recipe = found.tags["trans_peft.recipe"].replace(f'"{original}"', f'"{name}"')
    client.create_model_version(
        name,
        found.source,
        tags=found.tags | {"trans_peft.adapter": name, "trans_peft.recipe": recipe},
        model_id=found.source.removeprefix("models:/"),
        await_creation_for=0,
    )


@pytest.mark.servers
def test_the_searches_return_what_the_client_of_mlflow_returns(servers, unique, tmp_path):
    place = place_in_mlflow(servers, unique, tmp_path)
    place.trained()
    place.registry.register(transferred(place.trained()), place.peft_folder())
    place.person.set_alias_manually(place.adapter, "on-222222222222", 2)
    place.person.client.create_registered_model(f"{unique}-empty")
    place.person.client.set_registered_model_tag(place.adapter, "trans_peft.retired", "")
    client, tracking = place.person.client, place.registry._tracking
    for name in (place.adapter, f"{unique}-empty"):
        (found,) = tracking._search("registered-models", f"name = '{name}'", ["name ASC"])
        assert found == entry_of(client.get_registered_model(name)) == tracking.found_model(name)
    entities = client.search_model_versions(
        f"name = '{place.adapter}'", order_by=["version_number"]
    )
    assert tracking.versions_of([place.adapter]) == [*map(entry_of, entities)]
    assert len(entities) == 2


@pytest.mark.servers
def test_odd_entries_of_a_fleet_are_read_as_they_are_one_by_one(servers, unique, tmp_path):
    place = place_in_mlflow(servers, unique, tmp_path)
    client, names = place.person.client, [f"{unique}-{i}" for i in range(6)]
    for name in names:
        place.registry.register(transferred(place.trained(name)), place.peft_folder())
    untagged, moved, pruned, damaged, copied, lost = names
    client.delete_model_version_tag(untagged, "1", "trans_peft.family")
    client.set_model_version_tag(moved, "2", "trans_peft.family", "another-family")
    client.delete_model_version(pruned, "2")
    client.set_model_version_tag(damaged, "1", "trans_peft.suites", "[")
    client.copy_model_version(f"models:/{damaged}/2", copied)
    client.delete_registered_model_tag(lost, "trans_peft.family")
    client.create_registered_model(
        f"{unique}-empty",
        tags={"trans_peft.kind": "adapter", "trans_peft.family": place.family},
    )
    found = place.registry.fleet(place.family)
    live, unreadable = one_by_one(place.registry, place.family)
    (aside,) = found.unreadable[len(unreadable) :]
    assert (found.live, found.unreadable) == (live, (*unreadable, aside))
    assert [line.split(":")[0] for line in unreadable] == [untagged, moved, damaged]
    assert aside.startswith(f"{lost}: the tag trans_peft.family must be {place.family}")
    assert [(one.name, len(one.versions)) for one in found.live] == [
        (pruned, 1), (copied, 2), (f"{unique}-empty", 0),
    ]  # fmt: skip


@pytest.mark.servers
def test_mlflow_does_not_show_which_tags_and_aliases_changed(servers, unique, tmp_path):
    """Otherwise, a later look could read only what changed (decision 0145)."""
    place = place_in_mlflow(servers, unique, tmp_path)
    place.trained()
    client = place.person.client

    def times():
        return (
            client.get_registered_model(place.adapter).last_updated_timestamp,
            client.get_model_version(place.adapter, "1").last_updated_timestamp,
        )

    before = times()
    client.set_registered_model_tag(place.adapter, "a", "b")
    client.set_model_version_tag(place.adapter, "1", "a", "b")
    client.set_registered_model_alias(place.adapter, "a", "1")
    assert times() == before
    (found,) = client.search_model_versions(f"name = '{place.adapter}'")
    assert found.aliases == []


@pytest.mark.slow
@pytest.mark.servers
def test_a_database_without_a_server_is_read_alike(unique, tmp_path, monkeypatch):
    from trans_peft.edges.mlflow_registry import MlflowRegistry

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    registry = MlflowRegistry(f"sqlite:///{tmp_path}/mlflow.db")
    place = Place(registry, unique, None, tmp_path)
    version = place.trained()
    assert registry.fleet(place.family).live == (registry.adapter(place.adapter),)
    assert registry.versions(place.adapter) == (version,)
