"""Check the regular expressions among an adapter's options in a child process with limits.

PEFT compiles them with `re` and matches them against every module of a model. A pattern with nested
quantifiers can take exponential time to match, and a case-insensitive one with large character
classes takes seconds to compile. The child process does both once, in the ways of PEFT 0.21
(`peft.tuners.tuners_utils`, `peft.utils.other`). This module imports no torch.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from trans_peft.domain.bounds import MAX_ADAPTER_NUMBER, MAX_PATTERN_LENGTH
from trans_peft.domain.excerpts import excerpt
from trans_peft.domain.spec import MAX_OPTION_DEPTH
from trans_peft.errors import InvalidSpecError, LimitExceededError, listed
from trans_peft.isolation import CallLimits, call_isolated

if TYPE_CHECKING:
    from torch import nn

__all__ = ["TARGET_FORM", "check_options", "compile_problems", "names_of"]

_LIMITS = CallLimits(cpu_s=10, memory_bytes=1 << 29)
_QUANTIFIERS = frozenset("*+?{")
TARGET_FORM = r"(.*\.)?({})$"
"""How PEFT embeds an entry of `target_modules` or of an option with values by module."""
_FORMS = (
    "{}",
    TARGET_FORM,
    r"(^|.*\.){}($|\..*)",
    r"(?:^|.*?\.){}\.(?P<idx>\d+)\.",
    r".*\.{}$",
)
"""How PEFT embeds a pattern: targets, patterns by module, modules_to_save, layers, the rest."""
_NOT_PATTERNS = frozenset({
    "auto_mapping", "base_model_name_or_path", "peft_type", "peft_version",
    "prompt_tuning_init_text", "revision", "task_type", "tokenizer_name_or_path",
})  # fmt: skip
_EXPRESSIONS = frozenset({"target_modules", "exclude_modules", "feedforward_modules"})
"""Options that are a regular expression if they are a string. In a list, entries end a name."""
_OPENED = frozenset({"adapters"})  # XLORA
_PATHS = ("_path", "_dir", "_file", "_folder")
_SEEDS = ("seed", "prng_key")
_COMPILE_LIMITS = CallLimits(cpu_s=1, memory_bytes=1 << 29)
_LITERAL = re.compile(r"[\w.-]*", re.ASCII)
_TOO_SLOW = "together with the other patterns it takes more than 1 s to compile"


def check_options(options: Mapping[str, Any], names: Sequence[str], subject: str) -> None:
    """Raise an error unless an adapter's options can be matched against a model in bounded time.

    `options` are those of a spec, or the fields of an adapter_config.json. `names` are the names
    of the model's modules and parameters. `subject` names the adapter in errors. InvalidSpecError
    for options that are nested too deeply, integers above MAX_ADAPTER_NUMBER, options that name
    files, and patterns that are longer than MAX_PATTERN_LENGTH, invalid, or slow to compile;
    LimitExceededError for a pattern that needs more than 10 s of processor time to match.
    """
    problems: list[str] = []
    expressions: list[tuple[str, str]] = []
    patterns: list[str] = []
    for field, value in _leaves(options):
        seed = field.rpartition(".")[2].endswith(_SEEDS)
        if type(value) is int and abs(value) > MAX_ADAPTER_NUMBER and not seed:
            problems.append(f"{field}: {value} exceeds {MAX_ADAPTER_NUMBER}")
        elif isinstance(value, str) and value and _is_path(field):
            problems.append(f"{field}: an adapter's options may not name files, found {value!r}")
        elif isinstance(value, str) and field.partition(".")[0] not in _NOT_PATTERNS:
            if len(value) > MAX_PATTERN_LENGTH:
                problems.append(
                    f"{field}: a string of {len(value)} characters exceeds {MAX_PATTERN_LENGTH}"
                )
            else:
                expressions.append((field, value))
                if _QUANTIFIERS & set(value):
                    patterns.append(value)
    errors = compile_problems([value for _, value in expressions])
    problems += [
        f"{field}: {excerpt(value)} is not a regular expression: {error}"
        for (field, value), error in zip(expressions, errors, strict=True)
        if error and (field in _EXPRESSIONS or error == _TOO_SLOW)
    ]
    if problems:
        raise InvalidSpecError(
            f"{subject} cannot be used",
            expected=f"integers up to {MAX_ADAPTER_NUMBER}, regular expressions of up to "
            f"{MAX_PATTERN_LENGTH} characters, and no names of files",
            found=listed(problems, 20),
            do="correct these options",
        )
    if patterns:
        unique = list(dict.fromkeys(patterns))
        call_isolated(
            _match,
            unique,
            list(names),
            limits=_LIMITS,
            subject=f"a pattern of {subject} ({listed([repr(p[:80]) for p in unique], 3)})",
        )


def names_of(model: "nn.Module") -> Iterator[str]:
    """Yield the names of a model's modules and parameters."""
    for name, _ in model.named_modules():
        yield name
    for name, _ in model.named_parameters():
        yield name


def _leaves(options: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield every key and every scalar value of nested options with its dotted path."""
    stack: list[tuple[str, Any, int]] = [("", options, 0)]
    while stack:
        place, value, depth = stack.pop()
        if depth > MAX_OPTION_DEPTH:
            raise InvalidSpecError(
                f"{place[:80]}: options are nested more than {MAX_OPTION_DEPTH} deep"
            )
        if isinstance(value, Mapping):
            for key, item in value.items():
                if place:
                    yield place, key
                stack.append((f"{place}.{key}" if place else str(key), item, depth + 1))
        elif isinstance(value, (list, tuple, set, frozenset)):
            stack += [(place, item, depth + 1) for item in value]
        else:
            yield place, value


def _is_path(field: str) -> bool:
    """Whether PEFT opens the value of the option: a local path or a repository of the hub."""
    name = field.partition(".")[0]
    if name in _NOT_PATTERNS:
        return False
    return name in _OPENED or field.rpartition(".")[2].endswith(_PATHS)


def compile_problems(patterns: Sequence[str], forms: Sequence[str] = ("{}",)) -> list[str | None]:
    """Return for each pattern why Python cannot compile it in one of the forms; None if it can.

    One character class can take 30 ms to compile, so this runs in a child process. If all patterns
    together need more than 1 s of processor time, each of them has a problem.
    """
    special = [pattern for pattern in patterns if not _LITERAL.fullmatch(pattern)]
    if any(len(pattern) > MAX_PATTERN_LENGTH for pattern in special):
        return [
            f"{len(pattern)} characters, at most {MAX_PATTERN_LENGTH} are read"
            if len(pattern) > MAX_PATTERN_LENGTH
            else None
            for pattern in patterns
        ]
    if not special:
        return [None] * len(patterns)
    try:
        found = call_isolated(
            _compile,
            special,
            list(forms),
            limits=_COMPILE_LIMITS,
            subject="the patterns of an adapter",
        )
    except LimitExceededError:
        found = [_TOO_SLOW] * len(special)
    problems = dict(zip(special, found, strict=True))
    return [problems.get(pattern) for pattern in patterns]


def _compile(patterns: list[str], forms: list[str]) -> list[str | None]:
    """Compile every pattern in every form. Runs in the child process."""
    found = []
    for pattern in patterns:
        errors = {form: _compile_error(form.format(pattern)) for form in (*forms, *_FORMS)}
        found.append(next((errors[form] for form in forms if errors[form]), None))
    return found


def _compile_error(pattern: str) -> str | None:
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        return str(error)
    return None


def _match(patterns: list[str], names: list[str]) -> None:
    """Match every pattern against every name. Runs in the child process."""
    for pattern in patterns:
        for form in _FORMS:
            try:
                compiled = re.compile(form.format(pattern))
            except (re.error, RecursionError, OverflowError):
                continue  # PEFT does not use every string in every form
            for name in names:
                compiled.match(name)
                compiled.fullmatch(name)
