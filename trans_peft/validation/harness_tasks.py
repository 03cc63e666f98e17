"""Load tasks of lm-evaluation-harness. Needs the extra `harness`."""

import json
import random
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from hashlib import sha256
from importlib.metadata import version
from typing import Any

from trans_peft.domain.places import Places
from trans_peft.errors import DataError, InvalidSpecError, NotFoundError, closest, listed

__all__ = [
    "check_metric",
    "config_sha256",
    "harness_seeds",
    "load_task",
    "task_manager",
    "task_sha256",
]

_RANDOM_SEED, _OTHER_SEED = 0, 1234  # the defaults of the harness
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


@contextmanager
def harness_seeds() -> Iterator[None]:
    """Seed the global random number generators as the harness does, and restore them afterwards.

    Some tasks use them to make their documents. gpqa, for example, shuffles the choices. Without
    the seeds every process would have other documents.
    """
    import numpy as np
    import torch

    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        random.seed(_RANDOM_SEED)
        np.random.seed(_OTHER_SEED)
        torch.manual_seed(_OTHER_SEED)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


def load_task(name: str, *, folder: str | None = None, places: Places | None = None) -> Any:
    """Return a task of the harness with its documents. It decodes greedily.

    `folder` contains additional tasks (YAML). `places` are the hub data sets that may be read; by
    default all of them.

    NotFoundError for an unknown task, InvalidSpecError for a group of tasks, a task with sampling
    or a missing extra, AccessError for a data set that may not be read, and DataError if the task
    cannot be loaded.
    """
    manager = task_manager(folder)
    entry = manager.task_index.get(name)
    if entry is None:
        near = closest(name, manager.all_subtasks)[:3]
        raise NotFoundError(
            "unknown task of lm-evaluation-harness",
            expected=f"one of its {len(manager.all_subtasks)} tasks, such as {', '.join(near)}",
            found=name,
            do="correct the name, or pass the folder of the task's YAML file",
        )
    config = entry.cfg or {}
    if name not in manager.all_subtasks:
        members = sorted(entry.tags) or [str(member) for member in config.get("task", [])]
        raise InvalidSpecError(
            f"{name} is a group of tasks, but a suite is one task",
            expected="one of its tasks",
            found=listed(members, 20),
            do="make a suite of each of its tasks",
        )
    if places is not None:
        data_set = "" if "custom_dataset" in config else config.get("dataset_path", "")
        places.check_data_set(str(data_set or name), f"of the task {name}: {data_set or 'unknown'}")
    try:
        task = manager.load(name)["tasks"][name]
    except Exception as error:  # the hub client and the task's own code raise many types
        cause = error.__cause__ or error
        raise DataError(
            f"the task {name} cannot be loaded",
            found=f"{type(cause).__name__}: {cause}",
            do="check the connection to the hub and the name of the task's data set; where the hub "
            "cannot be reached, use a suite that was pinned elsewhere (docs/suites.md)",
        ) from error
    if (task.dump_config().get("generation_kwargs") or {}).get("do_sample"):
        raise InvalidSpecError(
            f"the task {name} decodes with sampling, so its results cannot be compared",
            do="use a task without do_sample",
        )
    return task


def check_metric(task: Any, metric: str) -> None:
    """Raise NotFoundError unless a task computes a metric (METRIC or METRIC,FILTER)."""
    names = [str(one["metric"]) for one in task.dump_config().get("metric_list") or []]
    if names and metric.partition(",")[0] not in names:
        raise NotFoundError(
            f"the task {task.task_name} does not compute this metric",
            expected=", ".join(names),
            found=metric,
            do="name one of these metrics",
        )


def task_sha256(task: Any) -> str:
    """Return the hash of the harness' version, a task's configuration and its documents."""
    content = [version("lm_eval"), _config(task), [dict(doc) for doc in task.eval_docs]]
    return sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def config_sha256(task: Any) -> str:
    """Return the hash of a task's configuration, equal on every machine."""
    text = json.dumps(_config(task), sort_keys=True, default=str)
    return sha256(_ADDRESS.sub("", text).encode()).hexdigest()


def _config(task: Any) -> dict[str, Any]:
    """Return a task's configuration without the path of its file."""
    config: dict[str, Any] = task.dump_config()
    metadata = config.get("metadata")
    if isinstance(metadata, dict):
        config["metadata"] = {k: v for k, v in metadata.items() if k != "config_source"}
    return config


@cache
def task_manager(folder: str | None) -> Any:
    """Return the harness' task manager, which reads thousands of files at construction."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise InvalidSpecError(
            "lm-evaluation-harness is not installed",
            do="pip install '.[harness]' in a checkout of trans-peft; or pin the suite where it is "
            "installed, and use the pinned suite (docs/suites.md)",
        ) from error
    return TaskManager(include_path=folder)
