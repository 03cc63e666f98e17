"""MLflow, Prefect and a queue in memory, with the interfaces that the bridge uses."""

import asyncio
import threading
import time

from infra.bridge.dispatcher import Run, UnavailableError
from infra.bridge.queue import Message


class FakeRegistry:
    def __init__(self, families):
        self.families = families
        self.asked = []
        self.broken = False

    def family(self, notification):
        if self.broken:
            raise UnavailableError("MLflow: down")
        self.asked.append(notification)
        time.sleep(0.005)
        return self.families.get(notification.name)


class FakePrefect:
    """Creates a run for each delivery. A run that has not begun covers its family."""

    def __init__(self, runs=None, delay_s=0.005):
        self.runs = dict(runs or {})
        self.asked, self.calls = [], 0
        self.waiting = {}
        self.broken = False
        self.delay_s = delay_s

    async def start(self, wanted):
        self.calls += 1
        await asyncio.sleep(self.delay_s)
        if self.broken:
            raise UnavailableError("Prefect: down")
        return {
            family: self._run(family, notification.delivery_id)
            for family, notification in wanted.items()
        }

    def _run(self, family, delivery_id):
        self.asked.append((family, delivery_id))
        if family in self.waiting:
            return Run(self.waiting[family])
        if delivery_id not in self.runs:
            made = sum(not run.has_begun for run in self.runs.values())
            self.runs[delivery_id] = Run(f"run-{made + 1}", delivery_id)
            self.waiting[family] = self.runs[delivery_id].id
        return self.runs[delivery_id]

    async def is_reachable(self):
        await asyncio.sleep(self.delay_s)
        return not self.broken


class FakeQueue:
    """A queue with a dead-letter queue. The test ends the visibility timeout."""

    def __init__(self, *bodies, receives=3):
        self.visible = [(str(n), body, 0) for n, body in enumerate(bodies)]
        self.hidden = {}
        self.dead, self.deleted, self.extended = [], [], []
        self.receives = receives
        self.silent = False
        self._lock = threading.Lock()

    def receive(self):
        if self.silent:
            raise OSError("no route")
        found = []
        with self._lock:
            received, self.visible = self.visible, []
            for name, body, count in received:
                if count >= self.receives:
                    self.dead.append(body)
                    continue
                self.hidden[name] = (name, body, count + 1)
                found.append(Message(name, f"receipt-{name}", body))
        if not found:
            time.sleep(0.005)
        return found

    def end_visibility_timeout(self):
        """Make all messages visible that were not deleted."""
        with self._lock:
            self.visible += self.hidden.values()
            self.hidden = {}

    def extend(self, message):
        self.extended.append(message.id)

    def delete(self, message):
        if self.silent:
            raise OSError("no route")
        self.deleted.append(message.body)
        self.hidden.pop(message.id, None)
