"""Programs that try to read, write or reach something outside their sandbox. None succeeds.

Root and unprivileged users take different paths through the sandbox. Run these tests as both.
"""

import os
import secrets
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent

import pytest

from tests.sandbox.programs import attempts, run
from trans_peft.sandbox import process
from trans_peft.sandbox.forkserver import ForkServer


@pytest.mark.usefixtures("all_guards")
def test_the_callers_environment_and_files_are_invisible(monkeypatch, tmp_path):
    secret = secrets.token_hex(16)
    monkeypatch.setenv("TRANS_PEFT_SECRET", secret)
    # This server starts with the secret in its parent's environment.
    monkeypatch.setattr(process, "_fork_server", ForkServer())
    (tmp_path / "token").write_text(secret)
    outcome = run(f"""
        import glob, os, subprocess
        print("tried", dict(os.environ), os.environb)
        import ctypes; print(ctypes.CDLL(None).getenv(b"TRANS_PEFT_SECRET"))
        places = ["/proc/self/environ", "/proc/1/environ", "/proc/{os.getpid()}/environ",
                  {str(tmp_path / "token")!r}, {__file__!r}, "/etc/passwd", "/etc/hostname"]
        for pattern in ("/proc/*/environ", "/root/.*", "/home/*/*"): places += glob.glob(pattern)
        for place in places:
            try: print("read", place, open(place).read())
            except OSError: pass
    """)
    assert "tried" in outcome.stdout, outcome
    assert secret not in outcome.stdout + outcome.stderr
    assert "read" not in outcome.stdout
    assert str(Path.home()) not in outcome.stdout


@pytest.mark.usefixtures("all_guards")
def test_nothing_is_written_outside_the_scratch_folder(tmp_path):
    outside = tmp_path / "outside"
    outside.write_text("untouched")
    outcome = run(
        attempts(
            f"open({str(outside)!r}, 'a').write('x')",
            f"open({str(tmp_path / 'new')!r}, 'w')",
            "open('/new', 'w')",
            "open('/scratch/../new', 'w')",
            "open('/dev/new', 'w')",
            "open(os.__file__, 'a')",
            "os.remove(os.__file__)",
            "os.chmod('/', 0o777)",
            "os.mkdir('/usr/new')",
            "os.mknod('/scratch/disk', 0o60666, os.makedev(254, 0))",
            f"os.symlink({str(outside)!r}, 'link'); open('link', 'a').write('x')",
            "os.link(os.__file__, 'hard')",
            "os.symlink('/', 'root'); open('root/new', 'w')",
            "os.chroot('.'); os.chdir('../../..')",
            "os.rename('/usr', '/scratch/usr')",
        )
    )
    assert outcome.stdout == "tried\n", outcome
    assert outside.read_text() == "untouched"
    assert list(tmp_path.iterdir()) == [outside]
    assert run("open('x', 'w').write('y'); print(open('/scratch/x').read())").stdout == "y\n"


@pytest.mark.usefixtures("all_guards")
def test_no_connection_is_made(tmp_path):
    listeners = {}
    for family, address in (
        (socket.AF_INET, ("127.0.0.1", 0)),
        (socket.AF_UNIX, str(tmp_path / "s")),
        (socket.AF_UNIX, f"\0{tmp_path}"),
    ):
        listener = socket.socket(family)
        listener.bind(address)
        listener.listen()
        listener.setblocking(False)
        listeners[listener] = listener.getsockname()
    calls = [
        f"socket.socket(socket.{listener.family.name}).connect({address!r})"
        for listener, address in listeners.items()
    ]
    outcome = run(
        attempts(
            *calls,
            "socket.socket(socket.AF_VSOCK)",
            "socket.socket(socket.AF_NETLINK)",
            "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', 53))",
            "socket.getaddrinfo('localhost', 80)",
            imports="socket",
        )
    )
    assert outcome.stdout == "tried\n", outcome
    for listener in listeners:
        with pytest.raises(BlockingIOError):
            listener.accept()
        listener.close()


@pytest.mark.usefixtures("all_guards")
def test_the_network_is_unreachable_without_the_seccomp_filter():
    """Two guards block the network. This tests the namespace alone."""
    listener = socket.create_server(("127.0.0.1", 0))
    address = listener.getsockname()
    listener.setblocking(False)
    program = f"import socket; s = socket.socket(); print('a socket'); s.connect({address!r})"
    script = f"""
        import os, socket
        from trans_peft.sandbox import child, process
        child.forbid_system_calls = lambda: None
        server, child_socket = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        if os.fork() == 0:
            server.close()
            child.main(child_socket.detach())
            os._exit(0)
        child_socket.close()
        class ServerWithoutFilter:
            def fork(self, control, fds):
                socket.send_fds(server, [b"."], (control.fileno(), *fds))
        process._fork_server = ServerWithoutFilter()
        from trans_peft.sandbox.run import run_script
        print(run_script({program!r}))
    """
    done = subprocess.run([sys.executable, "-c", dedent(script)], capture_output=True, text=True)
    assert "a socket" in done.stdout, done
    assert "unreachable" in done.stdout
    with pytest.raises(BlockingIOError):
        listener.accept()
    listener.close()


@pytest.fixture
def bystander() -> Iterator["subprocess.Popen[bytes]"]:
    with subprocess.Popen(["sleep", "60"]) as process:
        yield process
        process.kill()


@pytest.mark.usefixtures("all_guards")
def test_no_process_outside_is_reachable(bystander):
    # Inside the sandbox, the lowest numbers are its own processes.
    pids = [pid for pid in (bystander.pid, os.getpid(), os.getppid()) if pid > 9]
    outcome = run(
        attempts(
            "os.kill(os.getppid(), 9) if os.getppid() else 1 / 0",
            *(f"os.kill({pid}, 9)" for pid in pids),
            *(f"os.killpg({pid}, 9)" for pid in pids),
            *(f"os.pidfd_open({pid})" for pid in pids),
            *(f"open('/proc/{pid}/mem', 'r+b')" for pid in pids),
            *(f"assert libc.ptrace(16, {pid}, 0, 0) == 0" for pid in pids),
            "assert libc.ptrace(0, 0, 0, 0) == 0",
            f"assert libc.process_vm_readv({bystander.pid}, 0, 0, 0, 0, 0) == 0",
            f"os.sched_setaffinity({bystander.pid}, [0])",
            imports="os, ctypes; libc = ctypes.CDLL(None)",
        )
    )
    assert outcome.stdout == "tried\n", outcome
    assert "ProcessLookupError" in run("import os; os.kill(-1, 9)").stderr  # no process but itself
    assert bystander.poll() is None


@pytest.mark.usefixtures("all_guards")
def test_no_privilege_can_be_regained():
    outcome = run(
        attempts(
            "os.setuid(0)",
            "os.setresuid(0, 0, 0)",
            "os.setgroups([0])",
            "os.nice(-5)",
            "resource.setrlimit(resource.RLIMIT_NPROC, (1000, 1000))",
            "resource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
            "os.sethostname('x') if hasattr(os, 'sethostname') else socket.sethostname('x')",
            "assert libc.unshare(0x10000000) == 0",
            "assert libc.unshare(0x40000000) == 0",
            "assert libc.syscall(56, 0x10000000 | 17, 0, 0, 0, 0) >= 0",
            "assert libc.mount(b'none', b'/scratch', b'tmpfs', 0, 0) == 0",
            "assert libc.umount2(b'/scratch', 2) == 0",
            "assert libc.prctl(1, 0, 0, 0, 0) == 0",
            "assert libc.prctl(38, 0, 0, 0, 0) == 0",
            "assert libc.keyctl(0, -3, 0) >= 0",
            imports="os, socket, resource, ctypes; libc = ctypes.CDLL(None)",
        )
    )
    assert outcome.stdout == "tried\n", outcome


@pytest.mark.usefixtures("all_guards")
def test_open_descriptors_of_the_caller_are_closed(tmp_path):
    with (tmp_path / "open").open("wb") as file:
        os.set_inheritable(file.fileno(), True)
        outcome = run("""
            import os
            for fd in range(3, 4096):
                try: os.write(fd, b"x")
                except OSError: continue
                print("wrote to", fd)
        """)
    assert outcome.stdout == "", outcome
    assert (tmp_path / "open").read_bytes() == b""
