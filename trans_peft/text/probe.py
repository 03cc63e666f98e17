"""Check that an uploaded tokenizer and its chat templates are safe to use.

Ingestion calls `tokenizer_problems` in a child process with limits (`trans_peft.isolation`), which
stops endless loops and rules that multiply text. Answers are decoded in the main process. The check
therefore also limits the length of tokens and the growth of text in the decoder.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from trans_peft.domain.bounds import MAX_DECODER_GROWTH, MAX_TOKEN_CHARACTERS
from trans_peft.errors import listed
from trans_peft.isolation import is_memory_limit_error
from trans_peft.text.chat import render_prompts, template_problems

__all__ = ["tokenizer_problems"]

_PROBE = (
    "The quick brown fox doesn't jump over 13 lazy dogs; it costs $4.50 (or 1,234.5e-6 €).\n"
    "Ein Fuß über der Straße. Съешь ещё этих мягких французских булок. いろはにほへと 视频会议\n"
    "نص حكيم له سر قاطع · דג סקרן שט בים · ऋषियों को सताने वाले दुष्ट 🤖👍🏽 e\u0301 \u00a0 ﬁ ½\n"
    'def f(x: int = 0x1F) -> str:\n\tif not x % 2:\n        return f"{x:>8}"\n    # ok\n'
)
_LONG = ("a" * 20_000, " " * 20_000, "1" * 20_000, "é" * 20_000, "ab " * 7_000, _PROBE * 60)
_SYSTEM = {"role": "system", "content": "Be short."}
_USER = {"role": "user", "content": _PROBE}
_ASSISTANT = {"role": "assistant", "content": "4"}
_CHATS = (
    [_USER],
    [_SYSTEM, _USER],
    [_SYSTEM, _USER, _ASSISTANT],
    [_USER, _ASSISTANT] * 20 + [_USER],
    [{"role": "user", "content": "x" * 100_000}],
)


def tokenizer_problems(tokenizer: Any) -> list[str]:
    """Return the reasons why a loaded tokenizer cannot be used; empty if it can.

    Encodes and decodes probe texts, renders each chat template, and checks the rules of the
    decoder. A template that raises an error for a conversation is accepted, because many templates
    do not support system messages.

    Raises MemoryError if the tokenizer exhausts the memory.
    """
    problems = [
        *_length_problems(tokenizer),
        *_decoder_problems(tokenizer),
        *_sampling_problems(tokenizer),
    ]
    if problems:
        return problems
    try:
        for text in (_PROBE, *_LONG):
            tokenizer.decode(tokenizer(text)["input_ids"])
    except BaseException as error:  # a Rust panic in tokenizers is not an Exception
        if is_memory_limit_error(error):
            raise MemoryError(str(error)) from error
        return [f"the tokenizer fails on a probe text: {type(error).__name__}: {str(error)[:300]}"]
    for name, template in _templates(tokenizer).items():
        found = template_problems(template)
        problems += [f"the chat template {name}: {problem}" for problem in found]
        for prompt in (True, False) if not found else ():
            render_prompts(
                template,
                _CHATS,
                special_tokens=tokenizer.special_tokens_map,
                add_generation_prompt=prompt,
            )
    return problems


def _sampling_problems(tokenizer: Any) -> list[str]:
    """Return the settings by which a text is tokenized differently each time."""
    model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    dropout = getattr(model, "dropout", None)
    settings = getattr(tokenizer, "sp_model_kwargs", None) or {}
    problems = []
    if dropout:
        problems.append(
            f"tokenizer.json: model.dropout is {dropout:g}, which tokenizes a text differently "
            "each time; set it to null"
        )
    if settings.get("enable_sampling"):
        problems.append(
            "tokenizer_config.json: sp_model_kwargs.enable_sampling tokenizes a text differently "
            "each time; remove it"
        )
    return problems


def _templates(tokenizer: Any) -> dict[str, str]:
    configured = tokenizer.chat_template
    if isinstance(configured, str):
        return {"default": configured}
    return {str(name): text for name, text in (configured or {}).items() if isinstance(text, str)}


def _length_problems(tokenizer: Any) -> Iterator[str]:
    long = [
        f"{token[:20]!r}... has {len(token)}"
        for token in tokenizer.get_vocab()
        if len(token) > MAX_TOKEN_CHARACTERS
    ]
    if long:
        yield f"tokens of more than {MAX_TOKEN_CHARACTERS} characters: {listed(long)}"


def _decoder_problems(tokenizer: Any) -> Iterator[str]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return
    growth = 1.0
    for rule in _rules(json.loads(backend.to_str()).get("decoder")):
        if rule.get("type") != "Replace":
            continue
        pattern = rule.get("pattern")
        text = pattern.get("String") if isinstance(pattern, Mapping) else None
        if not text:
            yield (
                "its decoder has a Replace rule with a regular expression or an empty pattern; only"
                " a string that is not empty is allowed"
            )
        else:
            growth *= max(1.0, len(rule.get("content", "")) / len(text))
    if growth > MAX_DECODER_GROWTH:
        yield (
            f"its decoder can make text {growth:g} times longer; at most {MAX_DECODER_GROWTH} times"
            " is allowed"
        )


def _rules(value: Any) -> Iterator[Mapping[str, Any]]:
    """Yield a rule and all rules nested in it, in any order."""
    pending = [value]
    while pending:
        rule = pending.pop()
        if isinstance(rule, Mapping):
            yield rule
            pending += rule.values()
        elif isinstance(rule, list):
            pending += rule
