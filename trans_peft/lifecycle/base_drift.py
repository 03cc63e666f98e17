"""Describe how far a new base version moved from its predecessor, for the registry's pages."""

import heapq
import logging
import math

from trans_peft.bases.drift import Drift, sampled_drift
from trans_peft.domain.base import BaseVersion, Fingerprint
from trans_peft.errors import NotFoundError, TransPeftError
from trans_peft.ports import Platform

__all__ = ["describe_drift"]

_log = logging.getLogger(__name__)

_LAYERS = 5
_LONGEST_REASON = 300  # characters


def describe_drift(draft: BaseVersion, fingerprint: Fingerprint, platform: Platform) -> str:
    """Return one line on the change of a base's weights, estimated from the two fingerprints.

    The predecessor is the ready version that `draft` names as its parent. Without a parent, it is
    the newest ready version before it. The text is empty without a predecessor. If the change
    cannot be estimated, the text has the reason: ingestion does not depend on it. No weights are
    read.
    """
    previous = _predecessor(draft, platform)
    if previous is None:
        return ""
    try:
        before = platform.catalog.fingerprint(previous)
        found = sampled_drift(before, fingerprint, f"{previous} and {draft}")
    except (TransPeftError, ArithmeticError, ValueError) as error:
        _log.warning("the drift of %s from %s is unknown: %s", draft, previous, error)
        reason = " ".join(str(error).split())[:_LONGEST_REASON]
        return f"from {previous.version}: not estimated: {reason}"
    return f"from {previous.version}, estimated: {_summary(found)}"


def _predecessor(draft: BaseVersion, platform: Platform) -> BaseVersion | None:
    try:
        versions = platform.catalog.versions(draft.family)
    except NotFoundError:
        return None
    earlier = [
        base
        for base in versions
        if base.ready
        and base.version != draft.version
        and (not draft.number or base.number < draft.number)
    ]
    if draft.parent is not None:
        return next((base for base in earlier if base.version == draft.parent), None)
    return earlier[-1] if earlier else None


def _summary(drift: Drift) -> str:
    parts = {"FFN": drift.ffn, "attention": drift.attention, "other weights": drift.other}
    text = ", ".join(f"{name} {share:.2%}" for name, share in parts.items() if share == share)
    by_layer = [(share, layer) for layer, share in enumerate(drift.ffn_by_layer) if share > 0]
    most = heapq.nlargest(_LAYERS, by_layer)
    if not most or math.isinf(most[0][0]):
        return text
    layers = ", ".join(f"layer {layer} {share:.2%}" for share, layer in most)
    return f"{text}; largest changes of an FFN: {layers}"
