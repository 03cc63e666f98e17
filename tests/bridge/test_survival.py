"""The bridge survives odd events, odd answers, odd messages and calls that are cut off."""

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
from infra.bridge.loops import Failures, forever
from infra.bridge.metrics import Metrics, Place
from infra.bridge.notifications import Notification, NotificationKind
from infra.bridge.prefect_calls import PrefectCalls
from infra.bridge.queue import MOST_RECEIVES, Message, SqsQueue, consume
from infra.bridge.readiness import Readiness
from infra.bridge.registry import MlflowNames
from infra.bridge.run_starter import PrefectStarter
from infra.bridge.verdicts import Verdicts
from tasks.origin import Origin
from tests.bridge.fakes import FakePrefect, FakeRegistry
from tests.bridge.test_app import JSON, uploaded

HINT = Notification(NotificationKind.CHAMPION, "smol", "d-1", "champion")
AT = datetime(2026, 1, 1, tzinfo=UTC)
ODD_ANSWERS = [
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
    """A server that answers each request after `delay_s[0]` seconds, and how often it was asked."""
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


def test_calls_that_were_cut_off_leave_a_client_that_answers():
    """The pool of httpx keeps the connections of cancelled calls; Prefect's client has 16."""

    async def story():
        delay_s = [0.3]
        async with slow_server(delay_s) as (url, _):
            calls = PrefectCalls(lambda: PrefectClient(url))

            async def ask(patience_s):
                try:
                    answer = await calls.call(lambda c: c._client.get("/x"), patience_s=patience_s)
                    return answer.status_code
                except TimeoutError:
                    return "late"

            many = await asyncio.gather(*(ask(0.5) for _ in range(400)))
            delay_s[0] = 0
            after = [await ask(5) for _ in range(20)]
            await calls.close()
            return many, after

    many, after = asyncio.run(story())
    assert "late" in many
    assert after == [200] * 20


def test_a_call_that_is_not_cut_off_keeps_its_client_while_others_are():
    opened, closed = [], []

    @asynccontextmanager
    async def client():
        opened.append(1)
        yield len(opened)
        closed.append(1)

    async def story():
        calls = PrefectCalls(client)
        steady = asyncio.create_task(calls.call(lambda c: asyncio.sleep(0.2, c), patience_s=5))
        await asyncio.sleep(0.01)
        with pytest.raises(TimeoutError):
            await calls.call(lambda c: asyncio.sleep(9), patience_s=0.05)
        assert closed == []  # the first client still serves a call
        second = await calls.call(lambda c: asyncio.sleep(0, c), patience_s=1)
        assert (await steady, second) == (1, 2)
        await asyncio.sleep(0.01)
        assert len(closed) == 1
        await calls.close()
        assert len(closed) == 2

    asyncio.run(story())


def test_one_probe_answers_everybody_for_a_while():
    asked = []

    async def probe():
        asked.append(1)
        await asyncio.sleep(0.05)
        return True

    async def story():
        ready = Readiness(probe, valid_s=0.2, patience_s=1)
        assert await asyncio.gather(*(ready.now() for _ in range(500))) == [True] * 500
        waits = asyncio.create_task(ready.now())
        await asyncio.sleep(0)
        waits.cancel()  # who hangs up cancels nothing
        assert await ready.now()
        assert len(asked) == 1
        await asyncio.sleep(0.25)
        assert await ready.now()
        assert len(asked) == 2

    asyncio.run(story())


def prefect_that_answers(body, status=200):
    transport = httpx.MockTransport(lambda request: httpx.Response(status, content=body))
    return PrefectCalls(
        lambda: PrefectClient("http://p/api", httpx_settings={"transport": transport})
    )


def asked_of(prefect):
    """Return a run or UnavailableError, and readiness."""

    async def story():
        run_starter = PrefectStarter(prefect, patience_s=5)
        try:
            started = (await run_starter.start({"smol": HINT}))["smol"]
        except UnavailableError as error:
            started = error
        metrics = Metrics()
        looks = Verdicts(prefect, metrics, Failures(metrics))
        with suppress(Exception):  # `forever` notes it
            await looks.look()
        return started, await run_starter.reachable()

    return asyncio.run(story())


@pytest.mark.parametrize("status", [200, 401, 404, 422, 500])
@pytest.mark.parametrize("body", ODD_ANSWERS)
def test_any_answer_of_prefect_is_a_run_or_unavailable(body, status):
    started, ready = asked_of(prefect_that_answers(body, status))
    assert isinstance(started, UnavailableError)
    assert ready is False


@examples(max_examples=40, deadline=None)
@given(JSON)
def test_any_json_of_prefect_is_a_run_or_unavailable(document):
    started, _ = asked_of(prefect_that_answers(json.dumps(document).encode()))
    assert isinstance(started, UnavailableError | Run)


# ---------------------------------------------------------------------------- MLflow: answers


@pytest.fixture(scope="module")
def mlflow():
    """MlflowNames before a server that answers whatever `answer` holds."""
    answer = SimpleNamespace(body=b"", status=200)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(answer.status)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(answer.body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        answer.names = MlflowNames(f"http://127.0.0.1:{server.server_port}")
        yield answer
    server.shutdown()
    server.server_close()


def family(mlflow, kind=NotificationKind.CHAMPION):
    try:
        return mlflow.names.family(Notification(kind, "smol", "d-1", "on-0123456789ab"))
    except UnavailableError:
        return UnavailableError


@pytest.mark.parametrize("status", [200, 404, 500])
@pytest.mark.parametrize("body", ODD_ANSWERS)
def test_any_answer_of_mlflow_is_nothing_or_unavailable(mlflow, body, status):
    mlflow.body, mlflow.status = body, status
    for kind in (NotificationKind.CHAMPION, NotificationKind.APPROVAL, NotificationKind.ASKED):
        assert family(mlflow, kind) in (None, UnavailableError)


@examples(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(JSON)
def test_any_json_of_mlflow_is_nothing_or_unavailable(mlflow, document):
    mlflow.body, mlflow.status = json.dumps({"registered_model": document}).encode(), 200
    assert family(mlflow) in (None, UnavailableError)


@pytest.mark.parametrize("name", ["", "..", "a/b", "a\nb", "x" * 300, "\ud800"])
def test_the_family_in_a_tag_is_a_name_or_nothing(mlflow, name):
    tags = [
        {"key": "trans_peft.kind", "value": "adapter"},
        {"key": "trans_peft.family", "value": name},
    ]
    mlflow.body = json.dumps({"registered_model": {"name": "chat", "tags": tags}}).encode()
    mlflow.status = 200
    assert family(mlflow, NotificationKind.ASKED) in (None, UnavailableError)


# ------------------------------------------------------------------------------------- events


class Events:
    """Prefect's events, all on one page."""

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


def looked(client, looks=1):
    metrics = Metrics()
    verdicts = Verdicts(PrefectCalls(lambda: nullcontext(client)), metrics, Failures(metrics))

    async def story():
        for _ in range(looks):
            await verdicts.look()

    asyncio.run(story())
    return metrics


def counted(metrics, kind="upload"):
    return value(metrics, f'trans_peft_first_verdict_lag_seconds_count{{kind="{kind}"}}')


GOOD = Origin("good", "upload", AT).payload
ODD_PAYLOADS = [
    {**GOOD, "hint_at": at}
    for at in ("0001-01-01", "0001-01-01T00:00:00+23:59", "9999-12-31T23:59:59-23:59", "", None)
] + [
    {**GOOD, "hint": "x" * 1_000_000}, {**GOOD, "hint": ["a"]}, {**GOOD, "hint": ""},
    {**GOOD, "hint_kind": "x" * 100_000}, {**GOOD, "hint_kind": {"a": 1}},
    {**GOOD, "hint_kind": ""},
    {"hint": 1, "hint_kind": 2, "hint_at": 3}, {},
]  # fmt: skip


@pytest.mark.parametrize("payload", ODD_PAYLOADS)
def test_an_odd_event_is_passed_over_and_the_good_one_after_it_is_counted(payload):
    assert counted(looked(Events(judged(payload), judged({**GOOD, "hint": "next"})))) == 1


@examples(max_examples=60, deadline=None)
@given(st.dictionaries(st.sampled_from(["hint", "hint_kind", "hint_at", "x"]), JSON))
def test_any_payload_of_an_event_is_passed_over_or_counted(payload):
    assert counted(looked(Events(judged(payload), judged({**GOOD, "hint": "next"})))) == 1


@examples(max_examples=60, deadline=None)
@given(st.datetimes(timezones=st.none() | st.timezones() | st.just(UTC)))
def test_any_time_of_a_hint_is_a_lag_or_no_hint(at):
    for text in (at.isoformat(), at.date().isoformat()):
        assert counted(looked(Events(judged({**GOOD, "hint_at": text}), judged(GOOD)))) >= 1


def test_an_event_that_fails_is_noted_once_however_often_it_is_read():
    broken = judged(GOOD)
    object.__setattr__(broken, "resource", None)
    metrics = looked(Events(broken, judged({**GOOD, "hint": "next"})), looks=5)
    assert failures(metrics, "event") == 1
    assert counted(metrics) == 2  # it is the log line of the first that failed


def test_labels_come_from_closed_sets_whatever_events_and_hints_say():
    events = [judged({"hint": f"h{n}", "hint_kind": f"k-{'ab'[n % 2] * (n % 18)}",
                      "hint_at": AT.isoformat()}) for n in range(400)]  # fmt: skip
    metrics = looked(Events(*events))
    for n in range(1000):
        metrics.answered(f"sender-{n}", f"kind-{n}", f"outcome-{n}", 0.1)
        metrics.run_exists(f"kind-{n}", AT)
        metrics.failed(f"place-{n}")
    lines, size = series(metrics)
    assert counted(metrics, "other") == 400
    assert len(lines) < 150
    assert size < 20_000


@pytest.mark.parametrize("error", [ValueError("html"), httpx.ConnectError("no"), KeyError("x")])
def test_looks_go_on_after_any_answer(error):
    client, metrics = Events(judged(GOOD)), Metrics()
    client.broken = error
    noted = Failures(metrics)
    verdicts = Verdicts(PrefectCalls(lambda: nullcontext(client)), metrics, noted)

    async def story():
        loop = asyncio.create_task(
            forever(Place.EVENTS, verdicts.look, every_s=0.01, failures=noted)
        )
        await asyncio.sleep(0.1)
        client.broken = None
        async with asyncio.timeout(5):
            while not counted(metrics):
                await asyncio.sleep(0.01)
        assert not loop.done()
        loop.cancel()

    asyncio.run(story())
    assert failures(metrics, "events") >= 1


def test_a_window_that_cannot_be_read_is_left_behind():
    """Prefect's client reads a page as a whole: an event it cannot read fails all of them."""
    client, metrics = Events(), Metrics()
    client.broken = ValueError("one of the events")
    verdicts = Verdicts(PrefectCalls(lambda: nullcontext(client)), metrics, Failures(metrics))
    with pytest.raises(ValueError, match="one of"):
        asyncio.run(verdicts.look())
    assert datetime.now(UTC) - verdicts._since < timedelta(minutes=11)


def test_pages_without_end_are_read_for_a_while_only():
    class Endless(Events):
        async def read_events(self, wanted, limit):
            return SimpleNamespace(events=[judged(GOOD)], next_page="http://p/next")

        async def read_events_page(self, _):
            return await self.read_events(None, None)

    began = time.monotonic()
    assert counted(looked(Endless(), looks=2)) == 1
    assert time.monotonic() - began < 10


def test_the_pause_grows_with_failures_in_a_row_and_the_loop_never_runs_hot():
    times = []

    async def step():
        times.append(time.monotonic())
        raise RuntimeError("always")

    async def story():
        with suppress(TimeoutError):
            async with asyncio.timeout(1):
                metrics = Metrics()
                await forever(
                    Place.QUEUE, step, every_s=0.0, retry_s=0.05, failures=Failures(metrics)
                )

    asyncio.run(story())
    assert 3 <= len(times) <= 6


# -------------------------------------------------------------------------------------- queue


class Mailbox:
    """A queue without a dead-letter queue: what is not deleted comes back at once."""

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


def emptied(mailbox, handler, timeout_s=20):
    async def story():
        loop = asyncio.create_task(consume(mailbox, handler, pause_s=0.01))
        async with asyncio.timeout(timeout_s):
            while mailbox.messages:
                assert not loop.done(), loop.result()
                await asyncio.sleep(0.005)
        loop.cancel()

    asyncio.run(story())
    return handler.metrics


def clerk_with(prefect):
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
def test_a_message_that_is_never_right_is_deleted_after_some_receives(body):
    prefect = FakePrefect()
    box = Mailbox(("poison", body), ("good", json.dumps(uploaded())))
    metrics = emptied(box, clerk_with(prefect))
    assert box.received[0] == MOST_RECEIVES
    assert box.received[1] == 1
    assert len(prefect.asked) == 1
    assert not failures(metrics, "queue")


def test_a_message_on_which_the_bridge_fails_is_deleted_after_some_receives():
    class Buggy(FakePrefect):
        async def start(self, wanted):
            raise RuntimeError("a bug")

    box = Mailbox(("m", json.dumps(uploaded())))
    metrics = emptied(box, clerk_with(Buggy()))
    assert box.received[0] == MOST_RECEIVES
    assert failures(metrics, "hint") == MOST_RECEIVES


@examples(max_examples=30, deadline=None)
@given(
    st.lists(
        st.tuples(st.text(max_size=300), st.text(max_size=200) | JSON.map(json.dumps)), max_size=5
    )
)
def test_any_messages_are_answered_and_leave_the_queue(messages):
    emptied(Mailbox(*messages), clerk_with(FakePrefect()))


@pytest.mark.parametrize(
    "answer", [{}, {"Messages": []}, {"Messages": [{}]},
               {"Messages": [{"Body": "x"}, {"MessageId": "1"}]},
               {"Messages": [{"Attributes": {"ApproximateReceiveCount": "many"}}]}],
)  # fmt: skip
def test_parts_that_the_answer_of_sqs_lacks_are_empty(answer, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "x")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    queue = SqsQueue("http://127.0.0.1:1/account/name")
    queue._sqs = SimpleNamespace(receive_message=lambda **_: answer)
    assert all(message.receives == 1 for message in queue.receive())


@pytest.mark.parametrize(
    "error", [KeyError("Body"), ValueError("html"), OSError("no"), TypeError()]
)
def test_a_queue_that_answers_oddly_is_asked_again(error):
    class Odd(Mailbox):
        fails = 3

        def receive(self):
            if self.fails:
                self.fails -= 1
                raise error
            return super().receive()

    box = Odd(("good", json.dumps(uploaded())))
    metrics = emptied(box, clerk_with(FakePrefect()))
    assert failures(metrics, "queue") == 3


def test_a_message_that_cannot_be_deleted_ends_nothing():
    class Stubborn(Mailbox):
        fails = 2

        def delete(self, message):
            if self.fails:
                self.fails -= 1
                raise ValueError("an odd answer")
            super().delete(message)

    metrics = emptied(Stubborn(("good", json.dumps(uploaded()))), clerk_with(FakePrefect()))
    assert failures(metrics, "message") == 2
