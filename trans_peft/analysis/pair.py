"""Check that two bases are versions of one base, before a model is loaded."""

from pathlib import Path
from typing import Any

from trans_peft.bases.checkpoint import Checkpoint, folder_checkpoint
from trans_peft.bases.drift import Drift, weight_drift
from trans_peft.errors import UnsupportedModelError
from trans_peft.transfer.compatibility import UNRELATED_COSINE
from trans_peft.transfer.tokenizers import compare_tokenizers

__all__ = ["drift_of_versions"]


def drift_of_versions(old: Path, new: Path) -> Drift:
    """Return the weight drift of two versions of one base, each a Hugging Face folder.

    Raises UnsupportedModelError, with all differences, for bases of another architecture, number of
    layers, shape or tokenizer, and for unrelated weights, as after pretraining from scratch.
    """
    before, after = folder_checkpoint(old), folder_checkpoint(new)
    problems = [
        f"{field}: {first!r}, then {second!r}"
        for field in ("architectures", "num_hidden_layers")
        for first, second in [(_field(before, field), _field(after, field))]
        if first != second
    ]
    if before.tokenizer != after.tokenizer:
        problems += compare_tokenizers(old, new)[0]
    drift = None
    try:
        drift = weight_drift(old, new)
    except UnsupportedModelError as error:
        problems.append(str(error))
    if drift is not None and drift.cosine < UNRELATED_COSINE:
        problems.append(
            f"the weights are unrelated: the median cosine of their matrices is {drift.cosine:.3f}"
        )
    if drift is None or problems:
        raise UnsupportedModelError(
            f"{old} and {new} are not versions of one base:\n    " + "\n    ".join(problems),
            expected="the same architecture, shapes and tokenizer, and weights with a median "
            f"cosine of at least {UNRELATED_COSINE}",
            do="compare a base with an update of it",
        )
    return drift


def _field(checkpoint: Checkpoint, name: str) -> Any:
    fields = checkpoint.fields()
    return fields.get(name, (fields.get("text_config") or {}).get(name))
