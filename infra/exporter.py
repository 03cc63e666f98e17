"""The metrics of one host's flow runs for Prometheus: `python -m infra.exporter`.

The flow runs of a worker are short processes. prometheus_client keeps the numbers of each in files
of the folder `PROMETHEUS_MULTIPROC_DIR`, which this program serves as one sum. At each scrape it
adds the files of ended processes to one file, so that their number stays small. It must see the
worker's processes: start it on the same host, or in the same container.
"""

import signal
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import psutil
from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.metrics_core import Metric
from prometheus_client.mmap_dict import MmapedDict, mmap_key
from prometheus_client.multiprocess import MultiProcessCollector
from pydantic import Field

from tasks.environment import EnvironmentSettings
from tasks.settings import METRICS_FOLDER

__all__ = ["ExporterSettings", "HostCollector", "main"]

_KINDS = ("counter", "histogram")
_ENDED = "ended"


class ExporterSettings(EnvironmentSettings):
    """Folder of the numbers, and the address to listen on."""

    folder: Path = Field(validation_alias=METRICS_FOLDER)
    """Folder in which the flow runs of this host keep their numbers."""

    host: str = Field(default="127.0.0.1", validation_alias="TRANS_PEFT_METRICS_HOST")
    """Address to listen on."""

    port: int = Field(default=9464, ge=1, le=65535, validation_alias="TRANS_PEFT_METRICS_PORT")
    """Port to listen on."""


class HostCollector(MultiProcessCollector):
    """The sum over all processes of a host, also over those that ended."""

    def __init__(self, folder: Path) -> None:
        super().__init__(registry=None, path=str(folder))
        self._folder = folder
        self._lock = threading.Lock()

    def collect(self) -> Iterable[Metric]:
        """Return the counters and histograms of this project, summed over all processes."""
        with self._lock:
            for kind in _KINDS:
                self._fold(kind)
            found = super().collect()
        # Prefect's own counters are in the same files.
        return [metric for metric in found if metric.name.startswith("trans_peft_")]

    def _fold(self, kind: str) -> None:
        """Add the files of ended processes to one file. A kill between the last two steps doubles
        the numbers of these files.
        """
        ended = [path for path in self._folder.glob(f"{kind}_*.db") if _has_ended(path)]
        if not ended:
            return
        sums = self._folder / f"{kind}_{_ENDED}.db"
        # A process that was killed while it created its file leaves an empty one.
        sources = [path for path in (sums, *ended) if path.exists() and path.stat().st_size]
        partial = self._folder / f"partial-{kind}"
        partial.unlink(missing_ok=True)
        written = MmapedDict(str(partial))
        for metric in self.merge([str(path) for path in sources], accumulate=False):
            for sample in metric.samples:
                key = mmap_key(
                    metric.name,
                    sample.name,
                    list(sample.labels),
                    list(sample.labels.values()),
                    metric.documentation,
                )
                written.write_value(key, sample.value, 0)
        written.close()
        partial.rename(sums)
        for path in ended:
            path.unlink()


def _has_ended(path: Path) -> bool:
    pid = path.stem.partition("_")[2]
    return pid.isdecimal() and not psutil.pid_exists(int(pid))


def main() -> None:
    """Serve until the process receives a signal to end."""
    settings = ExporterSettings()  # type: ignore[call-arg]  # its values come from the environment
    settings.folder.mkdir(parents=True, exist_ok=True)
    registry = CollectorRegistry()
    registry.register(HostCollector(settings.folder))
    start_http_server(settings.port, settings.host, registry)
    ended = threading.Event()

    def end(*_: Any) -> None:
        ended.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    ended.wait()


if __name__ == "__main__":
    main()
