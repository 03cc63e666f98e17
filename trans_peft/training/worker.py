"""Entry point of a training process, which `trans_peft.training.launch` starts through accelerate.

The process sends `ProcessStarted` before it imports torch, and every error as `Failed` before it
ends.
"""

import fcntl
import os
import re
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trans_peft.errors import InvalidSpecError, TrainingError, TransPeftError
from trans_peft.training.events import Failed, Finished, ProcessStarted
from trans_peft.training.job import TrainingJob
from trans_peft.training.machines import Machines
from trans_peft.training.parent_watch import EventStream, exit_with_parent

_LOCK_WAIT_S = 20
_TRACEBACK_CHARACTERS = 3000


def main() -> None:
    """Run the job whose file is the only argument. Errors are sent as events."""
    events = EventStream()
    exit_with_parent()
    events.send(ProcessStarted(os.getpgid(0)))
    try:
        _run(TrainingJob.read(Path(sys.argv[1])), events)
    except Exception as error:
        traceback.print_exc()
        events.send(_failure(error))
        sys.exit(3)


def _run(job: TrainingJob, events: EventStream) -> None:
    import torch
    from accelerate import PartialState
    from datasets import disable_progress_bars
    from transformers.utils import logging

    from trans_peft.training.finetune import finetune

    warnings.filterwarnings(
        "ignore", category=FutureWarning, module="transformers"
    )  # caused by TRL
    disable_progress_bars()
    logging.disable_progress_bar()
    processes, gpus = job.recipe.processes, torch.cuda.device_count()
    if 0 < gpus < (here := Machines.of().local_processes(processes)):
        raise InvalidSpecError(
            "there are fewer GPUs than processes",
            expected=f"{here} GPUs",
            found=gpus,
            do="lower the recipe's processes, or make more GPUs visible",
        )
    # Without a GPU, accelerate connects the processes only if cpu=True.
    state = PartialState(cpu=gpus == 0)
    if state.num_processes != processes:
        raise TrainingError(
            "accelerate started another number of processes than the recipe has",
            expected=processes,
            found=state.num_processes,
            do="unset ACCELERATE_* and distributed environment variables, and run again",
        )
    with exclusive_work_dir(job.work_dir, held=state.is_main_process):
        state.wait_for_everyone()  # until the lock is held, another run may write a checkpoint
        finetune(job, state, events.send)
        state.wait_for_everyone()  # until the main process has saved the result
        if state.is_local_main_process:
            events.send(Finished())


def _failure(error: Exception) -> Failed:
    if isinstance(error, TransPeftError):
        return Failed(type(error).__name__, str(error))
    # torch has an error class for a full GPU, but not for a full host.
    if isinstance(error, MemoryError) or re.search("out of memory|allocate memory", str(error)):
        return Failed("OutOfMemoryError", str(error) or type(error).__name__)
    text = "".join(traceback.format_exception(error))
    return Failed("TrainingError", f"the training process crashed\n{text[-_TRACEBACK_CHARACTERS:]}")


@contextmanager
def exclusive_work_dir(work_dir: Path, *, held: bool) -> Iterator[None]:
    """Lock a work folder against a second training. Only the process with `held` takes the lock.

    The lock ends with its process. For up to 20 s this waits for a process that is being killed.
    TrainingError if another process keeps the lock.
    """
    if not held:
        yield
        return
    with (work_dir / "lock").open("w") as file:
        deadline_s = time.monotonic() + _LOCK_WAIT_S
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline_s:
                    raise TrainingError(
                        f"another training process uses the work folder {work_dir}",
                        expected="one training per work folder",
                        do="wait until it has ended, or choose another work folder",
                    ) from None
                time.sleep(0.2)
        yield


if __name__ == "__main__":
    main()
