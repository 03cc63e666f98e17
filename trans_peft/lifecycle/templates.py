"""Keep the chat template of an adapter when its base is updated."""

import shutil
from pathlib import Path

from trans_peft.domain.base import BaseVersion
from trans_peft.lifecycle.base_files import base_folder
from trans_peft.ports import Platform
from trans_peft.text.chat import template_of
from trans_peft.text.saved_template import save_chat_template, saved_template
from trans_peft.transfer.peft_folder import CONFIG_NAME, WEIGHTS_NAME

__all__ = ["keep_template"]


def keep_template(
    folder: Path, trained_on: BaseVersion, new: BaseVersion, platform: Platform, target: Path
) -> Path:
    """Return a PEFT folder whose chat template is the one that the adapter was trained with.

    Returns `folder` itself if it contains a template, or if both bases have the same template.
    Otherwise returns `target`, a copy with the template of `trained_on`; its weights hash differs,
    because the template is part of it. Raises what `save_chat_template` raises.
    """
    old, updated = (platform.catalog.fingerprint(base) for base in (trained_on, new))
    same = old.chat_template_sha256 == updated.chat_template_sha256
    if same or saved_template(folder) is not None:
        return folder
    from trans_peft.models import load_tokenizer

    target.mkdir(parents=True)
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        shutil.copyfile(folder / name, target / name)
    save_chat_template(target, template_of(load_tokenizer(base_folder(trained_on, platform))))
    return target
