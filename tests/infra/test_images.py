"""Runs the commands of the images that infra/containers/build.sh built: `make images`.

The root of a container stays writable here. Instead, each test compares what its command wrote with
the folders that are writable on Kubernetes.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
import urllib.request
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from infra.containers.sbom import debian_packages, python_packages

NAMES = ("servers", "bridge", "worker")
WRITABLE = ("tmp", "home/trans-peft", "var/lib/trans-peft", "run", "dev", "proc", "sys")
PASSWORD = "user:the-password-of-a-test"


def buildah(*arguments, **options):
    """Run buildah and return its output."""
    command = ["buildah", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True, **options)
    return done.stdout.strip()


def _built():
    if shutil.which("buildah") is None:
        return False
    found = subprocess.run(["buildah", "images", "--json"], capture_output=True, check=False)
    return all(f"trans-peft-{name}:".encode() in found.stdout for name in NAMES)


needs_images = [
    pytest.mark.slow,
    pytest.mark.skipif(not _built(), reason="infra/containers/build.sh did not build the images"),
]


def port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextmanager
def container(name):
    """A container of an image, and the folder of its root."""
    made = buildah("from", "--pull-never", f"trans-peft-{name}")
    try:
        yield made, Path(buildah("mount", made))
    finally:
        buildah("umount", made)
        buildah("rm", made)


@contextmanager
def running(name, folder, command=None, /, **variables):
    """The image's command, or another one, with these variables. Yields its log."""
    image = json.loads(buildah("inspect", "--type", "image", f"trans-peft-{name}"))
    assert image["OCIv1"]["config"]["User"] == "trans-peft"
    command = command or image["OCIv1"]["config"]["Cmd"]
    with container(name) as (made, root):
        began = folder / "began"
        began.touch()
        log = folder / f"{made}.log"
        given = [f"--env={key}={value}" for key, value in variables.items()]
        with log.open("wb") as output:
            process = subprocess.Popen(
                ["buildah", "run", "--isolation", "chroot", *given, made, "--", *command],
                stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        try:
            yield log
            written = subprocess.run(
                ["find", ".", "-newer", str(began), "-type", "f"],
                cwd=root, capture_output=True, text=True, check=False,
            ).stdout.split("\n")  # fmt: skip
            places = tuple(f"./{place}/" for place in WRITABLE)
            assert [line for line in written if line and not line.startswith(places)] == []
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def answer(url, log, timeout_s=180):
    """Wait for a response with status 200 and return its body."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        with suppress(OSError), urllib.request.urlopen(url, timeout=5) as response:
            return response.read().decode()
        time.sleep(1)
    pytest.fail(f"no answer from {url}:\n{log.read_text()[-3000:]}")


class TestImages:
    """Each command, as the image's user."""

    pytestmark = needs_images

    def test_mlflow_starts(self, tmp_path):
        address = port()
        command = ["mlflow", "server", "--host", "127.0.0.1", "--port", str(address)]
        options = ["--backend-store-uri", "sqlite:////tmp/mlflow.db", "--workers", "1"]
        with running("servers", tmp_path, [*command, *options]) as log:
            assert answer(f"http://127.0.0.1:{address}/health", log) == "OK"

    def test_bridge_answers(self, tmp_path):
        address = port()
        with running(
            "bridge", tmp_path,
            BRIDGE_PORT=address, BRIDGE_HOST="127.0.0.1",
            BRIDGE_S3_TOKENS="a-token-of-at-least-24-characters",
            PREFECT_API_URL="http://127.0.0.1:9/api", MLFLOW_TRACKING_URI="http://127.0.0.1:9",
        ) as log:  # fmt: skip
            assert json.loads(answer(f"http://127.0.0.1:{address}/health", log)) == {"status": "ok"}

    def test_fleet_page_answers(self, tmp_path):
        address = port()
        command = ["python", "-m", "trans_peft.cli", "ui", "--port", str(address)]
        with running("bridge", tmp_path, command, MLFLOW_TRACKING_URI="http://127.0.0.1:9") as log:
            answer(f"http://127.0.0.1:{address}/health", log)

    def test_worker_registers_itself_with_prefect_of_the_other_image(self, tmp_path):
        address = port()
        url = f"http://127.0.0.1:{address}/api"
        server = ["prefect", "server", "start", "--host", "127.0.0.1", "--port", str(address)]
        client = {"PREFECT_API_URL": url, "PREFECT_API_AUTH_STRING": PASSWORD}
        with running(
            "servers", tmp_path, server,
            PREFECT_SERVER_API_AUTH_STRING=PASSWORD,
            PREFECT_SERVER_UI_STATIC_DIRECTORY="/tmp/ui",
        ) as log:  # fmt: skip
            answer(f"{url}/health", log)
            deploy = [
                "sh", "-c",
                "python -m infra.stack.prefect_objects "
                "&& env -u TRANS_PEFT_CHECKOUT prefect --no-prompt deploy --all && echo deployed",
            ]  # fmt: skip
            with running("worker", tmp_path, deploy, GPU_SLOTS=2, **client) as log:
                self.wait_for(log, r"^deployed$")
            with running("worker", tmp_path, **client) as log:
                self.wait_for(log, r"Worker '.+' started!")
                ls = ["prefect", "work-pool", "inspect", "trans-peft", "--output", "json"]
                with running("worker", tmp_path, ls, **client) as shown:
                    self.wait_for(shown, r'"status": "READY"')

    def wait_for(self, log, pattern, timeout_s=240):
        """Wait until a log has a line that matches."""
        deadline = time.monotonic() + timeout_s
        while not re.search(pattern, log.read_text(), re.MULTILINE):
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(1)

    def test_worker_without_cuda_is_below_3_gb(self):
        found = json.loads(buildah("images", "--json", "trans-peft-worker"))
        with container("worker") as (_, root):
            has_cuda = any(root.glob("usr/local/lib/python3*/*-packages/nvidia/*"))
        if has_cuda:
            pytest.skip("an image with CUDA")
        size, unit = found[0]["size"].split()
        assert float(size) * {"MB": 1e-3, "GB": 1}[unit] < 3

    def test_sbom_lists_the_locked_packages(self):
        folder = Path(__file__).parents[2] / "build" / "images"
        for name, lock in (("servers", "servers"), ("bridge", "servers"), ("worker", "worker")):
            document = json.loads((folder / f"trans-peft-{name}.cdx.json").read_text())
            found = {one["purl"] for one in document["components"]}
            text = (folder.parents[1] / "locks" / f"{lock}.txt").read_text()
            locked = re.findall(r"^([\w.-]+)==([^\s;\\]+)", text, re.MULTILINE)
            assert {f"pkg:pypi/{package}@{version}" for package, version in locked} <= found
            assert any(purl.startswith("pkg:deb/debian/libc6@") for purl in found)


def test_components_of_an_sbom_have_package_urls():
    assert debian_packages("zlib1g 1:1.2 amd64\nlibc6 2.36-9 amd64") == [
        {"type": "library", "name": "libc6", "version": "2.36-9",
         "purl": "pkg:deb/debian/libc6@2.36-9?arch=amd64"},
        {"type": "library", "name": "zlib1g", "version": "1:1.2",
         "purl": "pkg:deb/debian/zlib1g@1:1.2?arch=amd64"},
    ]  # fmt: skip
    found = {one["name"]: one["purl"] for one in python_packages()}
    assert found["pytest"] == f"pkg:pypi/pytest@{pytest.__version__}"
    assert found["ruamel-yaml"].startswith("pkg:pypi/ruamel-yaml@")  # its metadata: ruamel.yaml
    assert [*found] == sorted(found)
