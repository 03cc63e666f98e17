"""Runs the bridge: the HTTP server, the queue, the monitors of Prefect, and one initial run."""

import asyncio
import uuid
from collections.abc import Coroutine
from functools import partial
from typing import Any

import uvicorn
from prefect.client.orchestration import get_client

from infra.bridge.app import NotificationHandler, create_app
from infra.bridge.dispatcher import Dispatcher, DispatchOutcome
from infra.bridge.first_verdict import FirstVerdictMonitor
from infra.bridge.logs import configure_logging
from infra.bridge.loops import run_forever
from infra.bridge.metrics import FailureSource, Metrics
from infra.bridge.notifications import Notification, NotificationKind
from infra.bridge.prefect_calls import PrefectCalls
from infra.bridge.prefect_monitor import PrefectMonitor
from infra.bridge.protocol import MAX_HEADERS_BYTES, DeadlineProtocol
from infra.bridge.queue import SqsQueue, consume
from infra.bridge.registry import MlflowFamilyLookup
from infra.bridge.run_starter import PrefectRunStarter, shorten_retry_after
from infra.bridge.settings import BridgeSettings

__all__ = ["create_server", "serve", "start_initial_run"]

_EVENTS_S = 15.0
_STATE_S = 30.0
_MAX_PAUSE_S = 30.0
_MAX_CONNECTIONS = 1024
"""uvicorn answers 503 beyond this. With the longest body on each, they hold 256 MiB."""


async def serve(settings: BridgeSettings) -> None:
    """Answer notifications until the process receives a signal to end."""
    configure_logging()
    hooks = {"event_hooks": {"response": [shorten_retry_after]}}
    prefect = PrefectCalls(partial(get_client, httpx_settings=hooks))
    dispatcher = Dispatcher(MlflowFamilyLookup(settings.tracking_uri), PrefectRunStarter(prefect))
    handler = NotificationHandler(dispatcher, metrics := Metrics())
    server = create_server(settings, handler)
    monitor = FirstVerdictMonitor(prefect, metrics, handler.failures)
    background: list[Coroutine[Any, Any, None]] = [
        start_initial_run(handler),
        run_forever(
            FailureSource.EVENTS, monitor.poll, interval_s=_EVENTS_S, failures=handler.failures
        ),
        run_forever(
            FailureSource.STATE,
            PrefectMonitor(prefect, metrics).poll,
            interval_s=_STATE_S,
            failures=handler.failures,
        ),
    ]
    if settings.queue_url:
        queue = SqsQueue(settings.queue_url)
        background.append(consume(queue, handler, root_uri=settings.bases_uri))
    try:
        await _run_until_exit(server, background)
    finally:
        await prefect.close()


def create_server(settings: BridgeSettings, handler: NotificationHandler) -> uvicorn.Server:
    """Return the HTTP server, not started."""
    return uvicorn.Server(
        uvicorn.Config(
            create_app(settings, handler),
            host=settings.host,
            port=settings.port,
            log_config=None,
            access_log=False,  # it would show query strings; each delivery is logged by its id
            server_header=False,
            proxy_headers=False,
            limit_concurrency=_MAX_CONNECTIONS,
            http=DeadlineProtocol,
            h11_max_incomplete_event_size=MAX_HEADERS_BYTES,
            ws="none",
            timeout_graceful_shutdown=5,
        )
    )


async def start_initial_run(handler: NotificationHandler, *, pause_s: float = 2.0) -> None:
    """Start one reconcile of all families, for notifications that were missed while stopped."""
    notification = Notification(NotificationKind.START_UP, "", f"start-up-{uuid.uuid4()}")
    while True:
        result = await handler.handle("bridge", notification, notification.delivery_id)
        if result.outcome not in (DispatchOutcome.UNAVAILABLE, DispatchOutcome.FAILED):
            return
        await asyncio.sleep(pause_s)
        pause_s = min(2 * pause_s, _MAX_PAUSE_S)


async def _run_until_exit(
    server: uvicorn.Server, background: list[Coroutine[Any, Any, None]]
) -> None:
    """Run the server and the background tasks. If one of them fails, all of them end."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(coroutine) for coroutine in background]
            await server.serve()
            for task in tasks:
                task.cancel()
    except* SystemExit as ended:  # uvicorn exits if the port is taken
        raise ended.exceptions[0] from None
