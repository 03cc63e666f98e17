"""Start one training run in child processes, report its events, and end all of its processes.

`accelerate launch` starts the processes. They import torch and transformers; this process does not.
In contrast to `subprocess.run(["accelerate", "launch", ...])`, progress is reported as typed
events, every process ends if the caller is cancelled or dies, and errors name their cause. The
user's accelerate configuration is ignored, because it could change the result.
"""

import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import IO, NoReturn

import trans_peft.errors
from trans_peft.errors import (
    InvalidSpecError,
    OutOfMemoryError,
    TrainingCancelled,
    TrainingError,
    TransPeftError,
)
from trans_peft.isolation.environment import without_credentials
from trans_peft.models import adapter_weights_sha256
from trans_peft.training.events import (
    CheckpointSaved,
    Event,
    EventMessage,
    Failed,
    Finished,
    LogLine,
    ProcessStarted,
    decode,
)
from trans_peft.training.job import TrainingJob, TrainingResult
from trans_peft.training.machines import Machines

__all__ = ["finished", "fit", "take_part"]

_LESS_MEMORY = (
    "set compute.gradient_checkpointing, lower optimizer.batch_size (and raise "
    "gradient_accumulation by the same factor), lower max_length, or train in bfloat16 or nf4"
)
_TAIL_LINES = 25
_READERS_S = 5
_CHECKPOINT_S = 25.0  # machines that are taken away give 30 s


def fit(job: TrainingJob, *, on_event: Callable[[Event], None]) -> TrainingResult:
    """Train one adapter in child processes and return the result.

    This thread calls `on_event` with each event. A run that was killed resumes from its last
    complete checkpoint and ends in the same weights as an uninterrupted run. A finished run is not
    repeated: its result is returned. All training processes end when this call ends, also by an
    exception or by the death of this process. If a signal ends this call (KeyboardInterrupt,
    SystemExit, Prefect's TerminationSignal), they save a checkpoint first, for up to 25 s.

    If the environment names several machines (`trans_peft.training.machines`), this is machine 0.
    The training starts when all others have joined it.

    Raises:
        NotFoundError, InvalidSpecError: the job cannot start, or this is not machine 0.
        DataError: rows cannot be trained on.
        OutOfMemoryError: a process needed more memory than there is.
        TrainingCancelled: the processes were terminated (SIGTERM).
        TrainingError: the processes failed for another reason.
    """
    job.check()
    done = finished(job)
    if done is not None:
        return done
    if job.recipe.processes > 1 and (rank := Machines.of().rank) > 0:
        raise InvalidSpecError(
            "a training on several machines starts on machine 0",
            expected="TRANS_PEFT_MACHINE_RANK=0",
            found=f"TRANS_PEFT_MACHINE_RANK={rank}",
            do=f"run `python -m trans_peft.training.join {job.file}` on this machine, or unset its "
            "TRANS_PEFT_MACHINE variables",
        )
    job.write()
    take_part(job, on_event=on_event)
    result = finished(job)
    if result is None:
        raise TrainingError(
            "training reported success but saved no intact adapter",
            expected=str(job.result_file),
            do="run the training again",
        )
    return result


def take_part(job: TrainingJob, *, on_event: Callable[[Event], None]) -> None:
    """Run this machine's processes of a job that `fit` has written, until the adapter is saved.

    Raises what `fit` raises. Processes end with this call, as there.
    """
    with _Training(job) as training:
        try:
            training.follow(on_event)
        except Exception:
            raise
        except BaseException:  # a signal, or Prefect cancels the run
            training.stop_after_checkpoint(on_event)
            raise


def finished(job: TrainingJob) -> TrainingResult | None:
    """Return the result of a training that has ended and whose adapter is intact, or None."""
    if not job.result_file.is_file():
        return None
    result = TrainingResult.read(job.result_file)
    try:
        intact = adapter_weights_sha256(job.adapter_folder) == result.weights_sha256
    except TransPeftError:
        intact = False
    # The work folder may have been moved after the result was written.
    return replace(result, folder=job.adapter_folder) if intact else None


class _Training:
    """This machine's processes of one run, which start on entry and are killed on exit."""

    def __init__(self, job: TrainingJob) -> None:
        self._job = job
        self._lines: queue.SimpleQueue[EventMessage | LogLine | None] = queue.SimpleQueue()
        self._groups: set[int] = set()
        self._tail: deque[str] = deque(maxlen=_TAIL_LINES)

    def __enter__(self) -> "_Training":
        self._process = subprocess.Popen(
            _command(self._job),
            stdin=subprocess.PIPE,  # closes when this process dies; see parent_watch
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=_environment(Machines.of().local_processes(self._job.recipe.processes)),
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self._groups.add(self._process.pid)
        assert self._process.stdout is not None and self._process.stderr is not None
        self._readers = [
            threading.Thread(target=self._read, args=(stream, parse), daemon=True)
            for stream, parse in ((self._process.stdout, decode), (self._process.stderr, LogLine))
        ]
        for reader in self._readers:
            reader.start()
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        for group in self._groups:  # torch's elastic agent gives each process its own group
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(group, signal.SIGKILL)
        self._process.wait()
        for reader in self._readers:
            reader.join(timeout=_READERS_S)

    def follow(self, on_event: Callable[[Event], None]) -> None:
        """Call `on_event` until the adapter is saved. Raises if the processes end before that."""
        failure = None
        open_streams = len(self._readers)
        while open_streams:
            try:
                # Prefect cancels by raising an exception in this thread, which is only possible
                # between two bytecodes, so the wait must have a timeout.
                message = self._lines.get(timeout=0.5)
            except queue.Empty:
                continue
            match message:
                case None:
                    open_streams -= 1
                case ProcessStarted():
                    self._groups.add(message.process_group)
                case Failed():
                    failure = failure or message
                case Finished():
                    return  # the shutdown of the interpreters takes seconds
                case _:
                    if isinstance(message, LogLine):
                        self._tail.append(message.text)
                    on_event(message)
        if failure is not None:
            raise _error(failure)
        self._raise_for(self._process.wait())

    def stop_after_checkpoint(self, on_event: Callable[[Event], None]) -> None:
        """Let the processes save a checkpoint after the current step, for at most 25 s.

        `on_event` gets the saved checkpoint. Its errors are dropped: the call ends anyway.
        """
        deadline_s = time.monotonic() + _CHECKPOINT_S
        assert self._process.stdin is not None
        with suppress(OSError):  # the processes may have ended
            self._process.stdin.write("stop\n")
            self._process.stdin.flush()
        open_streams = len(self._readers)
        while open_streams and (left_s := deadline_s - time.monotonic()) > 0:
            with suppress(queue.Empty):
                match self._lines.get(timeout=left_s):
                    case None:
                        open_streams -= 1
                    case CheckpointSaved() as saved:
                        with suppress(Exception):
                            on_event(saved)
                    case Failed() | Finished():
                        return

    def _read(self, stream: IO[str], parse: Callable[[str], EventMessage | LogLine]) -> None:
        with stream:
            for line in stream:
                if line.strip():
                    self._lines.put(parse(line.rstrip("\n")))
        self._lines.put(None)

    def _raise_for(self, code: int) -> NoReturn:
        tail = "\n".join(self._tail)
        log = "\n    ".join(self._tail) or "(empty)"
        if re.search(r"out of memory|can't allocate memory|MemoryError", tail):
            raise OutOfMemoryError(
                "the training process ran out of memory", found=log, do=_LESS_MEMORY
            )
        # The launcher logs the signal of a child and exits with 1.
        if code in (-signal.SIGKILL, 128 + signal.SIGKILL) or "SIGKILL" in tail:
            raise OutOfMemoryError(
                "the training process was killed (SIGKILL), as the operating system does if memory "
                "runs out",
                found=log,
                do=_LESS_MEMORY,
            )
        if code in (-signal.SIGTERM, 128 + signal.SIGTERM) or "SIGTERM" in tail:
            raise TrainingCancelled("the training process was terminated (SIGTERM)")
        raise TrainingError(
            f"the training process ended with exit code {code}",
            found=f"the end of its log:\n    {log}",
            do="read the log; if the cause is temporary, run the training again",
        )


def _error(failure: Failed) -> TransPeftError:
    kind = getattr(trans_peft.errors, failure.error, TrainingError)
    if kind is OutOfMemoryError:
        return OutOfMemoryError(
            "the training process ran out of memory", found=failure.message, do=_LESS_MEMORY
        )
    return kind(failure.message)


def _command(job: TrainingJob) -> list[str]:
    processes = Machines.of().local_processes(job.recipe.processes)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, (cores or 1) // processes))
    return [
        sys.executable,
        *("-m", "accelerate.commands.launch"),
        *("--config_file", str(_launch_config(job))),
        *("--num_cpu_threads_per_process", threads),
        *("--module", "trans_peft.training.worker", str(job.file)),
    ]


def _launch_config(job: TrainingJob) -> Path:
    processes = job.recipe.processes
    machines = Machines.of() if processes > 1 else Machines()
    config = {
        "compute_environment": "LOCAL_MACHINE",
        # accelerate starts several processes only for this type; without a GPU they use the CPU
        # and gloo.
        "distributed_type": "MULTI_GPU" if processes > 1 else "NO",
        "num_processes": processes,
        "num_machines": machines.count,
        "machine_rank": machines.rank,
        "main_process_ip": machines.host if machines.count > 1 else None,
        "main_process_port": machines.port,
        "same_network": True,
        "mixed_precision": "no",
        "use_cpu": False,
        "debug": False,
    }
    path = job.work_dir / f"accelerate-{machines.rank}.json"
    path.write_text(json.dumps(config, indent=2))
    return path


def _environment(processes: int) -> dict[str, str]:
    """Return the caller's environment with one GPU per process, to avoid nn.DataParallel.

    Credentials are left out: a training reads local files only.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = map(str, range(processes)) if visible is None else visible.split(",")[:processes]
    inherited = {k: v for k, v in without_credentials().items() if not k.startswith("ACCELERATE_")}
    # By default OpenMP's threads spin while they wait, which makes a step several times slower on a
    # machine that runs other processes.
    defaults = {"OMP_WAIT_POLICY": "PASSIVE"}
    fixed = {
        "CUDA_VISIBLE_DEVICES": ",".join(gpus),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    return defaults | inherited | fixed
