"""prefect.yaml: all fields have a value, and flows import no more than they need."""

import importlib
import json
import subprocess
import sys
from dataclasses import fields
from inspect import signature
from pathlib import Path

import pytest
import yaml
from prefect.utilities.callables import parameter_schema
from pydantic import TypeAdapter

from flows.reconcile import reconcile
from trans_peft.domain.evaluation import GatePolicy
from trans_peft.domain.promotion import PromotionPolicy
from trans_peft.domain.recovery import CompensationPolicy, RecoveryPolicy

ROOT = Path(__file__).parents[2]
DEPLOYMENTS = yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]
(RECONCILE,) = [d for d in DEPLOYMENTS if d["entrypoint"].endswith(":reconcile")]


@pytest.mark.parametrize(
    ("name", "default"),
    [
        ("policy", GatePolicy(recovery=RecoveryPolicy(compensation=CompensationPolicy()))),
        ("promotion", PromotionPolicy()),
    ],
)
def test_a_policy_is_written_out_with_every_field_at_its_default(name, default):
    written = RECONCILE["parameters"][name]
    assert TypeAdapter(type(default)).validate_python(written) == default
    assert _names(written) == _names(json.loads(TypeAdapter(type(default)).dump_json(default)))


def _names(value):
    """The names of all fields, at every level."""
    return {key: _names(inner) for key, inner in value.items()} if isinstance(value, dict) else None


def test_every_parameter_of_reconcile_except_dry_run_has_a_value():
    assert set(RECONCILE["parameters"]) == set(signature(reconcile.fn).parameters) - {"dry_run"}


def test_every_parameter_of_every_flow_has_a_description():
    for deployment in DEPLOYMENTS:
        path, _, name = deployment["entrypoint"].partition(":")
        module = importlib.import_module(path.removesuffix(".py").replace("/", "."))
        schema = parameter_schema(getattr(module, name))
        assert all(field.get("description") for field in schema.properties.values()), name
        assert deployment["description"]


def test_no_field_of_the_promotion_policy_is_part_of_a_verdicts_key():
    assert "promotion" not in {field.name for field in fields(GatePolicy)}


@pytest.mark.parametrize("flow", ["reconcile", "ingest_base"])
def test_light_flows_import_no_machine_learning(flow):
    heavy = [
        "torch",
        "transformers",
        "peft",
        "accelerate",
        "datasets",
        "trl",
        "boto3",
        "scipy.stats",
    ]
    script = f"import sys, flows.{flow}; print([m for m in {heavy} if m in sys.modules])"
    found = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "[]"
