"""Read and write the chat template in an adapter's folder.

An adapter keeps the template that it was trained with, so that its prompts stay the same when its
base is updated. The file is named `chat_template.jinja`, as in the folder of a tokenizer, so that
servers can load it.
"""

from pathlib import Path
from typing import Any

from trans_peft.domain.untrusted_json import parse_json
from trans_peft.errors import AdapterError, ContentError
from trans_peft.isolation import call_isolated
from trans_peft.text.chat import (
    CHAT_IMPORTS,
    MAX_TEMPLATE_CHARACTERS,
    pinned,
    template_problems,
)

__all__ = [
    "MAX_SETTINGS_BYTES",
    "TEMPLATE_NAME",
    "check_template",
    "save_chat_template",
    "saved_template",
    "write_template",
]

TEMPLATE_NAME = "chat_template.jinja"
_SETTINGS_NAME = "tokenizer_config.json"
MAX_SETTINGS_BYTES = 64 << 20
"""Largest size of the tokenizer_config.json in an adapter's folder."""


def saved_template(folder: Path) -> str | None:
    """Return the pinned chat template in an adapter's folder, or None if there is none.

    Raises AdapterError if the file is too large or not UTF-8.
    """
    path = Path(folder) / TEMPLATE_NAME
    if not path.is_file():
        return None
    if path.stat().st_size > 4 * MAX_TEMPLATE_CHARACTERS:
        raise AdapterError(
            f"{path} is too large for a chat template",
            expected=f"at most {MAX_TEMPLATE_CHARACTERS} characters",
            found=f"{path.stat().st_size} bytes",
            do="shorten the template, or remove the file if the adapter needs none of its own",
        )
    try:
        return pinned(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise AdapterError(
            f"{path} is not UTF-8 text", found=error, do="save the template again in UTF-8"
        ) from error


def write_template(folder: Path, template: str) -> None:
    """Pin a chat template, and write it to the folder of an adapter."""
    (Path(folder) / TEMPLATE_NAME).write_bytes(pinned(template).encode())


def save_chat_template(folder: Path, base_template: str | None) -> str:
    """Write the chat template of an adapter to its folder, and return where it comes from.

    The first of these that exists is used:

    1. `chat_template.jinja` in the folder: returns "adapter".
    2. The template in the folder's `tokenizer_config.json`: returns "adapter".
    3. `base_template`, of the base that the adapter was trained on: returns "base".

    Returns "none", and writes nothing, if there is no template.

    Raises AdapterError if a file cannot be read, and ContentError if the template cannot be used.
    """
    own = saved_template(folder)
    own = _configured(Path(folder) / _SETTINGS_NAME) if own is None else own
    template = base_template if own is None else own
    if template is None:
        return "none"
    check_template(template, f"the chat template of {'the base' if own is None else folder}")
    write_template(folder, template)
    return "base" if own is None else "adapter"


def check_template(template: str, subject: str) -> None:
    """Compile a template in a child process. Raises ContentError if it cannot be used."""
    problems = call_isolated(
        template_problems,
        template,
        subject=subject,
        imports=CHAT_IMPORTS,
    )
    if problems:
        raise ContentError(
            f"{subject} cannot be used",
            expected="a Jinja template that renders the same text each time",
            found="; ".join(problems),
            do="correct the template; strftime_now is allowed, and always formats the same date",
        )


def _configured(path: Path) -> str | None:
    """Return the (default) chat template in a tokenizer_config.json, or None."""
    if not path.is_file():
        return None
    if path.stat().st_size > MAX_SETTINGS_BYTES:
        raise AdapterError(
            f"{path} is too large",
            expected=f"at most {MAX_SETTINGS_BYTES} bytes",
            found=f"{path.stat().st_size} bytes",
            do="save the tokenizer again beside the adapter, or remove its files",
        )
    try:
        settings: Any = parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise AdapterError(
            f"{path} is not JSON", found=error, do="save the tokenizer again beside the adapter"
        ) from error
    template = settings.get("chat_template") if isinstance(settings, dict) else None
    if isinstance(template, list):
        named = [item for item in template if isinstance(item, dict)]
        template = next((t.get("template") for t in named if t.get("name") == "default"), None)
    return template if isinstance(template, str) else None
