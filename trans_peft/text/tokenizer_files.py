"""A tokenizer's files: what the fingerprint of a base covers of them, and how they are loaded.

A tokenizer is made of tokenizer.json, of the settings around it (tokenizer_config.json over the
older special_tokens_map.json), of its chat templates (files over settings) and of the model type in
config.json, by which transformers chooses a class. `AutoTokenizer` reads more than that where it
lies in the folder (vocab.json, merges.txt, added_tokens.json, other *.model files), and decides by
the folder's name and by the version that saved it. `stage` therefore writes a folder of those parts
alone that the hashes cover, and the tokenizer is loaded from there.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trans_peft.domain.identity import content_sha256
from trans_peft.domain.untrusted_json import parse_json

__all__ = [
    "SETTINGS_NAME",
    "SPECIAL_NAME",
    "TOKENIZER_NAME",
    "chat_template_sha256",
    "setting_conflicts",
    "settings_of",
    "stage",
    "tokenizer_sha256",
    "vocabulary",
]

TOKENIZER_NAME = "tokenizer.json"
SETTINGS_NAME = "tokenizer_config.json"
SPECIAL_NAME = "special_tokens_map.json"
_CONFIG_NAME = "config.json"
_TEMPLATE_NAME = "chat_template.jinja"
_MORE_TEMPLATES = "additional_chat_templates"

# Names, versions, and what has a hash of its own. Anything not listed here counts.
_UNFELT = frozenset({
    "_commit_hash", "backend", "chat_template", "is_local", "local_files_only", "name_or_path",
    "processor_class", "tokenizer_file", "transformers_version",
})  # fmt: skip
_ORIGIN = frozenset({"_commit_hash", "_name_or_path", "transformers_version"})
"""Of config.json: where a model came from, by which transformers would choose too."""


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
    kept = _without_last_call(tokenizer)
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
    templates = _templates(settings, files)
    if not templates:
        return ""
    if templates.keys() == {"default"}:
        text = templates["default"].encode(errors="surrogatepass")
        return hashlib.sha256(text).hexdigest()
    return content_sha256(templates)


def settings_of(special: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that special_tokens_map.json and tokenizer_config.json make together."""
    return {**special, **settings}


def setting_conflicts(special: Mapping[str, Any], settings: Mapping[str, Any]) -> list[str]:
    """Return the special tokens about which the two files disagree.

    transformers lets tokenizer_config.json win where it has an `added_tokens_decoder`, and
    special_tokens_map.json otherwise; only the former is what `settings_of` does.
    """
    if "added_tokens_decoder" in settings:
        return []
    return [
        f"{SPECIAL_NAME} and {SETTINGS_NAME} disagree about {key}: "
        f"{_content(special[key])!r} and {_content(settings[key])!r}"
        for key in sorted(special.keys() & settings.keys())
        if _content(special[key]) != _content(settings[key])
    ]


def stage(folder: Path, target: Path) -> None:
    """Write into `target` a tokenizer that consists of nothing but what the hashes cover.

    Reads a Hugging Face folder; config.json may be missing. Raises OSError for a folder without
    tokenizer.json, ValueError, with everything that is wrong, for files that make no tokenizer.
    """
    read = {
        name: _read(folder / name)
        for name in (TOKENIZER_NAME, SETTINGS_NAME, SPECIAL_NAME, _CONFIG_NAME)
        if name == TOKENIZER_NAME or (folder / name).is_file()
    }
    special, own = read.get(SPECIAL_NAME, {}), read.get(SETTINGS_NAME, {})
    if conflicts := setting_conflicts(special, own):
        raise ValueError("; ".join(conflicts))
    settings = settings_of(special, own)
    files = {
        path.stem: path.read_text(encoding="utf-8")
        for path in sorted((folder / _MORE_TEMPLATES).glob("*.jinja"))
        if path.is_file()
    }
    if (folder / _TEMPLATE_NAME).is_file():
        files["default"] = (folder / _TEMPLATE_NAME).read_text(encoding="utf-8")
    templates = _templates(settings, files)
    kept = {
        key: value
        for key, value in settings.items()
        if key not in _UNFELT and not key.endswith(("_file", "_files"))
    }
    if templates.keys() == {"default"}:
        kept["chat_template"] = templates["default"]
    elif templates:
        kept["chat_template"] = [{"name": n, "template": t} for n, t in templates.items()]
    written = {TOKENIZER_NAME: _without_last_call(read[TOKENIZER_NAME]), SETTINGS_NAME: kept}
    if _CONFIG_NAME in read:
        config = read[_CONFIG_NAME].items()
        written[_CONFIG_NAME] = {key: value for key, value in config if key not in _ORIGIN}
    for name, value in written.items():
        (target / name).write_text(json.dumps(value), encoding="utf-8")


def _read(path: Path) -> dict[str, Any]:
    if path.exists() and not path.is_file():  # a named pipe would block
        raise ValueError(f"{path.name} is not a regular file")
    try:
        value = parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path.name} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path.name} is not a JSON object")
    return value


def _without_last_call(tokenizer: Mapping[str, Any]) -> dict[str, Any]:
    """Return a tokenizer.json without padding and truncation: settings of the last call."""
    return {key: value for key, value in tokenizer.items() if key not in ("padding", "truncation")}


def _content(token: Any) -> Any:
    """Return a special token's text, or those of a list of them."""
    if isinstance(token, list):
        return [_text(item) for item in token]
    return _text(token)


def _text(token: Any) -> Any:
    return token["content"] if isinstance(token, Mapping) and "content" in token else token


def _templates(settings: Mapping[str, Any], files: Mapping[str, str]) -> dict[str, str]:
    """Return the chat templates by name: the files', and those among the settings besides."""
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
    return templates
