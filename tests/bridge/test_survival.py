"""The bridge continues after invalid events, responses and messages, and after cancelled calls."""

import asyncio
import json
import threading
import time
from contextlib import asynccontextmanager, nullcontext, suppress
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import httpx
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st
from prefect.client.orchestration import PrefectClient
from prefect.events import Event

from infra.bridge.app import NotificationHandler
from infra.bridge.dispatcher import Dispatcher, Run, UnavailableError
from infra.bridge.first_verdict import FirstVerdictMonitor
from infra.bridge.loops import Failures, run_forever
from infra.bridge.metrics import FailureSource, Metrics
from infra.bridge.notifications import Notification, NotificationKind
from infra.bridge.prefect_calls import PrefectCalls
from infra.bridge.queue import MAX_RECEIVES, Message, SqsQueue, consume
from infra.bridge.readiness import Readiness
from infra.bridge.registry import MlflowFamilyLookup
from infra.bridge.run_starter import PrefectRunStarter
from tasks.origin import Origin
from tests.bridge.fakes import FakePrefect, FakeRegistry
from tests.bridge.test_app import JSON, uploaded

NOTIFICATION = Notification(NotificationKind.CHAMPION, "smol", "d-1", "champion")
AT = datetime(2026, 1, 1, tzinfo=UTC)
ODD_RESPONSES = [
    b"<html>504 Gateway Time-out</html>", b"", b"null", b"[]", b"{}", b"{", b'"text"', b"1",
    b"\xff", b'{"id": 1}', b"[" * 20_000, b'[{"id": "x"}]',
    b'{"events": [{}], "total": 1, "next_page": null}',
    b'{"registered_model": null}', b'{"registered_model": {"tags": 3}}',
    b'{"registered_model": {"name": "smol", "tags": [{"key": "trans_peft.kind"}]}}',
]  # fmt: skip


def series(metrics):
    """Return the time series and how many bytes `/metrics` has."""
    text = metrics.text()
    return {line.rpartition(" ")[0] for line in text.decode().splitlines()}, len(text)


def value(metrics, line):
    found = dict(line.rpartition(" ")[::2] for line in metrics.text().decode().splitlines())
    return float(found.get(line, 0))


def failures(metrics, place):
    return value(metrics, f'trans_peft_bridge_failures_total{{place="{place}"}}')


# ------------------------------------------------------------------ Prefect: calls and answers


@asynccontextmanager
async def slow_server(delay_s):
    """Yield the URL of a server that responds after `delay_s[0]` seconds, and its requests."""
    asked, writers = [], []

    async def answer(reader, writer):
        writers.append(writer)
        with suppress(OSError, asyncio.IncompleteReadError):
            while await reader.readuntil(b"\r\n\r\n"):
                asked.append(1)
                await asyncio.sleep(delay_s[0])
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
                await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0, backlog=1024)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/api", asked
        for writer in writers:
            writer.close()
        await asyncio.sleep(0.05)


def test_cancelled_calls_do_not_exhaust_the_client():
    """httpx's pool keeps connections of cancelled calls, and Prefect's client has 16."""

    async def scenario():
        delay_s = [0.3]
        async with slow_server(delay_s) as (url, _):
            calls = PrefectCalls(lambda: PrefectClient(url))

            async def ask(timeout_s):
                try:
                    answer = await calls.call(lambda c: c._client.get("/x"), timeout_s=timeout_s)
                    return answer.status_code
                except TimeoutError:
                    return "late"

            many = await asyncio.gather(*(ask(0.5) for _ in range(400)))
            delay_s[0] = 0
            after = [await ask(5) for _ in range(20)]
            await calls.close()
            return many, after

    many, after = asyncio.run(scenario())
    assert "late" in many
    assert after == [200] * 20


def test_a_running_call_keeps_its_client_while_others_are_cancelled():
    opened, closed = [], []

    @asynccontextmanager
    async def client():
        opened.append(1)
        yield len(opened)
        closed.append(1)

    async def scenario():
        calls = PrefectCalls(client)
        steady = asyncio.create_task(calls.call(lambda c: asyncio.sleep(0.2, c), timeout_s=5))
        await asyncio.sleep(0.01)
        with pytest.raises(TimeoutError):
            await calls.call(lambda c: asyncio.sleep(9), timeout_s=0.05)
        assert closed == []  # the first client still serves a call
        second = await calls.call(lambda c: asyncio.sleep(0, c), timeout_s=1)
        assert (await steady, second) == (1, 2)
        await asyncio.sleep(0.01)
        assert len(closed) == 1
        await calls.close()
        assert len(closed) == 2

    asyncio.run(scenario())


def test_concurrent_calls_share_one_probe_and_its_cached_result():
    asked = []

    async def probe():
        asked.append(1)
        await asyncio.sleep(0.05)
        return True

    async def scenario():
        ready = Readiness(probe, valid_s=0.2, timeout_s=1)
        assert await asyncio.gather(*(ready.now() for _ in range(500))) == [True] * 500
        waits = asyncio.create_task(ready.now())
        await asyncio.sleep(0)
        waits.cancel()  # cancels this caller, not the probe
        assert await ready.now()
        assert len(asked) == 1
        await asyncio.sleep(0.25)
        assert await ready.now()
        assert len(asked) == 2

    asyncio.run(scenario())


def prefect_with_response(body, status=200):
    transport = httpx.MockTransport(lambda request: httpx.Response(status, content=body))
    return PrefectCalls(
        lambda: PrefectClient("http://p/api", httpx_settings={"transport": transport})
    )


def start_with(prefect):
    """Return the run or the UnavailableError, and the readiness."""

    async def scenario():
        run_starter = PrefectRunStarter(prefect, timeout_s=5)
        try:
            started = (await run_starter.start({"smol": NOTIFICATION}))["smol"]
        except UnavailableError as error:
            started = error
        metrics = Metrics()
        looks = FirstVerdictMonitor(prefect, metrics, Failures(metrics))
        with suppress(Exception):  # `run_forever` records it
            await looks.poll()
        return started, await run_starter.is_reachable()

    return asyncio.run(scenario())


@pytest.mark.parametrize("status", [200, 401, 404, 422, 500])
@pytest.mark.parametrize("body", ODD_RESPONSES)
def test_any_response_of_prefect_is_a_run_or_unavailable(body, status):
    started, ready = start_with(prefect_with_response(body, status))
    assert isinstance(started, UnavailableError)
    assert ready is False


@examples(max_examples=40, deadline=None)
@given(JSON)
def test_any_json_of_prefect_is_a_run_or_unavailable(document):
    started, _ = start_with(prefect_with_response(json.dumps(document).encode()))
    assert isinstance(started, UnavailableError | Run)


# ---------------------------------------------------------------------------- MLflow: answers


@pytest.fixture(scope="module")
def mlflow():
    """A `MlflowFamilyLookup` (`.names`) whose server responds with `.body` and `.status`."""
    answer = SimpleNamespace(body=b"", status=200)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            first = "registered-models/search" in self.path  # asks whether this is MLflow
            self.send_response(200 if first else answer.status)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(b"{}" if first else answer.body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        answer.names = MlflowFamilyLookup(f"http://127.0.0.1:{server.server_port}")
        yield answer
    server.shutdown()
    server.server_close()


def family(mlflow, kind=NotificationKind.CHAMPION):
    try:
        return mlflow.names.family(Notification(kind, "smol", "d-1", "on-0123456789ab"))
    except UnavailableError:
        return UnavailableError


@pytest.mark.parametrize("status", [200, 404, 500])
@pytest.mark.parametrize("body", ODD_RESPONSES)
def test_any_response_of_mlflow_is_none_or_unavailable(mlflow, body, status):
    mlflow.body, mlflow.status = body, status
    for kind in (NotificationKind.CHAMPION, NotificationKind.APPROVAL, NotificationKind.REQUESTED):
        assert family(mlflow, kind) in (None, UnavailableError)


@examples(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(JSON)
def test_any_json_of_mlflow_is_none_or_unavailable(mlflow, document):
    mlflow.body, mlflow.status = json.dumps({"registered_model": document}).encode(), 200
    assert family(mlflow) in (None, UnavailableError)


@pytest.mark.parametrize("name", ["", "..", "a/b", "a\nb", "x" * 300, "\ud800"])
def test_an_invalid_family_in_a_tag_is_none(mlflow, name):
    tags = [
        {"key": "trans_peft.kind", "value": "adapter"},
        {"key": "trans_peft.family", "value": name},
    ]
    mlflow.body = json.dumps({"registered_model": {"name": "chat", "tags": tags}}).encode()
    mlflow.status = 200
    assert family(mlflow, NotificationKind.REQUESTED) in (None, UnavailableError)


# ------------------------------------------------------------------------------------- events


class Events:
    """Prefect's client, with all events on one page."""

    def __init__(self, *events):
        self.events = list(events)
        self.broken = None

    async def read_events(self, wanted, limit):
        if self.broken:
            raise self.broken
        return SimpleNamespace(events=self.events, next_page=None)


def judged(payload, resource="trans-peft.adapter.chat"):
    return Event(
        event="trans-peft.adapter.judged",
        resource={"prefect.resource.id": resource},
        payload=payload,
        occurred=datetime.now(UTC) + timedelta(seconds=1),
    )


def polled(client, looks=1):
    metrics = Metrics()
    verdicts = FirstVerdictMonitor(
        PrefectCalls(lambda: nullcontext(client)), metrics, Failures(metrics)
    )

    async def scenario():
        for _ in range(looks):
            await verdicts.poll()

    asyncio.run(scenario())
    return metrics


def counted(metrics, kind="upload"):
    return value(metrics, f'trans_peft_first_verdict_lag_seconds_count{{kind="{kind}"}}')


GOOD = Origin("good", "upload", AT).payload
ODD_PAYLOADS = [
    {**GOOD, "notification_at": at}
    for at in ("0001-01-01", "0001-01-01T00:00:00+23:59", "9999-12-31T23:59:59-23:59", "", None)
] + [
    {**GOOD, "notification": "x" * 1_000_000}, {**GOOD, "notification": ["a"]},
    {**GOOD, "notification": ""},
    {**GOOD, "notification_kind": "x" * 100_000}, {**GOOD, "notification_kind": {"a": 1}},
    {**GOOD, "notification_kind": ""},
    {"notification": 1, "notification_kind": 2, "notification_at": 3}, {},
]  # fmt: skip


@pytest.mark.parametrize("payload", ODD_PAYLOADS)
def test_an_invalid_event_is_skipped_and_the_next_valid_one_is_counted(payload):
    assert counted(polled(Events(judged(payload), judged({**GOOD, "notification": "next"})))) == 1


@examples(max_examples=60, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(["notification", "notification_kind", "notification_at", "x"]), JSON
    )
)
def test_any_payload_of_an_event_is_skipped_or_counted(payload):
    assert counted(polled(Events(judged(payload), judged({**GOOD, "notification": "next"})))) == 1


@examples(max_examples=60, deadline=None)
@given(st.datetimes(timezones=st.none() | st.timezones() | st.just(UTC)))
def test_any_time_in_an_event_is_a_lag_or_is_skipped(at):
    for text in (at.isoformat(), at.date().isoformat()):
        assert counted(polled(Events(judged({**GOOD, "notification_at": text}), judged(GOOD)))) >= 1


def test_an_event_that_fails_is_recorded_once_although_each_poll_reads_it():
    broken = judged(GOOD)
    object.__setattr__(broken, "resource", None)
    metrics = polled(Events(broken, judged({**GOOD, "notification": "next"})), looks=5)
    assert failures(metrics, "event") == 1
    assert counted(metrics) == 2  # only writing the log line of the first event failed


def test_labels_of_metrics_have_closed_sets_of_values():
    events = [judged({"notification": f"h{n}", "notification_kind": f"k-{'ab'[n % 2] * (n % 18)}",
                      "notification_at": AT.isoformat()}) for n in range(400)]  # fmt: skip
    metrics = polled(Events(*events))
    for n in range(1000):
        metrics.answered(f"sender-{n}", f"kind-{n}", f"outcome-{n}", 0.1)
        metrics.run_exists(f"kind-{n}", AT)
        metrics.failed(f"place-{n}")
    lines, size = series(metrics)
    assert counted(metrics, "other") == 400
    assert len(lines) < 150
    assert size < 20_000


@pytest.mark.parametrize("error", [ValueError("html"), httpx.ConnectError("no"), KeyError("x")])
def test_polling_continues_after_any_error(error):
    client, metrics = Events(judged(GOOD)), Metrics()
    client.broken = error
    noted = Failures(metrics)
    verdicts = FirstVerdictMonitor(PrefectCalls(lambda: nullcontext(client)), metrics, noted)

    async def scenario():
        loop = asyncio.create_task(
            run_forever(FailureSource.EVENTS, verdicts.poll, interval_s=0.01, failures=noted)
        )
        await asyncio.sleep(0.1)
        client.broken = None
        async with asyncio.timeout(5):
            while not counted(metrics):
                await asyncio.sleep(0.01)
        assert not loop.done()
        loop.cancel()

    asyncio.run(scenario())
    assert failures(metrics, "events") >= 1


def test_a_window_that_cannot_be_read_is_skipped():
    """Prefect's client parses a whole page: one event that it cannot parse fails all of them."""
    client, metrics = Events(), Metrics()
    client.broken = ValueError("one of the events")
    verdicts = FirstVerdictMonitor(
        PrefectCalls(lambda: nullcontext(client)), metrics, Failures(metrics)
    )
    with pytest.raises(ValueError, match="one of"):
        asyncio.run(verdicts.poll())
    assert datetime.now(UTC) - verdicts._since < timedelta(minutes=11)


def test_the_number_of_pages_of_one_poll_is_limited():
    class Endless(Events):
        async def read_events(self, wanted, limit):
            return SimpleNamespace(events=[judged(GOOD)], next_page="http://p/next")

        async def read_events_page(self, _):
            return await self.read_events(None, None)

    began = time.monotonic()
    assert counted(polled(Endless(), looks=2)) == 1
    assert time.monotonic() - began < 10


def test_the_pause_grows_with_each_failure_in_a_row():
    times = []

    async def step():
        times.append(time.monotonic())
        raise RuntimeError("always")

    async def scenario():
        with suppress(TimeoutError):
            async with asyncio.timeout(1):
                metrics = Metrics()
                await run_forever(
                    FailureSource.QUEUE,
                    step,
                    interval_s=0.0,
                    retry_s=0.05,
                    failures=Failures(metrics),
                )

    asyncio.run(scenario())
    assert 3 <= len(times) <= 6


# -------------------------------------------------------------------------------------- queue


class Mailbox:
    """A queue without a dead-letter queue: messages return immediately unless they are deleted."""

    def __init__(self, *messages):
        self.messages = dict(enumerate(messages))
        self.received = dict.fromkeys(self.messages, 0)

    def receive(self):
        time.sleep(0.002)
        found = []
        for key, (name, body) in self.messages.items():
            self.received[key] += 1
            found.append(Message(name, str(key), body, self.received[key]))
        return found

    def extend(self, message):
        pass

    def delete(self, message):
        del self.messages[int(message.receipt)]


def process_all(mailbox, handler, timeout_s=20):
    async def scenario():
        loop = asyncio.create_task(consume(mailbox, handler, pause_s=0.01))
        async with asyncio.timeout(timeout_s):
            while mailbox.messages:
                assert not loop.done(), loop.result()
                await asyncio.sleep(0.005)
        loop.cancel()

    asyncio.run(scenario())
    return handler.metrics


def handler_with(prefect):
    return NotificationHandler(Dispatcher(FakeRegistry({}), prefect), Metrics())


BODIES = [
    "\ud800",
    "",
    "{",
    "[" * 20_000,
    "1" * 5_000,
    "null",
    '{"Records": 3}',
    '{"Records": [0]}',
]
BODIES += [json.dumps(uploaded("\ud800/v1/trans_peft_manifest.json")), "\x00"]


@pytest.mark.parametrize("body", BODIES)
def test_an_invalid_message_is_deleted_after_the_maximum_of_receives(body):
    prefect = FakePrefect()
    box = Mailbox(("invalid", body), ("good", json.dumps(uploaded())))
    metrics = process_all(box, handler_with(prefect))
    assert box.received[0] == MAX_RECEIVES
    assert box.received[1] == 1
    assert len(prefect.asked) == 1
    assert not failures(metrics, "queue")


def test_a_message_on_which_the_bridge_fails_is_deleted_after_the_maximum_of_receives():
    class Buggy(FakePrefect):
        async def start(self, wanted):
            raise RuntimeError("a bug")

    box = Mailbox(("m", json.dumps(uploaded())))
    metrics = process_all(box, handler_with(Buggy()))
    assert box.received[0] == MAX_RECEIVES
    assert failures(metrics, "notification") == MAX_RECEIVES


@examples(max_examples=30, deadline=None)
@given(
    st.lists(
        st.tuples(st.text(max_size=300), st.text(max_size=200) | JSON.map(json.dumps)), max_size=5
    )
)
def test_all_messages_are_processed_and_deleted(messages):
    process_all(Mailbox(*messages), handler_with(FakePrefect()))


@pytest.mark.parametrize(
    "answer", [{}, {"Messages": []}, {"Messages": [{}]},
               {"Messages": [{"Body": "x"}, {"MessageId": "1"}]},
               {"Messages": [{"Attributes": {"ApproximateReceiveCount": "many"}}]}],
)  # fmt: skip
def test_missing_parts_of_an_sqs_response_are_empty(answer, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "x")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    queue = SqsQueue("http://127.0.0.1:1/account/name")
    queue._sqs = SimpleNamespace(receive_message=lambda **_: answer)
    assert all(message.receives == 1 for message in queue.receive())


@pytest.mark.parametrize(
    "error", [KeyError("Body"), ValueError("html"), OSError("no"), TypeError()]
)
def test_polling_continues_after_any_error_of_the_queue(error):
    class Odd(Mailbox):
        fails = 3

        def receive(self):
            if self.fails:
                self.fails -= 1
                raise error
            return super().receive()

    box = Odd(("good", json.dumps(uploaded())))
    metrics = process_all(box, handler_with(FakePrefect()))
    assert failures(metrics, "queue") == 3


def test_the_loop_continues_if_a_message_cannot_be_deleted():
    class UndeletableQueue(Mailbox):
        fails = 2

        def delete(self, message):
            if self.fails:
                self.fails -= 1
                raise ValueError("an odd answer")
            super().delete(message)

    metrics = process_all(
        UndeletableQueue(("good", json.dumps(uploaded()))), handler_with(FakePrefect())
    )
    assert failures(metrics, "message") == 2
