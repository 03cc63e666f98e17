"""Rules, dashboard and page use metrics, labels and values that the programs export."""

import json
import logging
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from prefect.logging.configuration import DEFAULT_LOGGING_SETTINGS_PATH
from pythonjsonlogger.json import JsonFormatter

from infra.bridge import metrics as bridge
from infra.bridge.dispatcher import DispatchOutcome
from infra.bridge.logs import json_formatter
from infra.bridge.prefect_monitor import QUEUES
from infra.stack.settings import StackSettings
from tasks import metrics as worker
from trans_peft.domain.evaluation import Verdict
from trans_peft.ui.index import State
from trans_peft.ui.metrics import FleetCollector

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "infra" / "monitoring"
RULES = yaml.safe_load((FOLDER / "alerts.yaml").read_text())["groups"][0]["rules"]
DASHBOARD = json.loads((FOLDER / "dashboard.json").read_text())
PROMTOOL = shutil.which("promtool")

SCRAPED = {"job", "instance", "le"}  # labels that Prometheus or a histogram adds
VALUES = {
    "verdict": set(Verdict),
    "state": {"waiting", "running", "completed", "failed", "crashed", *State},
    "queue": set(QUEUES),
    "outcome": set(DispatchOutcome),
    "result": {"hit", "miss"},
}


def exported() -> Iterator[tuple[str, set[str]]]:
    """Each sample's name with its labels."""
    for registry in (worker.REGISTRY, bridge.Metrics()._registry):
        for metric in registry._collector_to_names:
            suffixes = {"counter": ["_total"], "gauge": [""]}.get(
                metric._type, ["_bucket", "_sum", "_count"]
            )
            for suffix in suffixes:
                yield metric._name + suffix, set(metric._labelnames)
    empty = SimpleNamespace(families=lambda: ())
    for gauge in FleetCollector(empty).collect():
        yield gauge.name, set(gauge._labelnames)


EXPORTED = dict(exported())
QUERIES = {
    **{rule["alert"]: rule["expr"] for rule in RULES},
    **{f"{p['title']} {t['refId']}": t["expr"] for p in DASHBOARD["panels"] for t in p["targets"]},
}


@pytest.mark.parametrize("name", QUERIES)
def test_a_query_uses_exported_metrics_and_labels(name):
    query = QUERIES[name]
    metrics = set(re.findall(r"\btrans_peft_\w+", query))
    assert metrics or "up{" in query
    assert metrics <= EXPORTED.keys()
    for metric, matchers in re.findall(r"(trans_peft_\w+)\{([^}]*)\}", query):
        for label, operator, value in re.findall(r'(\w+)(=~|=)"([^"]*)"', matchers):
            assert label in EXPORTED[metric] | SCRAPED
            if value.startswith("$"):  # a variable of the dashboard
                continue
            values = value.split("|") if operator == "=~" else [value]
            assert set(values) <= VALUES[label]
    labels = {label for metric in metrics for label in EXPORTED[metric]} | SCRAPED
    for grouped in re.findall(r"(?:by|on) \(([^)]*)\)", query):
        assert {label.strip() for label in grouped.split(",")} <= labels


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_a_summary_shows_labels_of_its_query(rule):
    shown = set(re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"]))
    metrics = re.findall(r"\btrans_peft_\w+", rule["expr"])
    assert shown <= {label for metric in metrics for label in EXPORTED[metric]} | SCRAPED
    assert rule["labels"]["severity"] in ("warning", "critical")


def test_every_alert_has_a_test():
    tests = yaml.safe_load((FOLDER / "alerts_test.yaml").read_text())["tests"]
    tested = {
        case["alertname"]
        for one in tests
        for case in one["alert_rule_test"]
        if case.get("exp_alerts")
    }
    assert tested == {rule["alert"] for rule in RULES}


def test_the_scraped_addresses_are_those_of_the_stack(tmp_path):
    config = yaml.safe_load((FOLDER / "prometheus.yaml").read_text())
    scraped = {
        target
        for job in config["scrape_configs"]
        for one in job["static_configs"]
        for target in one["targets"]
    }
    urls = StackSettings(state=tmp_path).urls
    assert scraped == {urls[name].removeprefix("http://") for name in ("bridge", "ui", "exporter")}
    assert all(job["job_name"].startswith("trans-peft-") for job in config["scrape_configs"])


def test_panels_do_not_overlap():
    taken = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert not cells & taken, panel["title"]
        assert at["x"] + at["w"] <= 24
        taken |= cells


@pytest.mark.skipif(PROMTOOL is None, reason="promtool is not on PATH (Debian: prometheus)")
@pytest.mark.parametrize(
    "command", [("check", "config", "prometheus.yaml"), ("test", "rules", "alerts_test.yaml")]
)
def test_promtool_accepts_the_files_and_the_tests_of_the_rules_pass(command):
    done = subprocess.run(
        [PROMTOOL, *command], cwd=FOLDER, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_logs_of_flow_runs_have_the_names_of_the_bridge():
    config = yaml.safe_load((FOLDER / "logging.yaml").read_text())
    wanted = {name: value for name, value in config["formatters"]["json"].items() if name != "()"}
    record = logging.LogRecord("prefect.flow_runs", logging.INFO, "", 1, "%s ended", ("x",), None)
    record.flow_run_id, record.flow_run_name = "0-1", "judge small/v2"
    line = json.loads(JsonFormatter(**wanted).format(record))
    assert line.pop("time")
    assert line == {
        "level": "INFO",
        "logger": "prefect.flow_runs",
        "message": "x ended",
        "run": "0-1",
        "run_name": "judge small/v2",
    }
    bridge_line = json.loads(json_formatter().format(record))
    assert {"level", "logger", "message", "time"} <= bridge_line.keys()


def test_logs_of_runs_still_reach_prefects_pages():
    ours = yaml.safe_load((FOLDER / "logging.yaml").read_text())["loggers"]
    theirs = yaml.safe_load(DEFAULT_LOGGING_SETTINGS_PATH.read_text())["loggers"]
    assert ours == {name: theirs[name] for name in ours}
    assert [name for name in theirs if "api" in str(theirs[name].get("handlers"))] == [
        "prefect.extra",
        "prefect.flow_runs",
        "prefect.task_runs",
        "prefect.workers",
    ]


def test_the_page_has_every_alert_and_every_metric_of_the_fleet():
    page = (ROOT / "docs" / "operations.md").read_text()
    assert set(re.findall(r"^\| `(TransPeft\w+)` \|", page, re.MULTILINE)) == {
        rule["alert"] for rule in RULES
    }
    bridge_only = re.compile("notification|first_verdict|bridge_failures")  # docs/triggers.md
    names = {re.sub("_(bucket|sum|count)$", "", name) for name in EXPORTED}
    missing = {name for name in names if f"`{name}`" not in page and not bridge_only.search(name)}
    assert not missing
