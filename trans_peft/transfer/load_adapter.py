"""Bind an adapter's bytes to another base: as a folder, and on a model in memory.

`transplant` writes a stock PEFT folder that names the new base. `attach` puts a folder on a loaded
base; unlike `PeftModel.from_pretrained` it compares the file's keys with the adapter's both ways
and refuses any difference. `attached` gives the base back as it came, so that one base in memory
serves many adapters, one after the other.
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

__all__ = ["attach", "attached", "transplant"]

# An adapter may build as many elements as its base has, and `_ROOM` more. With a method that saves
# nearly all that it builds, it may take a multiple of its file's elements instead; FourierFT, BOFT
# and others build dense matrices that they do not save.
_ROOM_FACTOR, _ROOM = 4, 1 << 26
_SAVED_WHOLE = frozenset({"ADALORA", "BOTTLENECK", "IA3", "LOHA", "LOKR", "LORA", "PROMPT_TUNING"})


def transplant(folder: Path, target: Path, *, base_name: str, base_revision: str | None) -> Path:
    """Write the adapter in `folder` to `target`, bound to another base, and return `target`.

    The weights are the same bytes; of the config only `base_model_name_or_path` and `revision`
    change. A chat template that lies beside the adapter comes along. Whole or not at all; the same
    transplant again changes nothing. AdapterError for a folder that is not PEFT or a `target` that
    holds something else.
    """
    source = read_peft_folder(folder)
    config = {**source.config, "base_model_name_or_path": base_name, "revision": base_revision}
    if target.exists() and any(target.iterdir()):
        there = read_peft_folder(target)
        same = filecmp.cmp(folder / WEIGHTS_NAME, target / WEIGHTS_NAME, shallow=False)
        if same and there.config == config and saved_template(folder) == saved_template(target):
            return target
        raise AdapterError(
            f"{target} already holds another adapter",
            expected=f"nothing there, or the same adapter bound to {base_name}",
            found=f"{'the same' if same else 'other'} weights, bound to"
            f" {there.config.get('base_model_name_or_path')}",
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
    """Lend `model` with the adapter in `folder` on it, and give it back exactly as it came.

    Within the block the PeftModel is `attach`'s; after it, the PeftModel is empty and must not be
    used. UnsupportedModelError if the base's content changed in between, as merging does; the
    comparison is by `trans_peft.checksums`. After any other error in the block nothing is compared:
    `load_base` compares before it hands a base out again.
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
            "the base's own weights were changed while the adapter was attached",
            found="the adapter is merged into them" if merged else listed(changed, 3),
            do="load the base again, and do not merge an attached adapter",
        )


def attach(model: "nn.Module", folder: Path, name: str = "default") -> "PeftModel":
    """Put the adapter in `folder` on a loaded base and return it as a PeftModel, for inference.

    The logits are those of `PeftModel.from_pretrained`, but the keys and shapes in the file must be
    exactly those of the adapter on this base. AdapterError with every difference; `model` is then
    as it came. Nothing is trainable afterwards, and torch's random state is untouched.
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
            "the model already carries an adapter",
            do="leave the `attached` block of the other one first, or pass its base model",
        )
    subject = f"the adapter in {folder}"
    snapshot = ModelSnapshot(model)
    try:
        check_options(source.config, [*names_of(model)], subject)
        build = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config.task_type, PeftModel)
        room = sum(weight.numel() for weight in model.parameters())
        if source.peft_type in _SAVED_WHOLE:
            room = min(room, _ROOM_FACTOR * sum(map(prod, source.tensors.values())))
        with (
            BoundedAllocation(_ROOM + room, subject),
            torch.random.fork_rng(devices=[]),  # fresh weights are drawn, and overwritten below
        ):
            peft_model = build(model, config, adapter_name=name)
        _check_keys(peft_model, source, name)
        if not snapshot.holds(peft_model):
            raise AdapterError(
                f"{folder}: loading it would rewrite the base's own weights",
                expected="an adapter that leaves the base alone",
                found=f"a {source.peft_type} adapter that replaces some of them",
            )
        written = snapshot.overlapping(_state(peft_model, name))
        if written:
            raise AdapterError(
                f"{folder}: loading it would overwrite weights of the base: {listed(written)}",
                expected="an adapter with weights of its own",
                do="train it with bias='none', and with modules_to_save instead of base weights",
            )
        tensors = load_file(folder / WEIGHTS_NAME)
        broken = [key for key, tensor in tensors.items() if not torch.isfinite(tensor).all()]
        if broken:
            raise AdapterError(f"{folder}: not finite: {listed(broken)}")
        set_peft_model_state_dict(peft_model, tensors, name)
        loaded = _state(peft_model, name)
        astray = [key for key in tensors if not _same(tensors[key], loaded[key])]
        if astray:
            raise AdapterError(f"{folder}: PEFT did not load {listed(astray)}")
        overflowed = [key for key in tensors if not torch.isfinite(loaded[key]).all()]
        if overflowed:
            raise AdapterError(
                f"{folder}: values of {listed(overflowed)} exceed the range of the dtype that they "
                "are loaded in",
                expected=f"values below {torch.finfo(loaded[overflowed[0]].dtype).max:.3g}",
            )
    except BaseException as error:
        snapshot.restore()
        passed_on = (AdapterError, IsolationError, MemoryError, torch.OutOfMemoryError)
        if not isinstance(error, Exception) or isinstance(error, passed_on):
            raise
        raise AdapterError(
            f"{folder} cannot be put on {type(model).__name__}: {_said(error)}",
            do="check that the adapter was trained on this architecture",
        ) from error
    peft_model.requires_grad_(False)
    peft_model.eval()
    return peft_model


def _peft_config(source: PeftFolder) -> "PeftConfig":
    """Build PEFT's config; PEFT itself warns about fields it does not know, and drops them."""
    from peft import PeftConfig
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    from trans_peft.methods.options import not_evaluable, saved_problems
    from trans_peft.methods.registration import register_methods

    register_methods()
    if source.peft_type not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise AdapterError(
            f"{source.path}: unknown method {source.peft_type}",
            expected=", ".join(
                sorted(str(getattr(t, "value", t)) for t in PEFT_TYPE_TO_CONFIG_MAPPING)
            ),
        )
    if source.rewriting_init:
        raise AdapterError(
            f"{source.path}: loading it would rewrite the base's own weights",
            expected="an adapter that leaves the base alone",
            found=f"init_lora_weights={source.rewriting_init!r}",
            do="convert it: save_pretrained(folder, path_initial_model_for_weight_conversion=...)",
        )
    known = {field.name for field in fields(PEFT_TYPE_TO_CONFIG_MAPPING[source.peft_type])}
    known.add("runtime_config")  # never part of an adapter
    unknown = sorted(key for key, value in source.config.items() if key not in known and value)
    if unknown:
        raise AdapterError(
            f"{source.path}: this PEFT does not know {listed(unknown)}, and would ignore it",
            found=f"saved by PEFT {source.config.get('peft_version', 'of unknown version')}",
            do="install the PEFT that saved it",
        )
    options = {k: v for k, v in source.config.items() if v is not None}
    problems = saved_problems(PEFT_TYPE_TO_CONFIG_MAPPING[source.peft_type], options)
    problems += not_evaluable(source.peft_type, options)
    if problems:
        raise AdapterError(f"{source.path}: {CONFIG_NAME} cannot be used: {'; '.join(problems)}")
    try:
        config = PeftConfig.from_pretrained(str(source.path))
    except Exception as error:
        raise AdapterError(
            f"{source.path}: PEFT cannot read {CONFIG_NAME}: {_said(error)}",
            found=f"saved by PEFT {source.config.get('peft_version', 'of unknown version')}",
        ) from error
    config.inference_mode = True
    return config


def _said(error: Exception) -> str:
    return str(error) if isinstance(error, TransPeftError) else f"{type(error).__name__}: {error}"


def _check_keys(peft_model: "PeftModel", source: PeftFolder, name: str) -> None:
    wanted = {key: tuple(tensor.shape) for key, tensor in _state(peft_model, name).items()}
    absent = sorted(set(wanted) - set(source.tensors))
    homeless = sorted(set(source.tensors) - set(wanted))
    reshaped = [
        f"{key} {source.tensors[key]} for {shape}"
        for key, shape in sorted(wanted.items())
        if key in source.tensors and source.tensors[key] != shape
    ]
    problems = [
        f"{len(found)} {what}: {listed(found)}"
        for found, what in (
            (homeless, "keys of the file have no place on this base"),
            (absent, "places on this base have no key in the file"),
            (reshaped, "tensors have another shape"),
        )
        if found
    ]
    if problems:
        do = "compare the base with the one it was trained on: trans-peft check"
        if {key for key in homeless for key in (key, key.replace(".base_layer.", "."))} & set(
            peft_model.state_dict()
        ):
            do = "leave the base's weights out: save_pretrained(..., save_embedding_layers=False)"
        raise AdapterError(
            f"{source.path} does not fit this base: {'; '.join(problems)}",
            expected=f"{len(wanted)} tensors for {source.peft_type} on this base",
            found=f"{len(source.tensors)} tensors in {WEIGHTS_NAME}",
            do=do,
        )


def _state(peft_model: "PeftModel", name: str) -> dict[str, "Tensor"]:
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(peft_model, adapter_name=name, save_embedding_layers=False)


def _same(in_file: "Tensor", loaded: "Tensor") -> bool:
    return bool((in_file.to(loaded) == loaded).all())
