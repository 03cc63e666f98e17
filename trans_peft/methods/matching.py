"""Check that every entry of an adapter's options matches something in a model.

PEFT ignores entries that match nothing: with `rank_pattern: {"q_porj": 16}` it trains the default
rank. These functions need the options and the model's names only. They follow the rules of PEFT
0.21 (`check_target_module_exists`, `get_pattern_key`, `_inject_parameters`, `_set_trainable`) and
import no torch. Call `trans_peft.methods.patterns.check_options` first, because a pattern can take
exponential time.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from trans_peft.domain.excerpts import excerpt
from trans_peft.methods.patterns import TARGET_FORM, compile_problems

__all__ = [
    "invalid_patterns",
    "matching_names",
    "unmatched_entries",
    "unused_entries",
    "unused_exclusions",
    "weightless_entries",
]

_TARGETS = ("target_modules", "exclude_modules", "feedforward_modules")
_PATTERN_FORMS = {"C3A": r".*\.{}$", "FOURIERFT": r".*\.{}$", "OSF": r".*({}).*"}
_PATTERN_FORM = r"(.*\.)?({})$"
_FIRST_INDEX = re.compile(r".*?\.[^.]*\.(?P<idx>\d+)\.")


def invalid_patterns(options: Mapping[str, Any]) -> list[str]:
    """Return a problem for each entry that PEFT uses as a regular expression and cannot compile."""
    entries = [(name, value) for name in _TARGETS if isinstance(value := options.get(name), str)]
    for name in ("layers_pattern", "modules_to_save"):
        entries += [(name, entry) for entry in _entries(options.get(name))]
    for name, patterns in _by_module(options):
        entries += [(name, key) for key in patterns]
    texts = [(name, entry) for name, entry in entries if isinstance(entry, str)]
    found = compile_problems([entry for _, entry in texts], ("{}", TARGET_FORM))
    return [
        f"{name}: {excerpt(entry)} is not a regular expression ({problem})"
        for (name, entry), problem in zip(texts, found, strict=True)
        if problem
    ]


def unmatched_entries(
    options: Mapping[str, Any], modules: Collection[str], parameters: Collection[str], rows: int
) -> list[str]:
    """Return a problem for each entry that matches nothing in a model.

    `modules` and `parameters` are the model's names, `rows` the rows of its input embedding.
    """
    problems = []
    for name in _TARGETS:
        value = options.get(name)
        if isinstance(value, str):
            found = value.lower() == "all-linear" or any(re.fullmatch(value, m) for m in modules)
            problems += [] if found else [f"{name}: {value!r} matches no module"]
        else:
            problems += _not_ends(name, value, modules, "module")
    problems += _not_ends("modules_to_save", options.get("modules_to_save"), modules, "module")
    problems += _not_ends(
        "target_parameters", options.get("target_parameters"), parameters, "parameter"
    )
    tokens = options.get("trainable_token_indices") or options.get("token_indices") or ()
    if isinstance(tokens, Mapping):
        problems += _not_ends("trainable_token_indices", tokens, modules, "module")
        tokens = [index for indices in tokens.values() for index in indices]
    problems += [
        f"token index {index} is not a row of the embedding, which has {rows}"
        for index in tokens
        if not 0 <= index < rows
    ]
    return problems


def weightless_entries(options: Mapping[str, Any], weighted: Collection[str]) -> list[str]:
    """Return a problem for each entry of modules_to_save that matches only modules without weights.

    `weighted` are the names of the modules that have parameters.
    """
    return [
        f"modules_to_save: {entry!r} matches only modules without weights"
        for entry in _entries(options.get("modules_to_save"))
        if not any(_ends(name, entry) for name in weighted)
    ]


def matching_names(targets: Any, names: Iterable[str]) -> list[str]:
    """Return the names that PEFT targets by `target_modules`, before any exclusion."""
    if isinstance(targets, str):
        return [name for name in names if re.fullmatch(targets, name)]
    return [name for name in names if any(_ends(name, entry) for entry in _entries(targets))]


def unused_exclusions(options: Mapping[str, Any], targeted: Collection[str]) -> list[str]:
    """Return a problem for each entry of exclude_modules that excludes none of the targets.

    `targeted` are the names that the adapter would target without exclusions.
    """
    excluded = options.get("exclude_modules")
    if isinstance(excluded, str):
        used = any(re.fullmatch(excluded, name) for name in targeted)
        unused = [] if used else [excluded]
    else:
        entries = _entries(excluded)
        unused = [e for e in entries if not any(_ends(name, e) for name in targeted)]
    return [f"exclude_modules: {entry!r} excludes no targeted module" for entry in unused]


def unused_entries(
    options: Mapping[str, Any], targeted: Sequence[str], peft_type: str
) -> list[str]:
    """Return a problem for each entry that has no effect on the modules that PEFT targeted.

    `targeted` are the names of the modules and parameters that have the adapter.
    """
    problems = []
    targets = options.get("target_modules")
    if not isinstance(targets, str):
        problems += [
            f"target_modules: {entry!r} matches only modules that exclude_modules, modules_to_save "
            "or layers_to_transform leave out"
            for entry in _entries(targets)
            if not any(_ends(name, entry) for name in targeted)
        ]
    form = _PATTERN_FORMS.get(peft_type, _PATTERN_FORM)
    for name, patterns in _by_module(options):
        used = {_first(patterns, target, form) for target in targeted}
        for key in patterns:
            if key in used:
                continue
            shadowed = any(re.match(form.format(key), target) for target in targeted)
            problems.append(
                f"{name}: {key!r} is never used, because earlier keys match the same modules"
                if shadowed
                else f"{name}: {key!r} matches no module of the adapter"
            )
    return problems + _unused_layers(options, targeted)


def _unused_layers(options: Mapping[str, Any], targeted: Sequence[str]) -> list[str]:
    problems = []
    layer_patterns = _entries(options.get("layers_pattern"))
    forms = [re.compile(rf"(?:^|.*?\.){p}\.(?P<idx>\d+)\.") for p in layer_patterns]
    indices = options.get("layers_to_transform")
    if indices is None:
        return ["layers_pattern has no effect without layers_to_transform"] if forms else []
    if isinstance(options.get("target_modules"), str):
        problems.append("layers_to_transform has no effect where target_modules is a string")
    wanted = [indices] if isinstance(indices, int) else list(indices)
    if not wanted:
        problems.append("layers_to_transform is empty, which PEFT treats as all layers")
    found = {
        int(match["idx"])
        for name in targeted
        for form in forms or [_FIRST_INDEX]
        if (match := form.match(name))
    }
    problems += [
        f"layers_to_transform: no targeted module is in layer {index}" for index in wanted
        if index not in found
    ]  # fmt: skip
    problems += [
        f"layers_pattern: {pattern!r} matches no module of the adapter"
        for pattern, form in zip(layer_patterns, forms, strict=True)
        if not any(form.match(name) for name in targeted)
    ]
    return problems


def _by_module(options: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the options that map patterns of module names to values, such as rank_pattern."""
    for name, value in options.items():
        if name.endswith("_pattern") and isinstance(value, Mapping):
            yield name, value


def _first(patterns: Iterable[str], name: str, form: str) -> str | None:
    return next((key for key in patterns if re.match(form.format(key), name)), None)


def _entries(value: Any) -> list[Any]:
    if value is None:
        return []
    return [value] if isinstance(value, str) else list(value)


def _not_ends(name: str, value: Any, names: Collection[str], what: str) -> list[str]:
    return [
        f"{name}: {entry!r} matches no {what}"
        for entry in _entries(value)
        if not any(_ends(known, entry) for known in names)
    ]


def _ends(name: str, entry: str) -> bool:
    return bool(entry) and (name == entry or name.endswith(f".{entry}"))
