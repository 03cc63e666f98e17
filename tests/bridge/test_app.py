"""The bridge over HTTP: a real server on a socket, with MLflow and Prefect in memory."""

import asyncio
import http.client
import io
import json
import logging
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress

import httpx
import psutil
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st

from infra.bridge import app, protocol
from infra.bridge.app import MAX_BODY_BYTES, NotificationHandler
from infra.bridge.authentication import sign
from infra.bridge.dispatcher import Dispatcher
from infra.bridge.logs import LOG, json_formatter
from infra.bridge.metrics import Metrics
from infra.bridge.readiness import Readiness
from infra.bridge.serve import create_server
from infra.bridge.settings import BridgeSettings
from infra.stack.machine import free_ports
from tests.bridge.fakes import FakePrefect, FakeRegistry
from tests.end_to_end.running_stack import wait_until

SECRETS = ("a-secret-of-mlflow-000000", "the-former-secret-1111111")
TOKENS = ("a-token-of-the-s3-server-22", "the-former-token-33333333333")
CHAMPION = {"name": "smol", "alias": "champion", "version": "1"}


class Bridge:
    def __init__(self, settings=None):
        self.registry, self.prefect = FakeRegistry({"smol": "smol"}), FakePrefect()
        self.handler = NotificationHandler(
            Dispatcher(self.registry, self.prefect, timeout_s=60), Metrics()
        )
        chosen = settings or BridgeSettings(
            tracking_uri="http://m", mlflow_secrets=SECRETS, s3_tokens=TOKENS
        )
        (self.port,) = free_ports(1)
        self._server = create_server(chosen.model_copy(update={"port": self.port}), self.handler)
        self._thread = threading.Thread(target=self._server.run)

    def __enter__(self):
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)
        fresh = httpx.Limits(max_keepalive_connections=0)
        url = f"http://127.0.0.1:{self.port}"
        self.http = httpx.Client(base_url=url, timeout=30, limits=fresh)
        return self

    def __exit__(self, *_):
        self.http.close()
        self._server.should_exit = True
        self._thread.join()

    def mlflow(self, body, *, secret=SECRETS[0], at=None, delivery_id="d-1", **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        timestamp = str(int(at or time.time()))
        signed = {
            "Content-Type": "application/json",
            "X-MLflow-Delivery-Id": delivery_id,
            "X-MLflow-Timestamp": timestamp,
            "X-MLflow-Signature": sign(secret, delivery_id, timestamp, body),
        }
        return self.http.post("/notifications/mlflow", content=body, headers={**signed, **headers})

    def s3(self, body, token=TOKENS[0]):
        headers = {"Authorization": f"Bearer {token}"}
        return self.http.post("/notifications/s3", json=body, headers=headers)


@pytest.fixture(scope="module")
def running():
    with Bridge() as bridge:
        yield bridge


@pytest.fixture
def bridge(running):
    running.prefect.__init__()
    running.registry.__init__({"smol": "smol"})
    return running


def champion(**more):
    data = {**CHAMPION, **more}
    return {"entity": "model_version_alias", "action": "created", "data": data}


def uploaded(key="smol/v1/trans_peft_manifest.json"):
    stored = {"bucket": {"name": "bases"}, "object": {"key": key}}
    return {"Records": [{"eventName": "s3:ObjectCreated:Put", "s3": stored}]}


@pytest.mark.parametrize("secret", SECRETS)
def test_a_signed_notification_is_answered_once_its_run_exists(bridge, secret):
    answer = bridge.mlflow(champion(), secret=secret)
    assert (answer.status_code, answer.json()) == (200, {"outcome": "started", "run": "run-1"})
    assert bridge.prefect.asked == [("smol", "d-1")]


@pytest.mark.parametrize("token", TOKENS)
def test_an_upload_is_answered_once_its_run_exists(bridge, token):
    assert bridge.s3(uploaded(), token).json() == {"outcome": "started", "run": "run-1"}
    ((family, delivery_id),) = bridge.prefect.asked
    assert family is None
    bridge.s3(uploaded(), token)
    assert bridge.prefect.asked[1] == (None, delivery_id)  # a retry has the id of the first attempt


def test_a_replay_returns_the_run_of_the_first_delivery(bridge):
    bridge.prefect.waiting = _NoneWaiting()
    first, again = bridge.mlflow(champion()), bridge.mlflow(champion())
    assert first.json()["run"] == again.json()["run"]


class _NoneWaiting(dict):
    """No run waits: each one has begun."""

    def __setitem__(self, key, value):
        pass


def test_the_projects_own_writes_start_no_run(bridge):
    tag = {"name": "smol", "version": "1", "key": "trans_peft.verdict", "value": "passed"}
    for notification in (
        champion(alias="serving"),
        {"entity": "model_version_tag", "action": "set", "data": tag},
    ):
        assert bridge.mlflow(notification).json() == {"outcome": "ignored", "run": ""}
    assert bridge.s3(uploaded("smol/v1/model.safetensors")).json()["outcome"] == "ignored"
    assert bridge.prefect.asked == []


@pytest.mark.parametrize("server", ["prefect", "registry"])
def test_the_response_is_503_while_a_server_is_unavailable(bridge, server):
    getattr(bridge, server).broken = True
    answer = bridge.mlflow(champion())
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "15")
    getattr(bridge, server).broken = False
    assert bridge.mlflow(champion()).status_code == 200


def test_an_error_of_the_bridge_is_500(bridge, monkeypatch):
    monkeypatch.setattr(bridge.prefect, "asked", None)
    assert bridge.mlflow(champion()).status_code == 500


@pytest.mark.parametrize(
    ("status", "send"),
    [
        (401, lambda b: b.mlflow(champion(), secret="wrong")),
        (401, lambda b: b.mlflow(champion(), at=time.time() - 301)),
        (401, lambda b: b.mlflow(champion(), at=time.time() + 310)),
        (401, lambda b: b.mlflow(champion(), delivery_id="{{ flow.id }}")),
        (401, lambda b: b.http.post("/notifications/mlflow", json=champion())),
        (401, lambda b: b.s3(uploaded(), "wrong")),
        (401, lambda b: b.http.post("/notifications/s3", json=uploaded())),
        (401, lambda b: b.http.post(f"/notifications/s3?token={TOKENS[0]}", json=uploaded())),
        (415, lambda b: b.mlflow(champion(), **{"Content-Type": "text/xml"})),
        (415, lambda b: b.mlflow(champion(), **{"Content-Type": ""})),
        (413, lambda b: b.mlflow(b"x" * (MAX_BODY_BYTES["mlflow"] + 1))),
        (405, lambda b: b.http.get("/notifications/mlflow")),
        (405, lambda b: b.http.put("/notifications/s3", json=uploaded())),
        (404, lambda b: b.http.post("/notifications", json={})),
        (404, lambda b: b.http.post("/notifications/../../etc/passwd", json={})),
        (400, lambda b: b.mlflow(b"{")),
        (400, lambda b: b.mlflow({})),
        (400, lambda b: b.mlflow(champion(name="../../etc/passwd"))),
        (400, lambda b: b.mlflow(champion(name="x'; DROP TABLE flow_run; --"))),
        (400, lambda b: b.mlflow(champion(name="\ud800"))),
        (400, lambda b: b.s3(uploaded("../../trans_peft_manifest.json"))),
        (400, lambda b: b.s3({"Records": [{}]})),
        (400, lambda b: b.mlflow(champion(name="{{ flow_run.id }} ${HOME} %s 模型"))),
    ],
)
def test_invalid_requests_get_their_status_and_start_no_run(bridge, status, send):
    assert send(bridge).status_code == status
    assert bridge.prefect.asked == []
    assert bridge.http.get("/health").status_code == 200


@examples(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.binary(max_size=200), st.text(max_size=20))
def test_any_signed_body_is_200_or_400(bridge, body, name):
    assert bridge.mlflow(body).status_code in (200, 400)
    assert bridge.mlflow(champion(name=name)).status_code in (200, 400)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=8,
)
HEADERS = ["X-MLflow-Delivery-Id", "X-MLflow-Timestamp", "X-MLflow-Signature", "Authorization"]
HEADERS += ["Content-Type", "Host", "Accept", "Transfer-Encoding", "Upgrade", "Connection"]


@examples(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.sampled_from(HEADERS),
    st.binary(max_size=300).filter(lambda value: not {*b"\r\n"} & {*value}),
    st.sampled_from(
        ["/notifications/mlflow", "/notifications/s3", "/ready", "/metrics", "/nowhere"]
    ),
)
def test_any_header_of_an_unauthenticated_request_is_refused(bridge, name, value, path):
    head = f"POST {path} HTTP/1.1\r\nHost: b\r\nConnection: close\r\nContent-Length: 2\r\n"
    answer = raw(bridge, head.encode() + name.encode() + b": " + value + b"\r\n\r\n", [b"{}"])
    assert answer == b"closed" or 400 <= int(answer.split()[1]) < 500
    assert bridge.prefect.asked == []


FIELDS = [("entity",), ("action",), ("timestamp",), ("data",)]
FIELDS += [("data", name) for name in ("name", "alias", "version", "tags", "key")]


@examples(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.sampled_from(FIELDS), JSON, st.sampled_from(["alias", "", "tag"]))
def test_any_field_of_a_webhook_may_have_any_value(bridge, path, value, what):
    body = champion(tags={}, key="trans_peft.reconcile") | {"timestamp": "2026-01-01T00:00:00Z"}
    body["entity"] = "model_version" + (f"_{what}" if what else "")
    body["action"] = "set" if what == "tag" else "created"
    *parents, last = path
    inner = body
    for name in parents:
        inner = inner[name]
    inner[last] = value
    assert bridge.mlflow(json.dumps(body).encode()).status_code in (200, 400)


TIMES = ["0001-01-01", "0001-01-01T00:00:00+23:59", "9999-12-31T23:59:59-23:59", "1e308"]


@pytest.mark.parametrize("at", [*TIMES, 1e308, -1e308, 0, 1 << 70, float("nan"), True, [], {}])
def test_an_implausible_time_is_ignored(bridge, at):
    before = lags(bridge)
    assert bridge.mlflow(champion() | {"timestamp": at}).status_code == 200
    record = uploaded()
    record["Records"][0]["eventTime"] = at
    assert bridge.s3(json.loads(json.dumps(record).replace("NaN", "0"))).status_code == 200
    assert lags(bridge) == before


def lags(bridge):
    text = bridge.http.get("/metrics").text
    return [line for line in text.splitlines() if "lag_seconds_count" in line]


def test_an_endpoint_without_a_secret_is_404():
    with Bridge(BridgeSettings()) as closed:
        assert closed.mlflow(champion()).status_code == 404
        assert closed.s3(uploaded()).status_code == 404


def raw(bridge, head, pieces, pause_s=0.0):
    """Send a request in pieces and return the status line. The server may close the connection."""
    with socket.create_connection(("127.0.0.1", bridge.port), timeout=30) as connection:
        connection.sendall(head)
        try:
            for piece in pieces:
                connection.sendall(piece)
                time.sleep(pause_s)
        except OSError:
            pass
        try:
            return connection.recv(200).split(b"\r\n")[0]
        except OSError:
            return b"closed"


HEAD = b"POST /notifications/mlflow HTTP/1.1\r\nHost: b\r\nContent-Type: application/json\r\n"


@pytest.mark.parametrize("length", [b"Content-Length: 104857600", b"Transfer-Encoding: chunked"])
def test_a_body_of_100_mb_is_refused_while_memory_stays_flat(bridge, length):
    chunk = b"x" * 65536
    piece = chunk if b"Length" in length else b"10000\r\n" + chunk + b"\r\n"
    me = psutil.Process()
    before, began = me.memory_info().rss, time.monotonic()
    for _ in range(5):
        answer = raw(bridge, HEAD + length + b"\r\n\r\n", [piece] * 1600)
        assert b"413" in answer or answer == b"closed"
    assert me.memory_info().rss - before < 16 << 20
    assert time.monotonic() - began < 20
    assert bridge.http.get("/health").status_code == 200


@pytest.mark.parametrize("head", [b"X: " + b"x" * 60, b"X" * 60 + b": x"])
def test_headers_that_are_too_long_are_refused(bridge, head):
    answer = raw(bridge, HEAD, [head + b"\r\n"] * 1000)
    assert b"400" in answer or answer == b"closed"
    assert bridge.http.get("/health").status_code == 200


@pytest.mark.parametrize("first", [b"", b"GET /health HTTP/1.1\r\nHost: b\r\n\r\n"])
def test_slow_headers_end_at_the_deadline(bridge, monkeypatch, first):
    """Also the head of the second request of a connection."""
    monkeypatch.setattr(protocol, "CLIENT_DEADLINE_S", 0.3)
    began = time.monotonic()
    with socket.create_connection(("127.0.0.1", bridge.port), timeout=30) as connection:
        connection.sendall(first)
        try:
            while time.monotonic() - began < 20:
                connection.sendall(b"X")
                time.sleep(0.05)
        except OSError:
            pass
    assert time.monotonic() - began < 5


REFUSED_EARLY = [
    b"GET /health HTTP/1.1\r\nHost: b\r\nContent-Length: 9\r\n\r\n",
    b"GET /health HTTP/1.1\r\nHost: b\r\nTransfer-Encoding: chunked\r\n\r\n",
    b"POST /nothing HTTP/1.1\r\nHost: b\r\nContent-Length: 9\r\n\r\n",
    b"GET /notifications/s3 HTTP/1.1\r\nHost: b\r\nContent-Length: 9\r\n\r\n",
]


def read_response(connection):
    response = http.client.HTTPResponse(connection)
    response.begin()
    response.read()
    return response.status


@pytest.mark.parametrize("head", REFUSED_EARLY)
@pytest.mark.parametrize("late", [b"", b"1", b"1\r\nx\r\n"])
def test_a_body_after_its_response_ends_at_its_deadline(bridge, monkeypatch, head, late):
    monkeypatch.setattr(protocol, "CLIENT_DEADLINE_S", 0.3)
    began = time.monotonic()
    with socket.create_connection(("127.0.0.1", bridge.port), timeout=20) as connection:
        connection.sendall(head)
        read_response(connection)
        connection.sendall(late)
        with suppress(ConnectionError):
            assert connection.recv(65536) == b""
    assert time.monotonic() - began < 4  # uvicorn's own keep-alive deadline is 5 s


def test_connections_with_a_late_body_do_not_block_others(bridge, monkeypatch):
    monkeypatch.setattr(protocol, "CLIENT_DEADLINE_S", 0.5)
    late = [socket.create_connection(("127.0.0.1", bridge.port)) for _ in range(1024)]
    try:
        for connection in late:
            connection.sendall(REFUSED_EARLY[0])
        for connection in late:
            with suppress(ConnectionError):
                connection.recv(4096)
                connection.sendall(b"x")
        wait_until(lambda: bridge.http.get("/health").status_code == 200, patience_s=20)
    finally:
        for connection in late:
            connection.close()


def test_a_client_that_reads_no_response_ends_at_its_deadline(bridge, monkeypatch):
    monkeypatch.setattr(protocol, "CLIENT_DEADLINE_S", 0.5)
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(2)
        connection.connect(("127.0.0.1", bridge.port))
        began = time.monotonic()
        with pytest.raises(ConnectionError):  # `timed out` is no ConnectionError
            while time.monotonic() - began < 20:
                try:
                    connection.sendall(b"GET /metrics HTTP/1.1\r\nHost: b\r\n\r\n" * 1000)
                except TimeoutError:
                    continue


def test_a_connection_serves_one_request_after_another(bridge, monkeypatch):
    """Also beyond the deadline, and with a request that arrives in pieces."""
    monkeypatch.setattr(protocol, "CLIENT_DEADLINE_S", 0.5)
    with socket.create_connection(("127.0.0.1", bridge.port), timeout=5) as connection:
        for _ in range(6):
            connection.sendall(b"GET /health HT")
            time.sleep(0.2)
            connection.sendall(b"TP/1.1\r\nHost: b\r\n\r\n")
            assert read_response(connection) == 200


def test_slow_connections_do_not_block_others(bridge, monkeypatch):
    monkeypatch.setattr(protocol, "CLIENT_DEADLINE_S", 0.5)
    slow = [socket.create_connection(("127.0.0.1", bridge.port)) for _ in range(1100)]
    try:
        for connection in slow:
            connection.send(b"POST /notifications")
        wait_until(lambda: bridge.http.get("/health").status_code == 200, patience_s=20)
    finally:
        for connection in slow:
            connection.close()


@pytest.mark.parametrize("prefect", ["well", "slow", "broken"])
def test_many_calls_of_ready_make_few_calls_to_prefect(bridge, monkeypatch, prefect):
    """Notifications are answered meanwhile."""
    asked = []

    async def is_reachable():
        asked.append(time.monotonic())
        if prefect == "broken":
            raise RuntimeError("odd")
        await asyncio.sleep(0.3 if prefect == "slow" else 0)
        return True

    monkeypatch.setattr(
        bridge.handler.dispatcher, "_readiness", Readiness(is_reachable, timeout_s=0.1)
    )
    url = bridge.http.base_url

    def ready(_):
        # Not with httpx: one thread may close the connection that another has just taken.
        with closing(http.client.HTTPConnection(url.host, url.port, timeout=30)) as connection:
            connection.request("GET", "/ready")
            return connection.getresponse().status

    with ThreadPoolExecutor(40) as pool:
        began = time.monotonic()
        codes = set(pool.map(ready, range(400)))
        took_s = time.monotonic() - began
    assert codes == {200 if prefect == "well" else 503}
    assert len(asked) <= 2 + took_s / 2
    assert bridge.mlflow(champion()).status_code == 200


def test_a_slow_body_ends_at_the_deadline(bridge, monkeypatch):
    monkeypatch.setattr(app, "BODY_DEADLINE_S", 0.3)
    began = time.monotonic()
    answer = raw(bridge, HEAD + b"Content-Length: 100\r\n\r\n", [b"{"] * 6, pause_s=0.1)
    assert b"408" in answer
    assert time.monotonic() - began < 5


def test_a_thousand_concurrent_notifications_make_few_calls_to_prefect(bridge):
    """Of ten families, each delivery twice, one connection per notification."""
    names = [f"f{n}" for n in range(10)]
    bridge.registry.families = {name: name for name in names}
    bridge.prefect.delay_s = 0.05

    async def send(number):
        body = json.dumps(champion(name=names[number // 2 % 10])).encode()
        delivery, at = f"burst-{number // 2}", str(int(time.time()))
        head = (
            f"POST /notifications/mlflow HTTP/1.1\r\nHost: b\r\nConnection: close\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
            f"X-MLflow-Delivery-Id: {delivery}\r\nX-MLflow-Timestamp: {at}\r\n"
            f"X-MLflow-Signature: {sign(SECRETS[0], delivery, at, body)}\r\n\r\n"
        )
        reader, writer = await asyncio.open_connection("127.0.0.1", bridge.port)
        writer.write(head.encode() + body)
        answer = await reader.read()
        writer.close()
        return answer

    async def burst():
        return await asyncio.gather(*(send(number) for number in range(1000)))

    answers = asyncio.run(burst())
    assert {answer.split(b"\r\n", 1)[0] for answer in answers} == {b"HTTP/1.1 200 OK"}
    assert {json.loads(answer.rpartition(b"\r\n")[2])["run"] for answer in answers} == {
        f"run-{n}" for n in range(1, 11)
    }
    assert bridge.prefect.calls <= 50
    assert len(bridge.registry.asked) <= 200


def test_health_ready_and_metrics(bridge):
    assert bridge.http.get("/ready").json() == {"prefect": True}
    bridge.prefect.broken = True
    wait_until(lambda: bridge.http.get("/ready").status_code == 503, patience_s=10)
    assert bridge.http.get("/health").json() == {"status": "ok"}
    bridge.prefect.broken = False
    bridge.mlflow({**champion(), "timestamp": "2026-01-01T00:00:00+00:00"})
    text = bridge.http.get("/metrics").text
    assert (
        'trans_peft_notifications_total{kind="champion",outcome="started",sender="mlflow"}' in text
    )
    assert 'trans_peft_notification_lag_seconds_bucket{kind="champion",le="3600.0"}' in text


def test_the_log_links_a_delivery_to_its_run_and_contains_no_secret(bridge):
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(json_formatter())
    # uvicorn's logger too: Prefect's set-up in another test may have stopped its propagation.
    listened = [logging.getLogger(), logging.getLogger("uvicorn")]
    before = [(logger, logger.level) for logger in (*listened, LOG)]
    for logger in listened:
        logger.addHandler(handler)
    try:
        for logger, _ in before:
            logger.setLevel(logging.DEBUG)
        bridge.mlflow(champion(), delivery_id="d-77")
        bridge.mlflow(champion(), secret="wrong-" + SECRETS[0])
        bridge.s3(uploaded())
        bridge.s3(uploaded(), "wrong-" + TOKENS[0])
        bridge.http.post(f"/notifications/s3?token={TOKENS[0]}", json=uploaded())
        bridge.prefect.asked = None  # a bug, with its traceback
        bridge.mlflow(champion())
        # uvicorn responds first and logs the traceback afterwards
        wait_until(lambda: "Traceback" in stream.getvalue(), patience_s=30)
    finally:
        for logger in listened:
            logger.removeHandler(handler)
        for logger, level in before:
            logger.setLevel(level)
    ours = [line for line in stream.getvalue().splitlines() if '"trans_peft.bridge"' in line]
    (notification,) = [
        found for line in ours if (found := json.loads(line)).get("delivery") == "d-77"
    ]
    assert (notification["outcome"], notification["run"], notification["about"]) == (
        "started",
        "run-1",
        "smol",
    )
    lines = stream.getvalue().splitlines()  # the client's own, in this process, left out
    logged = "\n".join(line for line in lines if '"logger": "http' not in line)
    assert "Traceback" in logged
    for secret in (*SECRETS, *TOKENS):
        assert secret not in logged
    assert not any(secret in repr(BridgeSettings(s3_tokens=TOKENS)) for secret in TOKENS)
