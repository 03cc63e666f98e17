"""Which adapters can be recovered without training rows, as a dry run of reconcile shows it."""

from dataclasses import replace

import pytest

from tasks.reporting import unprepared_text
from tests.lifecycle.fleet import FAMILY, SUITE, MemoryFleet
from trans_peft.domain.data import DataSource
from trans_peft.domain.recipe import SyntheticPrompts, TrainingRecipe
from trans_peft.domain.recovery import (
    COMPENSABLE_TYPES,
    CompensationPolicy,
    DistillationPolicy,
    RecoveryPolicy,
)
from trans_peft.edges.file_store import FileStore
from trans_peft.errors import StoreError
from trans_peft.lifecycle.reconcile import observe
from trans_peft.lifecycle.recovery.readiness import unprepared
from trans_peft.transfer.low_rank_matrices import _TYPES

NOTHING = "neither the policy (prompts_uri) nor the recipe (synthetic_prompts) gives prompts"
TRAINED_ELSEWHERE = "the adapter has no recipe, so its perturbation and options are unknown"


def test_the_types_that_can_be_compensated_are_those_that_have_an_implementation():
    assert set(_TYPES) == COMPENSABLE_TYPES


@pytest.fixture
def fleet(tmp_path):
    """`lora` and `ia3` were trained elsewhere, `own` has a recipe with synthetic prompts."""
    recipe = TrainingRecipe(
        *("own", FAMILY, DataSource("train.jsonl"), (SUITE,)),
        synthetic_prompts=SyntheticPrompts(steps=60),
    )
    fleet = MemoryFleet(tmp_path)
    base = fleet.add_base("v1")
    for name in ("ia3", "lora", "own"):
        fleet.add_adapter(name, base)
    found = observe(FAMILY, fleet.platform)
    versions = {
        "ia3": {"method": "IA3"},
        "own": {"recipe": recipe},
    }
    return replace(
        found,
        adapters=tuple(
            replace(one, versions=(replace(one.source, **versions.get(one.name, {})),))
            for one in found.adapters
        ),
    )


def test_without_such_a_strategy_no_adapter_can_be_recovered(fleet):
    off = "the policy has neither compensation nor distillation"
    found = unprepared(fleet, RecoveryPolicy(retune_steps=20), store=None)
    assert found == {"ia3": off, "lora": off, "own": off}


def test_an_adapter_needs_prompts_for_a_strategy_that_supports_its_type(fleet):
    compensation, distillation = CompensationPolicy(), DistillationPolicy()
    ia3 = "adapters of the type IA3 cannot be compensated"
    assert unprepared(fleet, RecoveryPolicy(compensation=compensation), store=None) == {
        "ia3": ia3,
        "lora": NOTHING,
    }
    assert unprepared(fleet, RecoveryPolicy(distillation=distillation), store=None) == {
        "ia3": TRAINED_ELSEWHERE,
        "lora": TRAINED_ELSEWHERE,
    }
    both = RecoveryPolicy(compensation=compensation, distillation=distillation)
    assert unprepared(fleet, both, store=None) == {
        "ia3": f"{ia3}; {TRAINED_ELSEWHERE}",
        "lora": f"{NOTHING}; {TRAINED_ELSEWHERE}",
    }


def test_files_of_prompts_must_exist_and_not_be_empty(fleet, tmp_path):
    recovery = RecoveryPolicy(compensation=CompensationPolicy(f"{tmp_path}/{{adapter}}.jsonl"))
    store = FileStore()
    (tmp_path / "own.jsonl").write_bytes(b"")
    found = unprepared(fleet, recovery, store)
    assert [*found] == ["ia3", "lora", "own"]
    assert found["lora"] == f"there is no file {tmp_path}/lora.jsonl"
    assert found["own"] == f"{tmp_path}/own.jsonl is empty"
    for name in ("lora", "own"):
        (tmp_path / f"{name}.jsonl").write_text('{"prompt": "2 + 2 ="}\n')
    assert [*unprepared(fleet, recovery, store)] == ["ia3"]


def test_one_file_for_all_adapters_is_opened_once(fleet, tmp_path):
    opened = []

    class Store:
        def read(self, uri):
            opened.append(uri)
            raise StoreError("S3 cannot be reached")

    recovery = RecoveryPolicy(compensation=CompensationPolicy("s3://traffic/all.jsonl"))
    with pytest.raises(StoreError):
        unprepared(replace(fleet, adapters=fleet.adapters[1:2]), recovery, Store())
    assert opened == ["s3://traffic/all.jsonl"]


def test_adapters_with_one_reason_are_in_one_line():
    assert unprepared_text({}).startswith("all adapters have what a recovery")
    assert unprepared_text({"a": NOTHING}).startswith("1 adapter cannot be recovered")
    reasons = {"a": NOTHING, "b": "there is no s3://traffic/b.jsonl", "c": NOTHING}
    assert unprepared_text(reasons).splitlines() == [
        "3 adapters cannot be recovered without training rows:",
        f"- a, c: {NOTHING}",
        "- b: there is no s3://traffic/b.jsonl",
    ]
