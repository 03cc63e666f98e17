"""Find fields of a row that are neither its prompt and answer nor metadata.

Columns such as `id`, `source` or `split` are metadata and are ignored. A field that other formats
use to build a prompt or to weight a loss would change the result if it were read, so a row with
such a field is refused:

- TRL, transformers and OpenAI: `tools`, `functions`, `chat_template_kwargs`, `images`, `weight`,
  `chosen` and `rejected`, `completion_mask`, `input_ids`, ...
- LLaMA-Factory, Dolly and Axolotl: `system`, `history`, `context`, ...

Two exceptions keep real data sets readable: a field whose value is empty, and a field whose text is
contained in the prompt or answer (`prompt` beside `messages`, `instruction` beside the `prompt`
that was built from it).
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from trans_peft.domain.excerpts import excerpt

__all__ = ["OWN_FIELDS", "unsupported_fields"]

OWN_FIELDS = frozenset({"choices", "id", "reference"})
"""Fields that a row of any shape may have beside its prompt and answer."""

_NOT_SUPPORTED = frozenset(
    [
        # more messages, or a rule for the model
        "system", "systemprompt", "systemmessage", "systeminstruction", "systeminstructions",
        "sys", "sysprompt", "sysmsg", "developer", "developerprompt", "developermessage", "history",
        "chathistory", "conversationhistory", "conversation", "conversations", "dialog",
        "dialogue",
        # what a chat template reads beside the messages (`tools` is read beside `messages`)
        "tool", "tools", "toolcalls", "toolcall", "toolchoice", "toolresults", "toolresponses",
        "availabletools", "paralleltoolcalls", "functions", "function", "functioncalls",
        "functioncall", "documents", "chattemplate", "chattemplatekwargs", "templatekwargs",
        "prompttemplate", "addgenerationprompt", "continuefinalmessage", "enablethinking",
        "thinking", "reasoningcontent", "reasoningeffort", "responseformat", "responseschema",
        # more than text
        "image", "images", "imagepath", "imagepaths", "imageurl", "imageurls",
        "video", "videos", "audio", "audios", "pixelvalues",
        # text around the prompt
        "shots", "fewshot", "fewshots", "fewshotexamples", "demonstrations", "exemplars", "prefix",
        "suffix", "promptprefix", "promptsuffix",
        # weights and masks of the loss
        "weight", "weights", "sampleweight", "sampleweights", "exampleweight", "lossweight",
        "lossweights", "lossscale", "advantage", "advantages", "train", "trainonprompt",
        "trainoninput", "trainoninputs", "mask", "masks", "lossmask", "labelmask", "promptmask",
        "completionmask", "assistantmask", "assistantmasks",
        # token ids instead of text
        "inputids", "attentionmask", "tokentypeids", "positionids", "labelids", "tokenids",
        "promptids", "completionids",
        # preferences
        "chosen", "rejected", "preferred", "dispreferred", "completions", "stepwiselabels",
    ]
)  # fmt: skip
_TEXT_OF_OTHER_FORMATS = frozenset(
    [
        "prompt", "prompts", "completion", "messages", "instruction", "instructions", "input",
        "inputs", "output", "outputs", "response", "query", "question", "problem", "context",
        "contexts", "passage", "background", "preamble", "persona", "article", "document",
        "hint", "hints", "options", "rules", "guidelines", "examples", "turns",
    ]
)  # fmt: skip
_TEXT_PARTS = re.compile(
    "^sys?tem|fewshot|prefill|preprompt|promptprefix|responseprefix|assistantprefix|history"
    "|previousturn|multiturn|tooldef|toolcall|toolresult|chattemplate|rejected|chosen|functions"
)
"""Fields with these parts in their names are not supported, unless their values are numbers."""
_WEIGHT_PARTS = re.compile(
    "(completion|loss|token|row)weight|ismasked|(loss|completion|prompt)mask|trainon"
)
_SEPARATORS = re.compile(r"[\W_]+")


def unsupported_fields(
    row: Mapping[str, Any], used: frozenset[str], text: str | None
) -> Iterator[str]:
    """Yield a reason for each field that would change the prompt or the loss if it were read.

    `used` are the fields that are read. `text` is the prompt and the answer. It is None for a raw
    row of a public data set, because templates ignore columns on purpose.
    """
    for name, value in row.items():
        if name in used or _is_empty(value):
            continue
        plain, shown = _SEPARATORS.sub("", name).casefold(), excerpt(name, 60)
        check = _BY_VALUE.get(plain)
        if (
            plain in _NOT_SUPPORTED
            or (check is not None and check(value))
            or _has_unsupported_part(plain, value)
        ):
            yield f"the field {shown} is not supported: it could change the prompt or the loss"
        elif text is not None and plain in _TEXT_OF_OTHER_FORMATS and not _within(value, text):
            yield f"the field {shown} is not read, and its text is not in the prompt or answer"


def _has_unsupported_part(plain: str, value: Any) -> bool:
    if _WEIGHT_PARTS.search(plain):
        return True
    return not isinstance(value, int | float) and _TEXT_PARTS.search(plain) is not None


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, (str, Sequence, Mapping)) and not value)


def _within(value: Any, text: str) -> bool:
    """Return whether all texts of a value occur in `text`."""
    if isinstance(value, str):
        return value.strip() in text
    if isinstance(value, Mapping):
        value = [item for key, item in value.items() if key != "role"]
    if isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray)):
        return all(_within(item, text) for item in value)
    return not isinstance(value, (bytes, bytearray))  # numbers are not text


def _is_preference(value: Any) -> bool:
    """Return whether a `label` has TRL's meaning: true for a desirable completion, else false."""
    return isinstance(value, bool) or (isinstance(value, list) and bool(value))


def _is_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, (bool, int, float)) for item in value)


_BY_VALUE: Mapping[str, Callable[[Any], bool]] = {
    "label": _is_preference,
    "labels": _is_numbers,
}
"""Fields that are unsupported only with certain values."""
