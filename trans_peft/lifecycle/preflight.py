"""Check before training or adoption that evaluation and registration will be possible."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

from trans_peft.data import read_examples
from trans_peft.domain.base import BaseVersion
from trans_peft.domain.evaluation import Suite
from trans_peft.domain.names import check_case, check_names
from trans_peft.errors import (
    DataError,
    InvalidSpecError,
    NotFoundError,
    StoreError,
    TransPeftError,
    UnsupportedModelError,
)
from trans_peft.lifecycle.base_files import base_folder
from trans_peft.lifecycle.judge_model import labeled_marks
from trans_peft.ports import Platform

__all__ = ["check_registration", "check_suites"]


def check_registration(adapter: str, family: str, platform: Platform) -> None:
    """Raise InvalidSpecError unless a version of `adapter` can be registered in `family`.

    Checks the name, that no adapter of another family has it, and that the registry and the
    evaluation store respond. Raises StoreError if the folder of this worker is not writable.
    """
    check_names("the adapter cannot be registered", adapter=adapter, family=family)
    families: set[str] = set()
    if (existing := platform.registry.registered_name(adapter)) is not None:
        check_case("adapter", adapter, [existing])
        with suppress(NotFoundError):
            families = {version.base.family for version in platform.registry.versions(adapter)}
    if families - {family}:
        raise InvalidSpecError(
            f"the adapter {adapter!r} belongs to another family",
            expected=", ".join(sorted(families)),
            found=family,
            do="give the new adapter another name",
        )
    platform.evaluations.get("0" * 64)
    _check_writable(platform.work_dir)


def check_suites(
    base: BaseVersion, suites: Sequence[Suite], platform: Platform, *, template: str | None = None
) -> None:
    """Raise an error unless every pinned suite can be evaluated on a base.

    Loads no model, except a suite's judge model whose labeled answers have no stored marks.

    Reads the rows, checks the scoring rule, renders and tokenizes the prompts, and checks their
    length and choices, as an evaluation does. `template` is the adapter's own chat template; None
    means the base's. If one suite fails, its error is raised (DataError or InvalidSpecError). If
    several fail, a DataError lists all problems.
    """
    from trans_peft.models import load_tokenizer
    from trans_peft.validation.tokenized_suite import prepare

    folder = base_folder(base, platform)
    tokenizer, context = load_tokenizer(folder), _context(folder)
    errors: list[TransPeftError] = []
    for suite in suites:
        try:
            examples = read_examples(suite.data, platform.store, limit=suite.limit)
            prepare(
                tokenizer,
                suite,
                examples,
                context=context,
                template=template,
                may_lack=platform.may_lack,
            )
            if suite.judge is not None:
                labeled_marks(suite, platform)
        except (DataError, InvalidSpecError) as error:
            errors.append(error)
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise DataError(
            f"{len(errors)} of {len(suites)} suites cannot be evaluated on {base}:\n"
            + "\n".join(str(error) for error in errors)
        )


def _context(folder: Path) -> int | None:
    """Return the longest text in tokens by the base's config.json; None if it states no limit."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (ValueError, KeyError) as error:
        raise UnsupportedModelError(
            f"transformers has no model for the config.json in {folder}",
            found=error,
            do="install a version of transformers that has this architecture",
        ) from error
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def _check_writable(folder: Path) -> None:
    probe = folder / f".writable-{uuid4().hex}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"\0")
        probe.unlink()
    except OSError as error:
        raise StoreError(
            f"this worker cannot write to its state folder {folder}",
            found=error,
            do="make the folder writable and free disk space, or configure another folder",
        ) from error
