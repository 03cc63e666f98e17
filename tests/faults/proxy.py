"""An HTTP proxy that injects faults between a client and a real server.

A fault replaces the request, so that the server never receives it, or the response, after the
server has done the work. S3 clients sign for the proxy's address, and the server receives that Host
header. The proxy forwards websockets.
"""

import http.client
import socket
import struct
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from random import Random
from typing import Protocol
from urllib.parse import urlsplit

BODIES = {
    500: "InternalError",
    503: "SlowDown",
    403: "ExpiredToken",
}
BEFORE = ("500", "503", "reset")  # the server does not receive the request
AFTER = ("answer 500", "answer 503", "answer lost")  # the server has done the work


class Plan(Protocol):
    """Chooses the fault for each request; an empty text means none."""

    wait_s: float
    cut_at_bytes: int

    def next(self, path: str) -> str: ...


@dataclass
class Faults:
    """Applies one kind of fault to the next `left` requests whose path ends with `of`."""

    kind: str = ""
    left: int = 0
    of: str = ""
    wait_s: float = 0.0
    cut_at_bytes: int = 0
    seen: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def next(self, path: str) -> str:
        with self.lock:
            self.seen.append(path)
            if not self.left or not urlsplit(path).path.endswith(self.of):
                return ""
            self.left -= 1
            return self.kind


@dataclass
class RandomFaults:
    """Applies faults to a share of all requests, drawn with a seed, while `bad` is true."""

    seed: int
    share: float
    kinds: Sequence[str] = (*BEFORE, *AFTER)
    wait_s: float = 0.0
    cut_at_bytes: int = 0
    bad: bool = True
    met: int = 0
    seen: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self._draw = Random(self.seed)

    def next(self, path: str) -> str:
        with self.lock:
            self.seen += 1
            if not self.bad or self._draw.random() >= self.share:
                return ""
            self.met += 1
            return self._draw.choice(self.kinds)


@contextmanager
def faulty(url: str) -> Iterator[tuple[str, Faults]]:
    """Yield the URL of a proxy for that server, and its faults, which the caller sets."""
    faults = Faults()
    with proxied(url, faults) as its_url:
        yield its_url, faults


@contextmanager
def proxied(url: str, plan: Plan, *, keeps_host: bool = True) -> Iterator[str]:
    """Yield the URL of a proxy for that server that applies the faults of the plan.

    MLflow refuses other Host headers than its own; use `keeps_host=False` for it.
    """
    target = urlsplit(url).netloc

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            sent = self.body()
            kind = plan.next(self.path)
            if kind.isdigit():
                return self.refuse(int(kind))
            if kind == "reset":
                return self.reset_connection()
            if kind == "wait":
                time.sleep(plan.wait_s)
            if self.headers.get("Upgrade"):
                return self.tunnel()
            upstream = http.client.HTTPConnection(target, timeout=120)
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                host = name.lower() == "host" and not keeps_host
                upstream.putheader(name, target if host else value)
            upstream.endheaders(sent)
            answer = upstream.getresponse()
            body = answer.read()
            upstream.close()
            if kind == "answer lost":
                return self.reset_connection()
            if kind.startswith("answer "):
                return self.refuse(int(kind.removeprefix("answer ")))
            own = {"content-length", "transfer-encoding", "connection"}
            own |= {"content-range"} if kind == "no ranges" else set()
            self.send_response_only(200 if kind == "no ranges" else answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in own:
                    self.send_header(name, value)
            if kind == "shorten" and self.command == "GET":  # with a matching length
                body = body[: plan.cut_at_bytes]
            if kind == "alter":
                body = body[:-1] + bytes([body[-1] ^ 1])
            size = (
                int(answer.headers["Content-Length"] or 0) if self.command == "HEAD" else len(body)
            )
            self.send_header("Content-Length", str(size))
            self.end_headers()
            if kind == "truncate":
                self.wfile.write(body[: plan.cut_at_bytes])
                return self.reset_connection()
            self.wfile.write(body)

        do_HEAD = do_PUT = do_POST = do_PATCH = do_DELETE = do_GET  # noqa: N815

        def body(self):
            if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            whole = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                chunk = self.rfile.read(size)
                whole += b"%x\r\n%s\r\n" % (size, chunk)
                self.rfile.readline()
            self.rfile.readline()
            return whole + b"0\r\n\r\n"

        def refuse(self, status):
            body = (
                f"<Error><Code>{BODIES[status]}</Code><Message>injected</Message></Error>".encode()
            )
            self.send_response_only(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def reset_connection(self):
            linger = struct.pack("ii", 1, 0)  # send a reset instead of closing cleanly
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)

        def tunnel(self):
            host, _, port = target.partition(":")
            with socket.create_connection((host, int(port))) as upstream:
                head = [self.requestline, *(f"{k}: {v}" for k, v in self.headers.items()), "", ""]
                upstream.sendall("\r\n".join(head).encode())
                back = threading.Thread(target=pump, args=(upstream, self.connection), daemon=True)
                back.start()
                pump(self.connection, upstream)
                back.join()
            self.close_connection = True

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.handle_error = lambda *_: None  # clients may close the connection
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def pump(source, target):
    """Copy bytes until either side closes."""
    with suppress(OSError):
        while data := source.recv(1 << 16):
            target.sendall(data)
    for side in (source, target):
        with suppress(OSError):
            side.shutdown(socket.SHUT_RDWR)
