"""The middleware for vLLM: every request is answered by the version that serves, or by an error.

    --middleware trans_peft.serving.vllm_middleware.ServeByVerdict

It stands before the routes of vLLM's server, follows the registry in the background, and replaces
the name in each request by the engine name of the version that serves. All routes that it does not
know are closed: vLLM answers from the bare base for an empty model, and its routes for adapters
would load any folder. Pure ASGI; the decisions are made in `router` and `adapter_server`. Seen with
vLLM 0.32.
"""

import asyncio
import json
import logging
import os
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from contextlib import suppress
from typing import Any

from trans_peft.client import connect
from trans_peft.domain.names import quoted
from trans_peft.errors import InvalidSpecError, TransPeftError
from trans_peft.serving.adapter_server import AdapterServer, Prepared, ServerSettings, set_current
from trans_peft.serving.manifest import ServedAdapter
from trans_peft.serving.router import BareBase, Refusal, RefusalReason

__all__ = ["VERSION_HEADER", "ServeByVerdict"]

_log = logging.getLogger(__name__)

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

VERSION_HEADER = b"trans-peft-version"
"""The header of each answer with the engine name: adapter, version, start of the hash."""

_PLUGIN = "trans-peft"
"""The name of the entry point of `vllm_plugin`."""
_OPEN = frozenset({"/health", "/ping", "/version", "/metrics", "/load"})
_MODELS = "/v1/models"
_CHATS = frozenset({
    "/v1/chat/completions", "/v1/messages", "/v1/messages/count_tokens", "/v1/responses",
})  # fmt: skip
"""Routes whose every request is a chat. On others, a request with `messages` is one."""
_TEMPLATED = frozenset({
    "/classify", "/pooling", "/tokenize", "/v1/chat/completions", "/v1/embeddings",
})  # fmt: skip
"""Routes on which vLLM applies the chat template in the body of a chat."""
_WITH_MODEL = _CHATS | _TEMPLATED | {
    "/detokenize", "/rerank", "/score", "/v1/completions", "/v1/rerank", "/v1/score", "/v2/rerank",
}  # fmt: skip
"""Routes whose body is a JSON object with the field `model`."""


class ServeByVerdict:
    """ASGI middleware that serves adapters by verdict. vLLM makes one for its process."""

    def __init__(self, app: App, make_server: Callable[[], AdapterServer] | None = None) -> None:
        self._app = app
        self._make_server = make_server or _server_from_environment
        self._server: AdapterServer | None = None
        self._following: asyncio.Task[None] | None = None
        self._preparing: dict[str, asyncio.Task[Prepared | Refusal]] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection, or the start and the end of the server."""
        if scope["type"] == "lifespan":
            await self._lifespan(scope, receive, send)
        elif scope["type"] == "http":
            await self._http(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1008, "reason": "closed"})

    async def _lifespan(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            self._server = await asyncio.to_thread(self._start, scope["app"].state)
        except Exception as error:
            # uvicorn ignores an exception here, and would serve without this middleware's state.
            if not isinstance(error, TransPeftError):
                _log.exception("the server cannot follow the registry")
            await receive()
            await send({"type": "lifespan.startup.failed", "message": str(error)})
            return
        set_current(self._server)
        self._following = asyncio.create_task(self._follow(scope["app"]))
        try:
            await self._app(scope, receive, send)
        finally:
            self._following.cancel()
            set_current(None)

    def _start(self, state: Any) -> AdapterServer:
        _check_environment()
        server = self._make_server()
        server.start(state.args.model, getattr(state.args, "max_lora_rank", None))
        return server

    async def _follow(self, app: Any) -> None:
        """Read the registry again and again, and unload what does not serve any more."""
        assert self._server is not None
        while True:
            await asyncio.sleep(self._server.settings.poll_s)
            try:
                await asyncio.to_thread(self._server.refresh)
                for name in self._server.revoked():
                    body = json.dumps({"lora_name": name}).encode()
                    status = await self._call_inside(app, "/v1/unload_lora_adapter", body)
                    if status in (200, 404):
                        self._server.unloaded(name)
                        _log.info("unloaded %s, which does not serve any more", name)
                    else:
                        _log.warning("%s could not be unloaded: status %d", name, status)
            except Exception:
                _log.exception("following the registry failed, and is tried again")

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        method = scope["method"]
        if method == "OPTIONS" or (method in ("GET", "HEAD") and path in _OPEN):
            await self._app(scope, receive, send)
        elif self._server is None:
            await _send_refusal(
                send, Refusal(RefusalReason.REGISTRY_AWAY, "the server has not started")
            )
        elif not ((method, path) == ("GET", _MODELS) or (method == "POST" and path in _WITH_MODEL)):
            message = f"{method} {quoted(path)} is closed on this server"
            await _send_refusal(send, Refusal(RefusalReason.CLOSED, message))
        elif not await self._is_authorized(scope):
            await _send_json(send, 401, {"error": "Unauthorized"})
        elif path == _MODELS:
            await _send_json(send, 200, self._models())
        else:
            await self._answer(path, scope, receive, send)

    async def _answer(self, path: str, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request whose body names a model."""
        assert self._server is not None
        body = await _read_body(receive)
        if body is None:
            return
        request = _parsed(body)
        if isinstance(request, Refusal):
            await _send_refusal(send, request)
            return
        route = await self._route(request, path, scope["app"].state.args)
        if isinstance(route, Refusal):
            await _send_refusal(send, route)
            return
        asked, request["model"] = request["model"], route
        scope, receive = _with_body(scope, receive, json.dumps(request).encode())
        with self._server.answering(route):
            await self._app(scope, receive, _Renamed(send, route, asked))

    async def _route(self, request: dict[str, Any], path: str, args: Any) -> str | Refusal:
        """Return the name inside of the server for a request, whose template it may set."""
        assert self._server is not None
        found = self._server.route(request.get("model"))
        if isinstance(found, Refusal):
            return found
        if _brings_template(request):
            return Refusal(
                RefusalReason.CLOSED,
                "requests cannot bring a chat template: an adapter is judged with its own",
            )
        if isinstance(found, BareBase):
            return _engine_base_name(args)
        prepared: Prepared | Refusal | None = self._server.ready(found)
        if prepared is None:
            prepared = await self._prepare(found)
            if self._server.route(request["model"]) != found:  # the registry changed meanwhile
                return await self._route(request, path, args)
        if isinstance(prepared, Refusal):
            return prepared
        is_chat = path in _CHATS or "messages" in request
        if is_chat and prepared.chat_template is not None:
            if path not in _TEMPLATED or not getattr(args, "trust_request_chat_template", False):
                return Refusal(
                    RefusalReason.UNSUPPORTED,
                    f"{found.name} was judged with a chat template that is not the base's; use "
                    "/v1/completions, or /v1/chat/completions of a server with "
                    "--trust-request-chat-template",
                )
            request["chat_template"] = prepared.chat_template
        return found.engine_name

    async def _prepare(self, adapter: ServedAdapter) -> Prepared | Refusal:
        """Prepare an adapter in a thread; requests for the same one wait for the same thread."""
        assert self._server is not None
        name = adapter.engine_name
        if name not in self._preparing:
            task = asyncio.create_task(asyncio.to_thread(self._server.prepare, adapter))
            self._preparing[name] = task
            task.add_done_callback(lambda _: self._preparing.pop(name, None))
        return await asyncio.shield(self._preparing[name])

    async def _is_authorized(self, scope: Scope) -> bool:
        """Whether vLLM accepts the request's API key. Its own check stands behind this class."""
        if not _api_key(scope["app"].state.args):
            return True
        probe = {**scope, "method": "GET", "path": scope.get("root_path", "") + _MODELS}
        return await self._status(probe, b"") != 401

    async def _call_inside(self, app: Any, path: str, body: bytes) -> int:
        """Send a request to a route behind this class, and return the status."""
        headers = [(b"content-type", b"application/json")]
        if key := _api_key(app.state.args):
            headers.append((b"authorization", f"Bearer {key}".encode()))
        scope: Scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST",
            "scheme": "http", "path": path, "raw_path": path.encode(), "query_string": b"",
            "root_path": "", "headers": headers, "client": None, "server": None, "app": app,
            "state": {},
        }  # fmt: skip
        return await self._status(scope, body)

    async def _status(self, scope: Scope, body: bytes) -> int:
        status = 500

        async def send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]

        async def wait() -> Message:
            await asyncio.Event().wait()
            raise AssertionError

        scope, receive = _with_body(scope, wait, body)
        await self._app(scope, receive, send)
        return status

    def _models(self) -> dict[str, Any]:
        """Return the names that this server answers, in the form of OpenAI's list of models."""
        assert self._server is not None
        adapters = self._server.names()
        data: list[dict[str, Any]] = [
            {
                "id": adapter.name,
                "object": "model",
                "owned_by": "trans-peft",
                "root": adapter.engine_name,
                "parent": str(adapter.base),
            }
            for adapter in adapters
        ]
        base = self._server.settings.base_name
        if isinstance(self._server.route(base), BareBase):
            data.insert(0, {"id": base, "object": "model", "owned_by": "trans-peft"})
        return {"object": "list", "data": data}


class _Renamed:
    """Sends an answer with the name that the client asked for, and the version in a header."""

    def __init__(self, send: Send, engine_name: str, asked: str) -> None:
        self._send = send
        self._engine_name = engine_name
        self._names = [
            (f'"model":{space}{json.dumps(engine_name)}'.encode(),
             f'"model":{space}{json.dumps(asked)}'.encode())
            for space in ("", " ")
        ]  # fmt: skip
        self._start: Message | None = None
        self._body = b""

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            header = (VERSION_HEADER, self._engine_name.encode())
            message = {**message, "headers": [*message.get("headers", ()), header]}
            if dict(message["headers"]).get(b"content-type", b"").startswith(b"application/json"):
                self._start = message  # its length changes: wait for the whole body
                return
        elif message["type"] == "http.response.body":
            if self._start is not None:
                await self._collect(self._start, message)
                return
            # vLLM sends one or more whole events in each chunk of a stream.
            message = {**message, "body": self._rename(message.get("body", b""))}
        await self._send(message)

    async def _collect(self, start: Message, message: Message) -> None:
        self._body += message.get("body", b"")
        if message.get("more_body"):
            return
        body = self._rename(self._body)
        headers = [(key, value) for key, value in start["headers"] if key != b"content-length"]
        headers.append((b"content-length", str(len(body)).encode()))
        await self._send({**start, "headers": headers})
        await self._send({"type": "http.response.body", "body": body})

    def _rename(self, body: bytes) -> bytes:
        for old, new in self._names:  # within a JSON text, the quotes would be escaped
            body = body.replace(old, new)
        return body


def _server_from_environment() -> AdapterServer:
    # MLflow's client repeats a request for minutes, and a change must arrive within 30 s.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    return AdapterServer(ServerSettings.from_environment(), connect())


def _check_environment() -> None:
    """Raise InvalidSpecError for settings of vLLM with which it would ignore this middleware."""
    problems = []
    if os.environ.get("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "").lower() not in ("1", "true"):
        problems.append("VLLM_ALLOW_RUNTIME_LORA_UPDATING is not 1, so vLLM asks no resolver")
    if os.environ.get("VLLM_SKIP_MODEL_NAME_VALIDATION", "").lower() in ("1", "true"):
        problems.append(
            "VLLM_SKIP_MODEL_NAME_VALIDATION is set, so vLLM answers any name from the bare base"
        )
    plugins = os.environ.get("VLLM_PLUGINS")
    if plugins is not None and _PLUGIN not in plugins.split(","):
        problems.append(f"VLLM_PLUGINS does not list {_PLUGIN}, so vLLM does not load the resolver")
    if problems:
        raise InvalidSpecError(
            f"this vLLM would not serve by verdict: {'; '.join(problems)}",
            do="set the variables that docs/serving.md lists",
        )


def _api_key(args: Any) -> str:
    keys = [key for key in (getattr(args, "api_key", None) or ()) if key]
    return keys[0] if keys else os.environ.get("VLLM_API_KEY", "")


def _engine_base_name(args: Any) -> str:
    names = getattr(args, "served_model_name", None)
    if isinstance(names, str):
        return names
    return str(names[0] if names else args.model)


def _parsed(body: bytes) -> dict[str, Any] | Refusal:
    """Return the JSON object in a body, or what is wrong with it."""
    try:
        request = json.loads(body)
    except RecursionError:
        return _unusable("is nested too deeply")
    except ValueError as error:
        return _unusable(f"is not valid JSON: {error}")
    return request if isinstance(request, dict) else _unusable("must be a JSON object")


def _unusable(problem: str) -> Refusal:
    return Refusal(RefusalReason.NO_MODEL, f"the body of the request {problem}")


def _brings_template(request: Mapping[str, Any]) -> bool:
    """Whether a request has a chat template, on whatever route.

    vLLM passes the object `chat_template_kwargs` on to the template, and applies a template in it.
    """
    options = request.get("chat_template_kwargs")
    return "chat_template" in request or (isinstance(options, dict) and "chat_template" in options)


async def _read_body(receive: Receive) -> bytes | None:
    """Return the whole body of a request, or None if the client went away."""
    body = []
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return None
        body.append(message.get("body", b""))
        if not message.get("more_body"):
            return b"".join(body)


def _with_body(scope: Scope, receive: Receive, body: bytes) -> tuple[Scope, Receive]:
    """Return scope and receive of the same request with another body."""
    replaced = (b"content-length", b"transfer-encoding")
    headers = [(key, value) for key, value in scope["headers"] if key not in replaced]
    headers.append((b"content-length", str(len(body)).encode()))
    waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def read() -> Message:
        return waiting.pop() if waiting else await receive()

    return {**scope, "headers": headers}, read


async def _send_refusal(send: Send, refusal: Refusal) -> None:
    error = {
        "message": refusal.message,
        "type": "invalid_request_error" if refusal.status < 500 else "server_error",
        "param": "model",
        "code": str(refusal.reason),
    }
    await _send_json(send, refusal.status, {"error": error})


async def _send_json(send: Send, status: int, value: object) -> None:
    body = json.dumps(value).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
    ]
    with suppress(OSError):  # the client went away
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})
