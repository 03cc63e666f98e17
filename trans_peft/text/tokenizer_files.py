"""Hash the files of a tokenizer, and write a copy that has only the hashed content.

The hashes cover:

- tokenizer.json, without the padding and truncation of the last call;
- the settings in tokenizer_config.json and, with lower priority, special_tokens_map.json;
- the chat templates in files and, with lower priority, in the settings;
- config.json (in `trans_peft.bases`): transformers chooses the tokenizer class by the model type.

`AutoTokenizer` also reads vocab.json, merges.txt, added_tokens.json and *.model files if they
exist, and its result depends on the folder's name and on the version of transformers that saved the
files. `write_hashed_copy` therefore writes a folder with the hashed content only, to load the
tokenizer from.
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
    "tokenizer_sha256",
    "vocabulary",
    "write_hashed_copy",
]

TOKENIZER_NAME = "tokenizer.json"
SETTINGS_NAME = "tokenizer_config.json"
SPECIAL_NAME = "special_tokens_map.json"
_CONFIG_NAME = "config.json"
_TEMPLATE_NAME = "chat_template.jinja"
_MORE_TEMPLATES = "additional_chat_templates"

# Settings without an effect on results, and the templates, which have a hash of their own. All
# other settings are hashed.
_UNHASHED_SETTINGS = frozenset({
    "_commit_hash", "backend", "chat_template", "is_local", "local_files_only", "name_or_path",
    "processor_class", "tokenizer_file", "transformers_version",
})  # fmt: skip
_PROVENANCE_FIELDS = frozenset({"_commit_hash", "_name_or_path", "transformers_version"})
"""Fields of config.json that state where a model comes from. `write_hashed_copy` removes them,
because they affect the tokenizer class that transformers chooses."""


def vocabulary(tokenizer: Mapping[str, Any]) -> dict[str, int]:
    """Return token -> id of a tokenizer.json, including added tokens. Raises ValueError."""
    try:
        known = tokenizer["model"]["vocab"]
        if isinstance(known, list):  # Unigram: [token, score] in the order of the ids
            tokens = {token: i for i, (token, _) in enumerate(known)}
        else:
            tokens = {token: int(i) for token, i in known.items()}
        return tokens | {t["content"]: int(t["id"]) for t in tokenizer.get("added_tokens") or []}
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise ValueError("no vocabulary: model.vocab must map each token to its id") from error


def tokenizer_sha256(tokenizer: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """Return the hash of a tokenizer.json and its settings.

    Padding and truncation are not hashed, because every call of the tokenizer sets them. Merges are
    written as "a b" or ["a", "b"]; both forms have the same hash.
    """
    kept = _without_last_call(tokenizer)
    model = kept.get("model")
    if isinstance(model, dict) and isinstance(model.get("merges"), list):
        merges = [m.split(" ", 1) if isinstance(m, str) else m for m in model["merges"]]
        kept["model"] = model | {"merges": merges}
    hashed = {key: value for key, value in settings.items() if key not in _UNHASHED_SETTINGS}
    return content_sha256([kept, hashed])


def chat_template_sha256(settings: Mapping[str, Any], files: Mapping[str, str]) -> str:
    """Return the hash of the chat templates, or "" if there are none.

    `files` maps names to texts and has priority over the settings. The hash of a single template
    is the SHA-256 of its text.
    """
    templates = _templates(settings, files)
    if not templates:
        return ""
    if templates.keys() == {"default"}:
        text = templates["default"].encode(errors="surrogatepass")
        return hashlib.sha256(text).hexdigest()
    return content_sha256(templates)


def settings_of(special: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Merge special_tokens_map.json with tokenizer_config.json, which has priority."""
    return {**special, **settings}


def setting_conflicts(special: Mapping[str, Any], settings: Mapping[str, Any]) -> list[str]:
    """Return a problem for each special token that differs between the two files.

    If tokenizer_config.json has no `added_tokens_decoder`, transformers gives priority to
    special_tokens_map.json, which is the opposite of `settings_of`.
    """
    if "added_tokens_decoder" in settings:
        return []
    return [
        f"{SPECIAL_NAME} and {SETTINGS_NAME} have different values of {key}: "
        f"{_content(special[key])!r} and {_content(settings[key])!r}"
        for key in sorted(special.keys() & settings.keys())
        if _content(special[key]) != _content(settings[key])
    ]


def write_hashed_copy(folder: Path, target: Path) -> None:
    """Write a copy of a tokenizer to `target` that has only the hashed content.

    `folder` is a Hugging Face folder; config.json may be missing. Raises OSError if there is no
    tokenizer.json, and ValueError, with all problems, if a file is invalid.
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
        if key not in _UNHASHED_SETTINGS and not key.endswith(("_file", "_files"))
    }
    if templates.keys() == {"default"}:
        kept["chat_template"] = templates["default"]
    elif templates:
        kept["chat_template"] = [{"name": n, "template": t} for n, t in templates.items()]
    written = {TOKENIZER_NAME: _without_last_call(read[TOKENIZER_NAME]), SETTINGS_NAME: kept}
    if _CONFIG_NAME in read:
        config = read[_CONFIG_NAME].items()
        written[_CONFIG_NAME] = {
            key: value for key, value in config if key not in _PROVENANCE_FIELDS
        }
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
    """Return a tokenizer.json without padding and truncation, the settings of the last call."""
    return {key: value for key, value in tokenizer.items() if key not in ("padding", "truncation")}


def _content(token: Any) -> Any:
    """Return the text of a special token, or the texts of a list of special tokens."""
    if isinstance(token, list):
        return [_text(item) for item in token]
    return _text(token)


def _text(token: Any) -> Any:
    return token["content"] if isinstance(token, Mapping) and "content" in token else token


def _templates(settings: Mapping[str, Any], files: Mapping[str, str]) -> dict[str, str]:
    """Return the chat templates by name. Files have priority over the settings."""
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
