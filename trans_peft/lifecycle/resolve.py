"""Look up the adapter version that serves on a base, and bases by version, alias or fingerprint."""

from collections.abc import Iterable

from trans_peft.domain.adapter import AdapterVersion
from trans_peft.domain.base import BaseVersion
from trans_peft.domain.conventions import BASE_ALIASES
from trans_peft.errors import InvalidSpecError, NotFoundError, NotServedError
from trans_peft.ports import Platform

__all__ = ["base_trained_on", "find_base", "resolve"]


def find_base(family: str, version: str, platform: Platform) -> BaseVersion:
    """Return the ready base version with that label or alias (`serving`, `champion`).

    Other aliases are ignored, because MLflow accepts an alias that is spelled like a label. Raises
    NotFoundError with the existing versions, also for a version that is not ready.
    """
    versions = platform.catalog.versions(family)
    number = platform.catalog.alias(family, version) if version in BASE_ALIASES else None
    for base in versions:
        if base.ready and (
            base.number == number if number is not None else base.version == version
        ):
            return base
    raise NotFoundError(
        f"family {family!r} has no ready base version {version!r}",
        expected=", ".join(base.version for base in versions if base.ready) or "none is ready yet",
        found=", ".join(f"{base.version} (not ready)" for base in versions if not base.ready)
        or repr(version),
        do="ingest the base first, or set the alias on a version that is ready",
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
    versions = platform.registry.versions(adapter)
    if not versions:
        raise NotFoundError(f"adapter {adapter!r} has no versions", do="train or adopt it first")
    target = find_base(versions[0].base.family, base, platform)
    number = platform.registry.alias(adapter, target.alias)
    for version in versions:
        if (
            version.number == number
            and version.base.fingerprint_sha256 == target.fingerprint_sha256
        ):
            return version
    outcome = next(
        (
            outcome
            for outcome in platform.registry.outcomes(adapter)
            if outcome.base.fingerprint_sha256 == target.fingerprint_sha256
        ),
        None,
    )
    raise NotServedError(
        f"{adapter} does not serve on {target}",
        expected=f"the alias {target.alias} on a version of {adapter} that was made for {target}",
        found=f"verdict {outcome.verdict}: {outcome.judgment.reason}"
        if outcome
        else "no verdict yet",
        do="reconcile the family, retrain the adapter, or set the alias in MLflow to approve it",
    )
