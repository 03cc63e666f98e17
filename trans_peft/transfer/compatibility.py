"""Whether an adapter's bytes mean anything on another base, told from the two fingerprints.

No weight is put on a device: shapes, names and sampled values are in the fingerprints, tokens in
two tokenizer files. `PeftModel.from_pretrained` is no such check: on a base with fewer layers it
drops trained weights without a word, on one with more it adds fresh ones.

A changed config under equal shapes (rope theta, context length, norm epsilon) is a note: real
updates change these, and adapters survive some of them, so the evaluation decides. The same shapes
with unrelated weights are a mismatch: nothing that the adapter learned to read or write is where it
was.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from statistics import median

from trans_peft.domain.base import Fingerprint, TensorSignature
from trans_peft.domain.outcome import Compatibility
from trans_peft.errors import InvalidSpecError
from trans_peft.text.saved_template import TEMPLATE_NAME, saved_template
from trans_peft.transfer.peft_folder import read_peft_folder
from trans_peft.transfer.target_modules import compare_target_modules
from trans_peft.transfer.tokenizers import compare_tokenizers

__all__ = ["UNRELATED_COSINE", "compare", "may_differ", "weight_cosine"]

UNRELATED_COSINE = 0.2
"""Below this median cosine, two bases of equal shapes count as unrelated.

Sampled cosines of independent weights scatter around 0: over 1,000 draws the largest median was
0.05 with 32 values of each of 210 matrices (a model of 30 layers), 0.20 with 32 of each of 15 (a
toy of 2). Continued training stays far above: a drift as large as the weights themselves still
leaves 0.7.
"""


def compare(
    old: Fingerprint,
    new: Fingerprint,
    adapter_folder: Path,
    *,
    old_tokenizer: Path | None = None,
    new_tokenizer: Path | None = None,
) -> Compatibility:
    """Return every mismatch and every note for an adapter trained on `old` and meant for `new`.

    The tokenizer folders (each verified, with a `tokenizer.json`) are read where `may_differ` says
    so; InvalidSpecError where the tokens' hashes differ and a folder is missing. AdapterError for a
    folder that is not PEFT.
    """
    mismatches: list[str] = []
    notes: list[str] = []
    if old.architecture != new.architecture:
        mismatches.append(f"the architecture was {old.architecture} and is {new.architecture}")
    if old.layer_count != new.layer_count:
        mismatches.append(f"the base had {old.layer_count} layers and has {new.layer_count}")
    for findings in (
        compare_target_modules(read_peft_folder(adapter_folder), old.tensors, new.tensors),
        _compare_values(old, new),
        _compare_tokenizers(old, new, adapter_folder, old_tokenizer, new_tokenizer),
        ((), _changed_texts(old, new, adapter_folder)),
    ):
        mismatches += findings[0]
        notes += findings[1]
    return Compatibility(tuple(mismatches), tuple(notes))


def weight_cosine(
    old: Mapping[str, TensorSignature], new: Mapping[str, TensorSignature]
) -> float | None:
    """Return the median cosine between the sketches of equal-shaped matrices; None without any.

    Vectors are left out: norm weights are near 1 in every model. The median, so that neither a
    replaced embedding nor a few untouched weights decide.
    """
    cosines = []
    for name, before in old.items():
        after = new.get(name)
        if after is None or len(before.shape) < 2 or before.shape != after.shape:
            continue
        if not before.sketch or len(before.sketch) != len(after.sketch):
            continue
        norm = math.hypot(*before.sketch) * math.hypot(*after.sketch)
        if norm > 0:
            dot = math.fsum(a * b for a, b in zip(before.sketch, after.sketch, strict=True))
            cosines.append(dot / norm)
    return median(cosines) if cosines else None


def _compare_values(old: Fingerprint, new: Fingerprint) -> tuple[tuple[str, ...], tuple[str, ...]]:
    cosine = weight_cosine(old.tensors, new.tensors)
    if cosine is None:
        return (), ("whether the weights are related is unknown: no sampled values to compare",)
    if cosine < UNRELATED_COSINE:
        return (
            "the weights are unrelated, as after a re-pretraining: the median cosine between old"
            f" and new matrices is {cosine:.3f}; an update has at least {UNRELATED_COSINE}",
        ), ()
    return (), ()


def may_differ(old: Fingerprint, new: Fingerprint) -> bool:
    """Whether two bases' loaded tokenizers may differ; config.json names the model type as well."""
    return _tokens(old) != _tokens(new) or old.config_sha256 != new.config_sha256


def _tokens(of: Fingerprint) -> tuple[str, str]:
    return of.vocabulary_sha256, of.tokenizer_sha256


def _compare_tokenizers(
    old: Fingerprint,
    new: Fingerprint,
    adapter: Path,
    old_folder: Path | None,
    new_folder: Path | None,
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    if not may_differ(old, new):
        return (), ()
    if old_folder is None or new_folder is None:
        if _tokens(old) == _tokens(new):
            return (), ()
        raise InvalidSpecError(
            "the two bases' tokenizers differ, and hashes do not tell which tokens",
            expected="the folder of each base's tokenizer",
            found=f"old: {old_folder}, new: {new_folder}",
            do="pass both folders",
        )
    return compare_tokenizers(old_folder, new_folder, saved_template(adapter))


def _changed_texts(old: Fingerprint, new: Fingerprint, adapter: Path) -> tuple[str, ...]:
    notes = []
    if old.config_sha256 != new.config_sha256:
        notes.append(
            "the base's config changed (such as rope theta, context length or norm epsilon): the"
            " evaluation decides"
        )
    if old.chat_template_sha256 != new.chat_template_sha256:
        notes.append(
            "the base's chat template changed: "
            + (
                f"the adapter keeps the one it was trained with ({TEMPLATE_NAME} in its folder)"
                if (adapter / TEMPLATE_NAME).is_file()
                else "the adapter has none of its own, so its chats are rendered with the new"
                " one; adopt it on the old base to keep that one's"
            )
        )
    return tuple(notes)
