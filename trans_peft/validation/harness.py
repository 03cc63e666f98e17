"""A task of lm-evaluation-harness as a suite, on a model that is already loaded.

    suite = harness_suite("arc_easy", "acc_norm")
    evaluation = evaluate_harness(model, tokenizer, suite, weights_sha256=..., ...)

The harness asks and marks (EleutherAI/lm-evaluation-harness, `simple_evaluate`); what it says of
each item becomes an `Evaluation`, so that the gate judges it like any other. A suite's data is
pinned to the harness's version, the task's configuration and its documents: others are refused.
Needs the extra `harness`.
"""

import copy
import json
import time
from collections.abc import Mapping
from functools import cache
from hashlib import sha256
from importlib.metadata import version
from typing import Any

from trans_peft.domain.data import DataSource
from trans_peft.domain.evaluation import Evaluation, ItemResult, Suite
from trans_peft.errors import DataError, IntegrityError, InvalidSpecError, NotFoundError
from trans_peft.text.answers import answer_text
from trans_peft.validation.decoding.batching import evaluating
from trans_peft.validation.evaluate import check_dtype

__all__ = ["evaluate_harness", "harness_suite"]

_SCHEME = "lm_eval:"


def harness_suite(
    task: str,
    metric: str,
    *,
    threshold: float | None = None,
    limit: int | None = None,
    folder: str | None = None,
) -> Suite:
    """Return a task of the harness as a suite, pinned to its configuration and documents.

    `metric` is one that the task computes for each item, as the harness names it, with its filter
    where that is not "none" ("exact_match,strict-match"). It must be right or wrong, or lie in 0 to
    1 with a `threshold` in 0 to 100. `folder` holds further tasks (YAML). NotFoundError for a task
    or metric that is not there, InvalidSpecError for a group of tasks or one that is sampled,
    DataError where its documents cannot be had.
    """
    loaded = _load(task, folder)
    names = [one["metric"] for one in loaded.dump_config().get("metric_list") or []]
    if names and metric.partition(",")[0] not in names:
        raise NotFoundError(
            f"the task {task} computes no such metric", expected=", ".join(names), found=metric
        )
    return Suite(
        task,
        DataSource(f"{_SCHEME}{task}", _task_sha256(loaded)),
        scoring=f"{_SCHEME}{metric}",
        threshold=threshold,
        limit=limit,
    )


def evaluate_harness(
    model: Any,
    tokenizer: Any,
    suite: Suite,
    *,
    weights_sha256: str,
    base_fingerprint_sha256: str,
    batch_size: int = 8,
    folder: str | None = None,
) -> Evaluation:
    """Let the harness evaluate a loaded model, with or without an adapter, on `harness_suite`'s.

    The model and the tokenizer are left as they were found. IntegrityError where the task is no
    longer the one that the suite was pinned to; InvalidSpecError where its metric says of an item
    neither right nor wrong, or the model has another dtype; further errors as `harness_suite`.
    """
    from lm_eval import simple_evaluate

    started = time.perf_counter()
    check_dtype(model, suite)
    task = _load(suite.data.uri.removeprefix(_SCHEME), folder)
    found = _task_sha256(task)
    if found != suite.data.sha256:
        raise IntegrityError(
            f"the task {suite.name} has changed since it was pinned",
            expected=f"sha256 {suite.data.sha256}",
            found=f"sha256 {found}",
            do="take the harness and the data that it was pinned to, or pin it again and evaluate "
            "all sides on that",
        )
    own = copy.deepcopy(tokenizer)  # it is given a padding token
    with evaluating(model):
        judged = _answering(model, own, batch_size)
        results = simple_evaluate(
            judged,
            tasks=[task],
            limit=suite.limit,
            bootstrap_iters=0,
            random_seed=None,  # the process keeps its own: nothing is drawn but examples
            numpy_random_seed=None,
            torch_random_seed=None,
        )
    metric, _, filtered = suite.scoring.removeprefix(_SCHEME).partition(",")
    samples = [
        sample
        for sample in results["samples"][task.task_name]
        if sample["filter"] == (filtered or "none")
    ]
    if not samples or metric not in samples[0]:
        raise NotFoundError(
            f"the harness says nothing of each item under {suite.scoring}",
            found=", ".join(results["results"][task.task_name]),
        )
    return Evaluation(
        suite=suite.name,
        weights_sha256=weights_sha256,
        base_fingerprint_sha256=base_fingerprint_sha256,
        suite_sha256=suite.suite_sha256,
        decoding_sha256=suite.decoding_sha256,
        items=tuple(_item(sample, metric, suite) for sample in samples),
        seconds=time.perf_counter() - started,
    )


def _answering(model: Any, tokenizer: Any, batch_size: int) -> Any:
    """Return the harness's model whose answers keep their special tokens, as references do."""
    from lm_eval.models.huggingface import HFLM

    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}

    class Answering(HFLM):
        def tok_decode(self, tokens: Any, skip_special_tokens: bool | None = None) -> str:
            if skip_special_tokens is None:  # an answer, padded to the longest of its batch
                return answer_text(self.tokenizer, tokens, ends)
            return str(super().tok_decode(tokens, skip_special_tokens))

    return Answering(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)


def _item(sample: Mapping[str, Any], metric: str, suite: Suite) -> ItemResult:
    degree = float(sample[metric])
    if suite.threshold is None and degree not in (0, 1):
        raise InvalidSpecError(
            f"suite {suite.name!r}: {metric} gives a degree, so it needs a threshold",
            found=f"{degree} for item {sample['doc_id']}",
        )
    least = 100.0 if suite.threshold is None else suite.threshold
    answer = json.dumps(sample["filtered_resps"], default=str)
    return ItemResult(
        id=str(sample["doc_id"]),
        correct=100 * degree >= least,
        answer_sha256=sha256(answer.encode()).hexdigest(),
        answer=answer if suite.keep_answers else None,
    )


@cache
def _manager(folder: str | None) -> Any:
    """Return what knows all tasks; it reads thousands of files to find them."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise InvalidSpecError(
            "lm-evaluation-harness is not installed", do="pip install 'trans-peft[harness]'"
        ) from error
    return TaskManager(include_path=folder)


def _load(name: str, folder: str | None) -> Any:
    manager = _manager(folder)
    if name not in manager.all_tasks:
        raise NotFoundError("lm-evaluation-harness has no such task", found=name)
    try:
        tasks = manager.load(name)["tasks"]
    except Exception as error:  # of the hub client and of the task's own code, many kinds
        raise DataError(
            f"the task {name} cannot be loaded", found=f"{type(error).__name__}: {error}"
        ) from error
    if list(tasks) != [name]:
        raise InvalidSpecError(
            f"{name} is a group: a suite is one task", expected="one of them", found=list(tasks)
        )
    task = tasks[name]
    if (task.dump_config().get("generation_kwargs") or {}).get("do_sample"):
        raise InvalidSpecError(f"the task {name} is sampled: its results cannot be compared")
    return task


def _task_sha256(task: Any) -> str:
    asked = [version("lm_eval"), task.dump_config(), [dict(doc) for doc in task.eval_docs]]
    return sha256(json.dumps(asked, sort_keys=True, default=str).encode()).hexdigest()
