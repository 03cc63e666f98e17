"""Read recipes, suites and policies from JSON or YAML files, and write results as JSON files."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from reprlib import Repr
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from trans_peft.domain.data import DataSource
from trans_peft.domain.evaluation import GatePolicy, Suite
from trans_peft.domain.excerpts import LONGEST_EXCERPT
from trans_peft.domain.experiment import BaseFamily, Experiment, Rows
from trans_peft.domain.recipe import TrainingRecipe
from trans_peft.errors import InvalidSpecError, NotFoundError, closest
from trans_peft.files import atomic_write, check_unused

__all__ = [
    "check_results_folder",
    "read_experiment",
    "read_policy",
    "read_recipe",
    "read_suites",
    "write_json",
]

T = TypeVar("T")

_ANOTHER_MEMBER = ("dataclass_type", "tuple_type")  # of a union
_UNKNOWN_FIELD = "unexpected_keyword_argument"  # as pydantic names it
_SHORT = Repr()
_SHORT.maxlevel = 2  # YAML aliases may repeat a list many times
_SHORT.maxstring = _SHORT.maxother = LONGEST_EXCERPT


def read_recipe(path: Path) -> TrainingRecipe:
    """Read a training recipe. Relative paths of data are resolved against the file's folder.

    A suite of the paper may be its name, or `named` with a `folder` and fields that differ.

    Raises NotFoundError if there is no such file or suite, and InvalidSpecError with all problems
    in the file.
    """
    recipe = _checked(path, _with_suites(_parse(path)), TrainingRecipe)
    suites = tuple(_resolve_suite(path, suite) for suite in recipe.suites)
    recipe = recipe.with_sources(partial(_resolve_source, path))
    return replace(recipe, suites=suites)


def read_suites(paths: Sequence[Path]) -> tuple[Suite, ...]:
    """Read one suite from each file. Relative paths of data are resolved against its folder.

    A suite of the paper may be named, as in `read_recipe`. Raises NotFoundError and
    InvalidSpecError as `read_recipe` does, and for two suites of one name.
    """
    suites = tuple(
        _resolve_suite(path, _checked(path, _with_fields(_parse(path)), Suite)) for path in paths
    )
    names = [suite.name for suite in suites]
    if len(set(names)) != len(names):
        raise InvalidSpecError(
            "two suites have the same name",
            expected="a name for each suite",
            found=", ".join(names),
            do="change the field `name` in one of the files",
        )
    return suites


def read_experiment(path: Path) -> Experiment:
    """Read an experiment. Relative paths of bases and data are resolved against the file's folder.

    A suite of the paper may be named, as in `read_recipe`. Raises NotFoundError and
    InvalidSpecError as `read_recipe` does.
    """
    value = _with_suites(_parse(path))
    if isinstance(value, dict) and isinstance(value.get("families"), dict):
        families = {name: _with_suites(family) for name, family in value["families"].items()}
        value = {**value, "families": families}
    read = _checked(path, value, Experiment)

    def rows(data: Rows) -> Rows:
        if isinstance(data, DataSource):
            return _resolve_source(path, data)
        return tuple(_resolve_source(path, source) for source in data)

    resolved = read.with_rows(rows, lambda suites: tuple(_resolve_suite(path, s) for s in suites))
    return replace(
        resolved,
        families=_resolve_families(path, resolved.families),
        quick=replace(read.quick, families=_resolve_families(path, read.quick.families)),
    )


def read_policy(path: Path | None) -> GatePolicy:
    """Read a gate policy. Without a file, return the default policy."""
    return GatePolicy() if path is None else _checked(path, _parse(path), GatePolicy)


def check_results_folder(out: Path) -> None:
    """Raise InvalidSpecError unless a command can write its results to the folder.

    A folder with `record.json` or `outcome.json` has all results of an earlier command: its adapter
    is named.
    """
    if any((out / name).is_file() for name in ("record.json", "outcome.json")):
        adapter = out / "adapter"
        raise InvalidSpecError(
            f"{out} is not empty: it has the results of a command that is complete",
            expected="a new or empty folder",
            found=f"the adapter in {adapter}" if adapter.is_dir() else "results without an adapter",
            do="use these results; to repeat the command, pass another folder as --out, and also "
            "as --state to compute everything again",
        )
    check_unused(out)


def write_json(path: Path, value: object) -> None:
    """Write a value as a JSON file, atomically."""
    from pydantic_core import to_json

    atomic_write(path, to_json(value, indent=2) + b"\n")


def _with_suites(value: Any) -> Any:
    """Return the value of a file with the fields of the suites that it names."""
    if isinstance(value, dict) and isinstance(value.get("suites"), list):
        return {**value, "suites": [_with_fields(suite) for suite in value["suites"]]}
    return value


def _with_fields(suite: Any) -> Any:
    """Return the fields of a suite that is named, such as "boolq"; all else unchanged."""
    from trans_peft.validation.suites import named

    if isinstance(suite, str):
        suite = {"named": suite}
    if not (isinstance(suite, dict) and "named" in suite):
        return suite
    changes = dict(suite)
    name, folder = changes.pop("named"), changes.pop("folder", None)
    if not (isinstance(name, str) and isinstance(folder, str | None)):
        raise InvalidSpecError(
            "a suite of the paper is named by texts",
            expected="named: NAME, and optionally folder: PATH",
            found=f"named: {name!r}, folder: {folder!r}",
        )
    return asdict(named(name, folder)) | changes


def _checked(path: Path, value: Any, kind: type[T]) -> T:
    """Return the value of a file as an object. InvalidSpecError with all problems in it."""
    from pydantic import TypeAdapter, ValidationError

    problems: list[str] = []
    while True:
        try:
            read = TypeAdapter(kind).validate_python(value)
            break
        except ValidationError as error:
            found = _of_chosen_members(error.errors(), value)
        # An unknown field hides what is wrong with the values beside it: read again without it.
        unknown = [problem["loc"] for problem in found if problem["type"] == _UNKNOWN_FIELD]
        problems += [
            f"{'.'.join(map(str, problem['loc'])) or 'the file'}: {_text(problem, kind)}"
            for problem in found
            if not unknown or problem["type"] == _UNKNOWN_FIELD
        ]
        if not unknown:
            break
        value = _without(value, unknown)
    if problems:
        raise InvalidSpecError(
            "\n    ".join([f"{path} is not a valid {kind.__name__}:", *problems]),
            do=f"correct {path} and run the command again",
        )
    return read


def _parse(path: Path) -> Any:
    import yaml

    from trans_peft.cli.unique_keys import parse_json, parse_yaml

    if not path.is_file():
        raise NotFoundError(f"there is no file {path}")
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            return parse_json(text)
        if path.suffix in (".yaml", ".yml"):
            return parse_yaml(text)
    except (ValueError, yaml.YAMLError) as error:  # also text that is not UTF-8
        raise InvalidSpecError(f"{path} cannot be read: {error}") from error
    raise InvalidSpecError(
        f"{path} has an unknown extension", expected=".json, .yaml or .yml", found=path.suffix
    )


def _of_chosen_members(problems: Sequence[Any], value: Any) -> list[Any]:
    """Return problems with their places in the value, without those of a union's other members.

    pydantic reports the problems of each member (one data source, a list of them), and the member's
    name is a part of the place.
    """
    placed = [problem | {"loc": _place_in(value, problem)} for problem in problems]
    mismatches = {
        number
        for number, (problem, found) in enumerate(zip(problems, placed, strict=True))
        if problem["type"] in _ANOTHER_MEMBER and problem["loc"] != found["loc"]
    }
    elsewhere = [found["loc"] for n, found in enumerate(placed) if n not in mismatches]
    return [
        found
        for number, found in enumerate(placed)
        if number not in mismatches
        or not any(loc[: len(found["loc"])] == found["loc"] for loc in elsewhere)
    ]


def _place_in(value: Any, problem: Any) -> tuple[int | str, ...]:
    """Return the keys and indices of a problem's place, without names of a union's members."""
    place = []
    for number, part in enumerate(problem["loc"]):
        is_key = isinstance(value, dict) and part in value
        if is_key or (isinstance(value, list) and isinstance(part, int)):
            value = value[part]
            place.append(part)
        elif problem["type"] == "missing" and number == len(problem["loc"]) - 1:
            place.append(part)
    return tuple(place)


def _without(value: Any, places: Sequence[tuple[int | str, ...]], at: int = 0) -> Any:
    """Return JSON data without the fields at these places."""
    items = enumerate(value) if isinstance(value, list) else value.items()
    kept = {
        key: _without(item, below, at + 1)
        if (below := [place for place in places if place[at] == key and len(place) > at + 1])
        else item
        for key, item in items
        if not any(place[at:] == (key,) for place in places)
    }
    return list(kept.values()) if isinstance(value, list) else kept


def _fields_at(kind: Any, place: Sequence[int | str]) -> list[str]:
    """Return the fields of the dataclass below `kind` at a place such as ("suites", 0)."""
    is_key = False  # whether the next part is a key of a mapping
    for number, part in enumerate(place):
        if is_key or not isinstance(part, str):  # or the index of an item
            is_key = False
            continue
        kind = get_type_hints(kind)[part]
        if get_origin(kind) is Mapping:
            kind, is_key = get_args(kind)[1], True
            continue
        if isinstance(kind, UnionType):  # a list, or one object
            is_list = isinstance([*place, ""][number + 1], int)
            members = [arg for arg in get_args(kind) if arg is not NoneType]
            kind = next((arg for arg in members if bool(get_args(arg)) == is_list), members[0])
        kind = next(iter(get_args(kind)), kind)
    return [field.name for field in fields(kind)]


def _text(problem: Any, kind: type) -> str:
    if problem["type"] == _UNKNOWN_FIELD:
        *place, name = problem["loc"]
        valid = closest(str(name), _fields_at(kind, place))
        return f"there is no such field; valid fields, the most similar first: {', '.join(valid)}"
    if problem["type"] == "value_error":
        return str(problem["ctx"]["error"])
    if problem["type"] == "missing":
        return "this field is missing"
    found = _SHORT.repr(problem["input"])
    if problem["type"] == "dataclass_type":
        return f"must have fields with values (found {found})"
    return f"{problem['msg'].lower()} (found {found})"


def _resolve_suite(path: Path, suite: Suite) -> Suite:
    judge = suite.judge and replace(
        suite.judge,
        uri=_resolve(path, suite.judge.uri),
        labeled=_resolve_source(path, suite.judge.labeled),
    )
    data = suite.data if suite.needs_items else _resolve_source(path, suite.data)
    return replace(suite, data=data, judge=judge)


def _resolve_families(path: Path, families: Mapping[str, BaseFamily]) -> Mapping[str, BaseFamily]:
    return {
        name: replace(
            family,
            old=_resolve(path, family.old),
            new={label: _resolve(path, uri) for label, uri in family.new.items()},
        )
        for name, family in families.items()
    }


_Source = TypeVar("_Source", bound=DataSource)


def _resolve_source(path: Path, source: _Source) -> _Source:
    return replace(source, uri=_resolve(path, source.uri))


def _resolve(path: Path, uri: str) -> str:
    """Return a path relative to the folder of a file, or a URI as it is."""
    if "://" in uri or uri.startswith("hub:"):
        return uri
    return str((path.parent / uri).resolve())
