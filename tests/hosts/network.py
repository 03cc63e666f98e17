"""Hosts as network namespaces of this machine: each reaches the servers through a link of its own.

In a namespace, 127.0.0.1 with a server's port is the address of a relay at the other end of the
link (`relay.py`), so that the URLs of a worker are the same on every host. Needs root, `ip` and
`iptables`.
"""

import os
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import psutil

from tests.end_to_end.running_stack import ROOT

PROGRAMS = ("ip", "iptables", "initdb", "postgres")


def missing():
    """Return what these tests need and this machine lacks."""
    programs = [name for name in PROGRAMS if shutil.which(name) is None]
    return programs if os.geteuid() == 0 else [*programs, "the rights of root"]


@dataclass(frozen=True)
class Host:
    """A network namespace and this machine's end of its link."""

    name: str
    link: str

    @property
    def command(self):
        """The command that precedes one that is to run on this host."""
        return ("ip", "netns", "exec", self.name)

    def processes(self):
        """Return the processes of this host."""
        found = []
        for pid in _run("ip", "netns", "pids", self.name).split():
            with suppress(psutil.NoSuchProcess):
                found.append(psutil.Process(int(pid)))
        return found

    def flow_runs(self):
        """Return the ids of the flow runs whose processes run here."""
        found = set()
        for process in self.processes():
            with suppress(psutil.Error):
                found.add(process.environ().get("PREFECT__FLOW_RUN_ID"))
        return found - {None}

    def kill(self):
        """Send SIGKILL to all processes of this host."""
        for process in self.processes():
            with suppress(psutil.NoSuchProcess):
                process.kill()

    def cut_off(self, seconds):
        """Take the link down, so that packets are lost, and up again after this time."""
        _run("ip", "link", "set", self.link, "down")
        time.sleep(seconds)
        _run("ip", "link", "set", self.link, "up")


@contextmanager
def host(name, number, ports, delay_s):
    """Create a host that reaches these ports of 127.0.0.1, each direction after the delay.

    `number` (from 0 to 62) selects the addresses, of a network that is reserved for tests.
    """
    link = f"veth-{number}"
    own, other = (f"198.18.0.{4 * number + place}" for place in (1, 2))
    inside = ("ip", "netns", "exec", name)
    nat = (*inside, "iptables", "--wait", "-t", "nat", "-A")
    listed = ",".join(map(str, ports))
    _run("ip", "netns", "add", name)
    try:
        _run("ip", "link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", name)
        _run("ip", "address", "add", f"{own}/30", "dev", link)
        _run("ip", "link", "set", link, "up")
        _run(*inside, "ip", "address", "add", f"{other}/30", "dev", "eth0")
        _run(*inside, "ip", "link", "set", "lo", "up")
        _run(*inside, "ip", "link", "set", "eth0", "up")
        _run(*inside, "sysctl", "-w", "net.ipv4.conf.all.route_localnet=1")
        _run(
            *(*nat, "OUTPUT", "-d", "127.0.0.1", "-p", "tcp", "-m", "multiport"),
            *("--dports", listed, "-j", "DNAT", "--to-destination", own),
        )
        _run(*nat, "POSTROUTING", "-o", "eth0", "-j", "MASQUERADE")
        with _relay(own, delay_s, ports):
            yield Host(name, link)
    finally:
        _run("ip", "netns", "delete", name)
        subprocess.run(["ip", "link", "delete", link], capture_output=True)  # if it still exists


@contextmanager
def _relay(address, delay_s, ports):
    command = [sys.executable, "-m", "tests.hosts.relay", address, str(delay_s), *map(str, ports)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout.readline() == "listening\n"
        try:
            yield
        finally:
            running.terminate()


def _run(*command):
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
