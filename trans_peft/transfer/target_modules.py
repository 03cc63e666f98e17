"""Compare the modules of two bases that an adapter targets.

The comparison uses the keys of the weights file and the names and shapes in two fingerprints; no
model is loaded. As in PEFT's `match_target_against_key`, a target that is a string is a regular
expression for the whole name, and a list contains the ends of names.
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
    """Return (mismatches, notes) about every module of the old base that the adapter changes.

    Raises AdapterError if a pattern in the adapter's config is invalid.
    """
    old, new = _with_tied_head(old), _with_tied_head(new)
    mismatches: list[str] = []
    notes: list[str] = []
    if adapter.rewriting_init:
        mismatches.append(
            f"the adapter was trained with init_lora_weights={adapter.rewriting_init!r}, so it"
            " works on its own base only; convert it to plain LoRA (save_pretrained with"
            " path_initial_model_for_weight_conversion)"
        )
    old_modules, new_modules = _modules(old), _modules(new)
    paths = [key.removeprefix("base_model.model.") for key in adapter.tensors]
    candidates = {part for path in paths for part in _prefixes(path)} | old_modules | new_modules
    try:
        check_options(adapter.config, sorted(candidates), f"the adapter in {adapter.path}")
    except InvalidSpecError as error:
        raise AdapterError(str(error)) from error
    targets = adapter.config.get("target_modules")
    modules_to_save = tuple(adapter.config.get("modules_to_save") or ())
    replaced: list[str] = []
    base_weights: list[str] = []
    adapted: set[str] = set()
    missing: dict[str, str] = {}
    for key in adapter.tensors:
        path = key.removeprefix("base_model.model.")
        if path == key:
            adapted.add("")  # prompt learning: virtual tokens before the whole model
            continue
        module = module_of(path, old_modules, targets)
        if path in old or path.replace(".base_layer.", ".") in old:
            # PEFT's rule for modules_to_save is looser than its rule for targets.
            is_saved = any(part.endswith(modules_to_save) for part in _prefixes(module))
            (replaced if is_saved else base_weights).append(path)
        if module not in old_modules:
            missing[module] = "does not exist in the base that the adapter was trained on"
        elif module not in new_modules:
            missing[module] = "exists in the old base, but not in the new one"
        else:
            adapted.add(module)
    if replaced:
        notes.append(
            f"the adapter replaces {listed(replaced)} of the new base with its own, which was"
            " trained on the old base"
        )
    if base_weights:
        mismatches.append(
            f"the adapter's file contains weights of the old base ({listed(base_weights)}), which"
            " would overwrite those of the new base; save the adapter with"
            " save_embedding_layers=False"
        )
    mismatches += [
        f"the adapter's target {module} {problem}" for module, problem in sorted(missing.items())
    ]
    mismatches += _changed_shapes(adapted, old, new)

    kinds = {_any_layer(module) for module in adapted | set(missing)} - {""}
    added = sorted(module for module in new_modules - old_modules if _any_layer(module) in kinds)
    if added:
        mismatches.append(
            f"the new base has {len(added)} additional target modules ({listed(added)}), for which"
            " the adapter has no weights"
        )
    return tuple(mismatches), tuple(notes)


def module_of(path: str, modules: set[str], targets: str | Iterable[str] | None) -> str:
    """Return the module that a tensor of the adapter belongs to, even if the base lacks it.

    This is the longest prefix of the path that is a module of the base, or matches the adapter's
    targets. If that is a list of layers, the result includes the next part of the path: the index
    of a layer that the base lacks.
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
    """Add a head that is tied to the embedding. Files contain a tied weight only once."""
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


def _changed_shapes(adapted: Iterable[str], old: Tensors, new: Tensors) -> list[str]:
    changed: dict[str, str] = {}
    for module in sorted(adapted):
        # For prompt learning only widths matter: rows may be added to the vocabulary.
        first = 0 if module else -1
        for name in old:
            if module and not name.startswith(f"{module}."):
                continue
            if name not in new:
                changed[name] = (
                    f"{name} had shape {old[name].shape} and does not exist in the new base"
                )
            elif old[name].shape[first:] != new[name].shape[first:]:
                changed[name] = f"{name} had shape {old[name].shape} and has {new[name].shape}"
    return [changed[name] for name in sorted(changed)]
