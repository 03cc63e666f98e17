"""Start a real vLLM server with the plugin and the middleware, and ask it.

It runs in an environment of its own (`make test-vllm`), because vLLM needs other versions.
"""

import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx

from tests.servers import HOST, _free_ports

ROOT = Path(__file__).parents[2]
PYTHON = Path(os.environ.get("TRANS_PEFT_VLLM", ROOT / "build/vllm-env")) / "bin/python"
START_TIMEOUT_S = 420
MIDDLEWARE = "trans_peft.serving.vllm_middleware.ServeByVerdict"


@dataclass
class Vllm:
    """A running server."""

    url: str
    log: Path
    process: subprocess.Popen

    def __post_init__(self):
        self.client = httpx.Client(base_url=self.url, timeout=120)

    def post(self, path: str, **body) -> httpx.Response:
        return self.client.post(path, json=body)

    def complete(self, model: str, prompt: str, tokens: int = 16) -> httpx.Response:
        return self.post(
            "/v1/completions",
            model=model, prompt=prompt, max_tokens=tokens, temperature=0, min_tokens=tokens,
            return_token_ids=True,
        )  # fmt: skip

    def tokens(self, model: str, prompt: str) -> list[int]:
        response = self.complete(model, prompt)
        assert response.status_code == 200, f"{response.text}\n{self.end_of_log()}"
        assert response.json()["model"] == model
        return response.json()["choices"][0]["token_ids"]

    def refusal(self, model: str) -> tuple[int, str]:
        response = self.complete(model, "17 is")
        return response.status_code, response.json().get("error", {}).get("code", "")

    def wait_until(self, condition, timeout_s: float = 30) -> float:
        """Wait until `condition()` holds, and return after how many seconds."""
        started = time.monotonic()
        while not condition():
            assert time.monotonic() - started < timeout_s, self.end_of_log()
            time.sleep(0.05)
        return time.monotonic() - started

    def end_of_log(self) -> str:
        return self.log.read_text()[-4000:]


@contextmanager
def vllm_server(
    folder: Path, base: Path, variables: Mapping[str, str], *arguments: str, fails: bool = False
) -> Iterator[Vllm]:
    """Run a server on a base until the end of the block. With `fails`, wait until it has ended."""
    (port,) = _free_ports(1)
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "vllm.log"
    command = [
        PYTHON, "-m", "vllm.entrypoints.openai.api_server",
        "--model", base, "--host", HOST, "--port", str(port),
        "--dtype", "float32", "--max-model-len", "256", "--max-num-seqs", "8", "--enforce-eager",
        "--enable-lora", "--max-loras", "1", "--max-cpu-loras", "1", "--max-lora-rank", "8",
        "--middleware", MIDDLEWARE, *arguments,
    ]  # fmt: skip
    environment = {
        **os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "TRANS_PEFT_SERVE_FOLDERS": str(folder / "served"),
        **variables,
    }  # fmt: skip
    with log.open("wb") as output:
        process = subprocess.Popen(
            list(map(str, command)), env=environment, stdout=output, stderr=subprocess.STDOUT,
            cwd=folder, start_new_session=True,
        )  # fmt: skip
    found = Vllm(f"http://{HOST}:{port}", log, process)
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not _is_up(found) and process.poll() is None:
            assert time.monotonic() < deadline, found.end_of_log()
            time.sleep(0.5)
        assert (process.poll() is not None) == fails, found.end_of_log()
        yield found
    finally:
        found.client.close()
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _is_up(server: Vllm) -> bool:
    with suppress(httpx.TransportError):
        return server.client.get("/health").status_code == 200
    return False
