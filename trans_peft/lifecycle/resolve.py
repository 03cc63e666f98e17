"""The one way for a consumer to get an adapter."""

from trans_peft.domain.adapter import AdapterVersion
from trans_peft.errors import NotServedError
from trans_peft.lifecycle.bases import find_base
from trans_peft.ports import Platform

__all__ = ["resolve"]


def resolve(
    adapter: str, family: str, platform: Platform, *, base: str = "serving"
) -> AdapterVersion:
    """Return the version of an adapter that serves on a base version (or alias) of its family.

    It fails closed: NotServedError rather than another version or the bare base.
    """
    target = find_base(family, base, platform)
    number = platform.registry.alias(adapter, target.alias)
    for version in platform.registry.versions(adapter):
        if (
            version.number == number
            and version.base_fingerprint_sha256 == target.fingerprint_sha256
        ):
            return version
    outcome = next(
        (
            outcome
            for outcome in platform.registry.outcomes(adapter)
            if outcome.base_fingerprint_sha256 == target.fingerprint_sha256
        ),
        None,
    )
    raise NotServedError(
        f"{adapter} does not serve on {target}",
        expected=f"the alias {target.alias} on a version of {adapter} made for that base",
        found=f"verdict {outcome.verdict}: {outcome.judgement.reason}"
        if outcome
        else "no verdict yet",
        do="reconcile the family, re-tune the adapter, or set the alias by hand to approve it",
    )
