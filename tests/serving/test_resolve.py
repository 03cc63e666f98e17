"""What `resolve` advises if nothing serves: the step that changes it."""

import pytest

from tests.serving.fleet import ServingFleet
from trans_peft.errors import NotFoundError, NotServedError
from trans_peft.lifecycle.resolve import resolve
from trans_peft.serving.manifest import serving_manifest


def advice(fleet, adapter, base):
    with pytest.raises(NotServedError) as caught:
        resolve(adapter, fleet.platform, base=base)
    return str(caught.value).partition("  do:       ")[2]


def test_an_alias_that_a_person_removed_is_to_be_set_again_by_a_person(fleet):
    alias = fleet.base("v2").alias
    fleet.registry.set_alias_manually("chat", alias, None)
    found = advice(fleet, "chat", "v2")
    assert found.startswith(f"set the alias {alias} in MLflow on version 2, which was made for")
    assert "reconcile the family" not in found
    fleet.registry.set_alias_manually("chat", alias, 2)
    assert resolve("chat", fleet.platform, base="v2").number == 2


def test_an_alias_that_a_person_set_for_another_base_is_to_be_moved(fleet):
    alias = fleet.base("v2").alias
    fleet.registry.set_alias_manually("chat", alias, 1)
    assert advice(fleet, "chat", "v2").startswith(f"set the alias {alias} in MLflow on version 2,")


def test_an_alias_cannot_be_set_for_a_base_without_a_version(fleet):
    v2 = fleet.base("v2")
    fleet.train("young", fleet.base("v1"), seed=5)
    fleet.registry.set_alias_manually("young", v2.alias, 1)
    found = advice(fleet, "young", "v2")
    assert found == f"retrain the adapter on {v2}, and set the alias {v2.alias} on that version"


def test_a_retired_adapter_has_an_advice_of_its_own(fleet):
    fleet.registry.retire_manually("chat")
    assert advice(fleet, "chat", "v1").startswith(
        "remove the tag trans_peft.retired from the registered model chat in MLflow"
    )


def test_a_verdict_is_followed_by_the_three_ways_to_serve(fleet):
    assert advice(fleet, "code", "v2").startswith("reconcile the family, retrain the adapter, or")


@pytest.mark.parametrize("alias", ["serving", "champion"])
def test_before_any_promotion_the_error_names_the_alias_to_set(tmp_path, tiny_bases, alias):
    fleet = ServingFleet(tmp_path)
    v1 = fleet.add_base("v1", tiny_bases[0])
    fleet.train("chat", v1)
    for read in (
        lambda: resolve("chat", fleet.platform, base=alias),
        lambda: serving_manifest(fleet.family, alias, fleet.platform),
    ):
        with pytest.raises(NotFoundError) as caught:
            read()
        text = str(caught.value)
        assert f"no base version of family 'small' has the alias '{alias}' yet" in text
        assert "on a version that is ready: v1" in text
        assert "set the alias champion in MLflow on a version that is ready" in text
        assert ("reconcile the family" in text) is (alias == "serving")
        assert "ingest" not in text
    fleet.catalog.set_alias_manually(fleet.family, "champion", v1.number)
    fleet.catalog.set_serving(v1)
    assert resolve("chat", fleet.platform, base=alias).number == 1
