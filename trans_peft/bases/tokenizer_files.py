"""What an adapter feels of a tokenizer, from its files: token ids, the whole of it, templates.

Follows how transformers 5 loads a fast tokenizer: tokenizer.json is the tokenizer,
tokenizer_config.json (over the older special_tokens_map.json) the settings around it, and a
chat_template.jinja beats a template among the settings.
"""

import hashlib
from collections.abc import Mapping
from typing import Any

from trans_peft.domain.identity import content_sha256

__all__ = ["chat_template_sha256", "tokenizer_sha256", "vocabulary"]

# Names, versions, and what has a hash of its own. Anything not listed here counts.
_UNFELT = frozenset({
    "_commit_hash", "backend", "chat_template", "is_local", "local_files_only", "name_or_path",
    "processor_class", "tokenizer_file", "transformers_version",
})  # fmt: skip


def vocabulary(tokenizer: Mapping[str, Any]) -> dict[str, int]:
    """Return token -> id of a tokenizer.json, added tokens included. ValueError if it has none."""
    try:
        known = tokenizer["model"]["vocab"]
        if isinstance(known, list):  # Unigram: [token, score] in the order of the ids
            tokens = {token: i for i, (token, _) in enumerate(known)}
        else:
            tokens = {token: int(i) for token, i in known.items()}
        return tokens | {t["content"]: int(t["id"]) for t in tokenizer.get("added_tokens") or []}
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise ValueError("no vocabulary of token -> id in it") from error


def tokenizer_sha256(tokenizer: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """Return the hash of a tokenizer.json and the settings around it.

    Padding and truncation are left out: they are what the last call left behind. Merges have two
    spellings ("a b" and ["a", "b"]); both give the same hash.
    """
    kept = {key: value for key, value in tokenizer.items() if key not in ("padding", "truncation")}
    model = kept.get("model")
    if isinstance(model, dict) and isinstance(model.get("merges"), list):
        merges = [m.split(" ", 1) if isinstance(m, str) else m for m in model["merges"]]
        kept["model"] = model | {"merges": merges}
    felt = {key: value for key, value in settings.items() if key not in _UNFELT}
    return content_sha256([kept, felt])


def chat_template_sha256(settings: Mapping[str, Any], files: Mapping[str, str]) -> str:
    """Return the hash of the chat templates (name -> text; `files` win), empty without any.

    A single template, the usual case, has the hash of its text.
    """
    configured = settings.get("chat_template")
    templates = dict(files)
    if isinstance(configured, str):
        templates.setdefault("default", configured)
    elif isinstance(configured, list):
        named = [t for t in configured if isinstance(t, dict)]
        templates = {
            t["name"]: t["template"]
            for t in named
            if isinstance(t.get("name"), str) and isinstance(t.get("template"), str)
        } | templates
    if not templates:
        return ""
    if templates.keys() == {"default"}:
        text = templates["default"].encode(errors="surrogatepass")
        return hashlib.sha256(text).hexdigest()
    return content_sha256(templates)
