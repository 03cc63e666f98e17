"""The machines of a training that runs on several, as the environment of each one states them.

Something outside this project starts the processes on all machines: a Kubernetes Job with several
pods, a scheduler, or an operator. Machine 0 trains as usual (`trans_peft.training.launch.fit`, in a
flow run or from the command line). Each other machine runs `python -m trans_peft.training.join`.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from trans_peft.errors import InvalidSpecError

__all__ = ["Machines"]

_COUNT = "TRANS_PEFT_MACHINES"
_RANK = "TRANS_PEFT_MACHINE_RANK"
_ADDRESS = "TRANS_PEFT_MAIN_ADDRESS"


@dataclass(frozen=True)
class Machines:
    """How many machines share a training, and which one this is.

    Attributes:
        count: number of machines.
        rank: number of this machine, from 0.
        host: name or IP address of machine 0.
        port: free port on machine 0, on which the processes find each other. 0 on one machine:
            any.
    """

    count: int = 1
    rank: int = 0
    host: str = "127.0.0.1"
    port: int = 0

    @classmethod
    def of(cls, environment: Mapping[str, str] = os.environ) -> "Machines":
        """Read the machines from environment variables. One machine if none is set.

        Raises InvalidSpecError for values that cannot be used.

        Example::

            >>> Machines.of({"TRANS_PEFT_MACHINES": "2", "TRANS_PEFT_MACHINE_RANK": "1",
            ...              "TRANS_PEFT_MAIN_ADDRESS": "train-0:29500"})
            Machines(count=2, rank=1, host='train-0', port=29500)
        """
        given = {name: environment.get(name, "") for name in (_COUNT, _RANK, _ADDRESS)}
        if not any(given.values()) or given[_COUNT] == "1":
            return cls()
        host, _, port = given[_ADDRESS].rpartition(":")
        numbers = (given[_COUNT], given[_RANK], port)
        if all(number.isdecimal() for number in numbers) and host:
            count, rank, number = map(int, numbers)
            if 0 <= rank < count and 0 < number < 1 << 16:
                return cls(count, rank, host, number)
        raise InvalidSpecError(
            "the machines of a training cannot be read from the environment",
            expected=f"{_COUNT}=2, {_RANK}=0 on the first machine and 1 on the second, and "
            f"{_ADDRESS}=HOST:PORT of the first machine on both",
            found=", ".join(f"{name}={value!r}" for name, value in given.items()),
            do="set all three variables, or none",
        )

    def local_processes(self, processes: int) -> int:
        """Return how many of a recipe's processes run on this machine: the same on each one.

        A recipe with one process trains on this machine alone.

        Raises InvalidSpecError if the machines cannot have the same number.
        """
        if processes % self.count and processes > 1:
            raise InvalidSpecError(
                "the machines of a training cannot have the same number of processes",
                expected=f"processes: a multiple of {self.count} ({_COUNT})",
                found=f"processes: {processes}",
                do="change the recipe's processes, or train on one machine",
            )
        return max(1, processes // self.count)
