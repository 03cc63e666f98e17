"""Drafts of speculative decoding, taken from existing answers.

Speculative decoding (Leviathan et al. 2023, arXiv:2211.17192) without a draft model, as in
"Inference with Reference" (Yang et al. 2023, arXiv:2304.04487): an adapter on a new base mostly
gives the answers that it gave on the old one. Unlike there, each question has its own draft, and a
pointer follows it instead of a text search. Drafts change the time of decoding but not its result:
`trans_peft.validation.decoding.decoder` decides which tokens are accepted.
"""

import math
import sys
from collections import deque
from collections.abc import Iterable, Sequence

__all__ = ["PASS_OVERHEAD_TOKENS", "Draft", "DraftAcceptance", "common_length"]

PASS_OVERHEAD_TOKENS = 32
"""Fixed cost of a forward pass, as the number of tokens that take the same time. Measured on a CPU
(SmolLM2-135M, one thread): 28. It is far larger on a GPU, where drafts of lower accuracy pay off.
"""

_RESYNC_TOKENS = 16  # distance from the pointer within which a matching token is searched


class Draft:
    """One expected answer and a pointer to its next token.

    The number of proposed tokens follows recent agreement: each token that agrees adds one, and a
    disagreement halves the number. An answer that diverges from its draft therefore costs little,
    and the draft is followed again once generated tokens agree with it.
    """

    def __init__(self, tokens: Sequence[int], first: int) -> None:
        """`first` is the number of tokens in the first proposal."""
        self.agreed_prefix: float = math.inf
        """Number of tokens that agreed before the first disagreement; infinite without one."""
        self._tokens = list(tokens)
        self._at = 0
        self._agreed = 0
        self._length = first

    def __len__(self) -> int:
        return len(self._tokens)

    def proposal(self) -> list[int]:
        """Return the next tokens to check; empty after recent disagreement."""
        return self._tokens[self._at : self._at + self._length]

    def observe(self, generated: Iterable[int]) -> None:
        """Move the pointer along the tokens that the model generated, proposed or not."""
        for token in generated:
            if self._tokens[self._at : self._at + 1] == [token]:
                self._at += 1
                self._agreed += 1
            else:
                if self._at < len(self._tokens) and math.isinf(self.agreed_prefix):
                    self.agreed_prefix = self._agreed
                self._agreed //= 2
                self._at = self._after(token)
            self._length = self._agreed

    def _after(self, token: int) -> int:
        """Return the position after the nearest equal token, else the next position."""
        low, high = (
            max(0, self._at - _RESYNC_TOKENS),
            min(len(self._tokens), self._at + _RESYNC_TOKENS + 1),
        )
        same = (i for i in range(low, high) if self._tokens[i] == token)
        nearest = min(same, key=lambda i: (abs(i - self._at), -i), default=self._at)
        return min(nearest + 1, len(self._tokens))


class DraftAcceptance:
    """How many tokens of drafts agreed at the start of recent answers of a run."""

    def __init__(self) -> None:
        # Initial value: longer than most answers that are a single label.
        self._agreed_prefixes = deque([8.0], maxlen=64)

    def first(self, rows: int) -> int:
        """Return how many tokens to propose together with the prompts of a batch of `rows`.

        One more token costs each row one token and can save the batch one pass. It pays off if at
        least rows / (rows + PASS_OVERHEAD_TOKENS) of the recent answers agreed that far.
        """
        needed = math.ceil(len(self._agreed_prefixes) * rows / (rows + PASS_OVERHEAD_TOKENS))
        return int(min(sorted(self._agreed_prefixes, reverse=True)[needed - 1], sys.maxsize))

    def record(self, drafts: Iterable[Draft]) -> None:
        """Record the drafts of finished answers; empty drafts are ignored."""
        self._agreed_prefixes.extend(draft.agreed_prefix for draft in drafts if len(draft))


def common_length(lengths: Sequence[int], unread: int) -> int:
    """Return how many tokens of each proposal to check in one batch.

    Proposals are padded to one length, and padding costs as much as tokens. The result is the
    largest length with at most as much padding as proposed tokens, plus an eighth of the `unread`
    tokens, which are processed in any case.
    """
    for length in range(max(lengths), 0, -1):
        proposed = sum(min(own, length) for own in lengths)
        if length * len(lengths) - proposed <= proposed + unread // 8:
            return length
    return 0
