"""Translate the tensor names of a fingerprint to the names in the loaded model.

PEFT names modules as the loaded model does, and names in files can differ: GPT-2 and BLOOM on the
hub lack the prefix `transformer.`, separate experts become one fused weight, a text backbone drops
the prefix of its multimodal checkpoint, and a tied head is in no file. The names are computed and
not stored with the base, because they depend on the installed version of transformers.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

from trans_peft.bases.checkpoint import Checkpoint, read_text
from trans_peft.bases.model_check import ModelWeight, compare_with_built_model
from trans_peft.bases.model_files import config_sha256
from trans_peft.domain.base import Fingerprint, TensorSignature
from trans_peft.errors import (
    IntegrityError,
    NotFoundError,
    UploadError,
    translating_full_disk_errors,
)
from trans_peft.files import atomic_write
from trans_peft.ports import ArtifactStore

__all__ = ["in_model_names"]


def in_model_names(
    fingerprint: Fingerprint, uri: str, store: ArtifactStore, cache_dir: Path
) -> Fingerprint:
    """Return the fingerprint with the tensors of the loaded model's state dict.

    A weight that is one tensor of the files has the signature of that tensor. A weight that is made
    of several tensors has a shape only. The fingerprint is returned unchanged if config.json is
    neither recorded in it nor found unchanged at `uri`. Results are cached in `cache_dir`, by
    digest and version of transformers. Raises ContentError if the model cannot be built,
    IsolationError, StoreError.
    """
    cached = cache_dir / f"{fingerprint.digest}-{version('transformers')}.json"
    weights = _read_cache(cached)
    if weights is None:
        config = fingerprint.config or _config_at(uri, store, fingerprint)
        if not config:
            return fingerprint
        _, weights = compare_with_built_model(Checkpoint(config, fingerprint.tensors, {}), uri)
        _write_cache(cached, weights)
    if not weights:
        return fingerprint
    return replace(fingerprint, tensors=_signatures(weights, fingerprint.tensors))


def _signatures(
    weights: tuple[ModelWeight, ...], tensors: Mapping[str, TensorSignature]
) -> dict[str, TensorSignature]:
    return {
        weight.name: tensors[weight.source]
        if weight.source is not None and weight.source in tensors
        else TensorSignature(weight.shape, "", "")
        for weight in weights
    }


def _config_at(uri: str, store: ArtifactStore, fingerprint: Fingerprint) -> str:
    """Return the text of config.json, or "" if it is not the one that was fingerprinted."""
    try:
        files = {file.name: file for file in store.list(uri)}
        config, generation = (
            read_text(uri, store, files[name]) if name in files else "{}"
            for name in ("config.json", "generation_config.json")
        )
        same = config_sha256(config, generation) == fingerprint.config_sha256
    except (NotFoundError, IntegrityError, UploadError, ValueError):
        return ""
    return config if same else ""


def _read_cache(path: Path) -> tuple[ModelWeight, ...] | None:
    try:
        return tuple(
            ModelWeight(name, tuple(shape), source)
            for name, shape, source in json.loads(path.read_text())
        )
    except (OSError, ValueError, TypeError):
        return None


def _write_cache(path: Path, weights: tuple[ModelWeight, ...]) -> None:
    with translating_full_disk_errors(path.parent):
        atomic_write(path, json.dumps([[w.name, w.shape, w.source] for w in weights]))
