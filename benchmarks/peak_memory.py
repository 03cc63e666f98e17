"""The peak memory of a process."""

import re
from pathlib import Path


def peak_memory_mib() -> float:
    """Return the peak RSS of this program.

    `getrusage` also counts the RSS of the parent at the moment of the fork.
    """
    (kib,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(kib) / 1024
