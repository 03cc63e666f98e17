"""transformers' continuous batching as an engine.

`generate_batch` keeps the keys and values of all texts in pages, and starts a waiting text as soon
as another one ends. Likelihoods and scores need no decoding: the default engine computes them.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import transformers
from torch import nn
from transformers import ContinuousBatchingConfig, GenerationConfig

from trans_peft.errors import EvaluationError, WorkerError
from trans_peft.ports import EngineAnswer, Sampling, TokenScore
from trans_peft.validation.decoding.batching import DEFAULT_BATCH_SIZE, evaluating
from trans_peft.validation.decoding.generation import AnswerEnds
from trans_peft.validation.engine import LoopEngine, dtype_of, refuse_sampling

__all__ = ["ContinuousBatchingEngine", "unsupported"]

_PAGE_TOKENS = 256
_ADAPTERS = frozenset({"BOTTLENECK", "IA3", "LORA"})
_LAYERS = frozenset({"full_attention", "sliding_attention"})


def unsupported(model: nn.Module, peft_type: str) -> str:
    """Return why continuous batching cannot answer with a kind of adapter; empty if it can.

    No weights are read: `model` may be on the meta device. All texts of a batch are one sequence,
    which only transformers' own attention functions read as several. `generate_batch` calls the
    model under PEFT's wrapper, so that an adapter outside of the model's layers would have no
    effect.
    """
    if peft_type not in _ADAPTERS:
        return f"continuous batching does not serve adapters of the type {peft_type}"
    config: Any = model.config.get_text_config()  # type: ignore[union-attr, operator]
    layers = set(getattr(config, "layer_types", None) or ()) - _LAYERS
    if layers or not getattr(model, "_supports_attention_backend", False):
        found = f"layers of the type {', '.join(sorted(layers))}" if layers else "attention"
        return f"continuous batching does not support the {found} of {type(model).__name__}"
    return ""


class ContinuousBatchingEngine:
    """Answers with `generate_batch` of transformers (`trans_peft.ports.Engine`).

    Drafts are ignored. Stop strings do not end the decoding: the answers are cut before them. Near
    ties are not counted.
    """

    name = f"transformers {transformers.__version__} continuous batching"

    def __init__(self, model: nn.Module, tokenizer: Any, *, batch_size: int | None = None) -> None:
        """On a CPU, there is room for `batch_size` texts at once, by default 32.

        On a GPU, transformers uses the free memory. WorkerError if the base is on several devices
        (`trans_peft.placement`): a larger GPU would hold it.
        """
        devices = sorted({str(weight.device) for weight in model.parameters()})
        if len(devices) > 1:
            raise WorkerError(
                "continuous batching needs the whole base on one device",
                found=", ".join(devices),
                do="choose another engine in the policy, or use a GPU that the base fits",
            )
        self._model, self._tokenizer = model, tokenizer
        self._batch_size = batch_size or DEFAULT_BATCH_SIZE
        self._loop = LoopEngine(model, tokenizer, batch_size=batch_size)
        self.dtype = dtype_of(model)

    def answers(  # noqa: PLR0913  the arguments of `generate`
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        stop: Sequence[str] = (),
        end_tokens: frozenset[int] = frozenset(),
        drafts: Sequence[Sequence[int]] | None = None,
        sampling: Sampling | None = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> list[EngineAnswer]:
        """Continue each prompt greedily.

        EvaluationError if transformers fails on one of them, InvalidSpecError for `sampling`.
        """
        refuse_sampling(sampling, "continuous batching")
        if not prompts:
            return []
        ends = AnswerEnds(self._model, self._tokenizer, stop, end_tokens)
        pages = math.ceil((max(map(len, prompts)) + max_new_tokens) / _PAGE_TOKENS)
        on_cpu = next(self._model.parameters()).device.type == "cpu"
        with evaluating(self._model):
            found = self._model.generate_batch(  # type: ignore[operator]
                inputs=[list(prompt) for prompt in prompts],
                generation_config=GenerationConfig(
                    do_sample=False,
                    max_new_tokens=max_new_tokens,
                    eos_token_id=sorted(ends.tokens),
                    pad_token_id=min(ends.tokens),
                ),
                continuous_batching_config=ContinuousBatchingConfig(
                    page_size=_PAGE_TOKENS,
                    # By default, it would fill the whole memory of the host.
                    num_blocks=pages * self._batch_size if on_cpu else None,
                    max_batch_tokens=pages * _PAGE_TOKENS if on_cpu else None,
                    return_logprobs=True,
                ),
                warmup=not on_cpu,
            )
        answers = []
        for output in found.values():
            broken = next((value for value in output.logprobs if not math.isfinite(value)), None)
            if output.error or broken is not None:
                raise EvaluationError(
                    "the model's logits are not finite"
                    if broken is not None
                    else "transformers could not answer a prompt",
                    found=output.error or f"{broken} as a log-likelihood",
                    do="check the weights of base and adapter, or use the default engine",
                )
            ids = output.generated_tokens
            cut = next((n for n in range(1, len(ids)) if ends.reached(ids[:n])), len(ids))
            answers.append(EngineAnswer(ends.text(ids[:cut]), ids[:cut]))
        if len(answers) != len(prompts):
            raise EvaluationError(
                "transformers did not answer all prompts",
                expected=f"{len(prompts)} answers",
                found=len(answers),
                do="use the default engine; the log of transformers has the reason",
            )
        if on_progress is not None:
            on_progress(len(answers), len(prompts))
        return answers

    def likelihoods(
        self,
        questions: Sequence[tuple[Sequence[int], Sequence[Sequence[int]]]],
        *,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> list[list[float]]:
        """Return the log-likelihood of each continuation, from the default engine."""
        return self._loop.likelihoods(questions, on_progress=on_progress)

    def scores(
        self, texts: Sequence[tuple[Sequence[int], Sequence[int]]]
    ) -> list[list[TokenScore]]:
        """Return the score of each given token, from the default engine."""
        return self._loop.scores(texts)
