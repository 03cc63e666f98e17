"""Look up the adapter version that serves on a base, and bases by version, alias or fingerprint."""

from collections.abc import Iterable

from trans_peft.domain.adapter import AdapterVersion
from trans_peft.domain.base import BaseVersion
from trans_peft.domain.conventions import BASE_ALIASES, CHAMPION_ALIAS, SERVING_ALIAS, TAG_PREFIX
from trans_peft.domain.fleet import RegisteredAdapter
from trans_peft.errors import InvalidSpecError, NotFoundError, NotServedError
from trans_peft.ports import Platform

__all__ = [
    "base_trained_on",
    "find_base",
    "find_fingerprint",
    "resolve",
    "resolve_on",
    "why_not_serving",
]


def find_base(family: str, version: str, platform: Platform) -> BaseVersion:
    """Return the ready base version with that label or alias (`serving`, `champion`).

    Other aliases are ignored, because MLflow accepts an alias that is spelled like a label. Raises
    NotFoundError with the existing versions, also for a version that is not ready.
    """
    versions = platform.catalog.versions(family)
    is_alias = version in BASE_ALIASES
    number = platform.catalog.alias(family, version) if is_alias else None
    for base in versions:
        if base.ready and (
            base.number == number if number is not None else base.version == version
        ):
            return base
    if is_alias and number is None:
        raise _alias_not_set(family, version, versions)
    raise NotFoundError(
        f"family {family!r} has no ready base version {version!r}",
        expected=", ".join(base.version for base in versions if base.ready) or "none is ready yet",
        found=", ".join(f"{base.version} (not ready)" for base in versions if not base.ready)
        or repr(version),
        do="ingest the base first, or set the alias on a version that is ready",
    )


def _alias_not_set(family: str, alias: str, versions: Iterable[BaseVersion]) -> NotFoundError:
    """Return the error for an alias that no version of the family has."""
    ready = ", ".join(base.version for base in versions if base.ready)
    promote = f"set the alias {CHAMPION_ALIAS} in MLflow on a version that is ready"
    if alias == SERVING_ALIAS:
        promote += f", and reconcile the family: it moves {SERVING_ALIAS} there"
    return NotFoundError(
        f"no base version of family {family!r} has the alias {alias!r} yet",
        expected=f"the alias on a version that is ready: {ready or 'none is ready yet'}",
        do=f"{promote}; or ask for a version by its name" if ready else "ingest a base first",
    )


def find_fingerprint(family: str, fingerprint_sha256: str, platform: Platform) -> BaseVersion:
    """Return the ready base version with a fingerprint. Raises NotFoundError with all of them."""
    bases = [base for base in platform.catalog.versions(family) if base.ready]
    for base in bases:
        if base.fingerprint_sha256 == fingerprint_sha256:
            return base
    raise NotFoundError(
        f"family {family!r} has no ready base version with the fingerprint "
        f"{fingerprint_sha256[:12]}",
        expected=", ".join(f"{base.version} ({base.fingerprint_sha256[:12]})" for base in bases)
        or "none is ready yet",
        do="ingest the base first",
    )


def base_trained_on(source: AdapterVersion, bases: Iterable[BaseVersion]) -> BaseVersion:
    """Return the ready base version that an adapter version was trained on, by fingerprint.

    The label is not compared, because another base version may have it by now. Raises NotFoundError
    if `bases`, the versions of the family, do not contain it.
    """
    for base in bases:
        if base.ready and base.fingerprint_sha256 == source.trained_on.fingerprint_sha256:
            return base
    raise NotFoundError(
        f"{source} was trained on a base that is no longer in the catalog",
        expected=f"{source.trained_on}, fingerprint {source.trained_on.fingerprint_sha256[:12]}",
        do="register that base version again: the gate compares with the results on it",
    )


def resolve(adapter: str, platform: Platform, *, base: str = "serving") -> AdapterVersion:
    """Return the version of an adapter that serves on a base version of its family.

    `base` is a version ("v2") or an alias ("serving", "champion").

    Raises NotServedError with the verdict if no version of the adapter serves on that base; never
    returns another version instead. Raises NotFoundError for an unknown adapter or base, and
    InvalidSpecError for arguments of other types.

    Example::

        platform = connect("http://mlflow:5000")
        version = resolve("chat", platform)
        platform.registry.download(version, Path("adapters/chat"))
    """
    if not (isinstance(adapter, str) and isinstance(platform, Platform) and isinstance(base, str)):
        raise InvalidSpecError(
            "resolve() got an argument of another type",
            expected='resolve(adapter: str, platform: Platform, base: str = "serving")',
            found=", ".join(type(value).__name__ for value in (adapter, platform, base)),
            do="pass the adapter's name first, then the platform that connect() returns",
        )
    found = _adapter(adapter, platform)
    return _required(found, find_base(found.family, base, platform))


def resolve_on(
    adapter: str, fingerprint_sha256: str, platform: Platform
) -> tuple[AdapterVersion, BaseVersion]:
    """Return the version of an adapter that serves on the base with a fingerprint, and that base.

    A server that has loaded a base knows its fingerprint, and no label. Raises what `resolve`
    raises; NotFoundError if the adapter's family has no such base.
    """
    found = _adapter(adapter, platform)
    base = find_fingerprint(found.family, fingerprint_sha256, platform)
    return _required(found, base), base


def why_not_serving(adapter: RegisteredAdapter, base: BaseVersion) -> str:
    """Return why no version serves on a base, with the verdict, if there is one."""
    if not adapter.is_live:
        return "the adapter is retired, or its tags cannot be read"
    state = adapter.alias_on(base)
    if state.number is not None:
        return f"the alias on version {state.number}, which was made for another base"
    outcome = next(
        (
            outcome
            for outcome in adapter.outcomes
            if outcome.base.fingerprint_sha256 == base.fingerprint_sha256
        ),
        None,
    )
    verdict = (
        f"verdict {outcome.verdict}: {outcome.judgment.reason}" if outcome else "no verdict yet"
    )
    return f"a person removed the alias ({verdict})" if state.is_manual else verdict


def _adapter(name: str, platform: Platform) -> RegisteredAdapter:
    found = platform.registry.adapter(name)
    if not found.versions:
        raise NotFoundError(f"adapter {name!r} has no versions", do="train or adopt it first")
    return found


def _required(adapter: RegisteredAdapter, target: BaseVersion) -> AdapterVersion:
    """Return the version that serves on a base. NotServedError, with the reason."""
    version = adapter.serving_on(target)
    if version is not None:
        return version
    raise NotServedError(
        f"{adapter.name} does not serve on {target}",
        expected=f"the alias {target.alias} on a version of {adapter.name} that was made for "
        f"{target}",
        found=why_not_serving(adapter, target),
        do=_how_to_serve(adapter, target),
    )


def _how_to_serve(adapter: RegisteredAdapter, base: BaseVersion) -> str:
    """Return what a person can do so that an adapter serves on a base."""
    if not adapter.is_live:
        return (
            f"remove the tag {TAG_PREFIX}retired from the registered model {adapter.name} in "
            "MLflow to serve it again; without that tag, correct its tags that begin with "
            f"{TAG_PREFIX}"
        )
    if not adapter.alias_on(base).is_manual:
        return "reconcile the family, retrain the adapter, or set the alias in MLflow to approve it"
    made_for_it = [
        str(version.number)
        for version in adapter.versions
        if version.base.fingerprint_sha256 == base.fingerprint_sha256
    ]
    if not made_for_it:
        return f"retrain the adapter on {base}, and set the alias {base.alias} on that version"
    return (
        f"set the alias {base.alias} in MLflow on version {' or '.join(made_for_it)}, which was "
        f"made for {base}: reconcile keeps what a person set"
    )
