"""Greedy answers from a causal language model that is already loaded, in batches.

The same tokens as transformers' `generate(do_sample=False)` gives prompt by prompt (in fp32; two
logits closer than rounding may fall either way). What differs is the cost: prompts of like length
share a batch, logits are computed for the last position only, and a finished answer leaves its
batch at once. Nothing of the model's own generation config counts but its end tokens.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from trans_peft.errors import EvaluationError, InvalidSpecError, UnsupportedModelError

__all__ = ["Progress", "evaluating", "generate", "generate_ids"]

Progress = Callable[[int, int], None]
"""Called with the number of prompts answered so far, and of all."""

DEFAULT_BATCH_SIZE = 32
_SLACK = 4  # tokens that a stop string may need beyond one for each of its bytes


def generate(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop: Sequence[str] = (),
    batch_size: int | None = None,
    on_progress: Progress | None = None,
) -> list[str]:
    """Return the answers as text, cut before the first stop string; arguments as `generate_ids`."""
    answers = generate_ids(
        model,
        tokenizer,
        prompts,
        max_new_tokens=max_new_tokens,
        stop=stop,
        batch_size=batch_size,
        on_progress=on_progress,
    )
    ends = _Ends(model, tokenizer, stop)
    return [ends.text(answer) for answer in answers]


def generate_ids(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop: Sequence[str] = (),
    batch_size: int | None = None,
    on_progress: Progress | None = None,
) -> list[list[int]]:
    """Return the token ids that greedy decoding adds to each prompt, in the prompts' order.

    `prompts` are token ids, not padded. An answer ends with an end token (the model's or the
    tokenizer's, kept), with the token that completes one of the `stop` strings (kept), or after
    `max_new_tokens`. A batch that does not fit into memory is halved and tried again. The model is
    left as it was found. Raises EvaluationError where logits are not finite or one prompt alone
    does not fit, InvalidSpecError for prompts without tokens, UnsupportedModelError for an adapter
    that adds tokens of its own (prompt tuning, prefix tuning).
    """
    peft_config: Any = getattr(model, "active_peft_config", None)
    if peft_config is not None and peft_config.is_prompt_learning:
        raise UnsupportedModelError(
            "answers of prompt-learning adapters cannot be decoded here",
            expected="an adapter inside the layers, such as LORA",
            found=peft_config.peft_type,
        )
    empty = [i for i, prompt in enumerate(prompts) if not prompt]
    if empty:
        raise InvalidSpecError("prompts without a single token", found=f"positions {empty[:10]}")
    ends = _Ends(model, tokenizer, stop)
    size = batch_size or DEFAULT_BATCH_SIZE
    # The longest first: what does not fit shows at once.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
    answers: list[list[int]] = [[] for _ in prompts]
    done = 0
    with evaluating(model), torch.no_grad():
        while done < len(order):
            batch = order[done : done + size]
            answered = _try_batch(model, [prompts[i] for i in batch], ends, max_new_tokens)
            if answered is None:
                size = _halved(len(batch), len(prompts[batch[0]]))
                continue
            for i, answer in zip(batch, answered, strict=True):
                answers[i] = answer
            done += len(batch)
            if on_progress is not None:
                on_progress(done, len(order))
    return answers


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put every module into evaluation mode inside the block, and back as it was after it."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


class _Ends:
    """Knows when an answer has ended, and which text it is."""

    def __init__(self, model: nn.Module, tokenizer: Any, stop: Sequence[str]) -> None:
        added = tokenizer.get_added_vocab()
        own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
        own = own if isinstance(own, list) else [own]
        # A stop string that is one special token would not be seen in text without them.
        ids = {*own, tokenizer.eos_token_id, *(added[text] for text in stop if text in added)}
        self.tokens = frozenset(ids - {None})
        self._strings = [text for text in stop if text not in added]
        self._tail = max((len(text.encode()) for text in self._strings), default=0) + _SLACK
        self._tokenizer = tokenizer

    def reached(self, answer: list[int]) -> bool:
        if answer[-1] in self.tokens:
            return True
        if not self._strings:
            return False
        tail = self._decode(answer[-self._tail :])
        return any(text in tail for text in self._strings)

    def text(self, answer: list[int]) -> str:
        text = self._decode(answer[:-1] if answer and answer[-1] in self.tokens else answer)
        return text[: min((at for s in self._strings if (at := text.find(s)) >= 0), default=None)]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )


def _try_batch(
    model: nn.Module, prompts: Sequence[Sequence[int]], ends: _Ends, max_new_tokens: int
) -> list[list[int]] | None:
    """Answer one batch; None where memory did not suffice (all of its tensors are gone by then)."""
    try:
        return _answer(model, prompts, ends, max_new_tokens)
    except torch.OutOfMemoryError:
        return None
    except RuntimeError as error:
        if "can't allocate memory" in str(error):  # how torch says it on a CPU
            return None
        raise


def _halved(size: int, tokens: int) -> int:
    if size == 1:
        raise EvaluationError(
            "out of memory with a single prompt",
            found=f"a prompt of {tokens} tokens",
            do="shorten the item, load the base in a smaller dtype, or use a larger device",
        )
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return size // 2


def _answer(
    model: nn.Module, prompts: Sequence[Sequence[int]], ends: _Ends, max_new_tokens: int
) -> list[list[int]]:
    device = next(model.parameters()).device
    width = max(map(len, prompts))
    # Padded on the left, so that every prompt ends in the last column. Any token will do for
    # padding: it is masked.
    ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    answers: list[list[int]] = [[] for _ in prompts]
    going, cache = list(range(len(prompts))), None
    for _ in range(max_new_tokens):
        out = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        best, tokens = out.logits[:, -1].max(-1)
        if not bool(best.isfinite().all()):
            raise EvaluationError(
                "the model's logits are not finite",
                found=f"{best[~best.isfinite()][0].item()} as the best logit of an answer's token "
                f"{len(answers[going[0]]) + 1}",
                do="look for broken weights (base and adapter) or a dtype that overflows",
            )
        for row, token in zip(going, tokens.tolist(), strict=True):
            answers[row].append(token)
        keep = [i for i, row in enumerate(going) if not ends.reached(answers[row])]
        if not keep:
            break
        cache = out.past_key_values
        if len(keep) < len(going):
            kept = torch.tensor(keep, device=device)
            cache.batch_select_indices(kept)
            tokens, mask, positions = tokens[kept], mask[kept], positions[kept]
            going = [going[i] for i in keep]
        ids = tokens[:, None]
        mask = torch.cat([mask, mask.new_ones(len(keep), 1)], dim=1)
        positions = positions[:, -1:] + 1
    return answers
