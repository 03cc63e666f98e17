"""Convert InternLM2's tokenizer to a fast tokenizer of transformers.

Follows tokenization_internlm2_fast.py of the release, which was read and is never run. Its class
differs from transformers' in two points, and the conversion writes both into the files: defaults of
missing settings, and the start and end tokens around a text, which its settings control.
(transformers takes them from tokenizer.json alone.)
"""

from collections.abc import Container, Mapping
from typing import Any

from trans_peft.text.tokenizer_files import vocabulary

__all__ = ["llama_tokenizer", "tokenizer_problems"]

_CLASSES = ("InternLM2Tokenizer", "InternLM2TokenizerFast")
_SWITCHES = {"add_bos_token": True, "add_eos_token": False}
_DEFAULTS = {
    "bos_token": "<s>",
    "clean_up_tokenization_spaces": False,
    "eos_token": "</s>",
    "pad_token": "</s>",
    "unk_token": "<unk>",
}


def tokenizer_problems(names: Container[str], settings: Mapping[str, Any]) -> list[str]:
    """Return why the tokenizer in a folder with these files cannot be converted."""
    problems = []
    if "tokenizer.json" not in names:
        problems.append(
            "tokenizer.json: missing; only the release's InternLM2TokenizerFast can create it from "
            "tokenizer.model: run its save_pretrained once, on a machine where that code may run, "
            "and add tokenizer.json to the folder"
        )
    if "auto_map" in settings and settings.get("tokenizer_class") not in _CLASSES:
        problems.append(
            "tokenizer_config.json: needs remote code of an unknown class "
            f"({settings.get('tokenizer_class')!r}); expected {' or '.join(_CLASSES)}"
        )
    return problems


def llama_tokenizer(
    tokenizer: Mapping[str, Any], settings: Mapping[str, Any], special: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return tokenizer.json and tokenizer_config.json for transformers' fast tokenizer.

    `special` is special_tokens_map.json. Both files stay unchanged if the settings name another
    class than the release's. Raises ValueError if a start or end token has no id.
    """
    if settings.get("tokenizer_class") not in _CLASSES:
        return dict(tokenizer), dict(settings)
    defaults = {name: value for name, value in _DEFAULTS.items() if name not in special}
    known = defaults | {n: v for n, v in settings.items() if n != "auto_map" and n not in _SWITCHES}
    switches = {name: settings.get(name, default) for name, default in _SWITCHES.items()}
    tokens = {
        name: token["content"] if isinstance(token, dict) else token
        for name, token in {**special, **known}.items()
        if name in ("bos_token", "eos_token")
    }
    start = [tokens["bos_token"]] if switches["add_bos_token"] else []
    end = [tokens["eos_token"]] if switches["add_eos_token"] else []
    ids = vocabulary(tokenizer)
    if unknown := [repr(token) for token in (*start, *end) if token not in ids]:
        raise ValueError(f"no id for the start or end token {', '.join(unknown)}")
    first, second = (
        [
            *({"SpecialToken": {"id": token, "type_id": place}} for token in start),
            {"Sequence": {"id": text, "type_id": place}},
            *({"SpecialToken": {"id": token, "type_id": place}} for token in end),
        ]
        for place, text in enumerate("AB")
    )
    around = {
        "type": "TemplateProcessing",
        "single": first,
        "pair": first + second,
        "special_tokens": {
            token: {"id": token, "ids": [ids[token]], "tokens": [token]} for token in (*start, *end)
        },
    }
    return (
        dict(tokenizer) | {"post_processor": around},
        known | {"tokenizer_class": "PreTrainedTokenizerFast"},
    )
