"""Whether an adapter can be recovered without training rows. Known before anything is evaluated."""

from collections.abc import Mapping
from functools import cache

from trans_peft.domain.adapter import AdapterVersion
from trans_peft.domain.fleet import Fleet, RegisteredAdapter
from trans_peft.domain.recovery import (
    COMPENSABLE_TYPES,
    CompensationPolicy,
    DistillationPolicy,
    PromptsPolicy,
    RecoveryPolicy,
)
from trans_peft.errors import AccessError, IntegrityError, NotFoundError
from trans_peft.lifecycle.parallel import in_parallel
from trans_peft.ports import ArtifactStore

__all__ = ["unprepared", "why_no_prompts", "why_not_compensated", "why_not_distilled"]


def why_no_prompts(source: AdapterVersion, policy: PromptsPolicy) -> str:
    """Return why an adapter has no prompts; empty if the policy or its recipe names some."""
    if policy.prompts_uri or (source.recipe and source.recipe.synthetic_prompts):
        return ""
    return "neither the policy (prompts_uri) nor the recipe (synthetic_prompts) gives prompts"


def why_not_compensated(source: AdapterVersion, policy: CompensationPolicy) -> str:
    """Return why the strategy `compensated` is impossible for an adapter; empty if it is not."""
    if source.method not in COMPENSABLE_TYPES:
        return f"adapters of the type {source.method} cannot be compensated"
    return why_no_prompts(source, policy)


def why_not_distilled(source: AdapterVersion, policy: DistillationPolicy) -> str:
    """Return why the strategy `distilled` is impossible for an adapter; empty if it is not."""
    if source.recipe is None:
        return "the adapter has no recipe, so its perturbation and options are unknown"
    return why_no_prompts(source, policy)


def unprepared(fleet: Fleet, recovery: RecoveryPolicy, store: ArtifactStore) -> Mapping[str, str]:
    """Return the adapters that no strategy without training rows can recover, with the reasons.

    These are all adapters if the policy has no such strategy. Files that `prompts_uri` names are
    opened and not parsed, so that they can still have too few prompts. Raises StoreError if the
    store does not respond.
    """
    compensation, distillation = recovery.compensation, recovery.distillation
    if compensation is None and distillation is None:
        off = "the policy has neither compensation nor distillation"
        return {adapter.name: off for adapter in fleet.adapters}

    @cache
    def why_no_file(uri: str) -> str:
        try:
            with store.read(uri) as chunks:
                return "" if any(chunks) else f"{uri} is empty"
        except (AccessError, IntegrityError, NotFoundError) as error:
            return str(error).partition("\n")[0]

    def file_of(source: AdapterVersion, policy: PromptsPolicy) -> str:
        return why_no_file(policy.prompts_of(source.adapter)) if policy.prompts_uri else ""

    def why(adapter: RegisteredAdapter) -> str:
        source, reasons = adapter.source, []
        if compensation is not None:
            reasons.append(
                why_not_compensated(source, compensation) or file_of(source, compensation)
            )
        if distillation is not None:
            reasons.append(why_not_distilled(source, distillation) or file_of(source, distillation))
        return "; ".join(dict.fromkeys(reasons)) if all(reasons) else ""

    found = zip(fleet.adapters, in_parallel(why, fleet.adapters), strict=True)
    return {adapter.name: reason for adapter, reason in found if reason}
