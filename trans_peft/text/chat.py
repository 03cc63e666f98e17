"""Chat templates: render many conversations with one template, the same way on every day.

A chat template is a Jinja program that comes with a base or an adapter, so it is untrusted text.
transformers renders it in Jinja's immutable sandbox; `render_prompts` is the only place in this
library that does so, which lets one caller bound it.

A prompt must be a function of its template and its messages alone, because nothing else is in an
evaluation's key. Templates of Llama 3, Mistral, SmolLM3 and gpt-oss write today's date into the
system prompt through `strftime_now`. `pinned` puts a macro of that name in front of such a
template, which formats `PINNED_DATE` instead. The result is a stock template, so a server that
loads it renders the same prompts. Jinja's `random` filter and `lipsum` function have no pinned
form: a template that uses one is refused.
"""

import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

from trans_peft.isolation import is_out_of_memory

__all__ = [
    "MAX_TEMPLATE_CHARACTERS",
    "PINNED_DATE",
    "pinned",
    "render_prompts",
    "template_of",
    "template_problems",
    "turn_end",
]

MAX_TEMPLATE_CHARACTERS = 1 << 20

PINNED_DATE = datetime(2024, 7, 26)
"""The date that every template sees (00:00, UTC): the one that Llama 3.1's own template falls back
to where a renderer has no clock."""

_FORMATS = {
    "%-d": "26", "%-m": "7", "%-H": "0", "%-I": "12", "%-M": "0", "%-S": "0", "%-j": "208",
    "%-y": "24", "%A": "Friday", "%a": "Fri", "%B": "July", "%b": "Jul", "%h": "Jul",
    "%C": "20", "%c": "Fri Jul 26 00:00:00 2024", "%D": "07/26/24", "%d": "26", "%e": "26",
    "%F": "2024-07-26", "%f": "000000", "%G": "2024", "%g": "24", "%H": "00", "%I": "12",
    "%j": "208", "%k": " 0", "%l": "12", "%M": "00", "%m": "07", "%n": "\\n", "%p": "AM",
    "%P": "am", "%R": "00:00", "%r": "12:00:00 AM", "%S": "00", "%s": "1721952000",
    "%T": "00:00:00", "%t": "\\t", "%U": "29", "%u": "5", "%V": "30", "%W": "30", "%w": "5",
    "%X": "00:00:00", "%x": "07/26/24", "%Y": "2024", "%y": "24", "%Z": "", "%z": "",
}  # fmt: skip
"""`PINNED_DATE` under each format of C's strftime in the C locale."""

_PIN = (
    "{# The date is fixed so that a prompt depends on its messages alone. #}"
    "{% macro strftime_now(format) %}{{ format"
    + "".join(f' | replace("{format_}", "{text}")' for format_, text in _FORMATS.items())
    + ' | replace("%%", "%") }}{% endmacro %}\n'
)

_PROBE = "an answer"
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+>")


def pinned(template: str) -> str:
    """Return a template that renders `PINNED_DATE` where the given one reads the clock.

    A template that does not mention `strftime_now` comes back as it is, and so does a pinned one.
    """
    if "strftime_now" not in template or template.startswith(_PIN):
        return template
    return _PIN + template


def template_of(tokenizer: Any) -> str | None:
    """Return the pinned template that a tokenizer renders a chat with; None if it has none."""
    if not tokenizer.chat_template:
        return None
    try:
        return pinned(tokenizer.get_chat_template())
    except ValueError:  # several named templates, and no default among them
        return None


def template_problems(template: str) -> list[str]:
    """Return why a template cannot be used; empty if it can. It is compiled, not rendered."""
    from jinja2 import TemplateError, nodes

    if len(template) > MAX_TEMPLATE_CHARACTERS:
        return [f"it has {len(template)} characters; at most {MAX_TEMPLATE_CHARACTERS} are allowed"]
    try:
        tree = _compiled(pinned(template)).environment.parse(template)
    except (TemplateError, RecursionError, ValueError, TypeError, ArithmeticError) as error:
        return [f"it does not compile: {_told(error)}"]
    random = {
        f"`{name}`"
        for name in [
            *(node.name for node in tree.find_all(nodes.Filter)),
            *(node.value for node in tree.find_all(nodes.Const)),  # as in map("random")
            *(node.name for node in tree.find_all(nodes.Name)),
        ]
        if name in ("random", "lipsum")
    }
    return [f"{name} gives other text each time it is rendered" for name in sorted(random)]


def render_prompts(
    template: str,
    conversations: Sequence[Sequence[Mapping[str, Any]]],
    *,
    special_tokens: Mapping[str, Any],
    add_generation_prompt: bool,
) -> tuple[list[str], list[str]]:
    """Render each conversation and return (texts, problems), each as long as `conversations`.

    A conversation is a list of messages with `role` and `content`. `special_tokens` are the
    tokenizer's (`special_tokens_map`), which templates use as variables. The texts are those of
    `apply_chat_template(tokenize=False)` with the clock pinned. A problem is empty where there is
    none, and the text is empty where there is one. Arguments and results are plain data: the call
    can be made in a child process.
    """
    found = template_problems(template)
    if found:
        told = f"the chat template cannot be used: {'; '.join(found)}"
        return [""] * len(conversations), [told] * len(conversations)
    compiled = _compiled(pinned(template))
    texts, problems = [], []
    for conversation in conversations:
        problem = ""
        messages = [dict(message) for message in conversation]
        try:
            text = compiled.render(
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **special_tokens,
            )
            text.encode()
            contents = "\n".join(str(message.get("content")) for message in messages)
            if set(_ADDRESS.findall(text)) - set(_ADDRESS.findall(template + contents)):
                raise ValueError("it writes a memory address into the prompt")
        except Exception as error:  # whatever an untrusted program raises
            if is_out_of_memory(error):
                raise MemoryError(str(error)) from error
            text, problem = "", f"the chat template failed: {_told(error)}"
        texts.append(text)
        problems.append(problem)
    return texts, problems


def turn_end(
    tokenizer: Any, conversation: Sequence[Mapping[str, Any]], template: str | None = None
) -> int | None:
    """Return the special token by which a template ends the last turn of a conversation.

    In a chat, a model is trained to end its answer with it (such as `<|im_end|>`), although the
    tokenizer's end-of-text token is often another one. None where no special token follows.
    `template`: the tokenizer's own where it is None.
    """
    template = template_of(tokenizer) if template is None else template
    if template is None:
        return None
    probe = [*conversation[:-1], {**conversation[-1], "content": _PROBE}]
    (text,), _ = render_prompts(
        template,
        [probe],
        special_tokens=tokenizer.special_tokens_map,
        add_generation_prompt=False,
    )
    _, found, rest = text.rpartition(_PROBE)
    ids = tokenizer(rest.lstrip(), add_special_tokens=False)["input_ids"] if found else []
    return ids[0] if ids and ids[0] in tokenizer.added_tokens_decoder else None


@lru_cache(maxsize=16)
def _compiled(template: str) -> Any:
    """Compile as transformers does, without what gives other text at each call."""
    from transformers.utils import chat_template_utils

    compiled = chat_template_utils._cached_compile_jinja_template(template)
    compiled.environment.filters.pop("random", None)
    compiled.environment.globals.pop("lipsum", None)
    return compiled


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:500]
