"""The default engine: this project's own decoding loop on a loaded model."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from trans_peft.domain.evaluation import DEFAULT_ENGINE
from trans_peft.errors import InvalidSpecError
from trans_peft.ports import EngineAnswer, Sampling, TokenScore
from trans_peft.validation.decoding.generation import generate
from trans_peft.validation.decoding.likelihoods import log_likelihoods, token_scores

__all__ = ["LoopEngine", "dtype_of", "refuse_sampling"]


def dtype_of(model: Any) -> str:
    """Return the name of the dtype of a model's weights, such as "float32"."""
    return str(model.get_input_embeddings().weight.dtype).removeprefix("torch.")


def refuse_sampling(sampling: Sampling | None, engine: str) -> None:
    """Raise InvalidSpecError if an engine that only decodes greedily is asked to sample."""
    if sampling is not None:
        raise InvalidSpecError(
            f"{engine} cannot sample answers",
            expected="greedy decoding: its random numbers depend on the other texts of a batch",
            found=f"temperature={sampling.temperature}",
            do="use the default engine",
        )


class LoopEngine:
    """Answers with `trans_peft.validation.decoding` (`trans_peft.ports.Engine`)."""

    name = DEFAULT_ENGINE

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        adapters: Sequence[str | None] | None = None,
        batch_size: int | None = None,
    ) -> None:
        """`adapters` names the adapter of each text, for a model with several."""
        self._model, self._tokenizer = model, tokenizer
        self._adapters, self._batch_size = adapters, batch_size
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
        """Continue each prompt; see `generate`."""
        found = generate(
            self._model,
            self._tokenizer,
            prompts,
            max_new_tokens=max_new_tokens,
            stop=stop,
            end_tokens=end_tokens,
            drafts=drafts,
            adapters=self._adapters,
            sampling=sampling,
            batch_size=self._batch_size,
            on_progress=on_progress,
        )
        answers = zip(found.texts, found.ids, found.near_ties_of, strict=True)
        return [EngineAnswer(*answer) for answer in answers]

    def likelihoods(
        self,
        questions: Sequence[tuple[Sequence[int], Sequence[Sequence[int]]]],
        *,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> list[list[float]]:
        """Return the log-likelihood of each continuation; see `log_likelihoods`."""
        return log_likelihoods(
            self._model,
            questions,
            adapters=self._adapters,
            batch_size=self._batch_size,
            on_progress=on_progress,
        )

    def scores(
        self, texts: Sequence[tuple[Sequence[int], Sequence[int]]]
    ) -> list[list[TokenScore]]:
        """Return the score of each given token; see `token_scores`."""
        return token_scores(self._model, texts, batch_size=self._batch_size)
