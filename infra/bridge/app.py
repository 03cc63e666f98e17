"""ASGI application that authenticates senders, parses their notifications and answers them.

Cheap checks come first: path and method, content type, bearer token, stated length. A body is read
up to a size limit and a deadline, whatever length the request states, and is not stored.

Responses: 2xx if the run exists or no run is needed, 4xx if the request can never succeed, 5xx if
the sender should try again.
"""

import asyncio
import hashlib
import logging
import time
from collections.abc import Awaitable, Callable

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from infra.bridge.authentication import AuthenticationError, check_token, mlflow_delivery
from infra.bridge.dispatcher import Dispatcher, DispatchOutcome, DispatchResult, UnavailableError
from infra.bridge.logs import LOG
from infra.bridge.loops import Failures
from infra.bridge.metrics import FailureSource, Metrics
from infra.bridge.notifications import Ignored, Notification, Parsed, Rejected, from_mlflow, from_s3
from infra.bridge.settings import MLFLOW_PATH, S3_PATH, BridgeSettings

__all__ = ["MAX_BODY_BYTES", "NotificationHandler", "create_app"]

MAX_BODY_BYTES = {"mlflow": 256 << 10, "s3": 4 << 20}
"""By sender. MLflow's limit is lower: its signature can be checked only after the body was read.
S3's is higher: an event of SeaweedFS lists all parts of a file. Others have a few kilobytes."""

BODY_DEADLINE_S = 10.0
_RETRY_AFTER_S = 15
"""MLflow makes three more attempts at this interval: 45 s in total instead of 7 s."""


class _RequestError(Exception):
    """A request that is answered with this HTTP status before its notification is parsed."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class NotificationHandler:
    """Dispatches parsed notifications, and counts and logs the results."""

    def __init__(self, dispatcher: Dispatcher, metrics: Metrics) -> None:
        self.dispatcher = dispatcher
        self.metrics = metrics
        self.failures = Failures(metrics)

    async def handle(self, sender: str, parsed: Parsed, delivery_id: str) -> DispatchResult:
        """Return the result of one delivery. Errors are returned as UNAVAILABLE and FAILED."""
        began = time.monotonic()
        kind = parsed.kind if isinstance(parsed, Notification) else "none"
        reason = parsed.reason if isinstance(parsed, Rejected | Ignored) else ""
        match parsed:
            case Notification():
                try:
                    result = await self.dispatcher.dispatch(parsed)
                except UnavailableError as error:
                    result, reason = DispatchResult(DispatchOutcome.UNAVAILABLE), str(error)
                except Exception as error:
                    self.failures.record(FailureSource.NOTIFICATION, error, delivery=delivery_id)
                    result, reason = DispatchResult(DispatchOutcome.FAILED), type(error).__name__
            case Ignored():
                result = DispatchResult(DispatchOutcome.IGNORED)
            case Rejected():
                result = DispatchResult(DispatchOutcome.REJECTED)
        seconds = time.monotonic() - began
        self.metrics.answered(sender, kind, result.outcome, seconds)
        if isinstance(parsed, Notification) and result.run_id:
            self.metrics.run_exists(kind, parsed.at)
        LOG.log(
            _LEVELS.get(result.outcome, logging.INFO),
            "notification answered",
            extra={
                "sender": sender,
                "delivery": delivery_id,
                "kind": kind,
                "about": parsed.name if isinstance(parsed, Notification) else "",
                "outcome": result.outcome,
                "run": result.run_id,
                "reason": reason,
                "seconds": round(seconds, 4),
            },
        )
        return result

    def record_refusal(self, sender: str, status: int, reason: str) -> None:
        """Count and log a request that was refused before its notification was parsed."""
        self.metrics.answered(sender, "none", DispatchOutcome.REFUSED, 0.0)
        LOG.warning("request refused", extra={"sender": sender, "status": status, "reason": reason})


_LEVELS = {
    DispatchOutcome.IGNORED: logging.DEBUG,
    DispatchOutcome.REJECTED: logging.WARNING,
    DispatchOutcome.UNAVAILABLE: logging.WARNING,
    DispatchOutcome.FAILED: logging.WARNING,
}
_STATUS = {
    DispatchOutcome.REJECTED: 400,
    DispatchOutcome.UNAVAILABLE: 503,
    DispatchOutcome.FAILED: 500,
}


def create_app(settings: BridgeSettings, handler: NotificationHandler) -> Starlette:
    """Return the application. An endpoint without a secret does not exist: it answers 404."""

    async def mlflow(request: Request) -> tuple[str, Parsed]:
        body = await _body(request, MAX_BODY_BYTES["mlflow"])
        delivery_id = mlflow_delivery(
            request.headers, body, secrets=settings.mlflow_secrets, now_s=time.time()
        )
        return delivery_id, from_mlflow(body, delivery_id)

    async def s3(request: Request) -> tuple[str, Parsed]:
        check_token(request.headers, tokens=settings.s3_tokens)
        body = await _body(request, MAX_BODY_BYTES["s3"])
        # S3 servers send no delivery id. A retry has the same bytes; another event differs in time.
        delivery_id = hashlib.sha256(body).hexdigest()[:32]
        return delivery_id, from_s3(body, delivery_id, root_uri=settings.bases_uri)

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def ready(request: Request) -> Response:
        is_ready = await handler.dispatcher.is_ready()
        return JSONResponse({"prefect": is_ready}, 200 if is_ready else 503)

    async def metrics(request: Request) -> Response:
        return Response(handler.metrics.text(), media_type="text/plain; version=0.0.4")

    routes = [Route("/health", health), Route("/ready", ready), Route("/metrics", metrics)]
    if settings.mlflow_secrets:
        routes.append(Route(MLFLOW_PATH, _endpoint("mlflow", mlflow, handler), methods=["POST"]))
    if settings.s3_tokens:
        routes.append(Route(S3_PATH, _endpoint("s3", s3, handler), methods=["POST"]))
    return Starlette(routes=routes)


_Reader = Callable[[Request], Awaitable[tuple[str, Parsed]]]


def _endpoint(
    sender: str, read: _Reader, handler: NotificationHandler
) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(request: Request) -> Response:
        try:
            delivery_id, parsed = await read(request)
        except (AuthenticationError, _RequestError) as error:
            status = error.status if isinstance(error, _RequestError) else 401
            handler.record_refusal(sender, status, str(error))
            return JSONResponse({"error": str(error)}, status, {"Connection": "close"})
        result = await handler.handle(sender, parsed, delivery_id)
        retry = result.outcome in (DispatchOutcome.UNAVAILABLE, DispatchOutcome.FAILED)
        return JSONResponse(
            {"outcome": result.outcome, "run": result.run_id},
            _STATUS.get(result.outcome, 200),
            headers={"Retry-After": str(_RETRY_AFTER_S)} if retry else None,
        )

    return endpoint


async def _body(request: Request, max_bytes: int) -> bytes:
    """Return the body. Raises _RequestError if it is not JSON, too long or too slow."""
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise _RequestError(415, "the content type is not application/json")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length[:20]) > max_bytes:
        raise _RequestError(413, f"the body is longer than {max_bytes} bytes")
    chunks, size = [], 0
    try:
        async with asyncio.timeout(BODY_DEADLINE_S):
            async for chunk in request.stream():
                size += len(chunk)
                if size > max_bytes:
                    raise _RequestError(413, f"the body is longer than {max_bytes} bytes")
                chunks.append(chunk)
    except TimeoutError as error:
        raise _RequestError(408, f"the body took longer than {BODY_DEADLINE_S:g} s") from error
    except ClientDisconnect as error:
        raise _RequestError(400, "the sender closed the connection") from error
    return b"".join(chunks)
