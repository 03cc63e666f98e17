"""Register an existing PEFT folder as a live adapter."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

from trans_peft.artifacts import download_files
from trans_peft.domain.adapter import AdapterVersion
from trans_peft.domain.base import BaseVersion
from trans_peft.domain.bounds import MAX_ADAPTER_CONFIG_BYTES, MAX_ADAPTER_WEIGHTS_BYTES
from trans_peft.domain.evaluation import Suite
from trans_peft.errors import (
    AdapterError,
    NotFoundError,
    replacing_paths_in_errors,
    translating_full_disk_errors,
)
from trans_peft.lifecycle.base_files import base_folder, named_fingerprint
from trans_peft.lifecycle.evaluation import (
    EvaluationSubject,
    evaluate_on,
    pin_suites,
)
from trans_peft.lifecycle.preflight import check_registration, check_suites
from trans_peft.lifecycle.progress import ProgressCallback
from trans_peft.lifecycle.resolve import find_base
from trans_peft.models import adapter_weights_sha256
from trans_peft.ports import Platform
from trans_peft.text.chat import template_of
from trans_peft.text.saved_template import (
    MAX_SETTINGS_BYTES,
    save_chat_template,
    saved_template,
)
from trans_peft.transfer.compatibility import compare
from trans_peft.transfer.peft_folder import PeftFolder, read_peft_folder

__all__ = ["adopt"]

_MAX_BYTES = {
    "adapter_config.json": MAX_ADAPTER_CONFIG_BYTES,
    "adapter_model.safetensors": MAX_ADAPTER_WEIGHTS_BYTES,
    "chat_template.jinja": MAX_SETTINGS_BYTES,
    "tokenizer_config.json": MAX_SETTINGS_BYTES,  # holds the template of old transformers versions
}
"""The files of an adapter that are copied, and their largest sizes."""


def adopt(  # noqa: PLR0913  as `train`, with what a recipe would contain
    adapter: str,
    folder_uri: str,
    family: str,
    suites: Sequence[Suite],
    platform: Platform,
    *,
    base_version: str | None = None,
    on_progress: ProgressCallback | None = None,
) -> AdapterVersion:
    """Register a PEFT folder as a live adapter and evaluate it on the base it was trained on.

    `folder_uri` is a local path or an `s3://` prefix. The base is `base_version` (a label or an
    alias), or else the ready version whose fingerprint or label is the `revision` in
    adapter_config.json. The tensor shapes must fit, and the adapter must change a logit on the
    base. The chat template is the one in the folder, or else that of the base; the tag
    `chat_template` records which. If the same folder is registered already, that version is
    returned.

    Raises AdapterError, NotFoundError or DataError. Nothing is registered then.
    """
    from trans_peft.models import load_base, load_tokenizer
    from trans_peft.transfer.effect import probe_effect
    from trans_peft.transfer.load_adapter import attached, rebind_adapter

    check_registration(adapter, family, platform)
    pinned = pin_suites(suites, platform)
    with (
        translating_full_disk_errors(tempfile.gettempdir()),
        tempfile.TemporaryDirectory(prefix="trans-peft-") as scratch,
        replacing_paths_in_errors({Path(scratch) / "peft": folder_uri}),
    ):
        folder = _fetch(folder_uri, Path(scratch) / "peft", platform)
        source = read_peft_folder(folder)
        base = _base(adapter, family, base_version, source, platform)
        template = save_chat_template(
            folder, template_of(load_tokenizer(base_folder(base, platform)))
        )
        check_suites(base, pinned, platform, template=saved_template(folder))
        fingerprint = named_fingerprint(base, platform)
        fit = compare(fingerprint, fingerprint, folder, old_tokenizer=None, new_tokenizer=None)
        if not fit.ok:
            raise AdapterError(
                f"{adapter} does not fit {base}",
                found="; ".join(fit.mismatches),
                do="pass the base version that the adapter was trained on",
            )
        loaded = load_base(base_folder(base, platform), pinned[0].dtype)
        with attached(loaded.model, folder) as model:
            effect = probe_effect(model, loaded.tokenizer)
        if not effect.found:
            raise AdapterError(
                f"{adapter} changes nothing on {base}",
                expected="at least one logit that differs from that of the bare base",
                found="the same logits: no weight of the adapter has an effect",
                do="check that the folder contains trained weights for this model",
            )
        weights_sha256 = adapter_weights_sha256(folder)
        evaluations = evaluate_on(
            base,
            pinned,
            platform,
            EvaluationSubject(adapter, weights_sha256, lambda: folder),
            on_progress=on_progress,
        )
        version = platform.registry.register(
            AdapterVersion(
                adapter=adapter,
                number=0,
                base=base.ref,
                trained_on=base.ref,
                weights_sha256=weights_sha256,
                method=source.peft_type,
                suites=pinned,
            ),
            rebind_adapter(
                folder,
                Path(scratch) / "adopted",
                base_name=base.uri,
                base_revision=base.fingerprint_sha256,
            ),
            tags={
                "adopted_from": folder_uri,
                "chat_template": f"of {base}" if template == "base" else template,
            },
            scores={name: found.score for name, found in evaluations.items()},
        )
    platform.registry.set_alias(adapter, version.base.alias, version.number)
    return version


def _fetch(uri: str, folder: Path, platform: Platform) -> Path:
    files = [file for file in platform.store.list(uri) if "/" not in file.name]
    names = {file.name for file in files}
    missing = {"adapter_config.json", "adapter_model.safetensors"} - names
    if missing:
        raise AdapterError(
            f"{uri} is not a PEFT folder that can be adopted",
            expected="adapter_config.json and adapter_model.safetensors",
            found=", ".join(sorted(names)) or "nothing",
            do="save the adapter with model.save_pretrained(folder); pickle files are not loaded",
        )
    used = [file for file in files if file.name in _MAX_BYTES]
    for file in used:
        if file.size > _MAX_BYTES[file.name]:
            raise AdapterError(
                f"the file {file.name} in {uri} is too large",
                expected=f"at most {_MAX_BYTES[file.name]} bytes",
                found=f"{file.size} bytes",
                do="save the adapter without copies of weights of the base, with a lower rank or "
                "in a smaller dtype",
            )
    folder.mkdir(parents=True)
    download_files(uri, used, platform.store, folder)
    return folder


def _base(
    adapter: str,
    family: str,
    named: str | None,
    source: PeftFolder,
    platform: Platform,
) -> BaseVersion:
    if named is not None:
        base = find_base(family, named, platform)
        if (recorded := source.base_fingerprint_sha256) not in (None, base.fingerprint_sha256):
            raise AdapterError(
                f"{adapter} is bound to another base than {base}",
                expected=f"the base with the fingerprint {recorded}, as adapter_config.json says",
                found=f"{base} with the fingerprint {base.fingerprint_sha256}",
                do="adopt the adapter on the base that it is bound to, then transfer it",
            )
        return base
    revision = source.config.get("revision")
    ready = [base for base in platform.catalog.versions(family) if base.ready]
    for base in ready:
        if revision and revision in (base.version, base.fingerprint_sha256):
            return base
    raise NotFoundError(
        f"the base version of {family} that {adapter} was trained on is unknown",
        expected=f"a revision in adapter_config.json that is one of {[b.version for b in ready]}",
        found=repr(revision),
        do="pass the base version",
    )
