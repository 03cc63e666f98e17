"""A proxy before a real S3 server that answers wrongly, cuts bodies off, waits, or hangs up.

The client signs for the proxy's address and the server sees that very Host header: whatever passes
untouched is answered by the real server.
"""

import http.client
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

BODIES = {
    500: "InternalError",
    503: "SlowDown",
    403: "ExpiredToken",
}


@dataclass
class Faults:
    """What is done to the next requests whose path ends with `of`; `left` of them, one each."""

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


@contextmanager
def faulty(s3_url: str) -> Iterator[tuple[str, Faults]]:
    """Give the URL of a proxy before that server, and what it is to do wrong."""
    faults, target = Faults(), urlsplit(s3_url).netloc

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            kind = faults.next(self.path)
            if kind.isdigit():
                return self.refuse(int(kind))
            if kind == "reset":
                return self.hang_up()
            if kind == "wait":
                time.sleep(faults.wait_s)
            upstream = http.client.HTTPConnection(target, timeout=30)
            length = int(self.headers.get("Content-Length") or 0)
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                upstream.putheader(name, value)
            upstream.endheaders(self.rfile.read(length))
            answer = upstream.getresponse()
            body = answer.read()
            upstream.close()
            own = {"content-length", "transfer-encoding", "connection"}
            own |= {"content-range"} if kind == "no ranges" else set()
            self.send_response_only(200 if kind == "no ranges" else answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in own:
                    self.send_header(name, value)
            size = (
                int(answer.headers["Content-Length"] or 0) if self.command == "HEAD" else len(body)
            )
            self.send_header("Content-Length", str(size))
            self.end_headers()
            if kind == "truncate":
                self.wfile.write(body[: faults.cut_at_bytes])
                return self.hang_up()
            self.wfile.write(body)

        do_HEAD = do_PUT = do_POST = do_DELETE = do_GET  # noqa: N815

        def refuse(self, status):
            body = (
                f"<Error><Code>{BODIES[status]}</Code><Message>as told</Message></Error>".encode()
            )
            self.send_response_only(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def hang_up(self):
            linger = struct.pack("ii", 1, 0)  # a reset instead of a good-bye
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.handle_error = lambda *_: None  # a client that hung up is part of the play
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", faults
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
