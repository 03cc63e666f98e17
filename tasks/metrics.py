"""Prometheus metrics of the processes that do the work: verdicts, cache hits, downloaded bytes.

A flow run is a process of minutes, which Prometheus would miss. With `PROMETHEUS_MULTIPROC_DIR`,
prometheus_client keeps the numbers of each process in files of that folder, and `infra/exporter.py`
serves their sum. Without it, `serve` serves the numbers of this process alone, for workers that
start each flow run in a container of its own.

Every label has a closed set of values, because Prometheus keeps one time series for each
combination of values.
"""

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import BinaryIO

from prometheus_client import CollectorRegistry, Counter, Histogram, start_http_server

from tasks.settings import METRICS_FOLDER
from trans_peft.domain.evaluation import Evaluation, EvaluationSummary, Verdict
from trans_peft.domain.outcome import TransferOutcome
from trans_peft.ports import ArtifactStore, EvaluationStore, Platform, StoredFile

__all__ = ["REGISTRY", "adapter_judged", "counting", "serve"]

REGISTRY = CollectorRegistry()
_SECONDS = (5, 10, 20, 30, 60, 120, 300, 600, 1800, 3600, 14400)

_VERDICTS = Counter(
    "trans_peft_verdicts", "Recorded verdicts, failed attempts included", ["verdict"],
    registry=REGISTRY,
)  # fmt: skip
_VERDICT_SECONDS = Histogram(
    "trans_peft_verdict_seconds",
    "Duration of a transfer that led to a verdict other than failed",
    buckets=_SECONDS,
    registry=REGISTRY,
)
_CACHE = Counter(
    "trans_peft_cache_reads",
    "Reads of copies of bases on this worker (cache: base) and of stored evaluations "
    "(cache: evaluation), by result (hit, miss)",
    ["cache", "result"],
    registry=REGISTRY,
)
_DOWNLOADED = Counter(
    "trans_peft_downloaded_bytes",
    "Bytes read from the artifact store, by the scheme of the URI (s3, file)",
    ["scheme"],
    registry=REGISTRY,
)


def adapter_judged(outcome: TransferOutcome) -> None:
    """Count one recorded outcome and its duration."""
    _VERDICTS.labels(outcome.verdict.value).inc()
    if outcome.verdict is not Verdict.FAILED:
        _VERDICT_SECONDS.observe(outcome.seconds)


def counting(platform: Platform) -> Platform:
    """Return the platform with ports that count what is read through them."""
    return replace(
        platform,
        store=_CountingStore(platform.store),
        evaluations=_CountingEvaluations(platform.evaluations),
        on_base_copy=lambda found: _read("base", found),
    )


def serve(port: int | None) -> None:
    """Serve the metrics of this process, unless it shares them in a folder. None: no server."""
    if port is None or METRICS_FOLDER in os.environ:
        return
    try:
        start_http_server(port, registry=REGISTRY)
    except (
        OSError
    ) as error:  # another run of this host has the port; the work does not depend on it
        logging.getLogger(__name__).warning(
            "the metrics of this run are not served on port %s: %s; "
            "set %s and start `python -m infra.exporter` where several runs share a host",
            port, error, METRICS_FOLDER,
        )  # fmt: skip


def _read(cache: str, found: bool) -> None:
    _CACHE.labels(cache, "hit" if found else "miss").inc()


class _CountingStore:
    """An `ArtifactStore` that counts the bytes that are read."""

    def __init__(self, store: ArtifactStore) -> None:
        self._store = store
        self.places = store.places

    def list(self, prefix_uri: str) -> tuple[StoredFile, ...]:
        return self._store.list(prefix_uri)

    def read(
        self, uri: str, *, etag: str | None = None, start: int = 0, stop: int | None = None
    ) -> AbstractContextManager[Iterator[bytes]]:
        return self._counted(uri, self._store.read(uri, etag=etag, start=start, stop=stop))

    @contextmanager
    def _counted(
        self, uri: str, reading: AbstractContextManager[Iterator[bytes]]
    ) -> Iterator[Iterator[bytes]]:
        counter = _DOWNLOADED.labels("s3" if uri.startswith("s3://") else "file")
        with reading as chunks:
            yield _measured(chunks, counter)

    def write(self, uri: str, data: BinaryIO) -> None:
        self._store.write(uri, data)

    def remove(self, uri: str) -> None:
        self._store.remove(uri)


def _measured(chunks: Iterator[bytes], counter: Counter) -> Iterator[bytes]:
    for chunk in chunks:
        counter.inc(len(chunk))
        yield chunk


class _CountingEvaluations:
    """An `EvaluationStore` that counts which evaluations were stored already."""

    def __init__(self, evaluations: EvaluationStore) -> None:
        self._evaluations = evaluations

    def get(self, key: str) -> Evaluation | None:
        found = self._evaluations.get(key)
        _read("evaluation", found is not None)
        return found

    def summary(self, key: str) -> EvaluationSummary | None:
        return self._evaluations.summary(key)

    def put(self, evaluation: Evaluation, *, labels: Mapping[str, str] | None = None) -> None:
        self._evaluations.put(evaluation, labels=labels)
