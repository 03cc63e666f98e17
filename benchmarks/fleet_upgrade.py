"""Measures what an upgrade of a fleet of 1,000 tiny adapters costs beside the computing.

    python -m benchmarks.fleet_upgrade [--adapters 1000] [--items 32] [--sqlite]
                                       [--folder FOLDER] [--dry]

It starts a separate stack (`make up`, on free ports) with default settings and with MLflow and
Prefect on a PostgreSQL server of its own (`initdb` must be in PATH), or on SQLite with `--sqlite`.
It adopts adapters with different weights on a tiny base, and uploads an update. Then it promotes
the update with the alias `champion`, and promotes the old base again. `--folder` keeps the folder
of the stack. With `--sqlite`, `make up TRANS_PEFT_STATE=FOLDER/state` then shows its pages.

`fleet.upgrade_1000_overhead_s`: (time from writing the manifest of the update until reconcile has
applied the last verdict - computing) / adapters. Computing is the time of the evaluations on the
new base. With the default of one GPU slot, the shards run one after the other.
`fleet.upgrade_1000_whole_s`: the same with the computing.
`fleet.promote_1000_s`, `fleet.roll_back_1000_s`: from setting `champion` until `serving` of the
base has moved.
"""

import argparse
import io
import os
import signal
import sys
import tempfile
import time
import warnings
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path

import torch
from mlflow.entities import Run
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from benchmarks.bridge import middle, put_base, running, runs, seconds, settle
from benchmarks.ratios import record
from infra.stack.machine import free_ports
from tests.end_to_end.running_stack import LENIENT, Stack, rows, wait_until, write_update
from tests.hosts.postgres import postgres
from tests.tiny import write_tiny_base
from trans_peft import connect
from trans_peft.domain.conventions import SERVING_ALIAS
from trans_peft.domain.data import DataSource
from trans_peft.domain.evaluation import Suite
from trans_peft.edges.mlflow_client import tag
from trans_peft.lifecycle.adopt import adopt

FAMILY = "tiny"
ITEMS = "s3://data/eval.jsonl"
PATIENCE_S = 3600.0


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--adapters", type=int, default=1000)
    options.add_argument("--items", type=int, default=32)
    options.add_argument("--sqlite", action="store_true", help="SQLite in place of PostgreSQL")
    options.add_argument("--folder", type=Path, help="keep the stack's folder here")
    options.add_argument("--dry", action="store_true", help="print, and leave results.json alone")
    chosen = options.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the stack ends with us
    warnings.simplefilter("ignore", FutureWarning)
    set_verbosity_error()
    disable_progress_bar()
    os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"
    os.environ["MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"] = "false"
    with ExitStack() as ending:
        folder = chosen.folder or Path(ending.enter_context(tempfile.TemporaryDirectory()))
        databases: dict[str, str] = {}
        if not chosen.sqlite:
            databases = ending.enter_context(postgres(*free_ports(1)))
        found = measured(ending.enter_context(running(folder, **databases)), folder, chosen)
    facts = {"machine": f"{os.cpu_count()} cores", "prefect": version("prefect")}
    database = "SQLite" if chosen.sqlite else "PostgreSQL"
    shape = f"{chosen.adapters} adapters, {chosen.items} items, {database}, one shard at a time"
    for name, value in found.items():
        if chosen.dry:
            print(name, round(value, 3))
        else:
            record(f"fleet.{name}", middle([value]), {**facts, "shape": shape})


def measured(stack: Stack, folder: Path, chosen: argparse.Namespace) -> dict[str, float]:
    """Return the seconds of an upgrade, a promotion and a rollback."""
    os.environ.update(stack.settings.client_environment)
    stack.s3.upload_fileobj(io.BytesIO(rows(100, chosen.items).encode()), "data", "eval.jsonl")
    found = stack.prefect("GET", "deployments/name/reconcile/default")
    stack.set_parameters_of_reconcile(policy={**found["parameters"]["policy"], **LENIENT})
    base = write_tiny_base(folder / "v1")
    put_base(stack, base, "v1")
    wait_until(lambda: stack.mlflow.search_model_versions(f"name='{FAMILY}'"), patience_s=300)
    settle(stack)
    moved(stack, "1")
    adopt_fleet(base, folder, chosen.adapters)
    settle(stack)

    began = put_base(stack, write_update(folder / "v2", seed=2), "v2")
    wait_until(lambda: len(stack.mlflow.search_model_versions(f"name='{FAMILY}'")) == 2, 300)
    settle(stack, poll_s=5)
    whole = ended(stack, after=began) - began
    judged = computing(stack, chosen.adapters)
    return {
        "upgrade_1000_overhead_s": (whole - judged) / chosen.adapters,
        "upgrade_1000_whole_s": whole / chosen.adapters,
        "promote_1000_s": moved(stack, "2"),
        "roll_back_1000_s": moved(stack, "1"),
    }


def adopt_fleet(base: Path, folder: Path, count: int) -> None:
    """Adopt LoRA adapters with random weights, as `trans-peft adopt` does."""
    model = AutoModelForCausalLM.from_pretrained(base)
    tuned = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    platform = connect(work_dir=folder / "client")
    suite = Suite("parity", DataSource(ITEMS), max_new_tokens=5)
    for number in range(count):
        torch.manual_seed(number)
        for name, weight in tuned.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(weight, std=0.02)
        tuned.save_pretrained(folder / "adapter")
        adapter = f"adapter-{number:04}"
        adopt(adapter, str(folder / "adapter"), FAMILY, [suite], platform, base_version="v1")
        if (number + 1) % 50 == 0:
            print(f"adopted {number + 1} of {count}", flush=True)


def ended(stack: Stack, after: float) -> float:
    """Return when the first reconcile ended after the last shard."""
    found = [run for run in runs(stack, end_time={"is_null_": False}) if run["start_time"]]
    shards = [run for run in found if "family:tiny" in run["tags"]]
    last = max(seconds(run["end_time"]) for run in shards if seconds(run["start_time"]) > after)
    others = (seconds(run["end_time"]) for run in found if run not in shards)
    return min(at for at in others if at > last)


def computing(stack: Stack, count: int) -> float:
    """Return the seconds of the evaluations on the new base. Each adapter must serve there."""
    platform = connect()
    base = platform.catalog.versions(FAMILY)[-1]
    serving = [one for one in platform.registry.fleet(FAMILY).live if one.serving_on(base)]
    if len(serving) != count:
        raise RuntimeError(f"{len(serving)} of {count} adapters serve on {base}")
    (experiment,) = stack.mlflow.search_experiments(filter_string="name = 'trans-peft/evaluations'")
    found: list[Run] = []
    token = None
    while token != "":
        page = stack.mlflow.search_runs(
            [experiment.experiment_id],
            f"tags.`{tag('base_fingerprint')}` = '{base.fingerprint_sha256}'",
            max_results=1000,
            page_token=token,
        )
        found += page
        token = page.token or ""
    print(f"{len(found)} evaluations on {base}")
    return sum(run.data.metrics["seconds"] for run in found)


def moved(stack: Stack, number: str) -> float:
    """Set `champion`, and return the seconds until `serving` has the same version."""
    began = time.time()
    stack.champion(number)
    wait_until(lambda: stack.alias(FAMILY, SERVING_ALIAS) == number, patience_s=PATIENCE_S)
    return time.time() - began


if __name__ == "__main__":
    main()
