"""Evaluate a loaded model on a task of lm-evaluation-harness.

    suite = harness_suite("arc_easy", "acc_norm")
    evaluation = evaluate_harness(model, tokenizer, suite, weights_sha256=..., ...)

The harness (EleutherAI/lm-evaluation-harness, `simple_evaluate`) builds the prompts and scores the
answers. The decoding loop of this project answers: its `TemplateLM` is one over `LoopEngine`. The
results by item become an `Evaluation`, which the gate handles like any other. A suite is pinned to
the version of the harness, the task's configuration and its documents. Needs the extra `harness`.
"""

import json
import time
from collections.abc import Mapping
from hashlib import sha256
from typing import Any

from trans_peft.domain.data import DataSource
from trans_peft.domain.evaluation import Evaluation, ItemResult, Suite
from trans_peft.errors import IntegrityError, InvalidSpecError, NotFoundError
from trans_peft.ports import Engine
from trans_peft.validation.engine import LoopEngine
from trans_peft.validation.evaluate import check_dtype, context_of
from trans_peft.validation.harness_tasks import (
    check_metric,
    harness_seeds,
    load_task,
    task_manager,
    task_sha256,
)

__all__ = ["evaluate_harness", "harness_model", "harness_suite"]

_SCHEME = "lm_eval:"
_DEFAULT_CONTEXT = 2048


@harness_seeds()
def harness_suite(
    task: str,
    metric: str,
    *,
    threshold: float | None = None,
    limit: int | None = None,
    folder: str | None = None,
) -> Suite:
    """Return a task of the harness as a suite, pinned to its configuration and documents.

    `metric` is a metric that the task computes for each item, in the harness' spelling, followed by
    its filter unless that is "none" ("exact_match,strict-match"). Its values must be 0 or 1, or lie
    between them if there is a `threshold` (0 to 100). `folder` contains additional tasks (YAML).

    NotFoundError for an unknown task or metric, InvalidSpecError for a group of tasks or a task
    with sampling, DataError if its documents cannot be loaded.
    """
    loaded = load_task(task, folder=folder)
    check_metric(loaded, metric)
    return Suite(
        task,
        DataSource(f"{_SCHEME}{task}", task_sha256(loaded)),
        scoring=f"{_SCHEME}{metric}",
        threshold=threshold,
        limit=limit,
    )


@harness_seeds()
def evaluate_harness(  # noqa: PLR0913  as `evaluate`
    model: Any,
    tokenizer: Any,
    suite: Suite,
    *,
    weights_sha256: str,
    base_fingerprint_sha256: str,
    batch_size: int | None = None,
    folder: str | None = None,
) -> Evaluation:
    """Evaluate a loaded model, with or without an adapter, on a suite of `harness_suite`.

    The model's training modes are restored, and the tokenizer is not changed. Raises IntegrityError
    if the task changed since the suite was pinned, and InvalidSpecError if a value of the metric is
    neither 0 nor 1 and the suite has no threshold, if the suite has a temperature, or if the model
    has another dtype. For further errors see `harness_suite`.
    """
    from lm_eval import simple_evaluate

    started = time.perf_counter()
    check_dtype(model, suite)
    if suite.is_sampled:
        raise InvalidSpecError(
            f"suite {suite.name!r}: tasks of the harness are decoded greedily",
            found=f"temperature={suite.temperature}",
            do="remove the temperature",
        )
    task = load_task(suite.data.uri.removeprefix(_SCHEME), folder=folder)
    found = task_sha256(task)
    if found != suite.data.sha256:
        raise IntegrityError(
            f"the task {suite.name} has changed since it was pinned",
            expected=f"sha256 {suite.data.sha256}",
            found=f"sha256 {found}",
            do="install the pinned version of the harness and of the data, or pin the suite again "
            "and evaluate the adapter on all bases again",
        )
    engine = LoopEngine(model, tokenizer, batch_size=batch_size)
    results = simple_evaluate(
        harness_model(engine, tokenizer, context_of(model)),
        tasks=[task],
        task_manager=task_manager(folder),  # a new one would read thousands of files
        limit=suite.limit,
        bootstrap_iters=0,
        random_seed=None,  # see harness_seeds
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
            f"the harness has no results by item for {suite.scoring}",
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


def harness_model(engine: Engine, tokenizer: Any, context: int | None) -> Any:
    """Return a model of the harness (`TemplateLM`) for which an engine answers.

    `context` is the context length in tokens; by default 2048, as in the harness.
    """
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    max_length = context or _DEFAULT_CONTEXT

    class EngineLM(TemplateLM):
        """Requests of the harness as calls of an engine. Long contexts lose their start."""

        @property
        def eot_token_id(self) -> int:
            return int(tokenizer.eos_token_id)

        @property
        def prefix_token_id(self) -> int:
            first = tokenizer.bos_token_id
            return self.eot_token_id if first is None else int(first)

        def tok_encode(
            self, string: str, add_special_tokens: bool | None = None, **_: Any
        ) -> list[int]:
            own = tokenizer.bos_token
            if add_special_tokens is None:
                add_special_tokens = not (own and string.startswith(own))
            ids = tokenizer(string, add_special_tokens=add_special_tokens)["input_ids"]
            return [int(id_) for id_ in ids]

        def _loglikelihood_tokens(
            self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_: Any
        ) -> list[tuple[float, bool]]:
            texts = []
            for _strings, before, tokens in requests:
                # The last of the tokens is not read, so that it may exceed the length by one.
                whole = [*before, *tokens][-(max_length + 1) :]
                texts.append((whole[: -len(tokens)], tokens))
            return [
                (sum(token.log_p for token in found), all(token.is_best for token in found))
                for found in engine.scores(texts)
            ]

        def loglikelihood_rolling(
            self, requests: list[Any], disable_tqdm: bool = False
        ) -> list[float]:
            sums = []
            for request in requests:
                windows = get_rolling_token_windows(
                    token_list=self.tok_encode(request.args[0]),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=max_length,
                    context_len=1,
                )
                found = engine.scores([make_disjoint_window(window) for window in windows])
                sums.append(sum(token.log_p for tokens in found for token in tokens))
            return sums

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            texts = [""] * len(requests)
            settings: dict[tuple[int, tuple[str, ...]], list[int]] = {}
            for number, request in enumerate(requests):
                options = normalize_gen_kwargs(dict(request.args[1]))
                stop = tuple(filter(None, handle_stop_sequences(options.get("until"), eos=None)))
                settings.setdefault((options["max_gen_toks"], stop), []).append(number)
            for (most, stop), numbers in settings.items():
                prompts = [
                    self.tok_encode(requests[i].args[0])[-(max_length - most) :] for i in numbers
                ]
                answers = engine.answers(prompts, max_new_tokens=most, stop=stop)
                for i, answer in zip(numbers, answers, strict=True):
                    texts[i] = answer.text
            return texts

    return EngineLM()


def _item(sample: Mapping[str, Any], metric: str, suite: Suite) -> ItemResult:
    score = float(sample[metric])
    if suite.threshold is None and score not in (0, 1):
        raise InvalidSpecError(
            f"suite {suite.name!r}: {metric} is a graded metric, so it needs a threshold",
            found=f"{score} for item {sample['doc_id']}",
            do="set `threshold` in the suite",
        )
    minimum = 100.0 if suite.threshold is None else suite.threshold
    answer = json.dumps(sample["filtered_resps"], default=str)
    return ItemResult(
        id=str(sample["doc_id"]),
        correct=100 * score >= minimum,
        answer_sha256=sha256(answer.encode()).hexdigest(),
        answer=answer if suite.keep_answers else None,
    )
