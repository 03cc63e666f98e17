import os
import signal
import socket
import subprocess
import sys

import psutil
import pytest

from infra.stack.machine import MARK, end, free_ports, marked, owner, port_is_free


def test_a_port_is_taken_while_a_process_listens_and_its_owner_is_named():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        assert not port_is_free(port)
        assert str(os.getpid()) in owner(port)
    assert port_is_free(port)


def test_free_ports_are_different_and_free():
    ports = free_ports(20)
    assert len(set(ports)) == 20
    assert all(port_is_free(port) for port in ports)


@pytest.fixture
def family(tmp_path):
    """A marked process that ignores SIGTERM, its child in another session, and an unmarked one."""
    code = (
        "import signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "sleep = 'import os, time; print(os.getpid(), flush=True); time.sleep(60)'\n"
        "subprocess.Popen([sys.executable, '-c', sleep], start_new_session=True)\n"
        "time.sleep(60)\n"
    )
    ours = subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, MARK: str(tmp_path)},
        stdout=subprocess.PIPE,
        text=True,
    )
    stranger = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(60)"],
        env={**os.environ, MARK: f"{tmp_path}-other"},
    )
    child = int(ours.stdout.readline())
    yield ours, child, stranger
    for process in (ours, stranger):
        process.kill()
        process.wait()
        process.stdout and process.stdout.close()
    if psutil.pid_exists(child):
        os.kill(child, signal.SIGKILL)


def test_exactly_the_marked_processes_are_found_and_ended(family, tmp_path):
    ours, child, stranger = family
    found = marked(tmp_path)
    assert {process.pid for process in found} == {ours.pid, child}
    end(found, grace_s=0.5)
    assert marked(tmp_path) == []
    assert stranger.poll() is None
