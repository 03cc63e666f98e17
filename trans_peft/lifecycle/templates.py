"""Which chat template an adapter without one of its own keeps, when its base is updated."""

import shutil
from pathlib import Path

from trans_peft.domain.base import BaseVersion
from trans_peft.lifecycle.evaluations import base_folder
from trans_peft.ports import Platform
from trans_peft.text.chat import template_of
from trans_peft.text.saved_template import saved_template, settle_template
from trans_peft.transfer.peft_folder import CONFIG_NAME, WEIGHTS_NAME

__all__ = ["keep_template"]


def keep_template(
    folder: Path, trained_on: BaseVersion, new: BaseVersion, platform: Platform, target: Path
) -> Path:
    """Return a PEFT folder whose adapter keeps the template of the base that it was trained on.

    That is `folder` where it holds a template, or where both bases have the same one; else a copy
    in `target`, which is another adapter by its hash. Raises as `settle_template`.
    """
    old, updated = (platform.catalog.fingerprint(base) for base in (trained_on, new))
    same = old.chat_template_sha256 == updated.chat_template_sha256
    if same or saved_template(folder) is not None:
        return folder
    from trans_peft.models import load_tokenizer

    target.mkdir(parents=True)
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        shutil.copyfile(folder / name, target / name)
    settle_template(target, template_of(load_tokenizer(base_folder(trained_on, platform))))
    return target
