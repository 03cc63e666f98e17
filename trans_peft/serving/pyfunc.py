"""The `python_function` model of an adapter version, which MLflow loads.

    mlflow.pyfunc.load_model("models:/chat@on-3f8a91c2b7d4").predict(["The capital of France is"])

MLflow downloads the files of the version and calls `_load_pyfunc`. The loader finds the base by the
fingerprint in the model's metadata, downloads and verifies it, and refuses a version that does not
serve on it.
"""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trans_peft.errors import (
    AdapterError,
    DataError,
    IntegrityError,
    InvalidSpecError,
    NotFoundError,
    NotServedError,
    listed_lines,
)

if TYPE_CHECKING:
    from pandas import DataFrame

    from trans_peft.data import Example
    from trans_peft.domain.base import BaseVersion
    from trans_peft.ports import Platform

__all__ = ["AdapterModel"]

_SHOWN = 20
_REQUIRED = frozenset({"adapter", "base_fingerprint", "dtype", "family", "weights_sha256"})

_lock = threading.Lock()
"""A process keeps one base in memory, and one adapter is attached to it at a time."""


@dataclass(frozen=True)
class AdapterModel:
    """An adapter version and the base that it was made for.

    Attributes:
        folder: The PEFT folder.
        weights_sha256: Hash of the registered weights, which the folder must have at each call.
        base: The base version.
        dtype: The precision in which the suites of the adapter were evaluated.
        platform: Where the base is stored, and this worker's verified copy of it.
    """

    folder: Path
    weights_sha256: str
    base: "BaseVersion"
    dtype: str
    platform: "Platform"

    def predict(self, data: "DataFrame", params: Mapping[str, Any]) -> list[str]:
        """Return the greedy continuation of each prompt, as an evaluation would generate it.

        Args:
            data: One row for each prompt: the text as the only column or as column `prompt`, or a
                chat as column `messages` (a list of `{"role": ..., "content": ...}`). MLflow drops
                all other columns before.
            params: `max_new_tokens` and `stop` (strings that end an answer).

        The files are read at each call, and the weights are hashed before. A copy of the base that
        was changed on the disk is downloaded again.

        Raises DataError with every row that is invalid or does not fit into the base's context, and
        IntegrityError if the adapter's files were changed after the model was loaded.
        """
        from trans_peft.data import end_of_turn, prompt_ids
        from trans_peft.lifecycle.base_files import base_folder
        from trans_peft.models import load_base
        from trans_peft.text.saved_template import saved_template
        from trans_peft.transfer.load_adapter import attached
        from trans_peft.validation.decoding.generation import generate
        from trans_peft.validation.evaluate import context_of

        examples = _examples(data)
        with _lock:
            _check_weights(self.folder, self.weights_sha256, do="load the model again")
            template = saved_template(self.folder)
            base = load_base(base_folder(self.base, self.platform), self.dtype)
            prompts = prompt_ids(examples, base.tokenizer, template)
            _check_length(prompts, params["max_new_tokens"], context_of(base.model))
            end = end_of_turn(examples[0], base.tokenizer, template)
            with attached(base.model, self.folder) as model:
                return generate(
                    model,
                    base.tokenizer,
                    prompts,
                    max_new_tokens=params["max_new_tokens"],
                    stop=tuple(params["stop"]),
                    end_tokens=() if end is None else (end,),
                ).texts


def _load_pyfunc(path: str, model_config: Mapping[str, Any] | None = None) -> AdapterModel:
    """Return the adapter version in a folder that MLflow downloaded. MLflow calls this.

    The tracking server is MLflow's own (`MLFLOW_TRACKING_URI`). With the model config
    `{"require_serving": False}`, a version that does not serve is loaded as well, for inspection.

    Raises NotServedError with the verdict if the version does not serve on its base,
    IntegrityError if its weights are not the registered ones, and NotFoundError if the registry
    has no base with the fingerprint.
    """
    import mlflow
    from mlflow.models import Model

    from trans_peft.client import connect
    from trans_peft.lifecycle.base_files import base_folder
    from trans_peft.lifecycle.resolve import find_fingerprint, resolve_on

    folder = Path(path)
    about = Model.load(str(folder)).metadata or {}
    if missing := _REQUIRED - about.keys():
        raise IntegrityError(
            f"the MLmodel file in {folder} does not describe an adapter version",
            expected=f"metadata with {', '.join(sorted(_REQUIRED))}",
            found=f"no {', '.join(sorted(missing))}",
            do="load a version that this platform registered",
        )
    found = about["weights_sha256"]
    _check_weights(folder, found, do="restore them from a backup of MLflow's artifacts")
    platform = connect(mlflow.get_registry_uri())
    if _requires_serving(model_config):
        version, base = resolve_on(about["adapter"], about["base_fingerprint"], platform)
        if version.weights_sha256 != found:
            raise NotServedError(
                f"this version of {about['adapter']} does not serve on {base}",
                expected=f"the weights of {version}, which serves there: {version.weights_sha256}",
                found=found,
                do=f"load models:/{version.adapter}@{base.alias}",
            )
    else:
        base = find_fingerprint(about["family"], about["base_fingerprint"], platform)
    base_folder(base, platform)  # downloads it now and not in the first request
    return AdapterModel(folder, found, base, about["dtype"], platform)


def _check_weights(folder: Path, expected: str, *, do: str) -> None:
    """Raise IntegrityError unless a PEFT folder has the weights with that hash."""
    from trans_peft.models import adapter_weights_sha256

    try:
        found = adapter_weights_sha256(folder)
    except (AdapterError, NotFoundError, OSError) as error:
        found = f"no adapter: {error}"
    if found != expected:
        raise IntegrityError(
            f"the weights in {folder} differ from the registered ones",
            expected=expected,
            found=found,
            do=do,
        )


def _requires_serving(model_config: Mapping[str, Any] | None) -> bool:
    config = {"require_serving": True, **(model_config or {})}
    if config.keys() != {"require_serving"} or not isinstance(config["require_serving"], bool):
        raise InvalidSpecError(
            "the model config is invalid",
            expected='{"require_serving": true} or {"require_serving": false}',
            found=dict(config),
            do="correct the argument `model_config` of mlflow.pyfunc.load_model",
        )
    return config["require_serving"]


def _examples(data: "DataFrame") -> "list[Example]":
    from trans_peft.data import ChatMessage, Example

    chat = str(data.columns[0]) == "messages"
    examples, problems = [], []
    for number, value in enumerate(data.iloc[:, 0]):
        if not chat and isinstance(value, str) and value:
            examples.append(Example(str(number), value, ""))
        elif chat and _is_chat(value):
            turns = tuple(ChatMessage(turn["role"], turn["content"]) for turn in value)
            # The last message of an example is its answer, which is not part of the prompt.
            turns += (ChatMessage("assistant", ""),)
            examples.append(Example(str(number), "", "", messages=turns))
        else:
            expected = "a list of {'role': text, 'content': text}" if chat else "a text"
            problems.append(f"row {number}: expected {expected}; found {type(value).__name__}")
    _refuse(problems)
    return examples


def _is_chat(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(turn, dict)
            and turn.keys() == {"role", "content"}
            and all(isinstance(text, str) for text in turn.values())
            for turn in value
        )
    )


def _check_length(
    prompts: Sequence[Sequence[int]], max_new_tokens: int, context: int | None
) -> None:
    if context is not None:
        _refuse(
            [
                f"row {number}: its prompt of {len(prompt)} tokens and max_new_tokens="
                f"{max_new_tokens} exceed the context of {context} tokens"
                for number, prompt in enumerate(prompts)
                if len(prompt) + max_new_tokens > context
            ]
        )


def _refuse(problems: Sequence[str]) -> None:
    if problems:
        raise DataError(
            f"{len(problems)} prompts are invalid\n    "
            + "\n    ".join(listed_lines(problems, _SHOWN)),
            do="correct these rows",
        )
