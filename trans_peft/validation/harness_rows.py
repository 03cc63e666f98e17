"""Write the documents of a task of lm-evaluation-harness as items of a suite.

The harness builds the prompts. What remains is greedy decoding or a comparison of likelihoods, and
a metric of each item, which the scoring rules `choice` and `harness_match` compute in the same way.
A suite with these items is evaluated without the harness. Tasks and metrics that the rules cannot
express are refused. Needs the extra `harness`.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from itertools import groupby
from typing import Any, NamedTuple

from trans_peft.data import Example
from trans_peft.data.rows import InvalidRow, Row, examples_from
from trans_peft.domain.harness_task import HarnessTask
from trans_peft.domain.places import Places
from trans_peft.errors import DataError, InvalidSpecError, NotFoundError, map_exceptions
from trans_peft.validation.harness_tasks import (
    check_metric,
    config_sha256,
    harness_seeds,
    load_task,
)
from trans_peft.validation.rules.harness_match import harness_match, settings_problems

__all__ = ["HarnessItems", "harness_items"]

_FEWSHOT_SEED = 1234  # the default of the harness
_METRICS: Mapping[str, Sequence[str]] = {
    "multiple_choice": ("acc", "acc_norm"),
    "generate_until": ("exact_match",),
}
_GREEDY = {
    "until", "max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens", "do_sample",
    "temperature", "top_p", "top_k",
}  # fmt: skip
_INSTEAD = (
    "name another metric or task, or evaluate a loaded model with "
    "trans_peft.validation.harness.evaluate_harness"
)


class HarnessItems(NamedTuple):
    """The items of a task, and the fields of `Suite` that go with them.

    Attributes:
        task: the task, pinned.
        examples: the items. Their ids are the numbers of the documents, as in the harness.
        fields: `scoring` and `chance_points`; for generated answers also `max_new_tokens` and
            `stop`.
    """

    task: HarnessTask
    examples: tuple[Example, ...]
    fields: Mapping[str, Any]


class _Document(NamedTuple):
    """A document, its number, and the arguments of its requests to a model."""

    number: int
    content: Any
    requests: list[tuple[Any, ...]]


@harness_seeds()
def harness_items(
    harness: HarnessTask,
    *,
    limit: int | None = None,
    places: Places | None = None,
    folder: str | None = None,
) -> HarnessItems:
    """Return the first `limit` documents of a task as items.

    `places` are the hub data sets that may be read; by default all of them. `folder` contains
    additional tasks (YAML), whose Python functions are run.

    Raises what `load_task` and `check_metric` raise, InvalidSpecError for a task, metric or filter
    that the scoring rules cannot express, and DataError with every document that is no item.
    """
    task = load_task(harness.task, folder=folder, places=places)
    check_metric(task, harness.metric)
    _check_task(task, harness)
    shots = _fewshot(task, harness)
    failed = f"the documents of the task {harness.task} cannot be read"
    with map_exceptions({Exception: lambda error: DataError(failed, found=repr(error))}):
        documents = _documents(task, shots, limit)
        if task.OUTPUT_TYPE == "multiple_choice":
            rows, fields = _choices(task, harness, documents)
        else:
            rows, fields = _answers(task, harness, documents)
    return HarnessItems(
        replace(
            harness,
            num_fewshot=shots,
            version=version("lm_eval"),
            config_sha256=config_sha256(task),
        ),
        examples_from(
            rows,
            f"the task {harness.task}",
            expected="documents with a prompt and the text of a right answer, or with one right "
            "answer among different choices",
            counted="documents",
            do=_INSTEAD,
        ),
        fields,
    )


def _check_task(task: Any, harness: HarnessTask) -> None:
    """Raise InvalidSpecError, with all reasons, for a task or a metric that cannot be expressed."""
    from lm_eval.api.task import ConfigurableTask

    kind, metric = task.OUTPUT_TYPE, harness.metric.partition(",")[0]
    reasons = []
    if type(task) is not ConfigurableTask:
        reasons.append("it is a Python class")
    if task.get_config("process_results") is not None:
        reasons.append("it computes its metrics by a function (process_results)")
    if kind not in _METRICS:
        reasons.append(f"its output_type is {kind}")
    elif metric not in _METRICS[kind]:
        reasons.append(f"its metric {metric} is not {' or '.join(_METRICS[kind])}")
    if task.get_config("doc_to_image") or task.get_config("doc_to_audio"):
        reasons.append("it has images or sounds")
    if getattr(task, "multiple_input", 0):
        reasons.append("its choices are parts of the prompt")
    if (task.get_config("repeats") or 1) > 1:
        reasons.append(f"it answers each question {task.get_config('repeats')} times")
    if reasons:
        raise _refused(harness, reasons)


def _fewshot(task: Any, harness: HarnessTask) -> int:
    """Return the number of answered questions in a prompt, and set it in the task."""
    own = task.get_config("num_fewshot")
    if own == 0 and harness.num_fewshot:
        raise InvalidSpecError(
            f"the task {harness.task} has no answered questions before its own",
            expected="num_fewshot: 0, as its configuration says",
            found=harness.num_fewshot,
            do="correct or remove num_fewshot",
        )
    shots = harness.num_fewshot if harness.num_fewshot is not None else own or 0
    task.set_config("num_fewshot", shots)
    task.set_fewshot_seed(_FEWSHOT_SEED)
    return int(shots)


def _documents(task: Any, shots: int, limit: int | None) -> list[_Document]:
    if shots and not getattr(getattr(task, "sampler", None), "df", None):
        raise DataError(
            f"the task {task.task_name} has no answered questions", do="set num_fewshot: 0"
        )
    task.build_all_requests(limit=limit)
    return [
        _Document(number, own[0].doc, [request.args for request in own])
        for number, own in (
            (number, list(group)) for number, group in groupby(task.instances, lambda r: r.doc_id)
        )
    ]


def _choices(
    task: Any, harness: HarnessTask, documents: Sequence[_Document]
) -> tuple[list[Row], dict[str, Any]]:
    """Return multiple-choice documents as rows with `choices`, and the fields of their suite."""
    if _filter(task, harness):
        raise _refused(harness, ["it filters likelihoods"])
    per_character = harness.metric.startswith("acc_norm")
    rows = [
        (f"document {document.number}", _choice_row(task, document, per_character))
        for document in documents
    ]
    counts = [len(row["choices"]) for _, row in rows if isinstance(row, dict)]
    return rows, {
        "scoring": "choice:per_character" if per_character else "choice",
        "chance_points": 100 * sum(1 / n for n in counts) / len(counts) if counts else None,
    }


def _choice_row(task: Any, document: _Document, per_character: bool) -> Any:
    texts = task.doc_to_choice(document.content)
    right = _right_choice(task.doc_to_target(document.content), texts)
    if right is None:
        return InvalidRow("it does not have one right answer among its choices")
    # acc_mutual_info has further requests, without the prompt.
    requests = document.requests[: len(texts)]
    context = requests[0][0]
    prompt = context.rstrip()  # as the harness: white space is tokenized with the choice
    choices = [context[len(prompt) :] + continuation for _, continuation in requests]
    if choices.index(choices[right]) < right:
        return InvalidRow("its right answer repeats an earlier choice")
    if per_character and any(
        not text or len(choice.strip()) != len(text)
        for text, choice in zip(texts, choices, strict=True)
    ):
        return InvalidRow("acc_norm counts white space at the ends of its choices, or nothing")
    return {
        "id": str(document.number),
        "prompt": prompt,
        "completion": choices[right],
        "choices": list(dict.fromkeys(choices)),  # of equal choices the harness takes the first
    }


def _right_choice(gold: Any, texts: Sequence[str]) -> int | None:
    """Return the index of the right choice by a target: an index, a text, or a list of one."""
    if isinstance(gold, list) and len(gold) == 1:
        gold = gold[0]
    if isinstance(gold, str):
        gold = texts.index(gold) if gold in texts else -1
    return int(gold) if isinstance(gold, int) and 0 <= gold < len(texts) else None


def _answers(
    task: Any, harness: HarnessTask, documents: Sequence[_Document]
) -> tuple[list[Row], dict[str, Any]]:
    """Return documents with generated answers as rows with `reference`, and the suite's fields."""
    scoring = _match(task, harness)
    max_new_tokens, stop = _generation(harness, documents[0].requests[0][1])
    rows = [(f"document {document.number}", _answer_row(task, document)) for document in documents]
    return rows, {
        "scoring": scoring,
        "chance_points": 0.0,
        "max_new_tokens": max_new_tokens,
        "stop": stop,
    }


def _answer_row(task: Any, document: _Document) -> Any:
    gold = task.doc_to_target(document.content)
    if task.get_config("doc_to_choice") is not None:
        gold = task.doc_to_choice(document.content)[gold]
    if isinstance(gold, list) != bool(task.multiple_target):
        return InvalidRow(
            "its target is a list and that of the first document is not, or the other way"
        )
    right = gold if isinstance(gold, list) else [str(gold)]
    if not right or not all(isinstance(text, str) for text in right):
        return InvalidRow("its right answers are not all texts")
    return {
        "id": str(document.number),
        "prompt": document.requests[0][0],
        "completion": f"{task.get_config('target_delimiter')}{right[0]}",
        "reference": json.dumps(right, ensure_ascii=False),
    }


def _match(task: Any, harness: HarnessTask) -> str:
    """Return the scoring rule for the metric exact_match behind the filter of a metric."""
    listed = task.dump_config().get("metric_list") or [{"metric": "exact_match"}]
    options = [one for one in listed if one["metric"] == "exact_match"][-1]  # as the harness
    if options.get("hf_evaluate"):
        raise _refused(harness, ["its metric is that of the package evaluate"])
    unused = ("metric", "aggregation", "higher_is_better", "hf_evaluate")
    settings = {
        name: value
        for name, value in options.items()
        if name not in unused and value not in (None, False)
    }
    if steps := _filter(task, harness):
        settings["filter"] = steps
    if problems := [*settings_problems(settings)]:
        raise _refused(harness, problems)
    parameter = json.dumps(settings, sort_keys=True)
    harness_match(parameter)  # raises InvalidSpecError for a pattern that cannot be compiled
    return f"harness_match:{parameter}"


def _filter(task: Any, harness: HarnessTask) -> list[dict[str, Any]]:
    """Return the steps of a metric's filter, without the last, which takes the only answer."""
    name = harness.metric.partition(",")[2] or "none"
    default = [{"name": "none", "filter": [{"function": "take_first"}]}]
    pipelines = {
        one["name"]: one["filter"] for one in task.dump_config().get("filter_list", default)
    }
    if name not in pipelines:
        raise NotFoundError(
            f"the task {harness.task} has no filter {name}",
            expected=", ".join(f"{harness.metric.partition(',')[0]},{one}" for one in pipelines),
            found=harness.metric,
            do="name one of these metrics",
        )
    *steps, last = pipelines[name]
    if last.get("function") != "take_first":
        raise _refused(harness, [f"its filter {name} does not end with take_first"])
    return steps


def _generation(harness: HarnessTask, options: Mapping[str, Any]) -> tuple[int, tuple[str, ...]]:
    """Return the largest number of tokens and the stop strings of greedy decoding."""
    from lm_eval.models.utils import normalize_gen_kwargs

    if unknown := sorted(options.keys() - _GREEDY):
        raise _refused(harness, [f"it generates with {', '.join(unknown)}"])
    found = normalize_gen_kwargs(dict(options))
    if found["do_sample"]:
        raise _refused(harness, ["it decodes with sampling"])
    if "" in found["until"]:
        raise _refused(harness, ["it has an empty stop string"])
    stop: list[str] = []
    for text in found["until"]:
        # The harness cuts at one string after the other.
        if not any(earlier in text for earlier in stop):
            stop.append(text)
    return found["max_gen_toks"], tuple(stop)


def _refused(harness: HarnessTask, reasons: Sequence[str]) -> InvalidSpecError:
    return InvalidSpecError(
        f"the task {harness.task} with the metric {harness.metric} cannot be a suite of a flow",
        expected="multiple choice with acc or acc_norm, or generated answers with exact_match and "
        "the filters regex, remove_whitespace, lowercase and uppercase",
        found="; ".join(reasons),
        do=_INSTEAD,
    )
