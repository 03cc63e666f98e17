"""The rows of a recipe: training rows by source, and validation rows that are not among them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from trans_peft.data.example import Example
from trans_peft.data.sources import read_examples
from trans_peft.domain.identity import content_sha256
from trans_peft.domain.recipe import TrainingRecipe
from trans_peft.errors import DataError, listed_lines
from trans_peft.ports import ArtifactStore

__all__ = ["TrainingRows", "read_training_rows"]

_SHOWN = 10


@dataclass(frozen=True)
class TrainingRows:
    """The rows of a recipe.

    Attributes:
        sources: training rows of each source, in the recipe's order.
        validation: held-out rows; empty without validation.
    """

    sources: tuple[tuple[Example, ...], ...]
    validation: tuple[Example, ...] = ()

    @property
    def training(self) -> tuple[Example, ...]:
        """The training rows of all sources, one after the other."""
        return tuple(example for source in self.sources for example in source)

    @property
    def all(self) -> tuple[Example, ...]:
        """All rows that the weights depend on: validation rows may select the kept checkpoint."""
        return self.training + self.validation


def read_training_rows(recipe: TrainingRecipe, store: ArtifactStore) -> TrainingRows:
    """Read all rows of a recipe.

    Raises what `trans_peft.data.read_examples` raises, and DataError if a validation row has the
    prompt of a training row, or if a source has no row left for training.
    """
    sources = tuple(
        read_examples(source, store, limit=source.limit, preferences=recipe.objective == "dpo")
        for source in recipe.sources
    )
    settings = recipe.validation
    if settings is None:
        return TrainingRows(sources)
    if settings.data is None:
        return _split(sources, settings.share, [source.uri for source in recipe.sources])
    validation = read_examples(settings.data, store)
    trained = {_prompt_sha256(example) for source in sources for example in source}
    if known := [example for example in validation if _prompt_sha256(example) in trained]:
        raise DataError(
            f"{len(known)} of {len(validation)} rows of {settings.data.uri} have the prompt of a "
            "training row\n    "
            + "\n    ".join(listed_lines([example.location for example in known], _SHOWN)),
            expected="validation rows that are not trained on",
            do="remove these rows from one of the files, or give validation.share instead of data",
        )
    return TrainingRows(sources, validation)


def _split(
    sources: Sequence[tuple[Example, ...]], share: float, uris: Sequence[str]
) -> TrainingRows:
    """Hold out the rows with the smallest hashes, until they are `share` of all rows."""
    hashes = [[_prompt_sha256(example) for example in source] for source in sources]
    ordered = sorted(value for source in hashes for value in source)
    last = ordered[math.ceil(share * len(ordered)) - 1]  # rows with this prompt stay together
    kept, held_out = [], []
    for source, values in zip(sources, hashes, strict=True):
        pairs = list(zip(source, values, strict=True))
        kept.append(tuple(example for example, value in pairs if value > last))
        held_out += [example for example, value in pairs if value <= last]
    if empty := [uri for uri, rows in zip(uris, kept, strict=True) if not rows]:
        raise DataError(
            f"validation.share={share:g} leaves no row for training in {', '.join(empty)}",
            expected="several prompts in each source",
            do="give more rows, a lower share, or a file of validation rows",
        )
    return TrainingRows(tuple(kept), tuple(held_out))


def _prompt_sha256(example: Example) -> str:
    tools = [example.tools] if example.tools else []
    return content_sha256([example.prompt, (example.messages or ())[:-1], *tools])
