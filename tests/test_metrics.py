"""What the worker's platform counts, and when a run serves its own numbers."""

import io
import socket
import urllib.request
from types import SimpleNamespace

import pytest

from tasks import metrics
from trans_peft.artifacts import read_file
from trans_peft.domain.evaluation import Verdict
from trans_peft.edges.memory import memory_platform


def value(name, **labels):
    return metrics.REGISTRY.get_sample_value(f"trans_peft_{name}", labels) or 0


@pytest.fixture
def platform(tmp_path):
    return metrics.counting(memory_platform(tmp_path))


def test_bytes_are_counted_as_they_are_read(platform):
    before = value("downloaded_bytes_total", scheme="s3")
    platform.store.write("s3://bases/a/x", io.BytesIO(bytes(100)))
    (file,) = platform.store.list("s3://bases/a")
    assert read_file("s3://bases/a", file, platform.store) == bytes(100)
    with platform.store.read("s3://bases/a/x", start=90) as chunks:
        assert b"".join(chunks) == bytes(10)
    assert value("downloaded_bytes_total", scheme="s3") == before + 110


def test_reads_of_caches_are_counted_by_result(platform):
    misses = value("cache_reads_total", cache="evaluation", result="miss")
    assert platform.evaluations.get("unknown") is None
    assert value("cache_reads_total", cache="evaluation", result="miss") == misses + 1
    hits = value("cache_reads_total", cache="base", result="hit")
    platform.on_base_copy(True)
    assert value("cache_reads_total", cache="base", result="hit") == hits + 1


def test_a_failed_attempt_counts_as_a_verdict_without_a_duration():
    before = value("verdicts_total", verdict="failed"), value("verdict_seconds_count")
    for verdict in (Verdict.FAILED, Verdict.PASSED):
        metrics.adapter_judged(SimpleNamespace(verdict=verdict, seconds=1.0))
    assert value("verdicts_total", verdict="failed") == before[0] + 1
    assert value("verdict_seconds_count") == before[1] + 1


def test_a_run_alone_in_its_container_serves_its_numbers(monkeypatch, caplog):
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    metrics.serve(port)
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        assert b"trans_peft_verdict_seconds_count" in answer.read()
    metrics.serve(port)
    assert f"not served on port {port}" in caplog.text


@pytest.mark.parametrize(("port", "folder"), [(None, ""), (1, "/tmp")])
def test_no_server_starts_without_a_port_or_with_a_shared_folder(monkeypatch, port, folder):
    if folder:
        monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", folder)
    monkeypatch.setattr(metrics, "start_http_server", lambda *_, **__: pytest.fail("started"))
    metrics.serve(port)
