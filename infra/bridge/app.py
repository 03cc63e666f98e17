"""The ASGI application: who sends, what it means, and an answer the sender understands.

What is cheap to refuse is refused first: path and method, content type, a bearer token, the stated
length. A body is read against a bound and a deadline, whatever its length was said to be, and
nothing of it is kept. 2xx: the run exists, or nothing had to run. 4xx: never right. 5xx: try again.
"""

import asyncio
import hashlib
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
from infra.bridge.metrics import Metrics, Place
from infra.bridge.notifications import Ignored, Notification, Parsed, Rejected, from_mlflow, from_s3
from infra.bridge.settings import BridgeSettings

__all__ = ["MAX_BODY_BYTES", "NotificationHandler", "create_app"]

MAX_BODY_BYTES = {"mlflow": 256 << 10, "s3": 4 << 20}
"""MLflow's signature can be checked once the body is read, an S3 server's token before: it may send
more. The filer's event lists all parts of a file; what else is sent has a few thousand bytes."""

BODY_DEADLINE_S = 10.0
_RETRY_AFTER_S = 15
"""MLflow tries three times more, and waits as long as it is told: 45 s instead of 7."""


class _Refusal(Exception):  # noqa: N818  an answer, not an error of ours
    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status


class NotificationHandler:
    """Takes what was parsed to the desk, and counts and logs what became of it."""

    def __init__(self, dispatcher: Dispatcher, metrics: Metrics) -> None:
        self.dispatcher = dispatcher
        self.metrics = metrics
        self.failures = Failures(metrics)

    async def take(self, sender: str, parsed: Parsed, delivery_id: str) -> DispatchResult:
        """Return the answer to one delivery. Raises nothing: see UNAVAILABLE and FAILED."""
        began = time.monotonic()
        kind = parsed.kind if isinstance(parsed, Notification) else "none"
        why = parsed.why if isinstance(parsed, Rejected | Ignored) else ""
        match parsed:
            case Notification():
                try:
                    answer = await self.dispatcher.answer(parsed)
                except UnavailableError as error:
                    answer, why = DispatchResult(DispatchOutcome.UNAVAILABLE), str(error)
                except Exception as error:
                    self.failures.note(Place.HINT, error, delivery=delivery_id)
                    answer, why = DispatchResult(DispatchOutcome.FAILED), type(error).__name__
            case Ignored():
                answer = DispatchResult(DispatchOutcome.IGNORED)
            case Rejected():
                answer = DispatchResult(DispatchOutcome.REJECTED)
        seconds = time.monotonic() - began
        self.metrics.answered(sender, kind, answer.outcome, seconds)
        if isinstance(parsed, Notification) and answer.run_id:
            self.metrics.run_exists(kind, parsed.at)
        LOG.log(
            _LEVELS.get(answer.outcome, 20),
            "hint answered",
            extra={
                "sender": sender,
                "delivery": delivery_id,
                "kind": kind,
                "about": parsed.name if isinstance(parsed, Notification) else "",
                "outcome": answer.outcome,
                "run": answer.run_id,
                "why": why,
                "seconds": round(seconds, 4),
            },
        )
        return answer

    def refused(self, sender: str, status: int, why: str) -> None:
        """Count and log a request that was turned away before it was read."""
        self.metrics.answered(sender, "none", DispatchOutcome.REFUSED, 0.0)
        LOG.warning("request refused", extra={"sender": sender, "status": status, "why": why})


_LEVELS = {
    DispatchOutcome.IGNORED: 10,
    DispatchOutcome.REJECTED: 30,
    DispatchOutcome.UNAVAILABLE: 30,
    DispatchOutcome.FAILED: 30,
}
_STATUS = {
    DispatchOutcome.REJECTED: 400,
    DispatchOutcome.UNAVAILABLE: 503,
    DispatchOutcome.FAILED: 500,
}


def create_app(settings: BridgeSettings, handler: NotificationHandler) -> Starlette:
    """Return the application. An entrance without a secret is not there: 404."""

    async def mlflow(request: Request) -> tuple[str, Parsed]:
        body = await _body(request, MAX_BODY_BYTES["mlflow"])
        delivery_id = mlflow_delivery(
            request.headers, body, secrets=settings.mlflow_secrets, now_s=time.time()
        )
        return delivery_id, from_mlflow(body, delivery_id)

    async def s3(request: Request) -> tuple[str, Parsed]:
        check_token(request.headers, tokens=settings.s3_tokens)
        body = await _body(request, MAX_BODY_BYTES["s3"])
        # These senders give no id: a retry has the same bytes, another event another time.
        delivery_id = hashlib.sha256(body).hexdigest()[:32]
        return delivery_id, from_s3(body, delivery_id, root_uri=settings.bases_uri)

    async def health(request: Request) -> Response:
        return JSONResponse({"alive": True})

    async def ready(request: Request) -> Response:
        reachable = await handler.dispatcher.reachable()
        return JSONResponse({"prefect": reachable}, 200 if reachable else 503)

    async def metrics(request: Request) -> Response:
        return Response(handler.metrics.text(), media_type="text/plain; version=0.0.4")

    routes = [Route("/health", health), Route("/ready", ready), Route("/metrics", metrics)]
    if settings.mlflow_secrets:
        routes.append(
            Route("/hints/mlflow", _entrance("mlflow", mlflow, handler), methods=["POST"])
        )
    if settings.s3_tokens:
        routes.append(Route("/hints/s3", _entrance("s3", s3, handler), methods=["POST"]))
    return Starlette(routes=routes)


_Reader = Callable[[Request], Awaitable[tuple[str, Parsed]]]


def _entrance(
    sender: str, read: _Reader, handler: NotificationHandler
) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(request: Request) -> Response:
        try:
            delivery_id, parsed = await read(request)
        except (AuthenticationError, _Refusal) as refusal:
            status = refusal.status if isinstance(refusal, _Refusal) else 401
            handler.refused(sender, status, str(refusal))
            return JSONResponse({"refused": str(refusal)}, status, {"Connection": "close"})
        answer = await handler.take(sender, parsed, delivery_id)
        again = answer.outcome in (DispatchOutcome.UNAVAILABLE, DispatchOutcome.FAILED)
        return JSONResponse(
            {"outcome": answer.outcome, "run": answer.run_id},
            _STATUS.get(answer.outcome, 200),
            headers={"Retry-After": str(_RETRY_AFTER_S)} if again else None,
        )

    return endpoint


async def _body(request: Request, most_bytes: int) -> bytes:
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise _Refusal(415, "the content type is not application/json")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length[:20]) > most_bytes:
        raise _Refusal(413, f"more than {most_bytes} bytes")
    chunks, size = [], 0
    try:
        async with asyncio.timeout(BODY_DEADLINE_S):
            async for chunk in request.stream():
                size += len(chunk)
                if size > most_bytes:
                    raise _Refusal(413, f"more than {most_bytes} bytes")
                chunks.append(chunk)
    except TimeoutError as error:
        raise _Refusal(408, f"the body took longer than {BODY_DEADLINE_S:g} s") from error
    except ClientDisconnect as error:
        raise _Refusal(400, "the sender went away") from error
    return b"".join(chunks)
