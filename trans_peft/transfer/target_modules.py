"""Where an adapter's tensors sit on a base, and whether those places are the same on another.

Told from the keys of the weights file and the names and shapes in two fingerprints, without PEFT
and without a model. PEFT's rule for targets is `match_target_against_key`: a string is a regular
expression for the whole name, a list holds ends of names.
"""

import re
from collections.abc import Iterable, Mapping

from trans_peft.domain.base import TensorSignature
from trans_peft.errors import AdapterError, InvalidSpecError, listed
from trans_peft.methods.patterns import check_options
from trans_peft.transfer.peft_folder import PeftFolder

__all__ = ["compare_target_modules", "module_of"]

_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")

Tensors = Mapping[str, TensorSignature]


def compare_target_modules(
    adapter: PeftFolder, old: Tensors, new: Tensors
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return (mismatches, notes) about every place that the adapter occupies on the old base."""
    old, new = _with_tied_head(old), _with_tied_head(new)
    mismatches: list[str] = []
    notes: list[str] = []
    if adapter.rewriting_init:
        mismatches.append(
            f"the adapter was started with init_lora_weights={adapter.rewriting_init!r} and saved"
            " as it is: it only fits the base that it was subtracted from; convert it to plain LoRA"
            " first (save_pretrained with path_initial_model_for_weight_conversion)"
        )
    old_modules, new_modules = _modules(old), _modules(new)
    paths = [key.removeprefix("base_model.model.") for key in adapter.tensors]
    candidates = {part for path in paths for part in _prefixes(path)} | old_modules | new_modules
    try:
        check_options(adapter.config, sorted(candidates), f"the adapter in {adapter.path}")
    except InvalidSpecError as error:
        raise AdapterError(str(error)) from error
    targets = adapter.config.get("target_modules")
    whole = tuple(adapter.config.get("modules_to_save") or ())
    brought: list[str] = []
    foreign: list[str] = []
    occupied: set[str] = set()
    lost: dict[str, str] = {}
    for key in adapter.tensors:
        path = key.removeprefix("base_model.model.")
        if path == key:
            occupied.add("")  # prompt learning: it sits before the whole model
            continue
        module = module_of(path, old_modules, targets)
        if path in old or path.replace(".base_layer.", ".") in old:
            # PEFT's rule for modules_to_save is looser than its rule for targets.
            saved = any(part.endswith(whole) for part in _prefixes(module))
            (brought if saved else foreign).append(path)
        if module not in old_modules:
            lost[module] = "does not exist in the base that the adapter was trained on"
        elif module not in new_modules:
            lost[module] = "exists in the old base and is missing from the new one"
        else:
            occupied.add(module)
    if brought:
        notes.append(
            f"the adapter brings its own {listed(brought)}, trained on the old base, in place of"
            " the new base's"
        )
    if foreign:
        mismatches.append(
            f"the adapter's file holds weights of the old base itself ({listed(foreign)}), which"
            " would overwrite the new base's; save it with save_embedding_layers=False"
        )
    mismatches += [
        f"{module}, where the adapter sits, {why}" for module, why in sorted(lost.items())
    ]
    mismatches += _changed_shapes(occupied, old, new)

    kinds = {_any_layer(module) for module in occupied | set(lost)} - {""}
    added = sorted(module for module in new_modules - old_modules if _any_layer(module) in kinds)
    if added:
        mismatches.append(
            f"the new base has {len(added)} more modules of the kind where the adapter sits"
            f" ({listed(added)}), for which it holds nothing"
        )
    return tuple(mismatches), tuple(notes)


def module_of(path: str, modules: set[str], targets: str | Iterable[str] | None) -> str:
    """Return the module that a tensor of the adapter sits on, also if the base does not have it.

    It is the longest part of the path that is a module of the base or a target by the adapter's
    config. A part that ends at a list of layers stands for an index that the list does not have.
    """
    parts = path.split(".")
    for end in range(len(parts), 0, -1):
        module = ".".join(parts[:end])
        if _is_target(module, targets):
            return module
        if module in modules:
            is_list = f"{module}.0" in modules
            return ".".join(parts[: end + 1]) if is_list else module
    return parts[0]


def _with_tied_head(tensors: Tensors) -> Tensors:
    """Add the head of a base that ties it to its embedding: files hold such a weight once."""
    embedding = next((name for name in tensors if name.endswith(_EMBEDDINGS)), None)
    if embedding is None or "lm_head.weight" in tensors:
        return tensors
    return {**tensors, "lm_head.weight": tensors[embedding]}


def _modules(tensors: Tensors) -> set[str]:
    modules = set()
    for name in tensors:
        parts = name.split(".")
        modules |= {".".join(parts[:end]) for end in range(1, len(parts))}
    return modules


def _prefixes(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts) + 1)]


def _is_target(module: str, targets: str | Iterable[str] | None) -> bool:
    if isinstance(targets, str):
        return re.fullmatch(targets, module) is not None
    return any(module == target or module.endswith(f".{target}") for target in targets or ())


def _any_layer(module: str) -> str:
    return re.sub(r"\b\d+\b", "*", module)


def _changed_shapes(occupied: Iterable[str], old: Tensors, new: Tensors) -> list[str]:
    changed: dict[str, str] = {}
    for module in sorted(occupied):
        # Before the whole model only the widths count: rows may be added to the vocabulary.
        first = 0 if module else -1
        for name in old:
            if module and not name.startswith(f"{module}."):
                continue
            if name not in new:
                changed[name] = f"{name} had shape {old[name].shape} and is gone"
            elif old[name].shape[first:] != new[name].shape[first:]:
                changed[name] = f"{name} had shape {old[name].shape} and has {new[name].shape}"
    return [changed[name] for name in sorted(changed)]
