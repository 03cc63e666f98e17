"""Choose tokens at random, by random numbers that depend on the answer and the position alone.

Token i is chosen with the probability p_i of transformers' `generate(do_sample=True)`: the logits
are divided by the temperature, then the least likely tokens are removed (`top_p`). The choice is
the Gumbel-max trick: the largest log p_i + g_i, with independent Gumbel noise g_i. The noise comes
from a counter-based generator (Philox, Salmon et al. 2011) whose key is the answer's and whose
counter is the position of the token. A choice is therefore a function of the logits, as in greedy
decoding: batches, prefixes that prompts share and drafts change no answer.

Two models with the same keys have the same noise. The more alike their distributions are, the more
often they choose the same token (common random numbers).
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

__all__ = ["NEAR_TIE", "Choice", "chosen_greedily", "gumbel_noise", "sampled"]

NEAR_TIE = 1e-4
"""Logits that differ by less can change their order with the shape of the batch."""

_MOST = np.float32(1 - 2**-24)

Choice = tuple[Tensor, Tensor, Tensor]
"""The largest logit, the chosen token, and whether rounding may have decided about it; each has
the shape (rows, positions)."""


def chosen_greedily(logits: Tensor) -> Choice:
    """Choose the most likely token of logits of shape (rows, positions, vocabulary)."""
    best, tokens = logits.max(-1)
    return best, tokens, (logits >= best[..., None] - NEAR_TIE).sum(-1) > 1


def sampled(
    logits: Tensor, keys: Sequence[int], starts: Sequence[int], *, temperature: float, top_p: float
) -> Choice:
    """Choose a token at random from each of the logits of shape (rows, positions, vocabulary).

    Args:
        keys: key of each row's answer, less than 2**128.
        starts: position in the answer of each row's first token.
        temperature: logits are divided by it.
        top_p: only the most likely tokens are chosen: those before which the sum of probabilities
            is less than `top_p`. 1: all tokens.
    """
    choices = []
    for column in range(logits.shape[1]):  # one by one: the noise is as large as the logits
        noise = gumbel_noise(keys, [start + column for start in starts], logits.shape[-1])
        scaled = logits[:, column].float() / temperature
        chosen = _largest(scaled, noise.to(logits.device), NEAR_TIE / temperature, top_p)
        choices.append((logits[:, column].amax(-1), *chosen))
    best, tokens, near = (torch.stack(parts, 1) for parts in zip(*choices, strict=True))
    return best, tokens, near


def gumbel_noise(keys: Sequence[int], positions: Sequence[int], vocabulary: int) -> Tensor:
    """Return Gumbel noise of shape (rows, vocabulary), from the key and position of each row."""
    uniform = np.empty((len(keys), vocabulary), np.float32)
    for row, (key, position) in enumerate(zip(keys, positions, strict=True)):
        # Philox increments the first word of its counter. Its raw numbers are the same in all
        # versions of NumPy, those of a Generator are not.
        philox = np.random.Philox(key=key, counter=np.array([0, position, 0, 0], dtype=np.uint64))
        raw = philox.random_raw(vocabulary // 2 + 1).view(np.uint32)[:vocabulary]
        uniform[row] = raw
    # The tokens that win have the smallest exponentials. Those keep their precision in float32.
    uniform = np.minimum((uniform + np.float32(0.5)) * np.float32(2**-32), _MOST)
    return -torch.log(-torch.log1p(-torch.from_numpy(uniform)))


def _largest(scaled: Tensor, noise: Tensor, margin: float, top_p: float) -> tuple[Tensor, Tensor]:
    """Return the tokens with the largest sum of logit and noise, and which are near ties.

    Tokens are drawn in the order of these sums until one is among the most likely ones. That takes
    1 / top_p draws or fewer on average, and needs no order of the vocabulary. Logits that differ by
    less than `margin` may change their order.
    """
    sums = scaled + noise
    p = scaled.softmax(-1)
    pending = torch.isfinite(scaled.amax(-1))  # the caller refuses other logits
    tokens = torch.zeros_like(pending, dtype=torch.long)
    near = torch.zeros_like(pending)
    while pending.any():
        best, drawn = sums.max(-1, keepdim=True)
        logit = scaled.gather(-1, drawn)

        def mass_above(bound: Tensor) -> Tensor:
            return (p * (scaled > bound)).sum(-1)

        if top_p < 1:
            kept = mass_above(logit) < top_p
            others = mass_above(logit - margin) - p.gather(-1, drawn)[..., 0]
            unsure = (mass_above(logit + margin) < top_p + margin) & (others >= top_p - margin)
        else:
            kept, unsure = torch.ones_like(pending), torch.zeros_like(pending)
        close = (sums >= best - margin).sum(-1) > 1
        near |= pending & (unsure | (kept & close))
        tokens = torch.where(pending & kept, drawn[..., 0], tokens)
        pending &= ~kept
        sums.scatter_(-1, drawn, -torch.inf)
    return tokens, near
