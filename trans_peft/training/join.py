"""Take part in a training that another machine has started: `python -m trans_peft.training.join`.

The argument is the file `job.json` in the training's work folder, which all machines share at the
same path, as they do the folder of the base. The command waits for the file. The environment says
which machine this is (`trans_peft.training.machines`).
"""

import logging
import os
import sys
import time
from pathlib import Path

from trans_peft.errors import InvalidSpecError
from trans_peft.training.job import TrainingJob
from trans_peft.training.launch import finished, take_part
from trans_peft.training.machines import Machines

_POLL_S = 1.0

_log = logging.getLogger(__name__)


def main(job_file: Path) -> None:
    """Wait for the job, and run this machine's processes until the training ends.

    Returns at once if the training has ended.
    """
    machines = Machines.of(os.environ)
    if machines.rank == 0:
        raise InvalidSpecError(
            "machine 0 starts a training, and does not join it",
            expected="TRANS_PEFT_MACHINE_RANK of at least 1",
            do="run the training itself on machine 0",
        )
    while not job_file.is_file():
        time.sleep(_POLL_S)
    job = TrainingJob.read(job_file)
    if job.recipe.processes == 1:
        raise InvalidSpecError(
            "the training has one process, which machine 0 runs",
            found=job_file,
            do="raise the recipe's processes, or let no other machine join",
        )
    if finished(job) is not None:  # machine 0 starts no processes
        _log.info("the training has ended: %s", job.result_file)
        return
    take_part(job, on_event=lambda event: _log.info("%s", event))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    main(Path(sys.argv[1]))
