"""Evaluations by key: looked up first, computed only where nobody has."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

from trans_peft.bases.cache import download
from trans_peft.bases.model_names import in_model_names
from trans_peft.bases.tokenizer_copy import copy_tokenizer
from trans_peft.data import pin
from trans_peft.domain.base import BaseVersion, Fingerprint
from trans_peft.domain.evaluation import BARE, Evaluation, Suite
from trans_peft.errors import BaseUnreadableError, IsolationError, StoreError, TransPeftError
from trans_peft.lifecycle.progress import ProgressCallback, progress_reporter
from trans_peft.lifecycle.questions import tokenized_suite_for
from trans_peft.ports import Platform
from trans_peft.text.saved_template import saved_template

__all__ = [
    "ProgressCallback",
    "base_folder",
    "evaluate_on",
    "named_fingerprint",
    "pin_suites",
    "reading_base",
    "tokenizer_folder",
]


@contextmanager
def reading_base(name: object) -> Iterator[None]:
    """Raise BaseUnreadableError for an error of the block, which reads a base and nothing else.

    Every adapter that is judged on the base meets the same error. It must not count as an attempt
    of each of them, or all would stay parked after the base has been repaired.
    """
    try:
        yield
    except (StoreError, IsolationError):
        raise
    except TransPeftError as error:
        raise BaseUnreadableError(f"the base {name} cannot be read: {error}") from error


def base_folder(base: BaseVersion, platform: Platform) -> Path:
    """Return the folder of this worker's verified copy of a base, fetched once."""
    with reading_base(base):
        return download(
            base.uri,
            platform.store,
            platform.work_dir / "bases",
            fingerprint=platform.catalog.fingerprint(base),
            limit_bytes=platform.cache_bytes,
        )


def named_fingerprint(base: BaseVersion, platform: Platform) -> Fingerprint:
    """Return a base's fingerprint with its tensors under the loaded model's own names."""
    with reading_base(base):
        return in_model_names(
            platform.catalog.fingerprint(base),
            base.uri,
            platform.store,
            platform.work_dir / "model-names",
        )


def tokenizer_folder(base: BaseVersion, platform: Platform, folder: Path) -> Path:
    """Write a base's tokenizer into `folder`, without fetching its weights, and return it.

    BaseUnreadableError where its files are no longer those that were made ready.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with reading_base(base):
        fingerprint = platform.catalog.fingerprint(base)
        return copy_tokenizer(base.uri, platform.store, folder, fingerprint=fingerprint)


def pin_suites(suites: Sequence[Suite], platform: Platform) -> tuple[Suite, ...]:
    """Bind each suite to the bytes that its data has now (a pinned one keeps its hash)."""
    return tuple(
        suite if suite.data.sha256 else replace(suite, data=pin(suite.data, platform.store))
        for suite in suites
    )


def evaluate_on(
    base: BaseVersion,
    suites: Sequence[Suite],
    platform: Platform,
    *,
    adapter: Callable[[], Path] | None = None,
    weights_sha256: str = BARE,
    elsewhere: Mapping[str, Evaluation] | None = None,
    labels: Mapping[str, str] | None = None,
    on_progress: ProgressCallback | None = None,
) -> dict[str, Evaluation]:
    """Return one evaluation per suite name of an adapter (None: the bare base) on a base.

    `adapter` gives the adapter's PEFT folder and is called only if something must be
    computed. What the store holds under its key is taken from there; a model is loaded only if
    something is missing, and each new evaluation is kept the moment it is known. `elsewhere` has
    the same adapter's evaluations on another base: answers kept in them are where decoding starts.
    """
    keys = {
        suite.name: suite.evaluation_key(weights_sha256, base.fingerprint_sha256)
        for suite in suites
    }
    who = (labels or {}).get("adapter", "bare base")
    known = {name: platform.evaluations.get(key) for name, key in keys.items()}
    for suite in suites:
        if known[suite.name] is None:
            there = (elsewhere or {}).get(suite.name)
            drafts = there.kept_answers if there is not None else {}
            evaluation = _evaluate(
                base, suite, platform, adapter, weights_sha256, drafts, who, on_progress
            )
            platform.evaluations.put(
                evaluation,
                labels={"family": base.family, "base": base.version} | dict(labels or {}),
            )
            known[suite.name] = evaluation
    return {name: evaluation for name, evaluation in known.items() if evaluation is not None}


def _evaluate(
    base: BaseVersion,
    suite: Suite,
    platform: Platform,
    adapter: Callable[[], Path] | None,
    weights_sha256: str,
    drafts: Mapping[str, str],
    who: str,
    on_progress: ProgressCallback | None,
) -> Evaluation:
    from trans_peft.models import load_base
    from trans_peft.transfer.load_adapter import attached
    from trans_peft.validation.evaluate import answer

    loaded = load_base(base_folder(base, platform), suite.dtype)
    folder = None if adapter is None else adapter()
    template = None if folder is None else saved_template(folder)
    questions = tokenized_suite_for(suite, loaded, platform, template)
    lent = nullcontext(loaded.model) if folder is None else attached(loaded.model, folder)
    with lent as model:
        return answer(
            model,
            questions,
            weights_sha256=weights_sha256,
            base_fingerprint_sha256=base.fingerprint_sha256,
            drafts=drafts,
            on_progress=progress_reporter(on_progress, who, suite.name, base.version),
        )
