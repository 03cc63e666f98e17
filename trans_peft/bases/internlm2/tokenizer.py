"""InternLM2's tokenizer as transformers' own fast tokenizer: tokenizer.json and its settings.

Follows the release's tokenization_internlm2_fast.py, read for facts and never run. Its class is
transformers' fast tokenizer but for two things, and both are written down here instead: defaults
for what the settings leave out, and the start and end tokens, which it puts around a text by its
settings, whatever tokenizer.json says. (transformers does it by tokenizer.json alone.)
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
    """Return why the tokenizer of a folder with these files cannot be had without its code."""
    problems = []
    if "tokenizer.json" not in names:
        problems.append(
            "tokenizer.json: missing; only the release's own InternLM2TokenizerFast makes one of "
            "tokenizer.model: call its save_pretrained once, on a machine where you let that code "
            "run, and put the tokenizer.json into the folder"
        )
    if "auto_map" in settings and settings.get("tokenizer_class") not in _CLASSES:
        problems.append(
            "tokenizer_config.json: asks for remote code of which nothing is known "
            f"({settings.get('tokenizer_class')!r}); known: {', '.join(_CLASSES)}"
        )
    return problems


def llama_tokenizer(
    tokenizer: Mapping[str, Any], settings: Mapping[str, Any], special: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return tokenizer.json and tokenizer_config.json for transformers' fast tokenizer.

    `special` is special_tokens_map.json. Both stay as they are where the settings name none of the
    release's classes. Raises ValueError where a token that belongs around a text has no id.
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
        raise ValueError(f"no id for {', '.join(unknown)}, which belong around a text")
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
