"""The chat template that lies beside an adapter's weights, in a stock PEFT folder.

transformers and servers read `chat_template.jinja` from a tokenizer's folder. An adapter keeps the
template it was trained with under the same name, so its prompts stay the same when its base is
updated and a server can be started with that file.
"""

from pathlib import Path
from typing import Any

from trans_peft.domain.untrusted_json import parse_json
from trans_peft.errors import AdapterError, ContentError
from trans_peft.isolation import call_isolated
from trans_peft.text.chat import MAX_TEMPLATE_CHARACTERS, pinned, template_problems

__all__ = [
    "MAX_SETTINGS_BYTES",
    "TEMPLATE_NAME",
    "check_template",
    "saved_template",
    "settle_template",
    "write_template",
]

TEMPLATE_NAME = "chat_template.jinja"
_SETTINGS_NAME = "tokenizer_config.json"
MAX_SETTINGS_BYTES = 64 << 20
"""Size of a tokenizer_config.json that lies beside an adapter."""


def saved_template(folder: Path) -> str | None:
    """Return the pinned template that an adapter's folder holds; None if it holds none.

    AdapterError for a file that is too long or no UTF-8.
    """
    path = Path(folder) / TEMPLATE_NAME
    if not path.is_file():
        return None
    if path.stat().st_size > 4 * MAX_TEMPLATE_CHARACTERS:
        raise AdapterError(
            f"{path} is too long for a chat template",
            expected=f"at most {MAX_TEMPLATE_CHARACTERS} characters",
            found=f"{path.stat().st_size} bytes",
        )
    try:
        return pinned(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise AdapterError(f"{path} is not UTF-8 text", found=error) from error


def write_template(folder: Path, template: str) -> None:
    """Write a template, pinned, where `saved_template` finds it."""
    (Path(folder) / TEMPLATE_NAME).write_bytes(pinned(template).encode())


def settle_template(folder: Path, of_base: str | None) -> str:
    """Give an adapter's folder the template it is going to keep, and return where it came from.

    In this order: `chat_template.jinja` in the folder, the template in its `tokenizer_config.json`,
    the template of the base that it was trained on (`of_base`). Returns "adapter", "base", or
    "none" where there is no template at all. Raises AdapterError, ContentError.
    """
    own = saved_template(folder)
    own = _configured(Path(folder) / _SETTINGS_NAME) if own is None else own
    template = of_base if own is None else own
    if template is None:
        return "none"
    check_template(template, f"the chat template of {'the base' if own is None else folder}")
    write_template(folder, template)
    return "base" if own is None else "adapter"


def check_template(template: str, subject: str) -> None:
    """Compile a template in a child process; ContentError if it cannot be used for prompts."""
    problems = call_isolated(
        template_problems,
        template,
        subject=subject,
        imports=("jinja2.sandbox", "transformers.utils.chat_template_utils"),
    )
    if problems:
        raise ContentError(
            f"{subject} cannot be used",
            expected="a Jinja template that renders the same text each time",
            found="; ".join(problems),
            do="correct the template; a date may be read with strftime_now, which is fixed here",
        )


def _configured(path: Path) -> str | None:
    """Return the (default) chat template in a tokenizer_config.json, if it has one."""
    if not path.is_file():
        return None
    if path.stat().st_size > MAX_SETTINGS_BYTES:
        raise AdapterError(f"{path} has more than {MAX_SETTINGS_BYTES} bytes")
    try:
        settings: Any = parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise AdapterError(f"{path} is not JSON", found=error) from error
    template = settings.get("chat_template") if isinstance(settings, dict) else None
    if isinstance(template, list):
        named = [item for item in template if isinstance(item, dict)]
        template = next((t.get("template") for t in named if t.get("name") == "default"), None)
    return template if isinstance(template, str) else None
