"""Whether two tokenizers say the same with the same ids, told from their `tokenizer.json` files."""

from pathlib import Path
from typing import TYPE_CHECKING

from trans_peft.errors import NotFoundError, listed
from trans_peft.isolation import Limits, call_isolated

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["PROBE_CORPUS", "compare_tokens"]

_LIMITS = Limits(cpu_s=120, memory_bytes=2 << 30)

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
)
"""Text that both must cut into the same tokens: several scripts, code, white space, numbers."""


def compare_tokens(old: Path, new: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return (mismatches, notes) about the tokenizers in two folders.

    Every old token must keep its id, and the probe corpus must become the same ids; added tokens
    are a note. NotFoundError for a folder without `tokenizer.json`; LimitExceededError where the
    tokenizers, which run in a child process, need too much time or memory.
    """
    mismatches, notes = call_isolated(
        _compare,
        old,
        new,
        limits=_LIMITS,
        subject=f"the tokenizer in {old} or {new}",
        imports=("tokenizers",),
    )
    return tuple(mismatches), tuple(notes)


def _compare(old: Path, new: Path) -> tuple[list[str], list[str]]:
    before, after = _tokenizer(old), _tokenizer(new)
    old_ids, new_ids = before.get_vocab(), after.get_vocab()
    mismatches, notes = [], []
    moved = [
        f"{token!r} was {number} and is {new_ids.get(token, 'gone')}"
        for token, number in sorted(old_ids.items(), key=lambda item: item[1])
        if new_ids.get(token) != number
    ]
    if moved:
        mismatches.append(f"{len(moved)} of {len(old_ids)} tokens lost their id: {listed(moved)}")
    added = sorted(set(new_ids) - set(old_ids), key=new_ids.__getitem__)
    if added:
        notes.append(f"tokens were added: {listed([repr(token) for token in added])}")
    differing = [
        f"{text!r} was {then[:8]}... and is {now[:8]}..."
        for text in PROBE_CORPUS
        if (then := before.encode(text).ids) != (now := after.encode(text).ids)
    ]
    if differing and not moved:  # ids that moved explain it already
        mismatches.append(
            f"{len(differing)} of {len(PROBE_CORPUS)} probe texts become other tokens:"
            f" {listed(differing, 1)}"
        )
    return mismatches, notes


def _tokenizer(folder: Path) -> "Tokenizer":
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    if not path.is_file():
        raise NotFoundError(
            f"{folder} has no tokenizer.json",
            do="save it there with AutoTokenizer.from_pretrained(...).save_pretrained(folder)",
        )
    return Tokenizer.from_file(str(path))
