"""vLLM as an engine, in a process of an environment of its own.

vLLM keeps keys and values in pages, starts a waiting text as soon as another one ends, and applies
LoRA adapters without changing the base. Its process stays for the next adapter of the same base.
"""

import atexit
import json
import math
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

from trans_peft.errors import EvaluationError, WorkerError
from trans_peft.isolation.environment import without_credentials
from trans_peft.models import borrow_memory
from trans_peft.ports import Engine, EngineAnswer, Sampling, TokenScore
from trans_peft.validation.decoding.generation import AnswerEnds
from trans_peft.validation.engine import refuse_sampling

__all__ = ["MAX_RANK", "VllmBase", "VllmEngine", "vllm_name"]

_CHILD = Path(__file__).with_name("vllm_child.py")
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
MAX_RANK = _RANKS[-1]
"""The largest rank that vLLM accepts."""

_LEAST_LENGTH = 1024
_SHOWN_LOG = 2000  # characters
_FIXED = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process, which ends with this one
    "HF_HUB_OFFLINE": "1",
}
_DEFAULTS = {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_CPU_KVCACHE_SPACE": "4",  # GiB; by default vLLM takes half of the host's memory
}
_numbers = count(1)
"""Numbers of adapters. vLLM caches by the name of an adapter, so no name is used twice."""


@cache
def vllm_name(environment: Path) -> str:
    """Return the engine's name, with the version of vLLM in a Python environment.

    Raises WorkerError if vLLM is not installed there, or finds no device that it runs
    on.
    """
    try:
        process = subprocess.run(
            [_python(environment), "-P", _CHILD, "check"],
            capture_output=True,
            text=True,
            check=False,
            env=_variables(),
        )
        found, error = json.loads(process.stdout or f"[null, {json.dumps(process.stderr[-300:])}]")
    except (OSError, ValueError) as raised:
        found, error = None, str(raised)
    if found is None or not found["device"]:
        raise WorkerError(
            "this worker cannot run vLLM",
            expected=f"vLLM in the Python environment {environment}, and a device that it supports",
            found=error or f"vLLM {found['version']} and no device",
            do="install vLLM there, set TRANS_PEFT_VLLM to its environment, or choose another "
            "engine in the policy",
        )
    return _name(found["version"])


def _name(version: str) -> str:
    return f"vllm {version.partition('+')[0]}"


@dataclass(frozen=True)
class VllmBase:
    """A base as vLLM loads it.

    Attributes:
        environment: The Python environment with vLLM.
        folder: The Hugging Face folder of the base.
        files: Its files (`trans_peft.models.base_files`): vLLM loads a base again that changed.
        dtype: Data type of the weights, such as "float32".
        context: The longest text of the base in tokens; None without a limit.
    """

    environment: Path
    folder: Path
    files: tuple[tuple[str, int, int], ...]
    dtype: str
    context: int | None = None


class VllmEngine:
    """Answers with vLLM (`trans_peft.ports.Engine`).

    Drafts are ignored, near ties are not counted, and no progress is reported within a call. Where
    vLLM may apply LoRA to the output layer, it cannot return the log-probabilities of given tokens
    (0.32: `prompt_logprobs` fails). The default engine computes them.
    """

    def __init__(
        self,
        base: VllmBase,
        ends_of: Any,
        tokenizer: Any,
        default: Callable[[], AbstractContextManager[Engine]],
        adapter: Path | None = None,
        rank: int = 0,
    ) -> None:
        """Prepare the engine; the first call starts vLLM, unless it runs on this base.

        `ends_of` is the base's model, whose end tokens end an answer; its weights are not read.
        `default` opens the default engine with the same base and adapter.
        `adapter` is a PEFT folder with LoRA matrices of at most this `rank`; None: the bare base.
        """
        self.name, self.dtype = vllm_name(base.environment), base.dtype
        self._base, self._ends_of, self._tokenizer, self._rank = base, ends_of, tokenizer, rank
        self._default = default
        number = next(_numbers)
        self._adapter = adapter and (f"adapter-{number}", number, str(adapter))

    def answers(  # noqa: PLR0913  the arguments of `generate`
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        stop: Sequence[str] = (),
        end_tokens: frozenset[int] = frozenset(),
        drafts: Sequence[Sequence[int]] | None = None,
        sampling: Sampling | None = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> list[EngineAnswer]:
        """Continue each prompt greedily. InvalidSpecError for `sampling`."""
        refuse_sampling(sampling, "vLLM")
        ends = AnswerEnds(self._ends_of, self._tokenizer, stop, end_tokens)
        options: dict[str, Any] = {
            "max_tokens": max_new_tokens,
            "stop_token_ids": sorted(ends.tokens),
            "skip_special_tokens": False,
        }
        results = list(self._results(prompts, stop=list(stop), detokenize=bool(stop), **options))
        cuts = [_end(ends, found["ids"]) for found in results]
        # vLLM finds stop strings in its own text, which can differ at incomplete characters.
        early = [
            number
            for number, (found, cut) in enumerate(zip(results, cuts, strict=True))
            if cut is None and len(found["ids"]) < max_new_tokens
        ]
        again = self._results([prompts[number] for number in early], detokenize=False, **options)
        for number, found in zip(early, again, strict=True):
            results[number], cuts[number] = found, _end(ends, found["ids"])
        answers = []
        for found, cut in zip(results, cuts, strict=True):
            _check_finite(found["log_p"])
            ids = found["ids"][:cut]
            answers.append(EngineAnswer(ends.text(ids), ids))
        if on_progress is not None:
            on_progress(len(answers), len(prompts))
        return answers

    def likelihoods(
        self,
        questions: Sequence[tuple[Sequence[int], Sequence[Sequence[int]]]],
        *,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> Sequence[Sequence[float]]:
        """Return the log-likelihood of each continuation, by the default engine."""
        with self._default() as engine:
            return engine.likelihoods(questions, on_progress=on_progress)

    def scores(
        self, texts: Sequence[tuple[Sequence[int], Sequence[int]]]
    ) -> Sequence[Sequence[TokenScore]]:
        """Return the score of each given token, by the default engine."""
        with self._default() as engine:
            return engine.scores(texts)

    def _results(
        self, prompts: Sequence[Sequence[int]], *, max_tokens: int, **sampling: Any
    ) -> Iterator[Mapping[str, Any]]:
        if not prompts:
            return iter(())
        process = _process(self._base, self._rank, max(map(len, prompts)) + max_tokens)
        if process.name != self.name:
            raise WorkerError(
                "another version of vLLM was installed while this process ran",
                expected=self.name,
                found=process.name,
                do="run it again in a new process",
            )
        request = {
            "prompts": [list(prompt) for prompt in prompts],
            "adapter": self._adapter,
            "sampling": {
                "temperature": 0, "max_tokens": max_tokens, "ignore_eos": True, "logprobs": 0,
                **sampling,
            },
        }  # fmt: skip
        found, error = process.call(request)
        if error is not None:
            raise EvaluationError(
                "vLLM could not answer",
                found=error,
                do="use the default engine, which names the adapter or the item at fault",
            )
        return iter(found)


def _end(ends: AnswerEnds, ids: Sequence[int]) -> int | None:
    """Return the number of tokens of an answer that has an end; None without one."""
    return next((n for n in range(1, len(ids) + 1) if ends.reached(ids[:n])), None)


def _check_finite(log_p: Sequence[float]) -> None:
    broken = next((value for value in log_p if not math.isfinite(value)), None)
    if broken is not None:
        raise EvaluationError(
            "the model's logits are not finite",
            found=f"{broken} as a log-likelihood",
            do="check the weights of base and adapter",
        )


class _Process:
    """vLLM with one base, for texts and LoRA matrices up to a length and a rank."""

    def __init__(self, base: VllmBase, rank: int, length: int) -> None:
        self.base, self.rank, self.length = base, rank, length
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  open as long as the process runs
        self._running = subprocess.Popen(
            [_python(base.environment), "-P", _CHILD, "serve"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=_variables(),
        )
        arguments = {
            "model": str(base.folder), "dtype": base.dtype, "load_format": "safetensors",
            "generation_config": "vllm", "enable_lora": True, "max_loras": 1,
            "max_lora_rank": rank, "max_model_len": length, "seed": 0,
        }  # fmt: skip
        found, error = self.call(arguments)
        if error is not None:
            self.stop()
            raise WorkerError(
                f"vLLM cannot load the base in {base.folder}",
                expected="a base that vLLM supports, and memory for it",
                found=error,
                do="choose another engine in the policy",
            )
        self.name = _name(found["version"])

    def call(self, request: Mapping[str, Any]) -> tuple[Any, str | None]:
        """Send one line; return the result, and None or the error.

        An interrupted call ends the process: the next call would read the results of this one.
        """
        assert self._running.stdin is not None and self._running.stdout is not None
        try:
            self._running.stdin.write(json.dumps(request) + "\n")
            self._running.stdin.flush()
            line = self._running.stdout.readline()
        except BrokenPipeError:
            line = ""
        except BaseException:
            self.stop()
            raise
        if not line:
            self._running.kill()
            self._running.wait()  # until the log is complete
            error = f"the process ended: {self._end_of_log()}"
            self.stop()
            return None, error
        found, error = json.loads(line)
        return found, error

    def _end_of_log(self) -> str:
        self._log.seek(0)
        return self._log.read().decode(errors="replace")[-_SHOWN_LOG:]

    @property
    def runs(self) -> bool:
        return self._running.poll() is None

    def stop(self) -> None:
        """End the process, and close its pipes and its log. Again: no effect."""
        with suppress(BrokenPipeError), self._running:  # a part of a request may be unsent
            self._running.kill()
        self._log.close()


_running: _Process | None = None


def _process(base: VllmBase, rank: int, length: int) -> _Process:
    """Return the process that runs on a base, or start one; another base's is stopped first."""
    global _running
    known = _running
    if known is None or not known.runs or known.base != base:
        known = None
    if known is None or known.rank < rank or known.length < length:
        rank = max(rank, known.rank if known else 0)
        length = max(length, known.length if known else _LEAST_LENGTH)
        _stop()
        borrow_memory(_stop)
        wanted = 1 << (length - 1).bit_length()
        _running = known = _Process(
            base,
            next(allowed for allowed in _RANKS if allowed >= rank),
            wanted if base.context is None else min(wanted, base.context),
        )
    return known


@atexit.register
def _stop() -> None:
    global _running
    if _running is not None:
        _running.stop()
        _running = None


def _python(environment: Path) -> Path:
    return environment / "bin" / "python"


def _variables() -> dict[str, str]:
    """Return the variables of the process. PYTHONPATH may name packages of this environment."""
    own = without_credentials()
    own.pop("PYTHONPATH", None)
    return _DEFAULTS | own | _FIXED
