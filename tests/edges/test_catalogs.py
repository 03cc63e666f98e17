"""One contract for every base catalog: in memory and in MLflow."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import pytest

from tests.edges.examples import fingerprint
from trans_peft.domain.base import BaseVersion
from trans_peft.edges.memory import MemoryCatalog
from trans_peft.errors import InvalidSpecError, NotFoundError, StoreError, UploadError
from trans_peft.ports import BaseCatalog


@dataclass
class Place:
    """A catalog, a family name that is free in it, and what a person can do there."""

    catalog: BaseCatalog
    family: str
    person: Any

    def publish(self, version: str, seed: int = 0, **changes: Any) -> BaseVersion:
        found = changes.pop("fingerprint", None) or fingerprint(seed)
        source = changes.pop("source", "upload")
        uri = f"s3://bases/{self.family}/{version}"
        draft = BaseVersion(self.family, version, uri, **{"number": 0} | changes)
        return self.catalog.make_ready(draft, fingerprint=found, source=source)


class MlflowPerson:
    """What a person does in MLflow's pages."""

    def __init__(self) -> None:
        from mlflow import MlflowClient

        self.client = MlflowClient()

    def register_manually(self, family: str, uri: str) -> int:
        from mlflow.exceptions import MlflowException

        with suppress(MlflowException):
            self.client.create_registered_model(family, tags={"trans_peft.kind": "base"})
        return int(self.client.create_model_version(family, uri).version)

    def set_alias_manually(self, family: str, alias: str, number: int | None) -> None:
        if number is None:
            self.client.delete_registered_model_alias(family, alias)
        else:
            self.client.set_registered_model_alias(family, alias, str(number))


@pytest.fixture(params=["memory", pytest.param("mlflow", marks=pytest.mark.servers)])
def place(request: pytest.FixtureRequest, unique: str) -> Iterator[Place]:
    if request.param == "memory":
        catalog = MemoryCatalog()
        yield Place(catalog, unique, catalog)
    else:
        servers = request.getfixturevalue("servers")
        from trans_peft.edges.mlflow_catalog import MlflowCatalog

        yield Place(MlflowCatalog(servers.mlflow_url), unique, MlflowPerson())


class TestEveryCatalog:
    def test_an_unknown_family_is_not_found(self, place):
        assert place.family not in place.catalog.families()
        with pytest.raises(NotFoundError):
            place.catalog.versions(place.family)
        with pytest.raises(NotFoundError):
            place.catalog.alias(place.family, "serving")

    def test_a_published_version_is_ready_and_keeps_its_fields(self, place):
        drift = "from v0, estimated: FFN 25.00%"
        base = place.publish("v1", parent="v0", manifest_sha256="a" * 64, drift=drift)
        assert base == BaseVersion(
            family=place.family,
            version="v1",
            uri=f"s3://bases/{place.family}/v1",
            number=1,
            fingerprint_sha256=fingerprint().digest,
            parent="v0",
            ready=True,
            manifest_sha256="a" * 64,
            drift=drift,
        )
        assert place.catalog.versions(place.family) == (base,)
        assert place.family in place.catalog.families()

    def test_a_name_that_breaks_the_rule_is_refused_before_anything_is_written(self, place):
        place.publish("v1")
        before = place.catalog.families(), place.catalog.set_aside()
        for version, changes in (
            ("a b", {}),
            ("latest", {}),
            ("v2", {"parent": "a/b"}),
            ("V1", {}),
        ):
            with pytest.raises(InvalidSpecError):
                place.publish(version, 1, **changes)
        for family in ("A's base", "größe", "a/b", place.family.upper()):
            with pytest.raises(InvalidSpecError):
                replace(place, family=family).publish("v1")
            with pytest.raises((InvalidSpecError, NotFoundError)):
                place.catalog.versions(family)
        assert (place.catalog.families(), place.catalog.set_aside()) == before
        assert len(place.catalog.versions(place.family)) == 1

    def test_a_family_with_an_invalid_name_is_set_aside(self, place):
        place.publish("v1")
        odd = f"{place.family}'s base"
        place.person.register_manually(odd, "s3://bases/x/v1")
        assert odd not in place.catalog.families()
        (line,) = (line for line in place.catalog.set_aside() if place.family in line)
        assert "must be 1 to 100 ASCII letters" in line
        assert place.catalog.set_aside(place.family) == ()
        assert len(place.catalog.versions(place.family)) == 1

    def test_the_fingerprint_is_returned_with_its_sketches(self, place):
        base = place.publish("v1", seed=1)
        found = place.catalog.fingerprint(base)
        assert found == fingerprint(1)
        assert [t.sketch for t in found.tensors.values()] == [(0.5, -1e-7, 3.25)]

    def test_versions_come_oldest_first(self, place):
        for seed, version in enumerate(("v2", "v1", "v10")):
            place.publish(version, seed)
        assert [b.version for b in place.catalog.versions(place.family)] == ["v2", "v1", "v10"]
        assert [b.number for b in place.catalog.versions(place.family)] == [1, 2, 3]

    def test_the_same_upload_twice_is_one_version(self, place):
        assert place.publish("v1") == place.publish("v1")
        assert len(place.catalog.versions(place.family)) == 1

    def test_a_version_never_changes_its_content(self, place):
        base = place.publish("v1", seed=1)
        with pytest.raises(UploadError, match="publish it under a new version"):
            place.publish("v1", seed=2)
        assert place.catalog.versions(place.family) == (base,)

    def test_one_content_may_have_two_names(self, place):
        first, second = place.publish("v1"), place.publish("v1-again")
        assert (first.number, second.number) == (1, 2)
        assert first.alias == second.alias

    def test_a_version_that_a_person_registered_waits_and_is_completed(self, place):
        uri = "s3://elsewhere/base"
        number = place.person.register_manually(place.family, uri)
        waiting = BaseVersion(place.family, "1", uri, number)
        assert place.catalog.versions(place.family) == (waiting,)
        with pytest.raises(NotFoundError, match="never made ready"):
            place.catalog.fingerprint(waiting)
        draft = BaseVersion(place.family, "v1", uri, number)
        ready = place.catalog.make_ready(draft, fingerprint=fingerprint(), source="registered")
        assert (ready.number, ready.version, ready.uri, ready.ready) == (number, "v1", uri, True)
        assert place.catalog.versions(place.family) == (ready,)

    def test_a_registered_version_may_serve_from_elsewhere(self, place):
        """Its own files may be of a layout that was converted."""
        number = place.person.register_manually(place.family, "s3://elsewhere/base")
        for _ in range(2):
            ready = place.publish("v1", number=number)
            assert (ready.number, ready.uri) == (number, f"s3://bases/{place.family}/v1")
            assert place.catalog.versions(place.family) == (ready,)

    def test_registering_an_existing_version_again_creates_no_second_one(self, place):
        base = place.publish("v1")
        number = place.person.register_manually(place.family, base.uri)
        assert place.publish("v1", number=number) == base
        assert place.catalog.versions(place.family) == (base,)

    def test_no_number_that_is_not_there_can_be_completed(self, place):
        place.publish("v1")
        with pytest.raises(NotFoundError, match="number 7"):
            place.publish("v2", number=7)

    def test_champion_is_read_and_serving_is_written(self, place):
        one, two = place.publish("v1", 1), place.publish("v2", 2)
        assert place.catalog.alias(place.family, "champion") is None
        place.person.set_alias_manually(place.family, "champion", 2)
        assert place.catalog.alias(place.family, "champion") == 2
        for base in (one, two, one):
            place.catalog.set_serving(base)
            assert place.catalog.alias(place.family, "serving") == base.number
        place.person.set_alias_manually(place.family, "champion", None)
        assert place.catalog.alias(place.family, "champion") is None

    def test_a_version_that_served_is_marked(self, place):
        one, two = place.publish("v1", 1), place.publish("v2", 2)
        place.catalog.set_serving(one)
        place.catalog.set_serving(one)
        assert place.catalog.versions(place.family) == (replace(one, served=True), two)
        place.catalog.set_serving(two)
        assert [b.served for b in place.catalog.versions(place.family)] == [True, True]

    def test_promotion_notes_are_set_and_removed(self, place):
        one = place.publish("v1")
        waiting = place.person.register_manually(place.family, "s3://elsewhere/base")
        assert place.catalog.promotion_notes(place.family) == {}
        for number, text in (
            (one.number, "refused:\n  found: x"),
            (waiting, "waits"),
            (1, "again"),
        ):
            place.catalog.note_promotion(place.family, number, text)
        assert place.catalog.promotion_notes(place.family) == {1: "again", waiting: "waits"}
        for _ in range(2):
            place.catalog.note_promotion(place.family, 1, "")
        assert place.catalog.promotion_notes(place.family) == {waiting: "waits"}
        with pytest.raises(NotFoundError):
            place.catalog.note_promotion(place.family, 7, "x")

    def test_what_is_not_ready_cannot_serve(self, place):
        number = place.person.register_manually(place.family, "s3://elsewhere/base")
        with pytest.raises(InvalidSpecError, match="not ready"):
            place.catalog.set_serving(BaseVersion(place.family, "1", "s3://x", number, ready=True))
        assert place.catalog.alias(place.family, "serving") is None

    def test_parallel_registrations_return_the_same_version(self, place):
        place.publish("v0", seed=9)
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda _: place.publish("v1"), range(4)))
        live = [b for b in place.catalog.versions(place.family) if b.version == "v1"]
        assert live == [found[0]]
        assert set(found) == {found[0]}
        assert found[0].ready


@pytest.mark.servers
class TestMlflow:
    @pytest.fixture
    def place(self, servers, unique):
        from trans_peft.edges.mlflow_catalog import MlflowCatalog

        return Place(MlflowCatalog(servers.mlflow_url), unique, MlflowPerson())

    @pytest.mark.parametrize(
        "found_as",
        [{}, {"number": 1, "source": "registered"}],
        ids=["an-upload", "a-registered-version"],
    )
    def test_a_killed_ingestion_is_completed_without_a_duplicate(
        self, place, monkeypatch, found_as
    ):
        from trans_peft.edges.mlflow_client import Tracking

        def killed(self, name, number, tags):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Tracking, "tag_version", killed)
            place.publish("v1")
        assert [b.ready for b in place.catalog.versions(place.family)] == [False]
        # what is not ready is found again among the versions that people register
        base = place.publish("v1", **found_as)
        assert (base.number, base.ready) == (1, True)
        assert place.catalog.versions(place.family) == (base,)
        assert place.catalog.fingerprint(base) == fingerprint()
        tags = place.person.client.get_model_version(place.family, "1").tags
        assert tags["trans_peft.source"] == "upload"

    @pytest.mark.parametrize("seeds", [(1, 1), (1, 2)], ids=["the-same", "two-contents"])
    def test_racing_registrations_keep_one_version(self, place, monkeypatch, seeds):
        from trans_peft.edges.mlflow_client import Tracking

        both_looked, make_version = threading.Barrier(2), Tracking.make_version

        def make(self, *arguments):
            both_looked.wait(timeout=60)
            return make_version(self, *arguments)

        monkeypatch.setattr(Tracking, "make_version", make)
        with ThreadPoolExecutor(2) as pool:
            both = [pool.submit(place.publish, "v1", seed) for seed in seeds]
        refused = [type(e) for future in both if (e := future.exception())]
        assert refused == [UploadError] * (len(set(seeds)) - 1)
        (base,) = place.catalog.versions(place.family)
        assert base.ready
        assert base in [future.result() for future in both if not future.exception()]

    def test_two_clients_that_write_the_same_tag_at_once_both_succeed(self, place):
        from trans_peft.edges.mlflow_client import Tracking

        place.publish("v1")
        trackings = [Tracking(place.person.client.tracking_uri) for _ in range(4)]
        start = threading.Barrier(4)

        def tag(tracking: Tracking) -> None:
            start.wait(timeout=60)
            tracking.tag_version(place.family, 1, {f"x{i}": "y" for i in range(5)})

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(tag, trackings))
        assert place.person.client.get_model_version(place.family, "1").tags["trans_peft.x4"] == "y"

    def test_the_ready_tag_comes_last(self, place, monkeypatch):
        from trans_peft.edges.mlflow_client import Tracking

        tagged = []
        tag_version = Tracking.tag_version

        def spy(self, name, number, tags):
            tagged.extend(tags)
            tag_version(self, name, number, tags)

        monkeypatch.setattr(Tracking, "tag_version", spy)
        number = place.person.register_manually(place.family, "s3://elsewhere/base")
        place.publish("v1", number=number)
        assert tagged[-1] == "ready"
        assert tagged.count("ready") == 1

    def test_a_promoted_copy_waits_for_its_own_ingestion(self, place, unique):
        base = place.publish("v1")
        other = f"{unique}-other"
        place.person.client.copy_model_version(f"models:/{place.family}/{base.number}", other)
        (copy,) = place.catalog.versions(other)
        assert (copy.version, copy.uri, copy.ready) == ("v1", base.uri, False)

    def test_a_copy_is_not_marked_as_served(self, place, unique):
        base = place.publish("v1")
        place.catalog.set_serving(base)
        other = Place(place.catalog, f"{unique}-other", place.person)
        place.person.client.copy_model_version(
            f"models:/{place.family}/{base.number}", other.family
        )
        assert not other.publish("v1", number=1).served

    def test_a_copy_within_its_family_is_not_a_base(self, place):
        base = place.publish("v1")
        copy = place.person.client.copy_model_version(
            f"models:/{place.family}/{base.number}", place.family
        )
        assert place.catalog.versions(place.family) == (base,)
        assert place.publish("v1") == base
        place.catalog.note_promotion(place.family, int(copy.version), "refused: a copy")
        assert place.catalog.promotion_notes(place.family) == {int(copy.version): "refused: a copy"}

    def test_an_adapter_copied_into_a_family_is_not_a_base(self, place, unique):
        base, client = place.publish("v1"), place.person.client
        adapter = f"{unique}-adapter"
        client.create_registered_model(adapter, tags={"trans_peft.kind": "adapter"})
        tags = {"trans_peft.adapter": adapter, "trans_peft.family": place.family}
        client.create_model_version(adapter, "s3://adapters/x", tags=tags)
        client.copy_model_version(f"models:/{adapter}/1", place.family)
        assert place.catalog.versions(place.family) == (base,)

    def test_a_model_with_the_kind_tag_is_a_family(self, place):
        place.person.client.create_registered_model(place.family)
        assert place.family not in place.catalog.families()
        place.person.client.set_registered_model_tag(place.family, "trans_peft.kind", "base")
        assert place.family in place.catalog.families()

    def test_an_adapter_is_not_a_family(self, place):
        place.person.client.create_registered_model(
            place.family, tags={"trans_peft.kind": "adapter"}
        )
        with pytest.raises(NotFoundError, match="is not a registered base"):
            place.catalog.versions(place.family)
        with pytest.raises(InvalidSpecError, match="not as a base"):
            place.publish("v1")

    def test_more_families_than_a_page_are_all_listed(self, place, monkeypatch):
        monkeypatch.setattr("trans_peft.edges.mlflow_client._PAGE", 2)
        names = [f"{place.family}-{i}" for i in range(5)]
        for name in names:
            place.person.client.create_registered_model(name, tags={"trans_peft.kind": "base"})
        assert set(names) <= set(place.catalog.families())

    def test_an_unreachable_server_is_named(self, monkeypatch):
        from trans_peft.edges.mlflow_catalog import MlflowCatalog

        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        with pytest.raises(StoreError, match=r"MLflow at http://127\.0\.0\.1:9 ") as caught:
            MlflowCatalog("http://127.0.0.1:9").families()
        assert not isinstance(caught.value, NotFoundError)
