"""The exporter sums the numbers of processes that run and of processes that ended."""

import os
import subprocess
import sys

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from infra.exporter import ExporterSettings, HostCollector
from trans_peft.errors import InvalidSpecError

RUN = """
import sys
from types import SimpleNamespace
from tasks import metrics
from trans_peft.domain.evaluation import Verdict
for seconds in map(float, sys.argv[1:]):
    metrics.adapter_judged(SimpleNamespace(verdict=Verdict.PASSED, seconds=seconds))
metrics.adapter_judged(SimpleNamespace(verdict=Verdict.FAILED, seconds=0.0))
"""


def work(folder, *seconds, wait=False):
    """Record verdicts in a process of its own; with `wait`, return it before it ends."""
    script = RUN + ("print(flush=True); sys.stdin.read()" if wait else "")
    process = subprocess.Popen(
        [sys.executable, "-c", script, *map(str, seconds)],
        env={**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(folder)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    if wait:
        assert process.stdout.readline()
    else:
        assert process.communicate()[0] == b""
    return process


def scrape(collector):
    registry = CollectorRegistry()
    registry.register(collector)
    families = text_string_to_metric_families(generate_latest(registry).decode())
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in families
        for sample in family.samples
    }


@pytest.fixture(scope="module")
def scraped(tmp_path_factory):
    """Two processes ended, one runs; two scrapes, and one after all of them ended."""
    folder = tmp_path_factory.mktemp("metrics")
    collector = HostCollector(folder)
    work(folder, 7, 70)
    first = scrape(collector)
    running = work(folder, 7, 700, wait=True)
    (folder / "counter_4194305.db").touch()  # larger than any process id: its process was killed
    second, again = scrape(collector), scrape(collector)
    files = sorted(path.name for path in folder.iterdir())
    pid = running.pid
    running.communicate()
    return first, second, again, scrape(collector), files, pid, folder


def test_numbers_of_ended_and_running_processes_are_added(scraped):
    first, second, *_ = scraped
    assert first["trans_peft_verdicts_total", "passed"] == 2
    assert second["trans_peft_verdicts_total", "passed"] == 4
    assert second["trans_peft_verdicts_total", "failed"] == 2
    assert second["trans_peft_verdict_seconds_count",] == 4, "failed attempts have no duration"
    assert second["trans_peft_verdict_seconds_sum",] == 784
    buckets = {name[1]: value for name, value in second.items() if name[0].endswith("bucket")}
    assert [buckets[le] for le in ("5.0", "10.0", "120.0", "1800.0", "+Inf")] == [0, 2, 3, 4, 4]


def test_a_scrape_changes_no_number(scraped):
    _, second, again, last, *_ = scraped
    assert again == second
    assert last == second


def test_files_of_ended_processes_become_one(scraped):
    *_, files, pid, folder = scraped
    kinds = ("counter", "histogram")
    assert files == sorted([f"{kind}_{of}.db" for kind in kinds for of in ("ended", pid)])
    assert sorted(path.name for path in folder.iterdir()) == [f"{kind}_ended.db" for kind in kinds]


def test_the_folder_must_be_named(monkeypatch, tmp_path):
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    with pytest.raises(InvalidSpecError, match="PROMETHEUS_MULTIPROC_DIR"):
        ExporterSettings()
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    assert (ExporterSettings().port, ExporterSettings().host) == (9464, "127.0.0.1")
