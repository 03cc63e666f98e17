"""Sends requests without credentials to every port of some processes."""

import socket
import ssl
from contextlib import ExitStack, suppress

import httpx
import psutil

SECRET = b"nobody-else-may-read-this"
_PAGES = ("text/html", "text/plain; version=")
_GRPC_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"


def ports_of(processes):
    """Return the ports that these processes listen on."""
    pids = {process.pid for process in processes}
    return {
        c.laddr.port
        for c in psutil.net_connections("tcp")
        if c.status == psutil.CONN_LISTEN and c.pid in pids
    }


def answers_without_credentials(ports, bucket):
    """Return the requests that read the secret or were not refused.

    A port that was closed after it was listed does not count as open.
    """
    reads = [f"/{bucket}/secret/x.txt", f"/buckets/{bucket}/secret/x.txt", f"/buckets/{bucket}/"]
    reads += [f"/{bucket}?list-type=2", "/buckets/?pretty=y", "/dir/assign", "/vol/status"]
    reads += ["/dir/lookup?volumeId=1", "/dir/lookup?fileId=1,01637037d6&read=yes", "/dir/status"]
    reads += [f"/col/delete?collection={bucket}", "/vol/vacuum", "/vol/grow?count=1"]
    reads += [f"/{volume},01637037d6" for volume in range(1, 9)] + ["/submit", "/debug/pprof/"]
    writes = [f"/buckets/{bucket}/evil", f"/{bucket}/evil", "/submit", "/1,01637037d6", "/evil"]
    asked = [("GET", path) for path in reads]
    asked += [(method, path) for path in writes for method in ("PUT", "POST", "DELETE")]
    open_ = []
    with httpx.Client(timeout=30, trust_env=False) as http:
        for port in sorted(ports):
            for method, path in asked:
                # gRPC with TLS, or a process that has ended since its ports were listed.
                with suppress(httpx.RemoteProtocolError, httpx.ReadError, httpx.ConnectError):
                    url = f"http://127.0.0.1:{port}{path}"
                    answer = http.request(method, url, content=b"x" if method != "GET" else None)
                    # A program's own page, or metrics, which the exporter returns for any path.
                    page = answer.headers.get("content-type", "").startswith(_PAGES)
                    if SECRET in answer.content or not (answer.status_code >= 400 or page):
                        open_.append((port, method, path, answer.status_code))
    return open_ + [(port, "gRPC") for port in sorted(ports) if speaks_grpc(port)]


def speaks_grpc(port, certificate=None):
    """Whether the port answers HTTP/2 without TLS, or with TLS and this certificate (or none)."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    if certificate is not None:
        context.load_cert_chain(*certificate)
    return any(_settings_of(port, context=wrap) for wrap in (None, context))


def _settings_of(port, context):
    """Whether a first frame of HTTP/2 comes back: SETTINGS, type 4."""
    with suppress(OSError), ExitStack() as open_:
        plain = socket.create_connection(("127.0.0.1", port), timeout=10)
        connection = open_.enter_context(plain)
        if context is not None:
            connection = open_.enter_context(context.wrap_socket(plain))
        connection.sendall(_GRPC_PREFACE)
        frame = connection.recv(9)
        return len(frame) == 9 and frame[3] == 4
    return False
