"""What a model will probably say next, taken from an answer that is already there.

The draft of speculative decoding (Leviathan et al. 2023, arXiv:2211.17192) without a draft model,
as in "Inference with Reference" (Yang et al. 2023, arXiv:2304.04487): an adapter on a new base
mostly answers as it did on the old one. Differs: nothing is searched for in a text; one draft
belongs to one question and is followed by a pointer. A draft only ever saves or costs time: what
is accepted is decided in `trans_peft.validation.decoding.generation`.
"""

import math
import sys
from collections import deque
from collections.abc import Iterable, Sequence

__all__ = ["PASS", "Draft", "DraftAcceptance", "common_length"]

PASS = 32
"""A forward pass takes as long as reading so many tokens, before it has read one: measured on a CPU
(SmolLM2-135M, one thread: 28). On a GPU it is far more, and fewer right drafts would pay."""

_NEAR = 16  # tokens on either side of the pointer in which the thread is taken up again


class Draft:
    """One expected answer, and how far along it the model's own answer is.

    As many tokens are proposed as the two have agreed on lately: each one that agrees adds one, a
    disagreement halves. So a text that went another way is not read to the end in vain, and one
    that comes back is followed again, at no cost, from the first token that agrees by itself.
    """

    def __init__(self, tokens: Sequence[int], first: int) -> None:
        """`first`: the tokens to propose before anything is known about this answer."""
        self.lead: float = math.inf
        """The tokens that agreed before the first that did not."""
        self._tokens = list(tokens)
        self._at = 0
        self._agreed = 0
        self._length = first

    def __len__(self) -> int:
        return len(self._tokens)

    def proposal(self) -> list[int]:
        """Return the next tokens that are worth checking, none where the draft is not believed."""
        return self._tokens[self._at : self._at + self._length]

    def observe(self, said: Iterable[int]) -> None:
        """Follow what the model said, proposed or not."""
        for token in said:
            if self._tokens[self._at : self._at + 1] == [token]:
                self._at += 1
                self._agreed += 1
            else:
                if self._at < len(self._tokens) and math.isinf(self.lead):
                    self.lead = self._agreed
                self._agreed //= 2
                self._at = self._after(token)
            self._length = self._agreed

    def _after(self, token: int) -> int:
        """Return where to go on: after the nearest same token, else one further."""
        low, high = max(0, self._at - _NEAR), min(len(self._tokens), self._at + _NEAR + 1)
        same = (i for i in range(low, high) if self._tokens[i] == token)
        nearest = min(same, key=lambda i: (abs(i - self._at), -i), default=self._at)
        return min(nearest + 1, len(self._tokens))


class DraftAcceptance:
    """How far drafts were right in the answers before this one, over all of a run's answers."""

    def __init__(self) -> None:
        # Before the first answer: the whole of most one-string answers.
        self._leads = deque([8.0], maxlen=64)

    def first(self, rows: int) -> int:
        """Return how many tokens to propose together with a prompt in a batch of so many rows.

        As many as pay: each row reads one token more, and the batch may be spared one pass, so
        rows / (rows + PASS) of the answers must have agreed so far.
        """
        needed = math.ceil(len(self._leads) * rows / (rows + PASS))
        return int(min(sorted(self._leads, reverse=True)[needed - 1], sys.maxsize))

    def learn(self, drafts: Iterable[Draft]) -> None:
        """Count answers that are complete; empty drafts say nothing."""
        self._leads.extend(draft.lead for draft in drafts if len(draft))


def common_length(lengths: Sequence[int], unread: int) -> int:
    """Return how many tokens of each proposal to check together in one batch.

    Proposals are padded to one length, and padding takes as long as tokens: the largest length with
    which no more padding is read than is proposed, give or take an eighth of the `unread` tokens
    that must be read anyway.
    """
    for length in range(max(lengths), 0, -1):
        proposed = sum(min(own, length) for own in lengths)
        if length * len(lengths) - proposed <= proposed + unread // 8:
            return length
    return 0
