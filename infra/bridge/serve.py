"""The bridge as a process: the application under uvicorn, the queue, and one run on start-up."""

import asyncio
import uuid
from collections.abc import Coroutine
from functools import partial
from typing import Any

import uvicorn
from prefect.client.orchestration import get_client

from infra.bridge.app import NotificationHandler, create_app
from infra.bridge.dispatcher import Dispatcher, DispatchOutcome
from infra.bridge.logs import log_to
from infra.bridge.loops import forever
from infra.bridge.metrics import Metrics, Place
from infra.bridge.notifications import Notification, NotificationKind
from infra.bridge.prefect_calls import PrefectCalls
from infra.bridge.protocol import MAX_HEAD_BYTES, DeadlineProtocol
from infra.bridge.queue import SqsQueue, consume
from infra.bridge.registry import MlflowNames
from infra.bridge.run_starter import PrefectStarter, come_again_soon
from infra.bridge.settings import BridgeSettings
from infra.bridge.verdicts import Verdicts

__all__ = ["listening", "serve", "start_up"]

_EVENTS_S = 15.0
_LONGEST_PAUSE_S = 30.0
_CONNECTIONS = 1024
"""More at once are answered 503. With the longest body each, they hold 256 MiB."""


async def serve(settings: BridgeSettings) -> None:
    """Answer hints until the process is told to end."""
    log_to()
    hooks = {"event_hooks": {"response": [come_again_soon]}}
    prefect = PrefectCalls(partial(get_client, httpx_settings=hooks))
    dispatcher = Dispatcher(MlflowNames(settings.tracking_uri), PrefectStarter(prefect))
    handler = NotificationHandler(dispatcher, metrics := Metrics())
    server = listening(settings, handler)
    verdicts = Verdicts(prefect, metrics, handler.failures)
    beside: list[Coroutine[Any, Any, None]] = [
        start_up(handler),
        forever(Place.EVENTS, verdicts.look, every_s=_EVENTS_S, failures=handler.failures),
    ]
    if settings.queue_url:
        queue = SqsQueue(settings.queue_url)
        beside.append(consume(queue, handler, root_uri=settings.bases_uri))
    try:
        await _until_ended(server, beside)
    finally:
        await prefect.close()


def listening(settings: BridgeSettings, handler: NotificationHandler) -> uvicorn.Server:
    """Return the server, not started."""
    return uvicorn.Server(
        uvicorn.Config(
            create_app(settings, handler),
            host=settings.host,
            port=settings.port,
            log_config=None,
            access_log=False,  # it would show query strings; every hint is logged by its id
            server_header=False,
            proxy_headers=False,
            limit_concurrency=_CONNECTIONS,
            http=DeadlineProtocol,
            h11_max_incomplete_event_size=MAX_HEAD_BYTES,
            ws="none",
            timeout_graceful_shutdown=5,
        )
    )


async def start_up(handler: NotificationHandler, *, pause_s: float = 2.0) -> None:
    """Start one reconcile of every family: hints may have come while nobody listened."""
    notification = Notification(NotificationKind.START_UP, "", f"start-up-{uuid.uuid4()}")
    while True:
        answer = await handler.take("bridge", notification, notification.delivery_id)
        if answer.outcome not in (DispatchOutcome.UNAVAILABLE, DispatchOutcome.FAILED):
            return
        await asyncio.sleep(pause_s)
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)


async def _until_ended(server: uvicorn.Server, beside: list[Coroutine[Any, Any, None]]) -> None:
    """Run the server; what runs beside it ends with it, and it ends if that fails."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(coroutine) for coroutine in beside]
            await server.serve()
            for task in tasks:
                task.cancel()
    except* SystemExit as ended:  # uvicorn: the port is taken
        raise ended.exceptions[0] from None
