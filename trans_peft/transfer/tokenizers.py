"""Compare the tokenizers of two bases.

Both tokenizers are loaded as for an evaluation, in a child process with limits, and encode and
decode a probe corpus. Comparing files is not enough, because `tokenizer_class` and other settings
also affect the tokens.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from trans_peft.errors import listed
from trans_peft.isolation import CallLimits, call_isolated
from trans_peft.text.answers import decode_ids
from trans_peft.text.chat import CHAT_IMPORTS, render_prompts, template_of
from trans_peft.text.tokenizer import TOKENIZER_IMPORTS, load_tokenizer

__all__ = ["PROBE_CORPUS", "compare_tokenizers"]

PROBE_CORPUS = (
    "The quick brown fox doesn't jump over 13 lazy dogs; it costs $4.50 (or 1,234.5e-6 €).",
    "Ein Fuß über der Straße, naïve façade, Ærøskøbing, İstanbul, ångström.",
    "Съешь ещё этих мягких французских булок. Ξεσκεπάζω την ψυχοφθόρα βδελυγμία.",
    "视频会议将于明天上午九点开始。いろはにほへと、テスト中です。 다람쥐 헌 쳇바퀴에 타고파.",
    "نص حكيم له سر قاطع وذو شأن عظيم · דג סקרן שט בים · ऋषियों को सताने वाले दुष्ट",
    'def f(x: int = 0x1F) -> str:\n\tif not x % 2:\n        return f"{x:>8}"\n    # ok\n',
    "for (int i = 0; i < n; ++i) { a[i] <<= 2; } /* C */\nSELECT * FROM t WHERE id IN (1, 2);\r\n",
    '{"key": [null, true, -1.5], "url": "https://example.org/a?b=c&d=%20"}   \n\n\n  end',
    "\\frac{a}{b} + \\sqrt[3]{x^2} = \\sum_{i=1}^{n} 🤖👍🏽 e\u0301 \u00a0 ﬁ ½ …",
    "123",
    " 2024-07-26 00:00:00 0 12 1234 12345678901234567890 007 ٣٤ ",
    "  leading,   inner\tand trailing  \n",
    "don't can't I'll WE'RE hyphen-ated snake_case camelCase <b>x</b> . , ! ? ' s",
)
"""Texts that both tokenizers encode: several scripts, code, white space and numbers."""

_MAX_SPECIAL_TOKENS = 256
_CHATS = (
    [{"role": "user", "content": "Hi, 123."}],
    [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "And?"},
    ],
    [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hi"}],
)
_SETTINGS = (
    "bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token",
    "extra_special_tokens", "split_special_tokens", "clean_up_tokenization_spaces", "add_bos_token",
    "add_eos_token", "add_prefix_space", "padding_side", "truncation_side", "model_max_length",
)  # fmt: skip
_LIMITS = CallLimits(cpu_s=300, wall_s=1800, memory_bytes=4 << 30)


def compare_tokenizers(
    old: Path, new: Path, template: str | None = None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return (mismatches, notes) about the tokenizers in two folders.

    Mismatches are differences that change the inputs or the end of answers: a token with another
    id, other ids or other decoded text for the probe corpus, other ids for chats, and another
    end-of-text token. Added tokens, and changed settings without such an effect, are notes.

    Args:
        old: folder of the old base's tokenizer.
        new: folder of the new base's tokenizer.
        template: chat template of the adapter; None: that of the old tokenizer.

    Raises:
        UnsupportedModelError: a folder has no valid tokenizer.
        LimitExceededError: the comparison exceeds a limit on time or memory.
    """
    mismatches, notes = call_isolated(
        _compare,
        Path(old),
        Path(new),
        template,
        limits=_LIMITS,
        subject=f"the tokenizers in {old} and {new}",
        imports=(*TOKENIZER_IMPORTS, *CHAT_IMPORTS),
    )
    return tuple(mismatches), tuple(notes)


def _compare(old: Path, new: Path, template: str | None) -> tuple[list[str], list[str]]:
    before, after = load_tokenizer(old), load_tokenizer(new)
    old_ids, new_ids = before.get_vocab(), after.get_vocab()
    mismatches, notes = [], []
    moved = [
        f"{token!r} was {number} and is {new_ids.get(token, 'missing')}"
        for token, number in sorted(old_ids.items(), key=lambda item: item[1])
        if new_ids.get(token) != number
    ]
    if moved:
        mismatches.append(f"{len(moved)} of {len(old_ids)} tokens have another id: {listed(moved)}")
    else:  # changed ids already explain other differences
        template = template_of(before) if template is None else template
        mismatches += list(_texts(before, after)) or list(_chats(before, after, template))
    if before.eos_token != after.eos_token:
        mismatches.append(
            f"the end-of-text token was {before.eos_token!r} and is {after.eos_token!r}"
        )
    added = sorted(set(new_ids) - set(old_ids), key=new_ids.__getitem__)
    if added:
        notes.append(f"tokens were added: {listed([repr(token) for token in added])}")
    changed = list(_changed_settings(before, after))
    if changed:
        notes.append(f"settings of the tokenizer changed: {', '.join(changed)}")
    parts = [] if mismatches else _changed_parts(before, after)
    if parts:
        notes.append(
            f"the tokenizer's {', '.join(parts)} changed; all {len(PROBE_CORPUS)} probe texts have "
            "the same tokens, but other texts may differ"
        )
    return mismatches, notes


def _texts(before: Any, after: Any) -> Iterator[str]:
    special = sorted(before.added_tokens_decoder.items())[:_MAX_SPECIAL_TOKENS]
    texts = [*PROBE_CORPUS, *(f"a{token}b {token} c" for _, token in special)]

    def differing(read: Callable[[Any, str], Any]) -> list[str]:
        pairs = ((text, read(before, text), read(after, text)) for text in texts)
        return [
            f"{t!r} was {_short(then)} and is {_short(now)}"
            for t, then, now in pairs
            if then != now
        ]

    alone = differing(lambda t, text: list(t(text, add_special_tokens=False)["input_ids"]))
    whole = differing(lambda t, text: list(t(text)["input_ids"]))
    found = alone or whole
    if found:
        yield (
            f"{len(found)} of {len(texts)} probe texts have other tokens"
            + ("" if alone else " when special tokens are added")
            + f": {listed(found, 1)}"
        )
        return
    decoded = differing(
        lambda t, text: decode_ids(t, t(text, add_special_tokens=False)["input_ids"])
    )
    if decoded:
        yield (
            f"the same tokens decode to other text, for {len(decoded)} probe texts:"
            f" {listed(decoded, 1)}"
        )


def _chats(before: Any, after: Any, template: str | None) -> Iterator[str]:
    """Compare the tokens of chats. Templates use the special tokens of each tokenizer."""
    if template is None:
        return

    def ids(tokenizer: Any) -> tuple[list[list[int]], list[str]]:
        texts, _ = render_prompts(
            template,
            _CHATS,
            special_tokens=tokenizer.special_tokens_map,
            add_generation_prompt=True,
        )
        return [list(row) for row in tokenizer(texts, add_special_tokens=False)["input_ids"]], texts

    (then, old_texts), (now, new_texts) = ids(before), ids(after)
    if then != now:
        yield (
            f"chats have other tokens: a prompt was {_short(old_texts[0])} and is"
            f" {_short(new_texts[0])}"
        )


def _changed_settings(before: Any, after: Any) -> Iterator[str]:
    kinds = (type(before).__name__, type(after).__name__)
    if kinds[0] != kinds[1]:
        yield f"its class was {kinds[0]} and is {kinds[1]}"
    for name in _SETTINGS:
        values = [_plain(getattr(tokenizer, name, None)) for tokenizer in (before, after)]
        if values[0] != values[1]:
            yield f"{name} was {values[0]!r} and is {values[1]!r}"


def _changed_parts(before: Any, after: Any) -> list[str]:
    """Return the parts of two fast tokenizers that differ, except for added vocabulary."""
    if not (hasattr(before, "backend_tokenizer") and hasattr(after, "backend_tokenizer")):
        return []
    old, new = (json.loads(t.backend_tokenizer.to_str()) for t in (before, after))
    parts = [
        name
        for name in ("normalizer", "pre_tokenizer", "post_processor", "decoder")
        if old.get(name) != new.get(name)
    ]
    models = [dict(found["model"]) for found in (old, new)]
    vocabularies = [model.pop("vocab", None) for model in models]
    merges = [model.pop("merges", []) for model in models]
    if merges[0] != merges[1][: len(merges[0])]:
        parts.append("merges")
    if models[0] != models[1]:
        parts.append("model")
    scored = all(isinstance(vocabulary, list) for vocabulary in vocabularies)  # Unigram
    if scored and vocabularies[0] != vocabularies[1][: len(vocabularies[0])]:
        parts.append("vocabulary")
    return parts


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [str(item) for item in value]
    return value if value is None or isinstance(value, (bool, int)) else str(value)


def _short(value: Any) -> str:
    if isinstance(value, str):
        return repr(value if len(value) <= 80 else value[:80] + "...")
    return f"{value[:8]}..." if len(value) > 8 else str(value)
