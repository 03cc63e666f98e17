"""Render conversations with a chat template, independent of the date.

A chat template is a Jinja program that comes with a base or an adapter, so it is untrusted. Only
`render_prompts` renders templates, in transformers' immutable Jinja sandbox. Callers run it in a
child process with limits.

A prompt must depend on its template and messages alone, because the key of an evaluation covers
nothing else. Templates of Llama 3, Mistral, SmolLM3 and gpt-oss write the current date into the
system prompt with `strftime_now`. `pinned` puts a macro of that name in front of such a template.
The macro formats `PINNED_DATE` instead. Any server that loads the pinned template renders the same
prompts. Templates that use Jinja's `random` filter or `lipsum` function are refused.
"""

import inspect
import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

from trans_peft.isolation import is_memory_limit_error
from trans_peft.text.stable_jinja import stabilize

__all__ = [
    "CHAT_IMPORTS",
    "MAX_TEMPLATE_CHARACTERS",
    "PINNED_DATE",
    "pinned",
    "render_prompts",
    "template_of",
    "template_problems",
    "turn_end",
]

CHAT_IMPORTS = ("jinja2.sandbox", "transformers.utils.chat_template_utils")
"""What `render_prompts` imports, for `call_isolated`."""

MAX_TEMPLATE_CHARACTERS = 1 << 20

PINNED_DATE = datetime(2024, 7, 26)
"""The date (00:00 UTC) that `strftime_now` formats in pinned templates. It is the default date of
Llama 3.1's template."""

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
    """Return a template with `strftime_now` redefined to format `PINNED_DATE`.

    A template that does not contain `strftime_now`, or that is pinned already, is returned
    unchanged.
    """
    if "strftime_now" not in template or template.startswith(_PIN):
        return template
    return _PIN + template


def template_of(tokenizer: Any) -> str | None:
    """Return the pinned chat template of a tokenizer, or None if it has none."""
    if not tokenizer.chat_template:
        return None
    try:
        return pinned(tokenizer.get_chat_template())
    except ValueError:  # several named templates without a default
        return None


def template_problems(template: str) -> list[str]:
    """Compile a template, and return the reasons why it cannot be used; empty if it can."""
    from jinja2 import TemplateError, nodes

    if len(template) > MAX_TEMPLATE_CHARACTERS:
        return [f"it has {len(template)} characters; at most {MAX_TEMPLATE_CHARACTERS} are allowed"]
    try:
        tree = _compiled(pinned(template)).environment.parse(template)
    except (TemplateError, RecursionError, ValueError, TypeError, ArithmeticError) as error:
        return [f"it does not compile: {_error_text(error)}"]
    random = {
        f"`{name}`"
        for name in [
            *(node.name for node in tree.find_all(nodes.Filter)),
            *(node.value for node in tree.find_all(nodes.Const)),  # as in map("random")
            *(node.name for node in tree.find_all(nodes.Name)),
        ]
        if name in ("random", "lipsum")
    }
    return [f"{name} renders different text each time" for name in sorted(random)]


def render_prompts(
    template: str,
    conversations: Sequence[Sequence[Mapping[str, Any]]],
    *,
    special_tokens: Mapping[str, Any],
    add_generation_prompt: bool,
    tools: Sequence[str] = (),
) -> tuple[list[str], list[str]]:
    """Render each conversation and return (texts, problems), each as long as `conversations`.

    The texts equal those of `apply_chat_template(tokenize=False)`, with a fixed date. For each
    conversation, either its text or its problem is empty. Arguments and results can be pickled, so
    that a child process can make this call.

    Args:
        template: the chat template, pinned or not.
        conversations: lists of messages with `role` and `content`.
        special_tokens: `special_tokens_map` of the tokenizer; templates use its keys as variables.
        add_generation_prompt: whether the text ends with the header of the assistant's answer.
        tools: for each conversation the JSON text of its tools, or "". It is a problem if the
            template writes the same text without them.

    Raises MemoryError if a template exhausts the memory.
    """
    found = template_problems(template)
    if found:
        problem = f"the chat template cannot be used: {'; '.join(found)}"
        return [""] * len(conversations), [problem] * len(conversations)
    compiled = _compiled(pinned(template))
    texts, problems = [], []
    tools = tools or [""] * len(conversations)
    for conversation, offered in zip(conversations, tools, strict=True):
        problem = ""
        messages = [dict(message) for message in conversation]
        try:
            options = {**special_tokens, "add_generation_prompt": add_generation_prompt}
            text = _rendered(compiled, messages, offered, options)
            text.encode()
            if offered and text == _rendered(compiled, messages, "", options):
                raise ValueError("the row has tools, and the template does not write them")
            contents = "\n".join([offered, *(str(turn.get("content")) for turn in messages)])
            if set(_ADDRESS.findall(text)) - set(_ADDRESS.findall(template + contents)):
                raise ValueError("the prompt contains a memory address")
        except Exception as error:  # an untrusted template can raise any exception
            if is_memory_limit_error(error):
                raise MemoryError(str(error)) from error
            text, problem = "", f"the chat template failed: {_error_text(error)}"
        texts.append(text)
        problems.append(problem)
    return texts, problems


def _rendered(
    compiled: Any, messages: Sequence[Mapping[str, Any]], tools: str, options: Mapping[str, Any]
) -> str:
    offered = json.loads(tools) if tools else None
    return str(compiled.render(messages=messages, tools=offered, documents=None, **options))


def turn_end(
    tokenizer: Any, conversation: Sequence[Mapping[str, Any]], template: str | None = None
) -> int | None:
    """Return the id of the special token that ends the last turn of a conversation, or None.

    Chat models are trained to end an answer with this token (such as `<|im_end|>`). It is often not
    the end-of-text token of the tokenizer. By default, the chat template of the tokenizer is used.
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
    """Compile a template as transformers does, without random functions and memory addresses."""
    from transformers.utils import chat_template_utils

    compile_template = chat_template_utils._cached_compile_jinja_template
    environment = inspect.unwrap(compile_template)("").environment
    stabilize(environment)
    compiled = environment.from_string(template)
    environment.filters.pop("random", None)
    environment.globals.pop("lipsum", None)
    return compiled


def _error_text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:500]
