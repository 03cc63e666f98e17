"""A small Kubernetes API server: Jobs and pods of one namespace, watches, logs and one Role.

It answers what prefect-kubernetes and kopf request, and refuses what the Role does not allow. Tests
play the part of the Job controller and of Kueue through `set_job`, `add_pod` and `delete_job`.
"""

import asyncio
import json
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import Future
from copy import deepcopy
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from aiohttp import web

Document = dict[str, Any]
_VERSIONS = {"pods": "v1", "jobs": "batch/v1"}
_KINDS = {"pods": "Pod", "jobs": "Job", "namespaces": "Namespace", "events": "Event"}


class FakeCluster:
    """An API server on a free port of this machine, in a thread. A context manager."""

    def __init__(self, namespace: str, rules: list[Document]) -> None:
        self.namespace = namespace
        self.refused: list[tuple[str, str, str]] = []
        self.used: set[tuple[str, str, str]] = set()
        self.deleted: list[tuple[str, Document]] = []
        self.logs: dict[str, str] = {}
        self._rules = rules
        self._objects: dict[str, dict[str, Document]] = {"jobs": {}, "pods": {}}
        self._watches: dict[str, list[asyncio.Queue[Document]]] = {"jobs": [], "pods": []}
        self._version = 0
        self._loop = asyncio.new_event_loop()
        self._started: Future[int] = Future()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "FakeCluster":
        self._thread.start()
        self.port = self._started.result(20)
        return self

    def __exit__(self, *error: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def write_kubeconfig(self, path: Path) -> Path:
        """Write the configuration of a client of this server."""
        named = {"name": "fake"}
        path.write_text(
            yaml.safe_dump(
                {
                    "apiVersion": "v1",
                    "kind": "Config",
                    "clusters": [{**named, "cluster": {"server": f"http://127.0.0.1:{self.port}"}}],
                    "users": [{**named, "user": {"token": "worker"}}],
                    "contexts": [{**named, "context": {"cluster": "fake", "user": "fake"}}],
                    "current-context": "fake",
                }
            )
        )
        return path

    def jobs_of(self, flow_run_id: object) -> list[Document]:
        """Return the Jobs of a flow run, oldest first."""
        selector = f"prefect.io/flow-run-id={flow_run_id}"
        return self._call(lambda: self._selected("jobs", selector))

    def set_job(self, name: str, *, suspend: bool | None = None, **status: Any) -> None:
        """Change a Job as its controller or Kueue would."""

        def change() -> None:
            job = self._objects["jobs"][name]
            job["status"] = {**job["status"], **status}
            if suspend is not None:
                job["spec"]["suspend"] = suspend
            self._store("jobs", job, "MODIFIED")

        self._call(change)

    def add_pod(self, job: Document, phase: str, **status: Any) -> str:
        """Create the pod of a Job and return its name."""
        name = f"{job['metadata']['name']}-pod"

        def change() -> None:
            known = self._objects["pods"].get(name)
            template = job["spec"]["template"]
            labels = {**template["metadata"]["labels"], "job-name": job["metadata"]["name"]}
            pod = known or {
                "metadata": self._metadata(name, labels),
                "spec": deepcopy(template["spec"]),
            }
            pod["status"] = {"phase": phase, **status}
            self._store("pods", pod, "MODIFIED" if known else "ADDED")

        self._call(change)
        return name

    def delete_job(self, name: str) -> None:
        """Delete a Job as a person would with kubectl."""
        self._call(lambda: self._remove("jobs", name))

    # The server.

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        app = web.Application(middlewares=[self._authorize])
        app.router.add_get("/version", _json({"major": "1", "minor": "37"}))
        app.router.add_get("/api", _json({"versions": ["v1"]}))
        batch = {"groupVersion": "batch/v1", "version": "v1"}
        groups = [{"name": "batch", "versions": [batch], "preferredVersion": batch}]
        app.router.add_get("/apis", _json({"groups": groups}))
        for resource, prefix in (("pods", "/api/v1"), ("jobs", "/apis/batch/v1")):
            others = [_described("namespaces"), _described("events")] if resource == "pods" else []
            app.router.add_get(prefix, _json({"resources": [_described(resource), *others]}))
            place = f"{prefix}/namespaces/{self.namespace}/{resource}"
            app.router.add_get(place, self._list)
            app.router.add_post(place, self._create)
            app.router.add_get(f"{place}/{{name}}", self._read)
            app.router.add_delete(f"{place}/{{name}}", self._delete)
            app.router.add_get(f"{place}/{{name}}/log", self._log)
        app.router.add_route("*", "/{other:.*}", self._other)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        self._loop.run_until_complete(runner.setup())
        site = web.TCPSite(runner, "127.0.0.1", 0)
        self._loop.run_until_complete(site.start())
        self._started.set_result(runner.addresses[0][1])
        self._loop.run_forever()

    @web.middleware
    async def _authorize(self, request: web.Request, handler: Any) -> web.StreamResponse:
        if request.path in ("/version", "/api", "/apis", "/api/v1", "/apis/batch/v1"):
            return await handler(request)  # what every account may read
        asked = _asked(request)
        if not self._allows(*asked):
            self.refused.append(asked)
            refusal = {"kind": "Status", "code": 403, "message": f"{asked} is forbidden"}
            return web.json_response(refusal, status=403)
        self.used.add(asked)
        return await handler(request)

    def _allows(self, group: str, resource: str, verb: str) -> bool:
        return any(
            group in rule["apiGroups"] and resource in rule["resources"] and verb in rule["verbs"]
            for rule in self._rules
        )

    async def _other(self, request: web.Request) -> web.Response:
        return web.json_response(await request.json() if request.can_read_body else {})

    async def _create(self, request: web.Request) -> web.Response:
        job = await request.json()
        name = job["metadata"]["generateName"] + uuid.uuid4().hex[:5]
        labels = job["metadata"].get("labels", {})
        job["metadata"] = {**job["metadata"], **self._metadata(name, labels)}
        job["status"] = {}
        self._store("jobs", job, "ADDED")
        return web.json_response(job, status=201)

    async def _read(self, request: web.Request) -> web.Response:
        found = self._objects[_resource(request)].get(request.match_info["name"])
        return web.json_response(found) if found else _not_found()

    async def _delete(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        if name not in self._objects["jobs"]:
            return _not_found()
        text = await request.text()
        self.deleted.append((name, {**(json.loads(text) if text else {}), **request.query}))
        self._remove("jobs", name)
        return web.json_response({"kind": "Status", "status": "Success"})

    async def _log(self, request: web.Request) -> web.Response:
        text = self.logs.get(request.match_info["name"])
        if text is None or request.query.get("previous") == "true":
            return _not_found()
        return web.Response(text=text)

    async def _list(self, request: web.Request) -> web.StreamResponse:
        resource = _resource(request)
        selector = request.query.get("labelSelector", "")
        if request.query.get("watch") != "true":
            return web.json_response(
                {
                    "apiVersion": _VERSIONS[resource],
                    "kind": f"{_KINDS[resource]}List",
                    "metadata": {"resourceVersion": str(self._version)},
                    "items": self._selected(resource, selector),
                }
            )
        response = web.StreamResponse()
        queue: asyncio.Queue[Document] = asyncio.Queue()
        since = int(request.query.get("resourceVersion", self._version))
        for item in self._selected(resource, selector):
            if int(item["metadata"]["resourceVersion"]) > since:
                queue.put_nowait({"type": "MODIFIED", "object": item})
        self._watches[resource].append(queue)
        await response.prepare(request)
        try:
            while True:
                event = await queue.get()
                if _selects(selector, event["object"]):
                    await response.write(json.dumps(event).encode() + b"\n")
        finally:
            self._watches[resource].remove(queue)

    # The objects.

    def _metadata(self, name: str, labels: Document) -> Document:
        return {
            "name": name,
            "namespace": self.namespace,
            "uid": str(uuid.uuid4()),
            "labels": labels,
            "creationTimestamp": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        }

    def _store(self, resource: str, item: Document, kind: str) -> None:
        self._version += 1
        item["metadata"]["resourceVersion"] = str(self._version)
        item.update(apiVersion=_VERSIONS[resource], kind=_KINDS[resource])
        self._objects[resource][item["metadata"]["name"]] = item
        self._announce(resource, kind, item)

    def _remove(self, resource: str, name: str) -> None:
        self._version += 1
        item = self._objects[resource].pop(name)
        item["metadata"]["resourceVersion"] = str(self._version)
        self._announce(resource, "DELETED", item)

    def _announce(self, resource: str, kind: str, item: Document) -> None:
        for queue in self._watches[resource]:
            queue.put_nowait({"type": kind, "object": deepcopy(item)})

    def _selected(self, resource: str, selector: str) -> list[Document]:
        found = self._objects[resource].values()
        return [deepcopy(item) for item in found if _selects(selector, item)]

    def _call(self, function: Callable[[], Any]) -> Any:
        async def called() -> Any:
            return function()

        return asyncio.run_coroutine_threadsafe(called(), self._loop).result(20)


def _asked(request: web.Request) -> tuple[str, str, str]:
    """Return API group, resource and verb of a request, as a Role names them."""
    group, _, rest = request.path.removeprefix("/apis/").removeprefix("/api/v1").partition("/")
    parts = rest.removeprefix("v1/").split("/")
    parts = parts[2:] if parts[0] == "namespaces" and len(parts) > 2 else parts
    resource = "/".join(parts[::2])  # a subresource follows a name
    reading = "get" if len(parts) > 1 else "watch" if request.query.get("watch") else "list"
    verbs = {"GET": reading, "POST": "create", "DELETE": "delete", "PATCH": "patch"}
    return group, resource, verbs[request.method]


def _resource(request: web.Request) -> str:
    return "jobs" if request.path.startswith("/apis/batch/v1") else "pods"


def _selects(selector: str, item: Document) -> bool:
    labels = item["metadata"].get("labels", {})
    for term in filter(None, selector.split(",")):
        name, equals, value = term.partition("=")
        if name not in labels or (equals and labels[name] != value):
            return False
    return True


def _described(resource: str) -> Document:
    verbs = ["create", "delete", "get", "list", "patch", "update", "watch"]
    kind = _KINDS[resource]
    return {
        "name": resource, "kind": kind, "singularName": kind.lower(),
        "namespaced": resource != "namespaces",
        "verbs": verbs,
    }  # fmt: skip


def _json(document: Document) -> Callable[[web.Request], Any]:
    async def answer(request: web.Request) -> web.Response:
        return web.json_response(document)

    return answer


def _not_found() -> web.Response:
    return web.json_response({"kind": "Status", "code": 404, "message": "not found"}, status=404)
