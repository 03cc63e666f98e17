"""Write the files of the demo that need no server: base v1 and the rows of each task.

`python -m demo.files FOLDER` runs while the servers start. Files that exist are not written again.
"""

import argparse
import os
from pathlib import Path

from demo.base import write_base_v1
from demo.settings import DATA_SEED, FULL, QUICK
from demo.sources import source_files
from demo.tasks import is_written, split, write

__all__ = ["base_v1_folder", "rows_folder"]


def base_v1_folder(folder: Path) -> Path:
    """Return the folder of base v1 in the demo's folder."""
    return folder / "v1"


def rows_folder(folder: Path, task: str) -> Path:
    """Return the folder of the rows of a task in the demo's folder."""
    return folder / "data" / task


def main() -> None:
    """Write what is missing, and print a line for each part."""
    parser = argparse.ArgumentParser(prog="python -m demo.files", description=__doc__)
    parser.add_argument("folder", type=Path, help="folder of the demo")
    parser.add_argument("--full", action="store_true", help="the tasks of `make demo-full`")
    given = parser.parse_args()
    files = None
    for task in [demo_task.task for demo_task in (FULL if given.full else QUICK)]:
        rows = rows_folder(given.folder, task.name)
        if not is_written(rows):
            if files is None:
                print("rows: reading the source of the installed packages", flush=True)
                files = list(source_files())
            print(f"rows: {task.name}, from {len(files):,} files", flush=True)
            write(split(task, files, DATA_SEED), rows)
    write_base_v1(base_v1_folder(given.folder))


if __name__ == "__main__":
    os.environ["TQDM_DISABLE"] = "1"
    main()
