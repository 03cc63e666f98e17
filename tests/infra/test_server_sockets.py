"""Servers with several workers answer without Nagle's algorithm (decision 0295)."""

import socket
import threading

import httpx
import pytest
from uvicorn import Config, Server
from uvicorn.protocols.http.h11_impl import H11Protocol


async def app(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"ok"})


@pytest.mark.timeout(60)
def test_connections_to_a_socket_that_was_bound_before_have_no_delay():
    no_delay = []

    class Recording(H11Protocol):
        def connection_made(self, transport):
            connection = transport.get_extra_info("socket")
            no_delay.append(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            super().connection_made(transport)

    config = Config(
        app, host="127.0.0.1", port=0, http=Recording, lifespan="off", log_level="error"
    )
    server, bound = Server(config), config.bind_socket()
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
    thread.start()
    try:
        url = f"http://127.0.0.1:{bound.getsockname()[1]}"
        transport = httpx.HTTPTransport(retries=5)
        with httpx.Client(transport=transport) as client:
            assert client.get(url).text == "ok"
    finally:
        server.should_exit = True
        thread.join()
    assert no_delay == [1]
