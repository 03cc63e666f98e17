"""Relays TCP connections, and delays each direction: a network between a host and its servers.

    python -m tests.hosts.relay ADDRESS DELAY_S PORT...

Listens at the ports of ADDRESS and connects to the same ports of 127.0.0.1. Prints a line when it
listens. (`tc netem` does the same in the kernel, and not every kernel has it.)
"""

import asyncio
import sys
from contextlib import suppress


async def relay(address, delay_s, ports):
    async def pump(source, target):
        later = asyncio.get_running_loop().call_later
        with suppress(OSError):
            while data := await source.read(1 << 16):
                later(delay_s, target.write, data)
        later(delay_s, target.close)

    def connect_to(port):
        async def connect(client_reader, client_writer):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            await asyncio.gather(pump(client_reader, writer), pump(reader, client_writer))

        return connect

    for port in ports:
        await asyncio.start_server(connect_to(port), address, port)
    sys.stdout.write("listening\n")
    sys.stdout.flush()
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(relay(sys.argv[1], float(sys.argv[2]), [int(port) for port in sys.argv[3:]]))
