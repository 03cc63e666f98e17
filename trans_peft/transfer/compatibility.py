"""Check whether an adapter is compatible with another base version, from their fingerprints.

No model is loaded. Fingerprints contain the names, shapes and sampled values of all tensors; tokens
are compared with the files of the two tokenizers. `PeftModel.from_pretrained` does not check this:
it silently drops trained weights if the base has fewer layers, and adds random ones if it has more.

A changed config with equal shapes (rope theta, context length, norm epsilon) is a note, because
adapters survive some of these changes; the evaluation decides. Equal shapes with unrelated weights
are a mismatch, because the features that the adapter was trained on no longer exist.
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

__all__ = ["UNRELATED_COSINE", "compare", "tokenizers_may_differ", "weight_cosine"]

UNRELATED_COSINE = 0.2
"""Bases of equal shapes are unrelated if the median cosine of their weights is below this value.

The cosines of independent weights are close to 0. In 1,000 draws with 32 sampled values per matrix,
the largest median was 0.05 for 210 matrices (30 layers) and 0.20 for 15 matrices (2 layers).
Continued training keeps the cosine far higher: 0.7 after a change as large as the weights.
"""


def compare(
    old: Fingerprint,
    new: Fingerprint,
    adapter_folder: Path,
    *,
    old_tokenizer: Path | None = None,
    new_tokenizer: Path | None = None,
) -> Compatibility:
    """Return all mismatches and notes for an adapter that was trained on `old`, on the base `new`.

    Args:
        old: fingerprint of the base that the adapter was trained on.
        new: fingerprint of the other base.
        adapter_folder: a PEFT folder.
        old_tokenizer: a folder with the verified tokenizer of the old base. Both folders are
            required if the tokenizer hashes differ, and read if `tokenizers_may_differ`.
        new_tokenizer: the same for the new base.

    Raises:
        InvalidSpecError: the tokenizer hashes differ, and a tokenizer folder is missing.
        AdapterError: `adapter_folder` is not a valid PEFT folder.
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
    """Return the median cosine between the sampled values of matrices with equal names and shapes.

    Returns None if there are no such matrices. Vectors are not compared, because norm weights are
    close to 1 in every model. The median is robust to a replaced embedding and to a few weights
    that did not change.
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
        return (), (
            "the weights cannot be compared: the fingerprints have no sampled values in common",
        )
    if cosine < UNRELATED_COSINE:
        return (
            "the weights are unrelated, as after pretraining from scratch: the median cosine"
            f" between old and new matrices is {cosine:.3f}; an"
            f" update has at least {UNRELATED_COSINE}",
        ), ()
    return (), ()


def tokenizers_may_differ(old: Fingerprint, new: Fingerprint) -> bool:
    """Whether the loaded tokenizers of two bases may differ.

    The configs are compared too, because config.json can determine the tokenizer class.
    """
    return (
        _tokenizer_hashes(old) != _tokenizer_hashes(new) or old.config_sha256 != new.config_sha256
    )


def _tokenizer_hashes(base: Fingerprint) -> tuple[str, str]:
    return base.vocabulary_sha256, base.tokenizer_sha256


def _compare_tokenizers(
    old: Fingerprint,
    new: Fingerprint,
    adapter: Path,
    old_folder: Path | None,
    new_folder: Path | None,
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    if not tokenizers_may_differ(old, new):
        return (), ()
    if old_folder is None or new_folder is None:
        if _tokenizer_hashes(old) == _tokenizer_hashes(new):
            return (), ()
        raise InvalidSpecError(
            "the tokenizers of the two bases differ, and must be compared",
            expected="the folder of each base's tokenizer",
            found=f"old: {old_folder}, new: {new_folder}",
            do="pass both folders",
        )
    return compare_tokenizers(old_folder, new_folder, saved_template(adapter))


def _changed_texts(old: Fingerprint, new: Fingerprint, adapter: Path) -> tuple[str, ...]:
    notes = []
    if old.config_sha256 != new.config_sha256:
        notes.append(
            "the base's config changed (such as rope theta, context length or norm epsilon)"
        )
    if old.chat_template_sha256 != new.chat_template_sha256:
        notes.append(
            "the base's chat template changed: "
            + (
                f"the adapter keeps the one it was trained with ({TEMPLATE_NAME} in its folder)"
                if (adapter / TEMPLATE_NAME).is_file()
                else "the adapter has no template of its own, so its chats are rendered with the"
                " new one; to keep the old one, adopt the adapter on the old base"
            )
        )
    return tuple(notes)
