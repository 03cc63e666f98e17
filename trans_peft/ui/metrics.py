"""Prometheus metrics of the fleets, computed from the snapshots of the pages.

A scrape never waits for the registry. It returns what was read last, with its age, and lets a
family that is older than five minutes be read again in the background: reading a large family takes
seconds. Base versions that no longer need verdicts are left out, so that the number of time series
stays small.
"""

from collections.abc import Iterable
from ipaddress import ip_address

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Receive, Scope, Send

from trans_peft.errors import TransPeftError
from trans_peft.ui.snapshots import Snapshot, Snapshots

__all__ = ["METRICS_PATH", "ByAddress", "FleetCollector", "metrics_text"]

METRICS_PATH = "/metrics"
_MAX_AGE_S = 300.0


class FleetCollector(Collector):
    """The families of one fleet page."""

    def __init__(self, snapshots: Snapshots) -> None:
        self._snapshots = snapshots

    def collect(self) -> Iterable[GaugeMetricFamily]:
        """Return the gauges of all families that were read."""
        adapters = GaugeMetricFamily(
            "trans_peft_adapters",
            "Live adapters by their verdict on a base version, or missing, or trained there",
            labels=["family", "base", "state"],
        )
        serving = GaugeMetricFamily(
            "trans_peft_adapters_serving",
            "Adapters that serve on a base version",
            labels=["family", "base"],
        )
        parked = GaugeMetricFamily(
            "trans_peft_adapters_parked",
            "Adapters whose transfer failed as often as it is tried",
            labels=["family", "base"],
        )
        missing = GaugeMetricFamily(
            "trans_peft_verdicts_missing", "Verdicts that a family lacks", labels=["family"]
        )
        pending = GaugeMetricFamily(
            "trans_peft_promotion_pending",
            "1 if the champion of a family does not serve",
            labels=["family"],
        )
        problems = GaugeMetricFamily(
            "trans_peft_registry_problems",
            "Entries of a family in the registry that cannot be read",
            labels=["family"],
        )
        age = GaugeMetricFamily(
            "trans_peft_fleet_age_seconds",
            "Time since the registry was read for the numbers of a family",
            labels=["family"],
        )
        for name, seen in self._read():
            for base in seen.progress.bases:
                if not (base.is_desired or base.is_serving or base.is_champion):
                    continue
                for state, count in base.states.items():
                    adapters.add_metric([name, base.base, state.value], count)
                serving.add_metric([name, base.base], base.serving)
                parked.add_metric([name, base.base], base.parked)
            fleet = seen.fleet
            missing.add_metric([name], seen.progress.missing)
            pending.add_metric([name], fleet.champion not in (None, fleet.serving))
            problems.add_metric([name], len(fleet.unreadable) + len(fleet.set_aside))
            age.add_metric([name], seen.age_s)
        return adapters, serving, parked, missing, pending, problems, age

    def _read(self) -> Iterable[tuple[str, Snapshot]]:
        for name in self._names():
            seen = self._snapshots.last(name)
            if seen is None:  # it is being read for the first time
                continue
            if seen.age_s > _MAX_AGE_S:
                self._snapshots.get(name)  # returns the old value and starts a read
            yield name, seen

    def _names(self) -> tuple[str, ...]:
        try:
            return self._snapshots.families()
        except TransPeftError:  # the registry never answered: there are no numbers
            return ()


def metrics_text(collector: FleetCollector) -> bytes:
    """Return the metrics in Prometheus's text format."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(collector)
    return generate_latest(registry)


class ByAddress:
    """Accepts requests for the metrics that name this server by an IP address.

    Prometheus does so for pods. All other requests go to `checked`, which allows listed names only:
    a web page can make a name of its own point to this server (DNS rebinding), but not an address.
    """

    def __init__(self, app: ASGIApp, checked: ASGIApp) -> None:
        self._app = app
        self._checked = checked

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        is_open = (
            scope["type"] == "http" and scope["path"] == METRICS_PATH and _host_is_address(scope)
        )
        await (self._app if is_open else self._checked)(scope, receive, send)


def _host_is_address(scope: Scope) -> bool:
    host = dict(scope["headers"]).get(b"host", b"").decode("latin-1")
    name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    try:
        ip_address(name)
    except ValueError:
        return False
    return True
