"""Bind an adapter to another base: as a PEFT folder, and on a model in memory.

`rebind_adapter` writes a PEFT folder that names the new base. `attach` loads a folder on a base in
memory. Unlike `PeftModel.from_pretrained`, it raises an error for any missing or unexpected tensor.
`attached` restores the base afterwards, so that one base in memory is used for many adapters in
turn.
"""

import filecmp
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from trans_peft.checksums import model_checksums
from trans_peft.errors import (
    AdapterError,
    IsolationError,
    TransPeftError,
    UnsupportedModelError,
    listed,
)
from trans_peft.methods.patterns import check_options, names_of
from trans_peft.snapshot import ModelSnapshot
from trans_peft.text.saved_template import TEMPLATE_NAME, saved_template
from trans_peft.transfer.peft_folder import CONFIG_NAME, WEIGHTS_NAME, PeftFolder, read_peft_folder

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from torch import Tensor, nn

__all__ = ["attach", "attached", "rebind_adapter"]

# PEFT may allocate as many elements for an adapter as its base has, plus `_SPARE_ELEMENTS`. Methods
# that save nearly all of their tensors may also allocate at most `_SAVED_FACTOR` times the elements
# in the file, plus `_SPARE_ELEMENTS`. FourierFT, BOFT and others allocate matrices that they do not
# save.
_SAVED_FACTOR, _SPARE_ELEMENTS = 4, 1 << 26
_FULLY_SAVED = frozenset({"ADALORA", "BOTTLENECK", "IA3", "LOHA", "LOKR", "LORA", "PROMPT_TUNING"})


def rebind_adapter(
    folder: Path, target: Path, *, base_name: str, base_revision: str | None
) -> Path:
    """Write a copy of an adapter that names another base, and return `target`.

    The weights and the chat template are copied unchanged. In the config, only
    `base_model_name_or_path` and `revision` change. `target` is created atomically. If it already
    contains the same copy, nothing is written.

    Raises AdapterError if `folder` is not a valid PEFT folder, or if `target` has other content.
    """
    source = read_peft_folder(folder)
    config = {**source.config, "base_model_name_or_path": base_name, "revision": base_revision}
    if target.exists() and any(target.iterdir()):
        existing = read_peft_folder(target)
        same = filecmp.cmp(folder / WEIGHTS_NAME, target / WEIGHTS_NAME, shallow=False)
        if same and existing.config == config and saved_template(folder) == saved_template(target):
            return target
        raise AdapterError(
            f"{target} already contains another adapter",
            expected=f"an empty folder, or the same adapter bound to {base_name}",
            found=f"{'the same' if same else 'other'} weights, bound to"
            f" {existing.config.get('base_model_name_or_path')}",
            do="write to another folder",
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as draft_name:
        draft = Path(draft_name) / target.name
        draft.mkdir()
        shutil.copyfile(folder / WEIGHTS_NAME, draft / WEIGHTS_NAME)
        (draft / CONFIG_NAME).write_text(json.dumps(config, indent=2), encoding="utf-8")
        if (folder / TEMPLATE_NAME).is_file():
            shutil.copyfile(folder / TEMPLATE_NAME, draft / TEMPLATE_NAME)
        draft.replace(target)
    return target


@contextmanager
def attached(model: "nn.Module", folder: Path, name: str = "default") -> Iterator["PeftModel"]:
    """Load the adapter in `folder` on a base for the duration of a block, and restore the base.

    The block receives the PeftModel of `attach`, which must not be used after the block.

    Raises UnsupportedModelError if the base was changed in the block, for example by merging
    (compared with `trans_peft.checksums`). If the block raises an error, the base is restored
    without a comparison, because `load_base` compares it before its next use.

    Example::

        with attached(base.model, Path("adapters/chat")) as model:
            logits = model(input_ids=ids).logits
    """
    before, snapshot = model_checksums(model), ModelSnapshot(model)
    peft_model = attach(model, folder, name)
    try:
        yield peft_model
        merged = any(getattr(module, "merged", False) for module in peft_model.modules())
    finally:
        snapshot.restore()
    changed = before.changes(model_checksums(model))
    if merged or changed:
        raise UnsupportedModelError(
            "the weights of the base were changed while the adapter was attached",
            found="the adapter is merged into them" if merged else listed(changed, 3),
            do="load the base again, and do not merge an attached adapter",
        )


def attach(model: "nn.Module", folder: Path, name: str = "default") -> "PeftModel":
    """Load the adapter in `folder` on a base in memory, and return a PeftModel for inference.

    The logits equal those of `PeftModel.from_pretrained`. The keys and shapes in the file must be
    exactly those that PEFT expects on this base. All parameters are frozen. torch's random state
    does not change.

    Raises AdapterError, with all differences, if the adapter cannot be loaded. `model` is then
    restored.
    """
    import torch
    from peft import PeftModel, set_peft_model_state_dict
    from peft.auto import MODEL_TYPE_TO_PEFT_MODEL_MAPPING
    from safetensors.torch import load_file

    from trans_peft.methods.allocation import BoundedAllocation

    source = read_peft_folder(folder)
    config = _peft_config(source)
    if hasattr(model, "peft_config"):
        raise AdapterError(
            "the model already has an adapter",
            do="end the `attached` block of the other adapter first, or pass a bare base",
        )
    subject = f"the adapter in {folder}"
    snapshot = ModelSnapshot(model)
    try:
        check_options(source.config, [*names_of(model)], subject)
        build = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config.task_type, PeftModel)
        elements = sum(weight.numel() for weight in model.parameters())
        if source.peft_type in _FULLY_SAVED:
            elements = min(elements, _SAVED_FACTOR * sum(map(prod, source.tensors.values())))
        with (
            BoundedAllocation(_SPARE_ELEMENTS + elements, subject),
            torch.random.fork_rng(devices=[]),  # PEFT draws initial weights, overwritten below
        ):
            peft_model = build(model, config, adapter_name=name)
        _check_keys(peft_model, source, name)
        if not snapshot.holds(peft_model):
            raise AdapterError(
                f"{folder}: loading it would change the weights of the base",
                expected="an adapter that does not change its base",
                found=f"a {source.peft_type} adapter that replaces weights of the base",
                do="train it with another method or initialization",
            )
        written = snapshot.overlapping(_state(peft_model, name))
        if written:
            raise AdapterError(
                f"{folder}: loading it would overwrite weights of the base: {listed(written)}",
                expected="an adapter that shares no weights with its base",
                do="train it with bias='none', and list trained base modules in modules_to_save",
            )
        tensors = load_file(folder / WEIGHTS_NAME)
        not_finite = [key for key, tensor in tensors.items() if not torch.isfinite(tensor).all()]
        if not_finite:
            raise AdapterError(
                f"{folder}: values are not finite: {listed(not_finite)}",
                expected="finite numbers",
                do="save the adapter from an earlier checkpoint, or train it again",
            )
        set_peft_model_state_dict(peft_model, tensors, name)
        loaded = _state(peft_model, name)
        not_loaded = [key for key in tensors if not _same(tensors[key], loaded[key])]
        if not_loaded:
            raise AdapterError(
                f"{folder}: PEFT did not load {listed(not_loaded)}",
                expected="only tensors that belong to the adapter's config",
                do="write both files again with model.save_pretrained(folder)",
            )
        overflowed = [key for key in tensors if not torch.isfinite(loaded[key]).all()]
        if overflowed:
            raise AdapterError(
                f"{folder}: values of {listed(overflowed)} exceed the range of the dtype in memory",
                expected=f"at most {torch.finfo(loaded[overflowed[0]].dtype).max:.3g}",
                do="load the base in bfloat16 or float32, or train the adapter again",
            )
    except BaseException as error:
        snapshot.restore()
        passed_on = (AdapterError, IsolationError, MemoryError, torch.OutOfMemoryError)
        if not isinstance(error, Exception) or isinstance(error, passed_on):
            raise
        raise AdapterError(
            f"{folder} cannot be loaded on {type(model).__name__}: {_error_text(error)}",
            do="check that the adapter was trained on a base of this architecture",
        ) from error
    peft_model.requires_grad_(False)
    peft_model.eval()
    return peft_model


def _peft_config(source: PeftFolder) -> "PeftConfig":
    """Build PEFT's config. Raises AdapterError for fields that PEFT would ignore with a warning."""
    from peft import PeftConfig
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    from trans_peft.methods.options import not_evaluable, saved_problems
    from trans_peft.methods.registration import register_methods

    register_methods()
    if source.peft_type not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise AdapterError(
            f"{source.path}: unknown PEFT method {source.peft_type}",
            expected=", ".join(
                sorted(str(getattr(t, "value", t)) for t in PEFT_TYPE_TO_CONFIG_MAPPING)
            ),
            do="install the version of PEFT that saved the adapter, if it is newer than this one",
        )
    if source.rewriting_init:
        raise AdapterError(
            f"{source.path}: loading it would change the weights of the base",
            expected="an adapter that does not change its base",
            found=f"init_lora_weights={source.rewriting_init!r}",
            do="convert it to plain LoRA: save_pretrained(folder, "
            "path_initial_model_for_weight_conversion=...)",
        )
    known = {field.name for field in fields(PEFT_TYPE_TO_CONFIG_MAPPING[source.peft_type])}
    known.add("runtime_config")  # a setting of the process, not of the adapter
    unknown = sorted(key for key, value in source.config.items() if key not in known and value)
    if unknown:
        raise AdapterError(
            f"{source.path}: the installed PEFT would ignore these fields: {listed(unknown)}",
            found=f"saved by PEFT {source.config.get('peft_version', 'of unknown version')}",
            do="install the version of PEFT that saved the adapter",
        )
    options = {k: v for k, v in source.config.items() if v is not None}
    problems = saved_problems(PEFT_TYPE_TO_CONFIG_MAPPING[source.peft_type], options)
    problems += not_evaluable(source.peft_type, options)
    if problems:
        raise AdapterError(
            f"{source.path}: {CONFIG_NAME} is not valid: {'; '.join(problems)}",
            do="train the adapter again with other options",
        )
    try:
        config = PeftConfig.from_pretrained(str(source.path))
    except Exception as error:
        raise AdapterError(
            f"{source.path}: PEFT cannot read {CONFIG_NAME}: {_error_text(error)}",
            found=f"saved by PEFT {source.config.get('peft_version', 'of unknown version')}",
            do="install the version of PEFT that saved the adapter",
        ) from error
    config.inference_mode = True
    return config


def _error_text(error: Exception) -> str:
    return str(error) if isinstance(error, TransPeftError) else f"{type(error).__name__}: {error}"


def _check_keys(peft_model: "PeftModel", source: PeftFolder, name: str) -> None:
    expected = {key: tuple(tensor.shape) for key, tensor in _state(peft_model, name).items()}
    missing = sorted(set(expected) - set(source.tensors))
    unexpected = sorted(set(source.tensors) - set(expected))
    reshaped = [
        f"{key} is {source.tensors[key]}, the base needs {shape}"
        for key, shape in sorted(expected.items())
        if key in source.tensors and source.tensors[key] != shape
    ]
    problems = [
        f"{problem} ({len(keys)}): {listed(keys)}"
        for keys, problem in (
            (unexpected, "tensors in the file that this base does not need"),
            (missing, "tensors missing from the file"),
            (reshaped, "tensors of another shape"),
        )
        if keys
    ]
    if problems:
        do = "run `trans-peft check` to compare this base with the base that it was trained on"
        names = {*unexpected, *(key.replace(".base_layer.", ".") for key in unexpected)}
        if names & peft_model.state_dict().keys():
            do = "save it without weights of the base: save_pretrained(..., "
            do += "save_embedding_layers=False)"
        raise AdapterError(
            f"{source.path} does not fit this base: {'; '.join(problems)}",
            expected=f"{len(expected)} tensors for {source.peft_type} on this base",
            found=f"{len(source.tensors)} tensors in {WEIGHTS_NAME}",
            do=do,
        )


def _state(peft_model: "PeftModel", name: str) -> dict[str, "Tensor"]:
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(peft_model, adapter_name=name, save_embedding_layers=False)


def _same(in_file: "Tensor", loaded: "Tensor") -> bool:
    return bool((in_file.to(loaded) == loaded).all())
