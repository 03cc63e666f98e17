"""The rows of a training job as token ids, checked before a model is loaded."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import pack_dataset

from trans_peft.data import Example, full_ids, parse_examples, prompt_ids, token_counts
from trans_peft.domain.recipe import TrainingRecipe
from trans_peft.errors import DataError, listed_lines
from trans_peft.training.batches import WeightedRows
from trans_peft.training.distillation import TeacherTargets
from trans_peft.training.job import TrainingJob
from trans_peft.training.memory import StepShape

__all__ = ["JobRows", "check_tokens", "read_job_rows", "token_count", "token_rows"]

_PROBLEMS_SHOWN = 20

TokenRow = dict[str, list[int]]
"""A row in TRL's format: `input_ids`, and `completion_mask`, with 1 for tokens of the loss.

These are the answer's, and those of the prompt as well if the recipe has `train_on_prompt`.

A row of preferences has `prompt_ids`, `chosen_ids` and `rejected_ids`.
"""


def token_count(row: TokenRow) -> int:
    """Return the number of tokens that a training step computes for a row."""
    if "input_ids" in row:
        return len(row["input_ids"])
    return 2 * len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"])


@dataclass(frozen=True)
class JobRows:
    """The rows of a training job.

    Attributes:
        training: training rows of all sources, one source after the other.
        sources: number and weight of the rows of each source; empty if the rows are packed.
        sequences: sequences of one epoch, repetitions included. They are the rows, or what TRL
            packs them into.
        held_out: validation rows.
        shortened: number of training rows that are cut at `max_length`; of preferences, the number
            of answers.
        targets: a teacher's targets, if the job has them.
    """

    training: list[TokenRow]
    sources: Sequence[WeightedRows]
    sequences: float
    held_out: list[TokenRow]
    shortened: int = 0
    targets: TeacherTargets | None = None

    def largest_step(self, recipe: TrainingRecipe) -> StepShape:
        """Return the shape of a micro-batch of the longest rows.

        A packed micro-batch is one sequence, of which at most all tokens are answers.
        """
        batch_size, longest = recipe.optimizer.batch_size, recipe.optimizer.max_length
        if recipe.packing:
            return StepShape(1, batch_size * longest, batch_size * longest)
        tokens = min(longest, max(len(row["input_ids"]) for row in self.training))
        answers = max(sum(row["completion_mask"]) for row in self.training)
        return StepShape(batch_size, tokens, min(answers, tokens))


def read_job_rows(
    job: TrainingJob, tokenizer: PreTrainedTokenizerBase, template: str | None
) -> JobRows:
    """Read and tokenize the rows of a job. DataError as from `check_tokens`."""
    if job.targets is not None:
        targets = TeacherTargets.read(job.targets)
        return JobRows(targets.training_rows(), (), len(targets), [], targets=targets)
    recipe = job.recipe
    max_length = recipe.optimizer.max_length
    names = [source.uri for source in recipe.sources]
    prefers = recipe.objective == "dpo"
    parts = [
        _examples(file, name, preferences=prefers)
        for file, name in zip(job.data_files, names, strict=False)
    ]
    examples = [example for part in parts for example in part]
    answers = [*examples, *(e.with_rejected() for e in examples)] if prefers else examples
    with_prompt = recipe.train_on_prompt
    shortened = check_tokens(answers, tokenizer, max_length, template, with_prompt=with_prompt)
    training = token_rows(answers, tokenizer, template, with_prompt=with_prompt)
    if prefers:
        training = list(map(_pair, training[: len(examples)], training[len(examples) :]))
    held_out: list[TokenRow] = []
    if job.validation_file is not None:
        validation = _examples(job.validation_file, "the validation rows")
        check_tokens(validation, tokenizer, max_length, template, with_prompt=with_prompt)
        held_out = token_rows(validation, tokenizer, template, with_prompt=with_prompt)
    if recipe.packing:
        lengths = Dataset.from_dict({"input_ids": [[0] * len(r["input_ids"]) for r in training]})
        return JobRows(training, (), len(pack_dataset(lengths, max_length)), held_out, shortened)
    weights = [source.weight for source in recipe.sources] if len(parts) > 1 else [1.0]
    sources = [WeightedRows(len(part), w) for part, w in zip(parts, weights, strict=True)]
    sequences = sum(source.rows_per_epoch for source in sources)
    return JobRows(training, sources, sequences, held_out, shortened)


def _examples(file: Path, name: str, *, preferences: bool = False) -> list[Example]:
    read = parse_examples(file.read_bytes(), name, preferences=preferences)
    # These places refer to the job's copy of the data, not to the user's file.
    return [replace(example, place="") for example in read]


def check_tokens(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    template: str | None = None,
    *,
    with_prompt: bool = False,
) -> int:
    """Return how many rows are cut at `max_length`; DataError lists rows that cannot be trained on.

    These are rows whose prompt alone fills `max_length`, unless the loss is `with_prompt`, and rows
    whose prompt ends in other tokens once the answer follows: an evaluation would use another
    prompt. The second check does not apply to chats, whose template separates prompt and answer.
    """
    shortened, problems = 0, []
    counts = token_counts(examples, tokenizer, template)
    for example, (prompt, whole, starts) in zip(examples, counts, strict=True):
        shortened += whole > max_length
        if prompt >= max_length and not with_prompt:
            problems.append(
                f"{example.location}: its prompt of {prompt} tokens fills max_length={max_length}"
            )
        elif example.messages is None and not starts:
            problems.append(
                f"{example.location}: the prompt ends in other tokens if the answer follows"
            )
    if problems:
        raise DataError(
            f"{len(problems)} of {len(examples)} rows cannot be trained on\n    "
            + "\n    ".join(listed_lines(problems, _PROBLEMS_SHOWN)),
            expected="prompts shorter than max_length, whose tokens do not depend on the answer",
            do="raise optimizer.max_length or remove long rows; move white space from the end of a "
            "prompt to the start of its answer",
        )
    return shortened


def token_rows(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    template: str | None = None,
    *,
    with_prompt: bool = False,
) -> list[dict[str, list[int]]]:
    """Return the examples as token ids in TRL's format, with a mask of the tokens of the loss.

    These are the answers, and `with_prompt` all tokens.

    TRL could tokenize the texts itself, but it would render chats without limits and with the
    current date. In a chat the answer starts at the first token at which the prompt and the whole
    conversation differ.
    """
    rows = []
    prompts = prompt_ids(examples, tokenizer, template)
    for prompt, whole in zip(prompts, full_ids(examples, tokenizer, template), strict=True):
        pairs = zip(prompt, whole, strict=False)
        start = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(prompt), len(whole)))
        mask = [int(with_prompt)] * start + [1] * (len(whole) - start)
        rows.append({"input_ids": whole, "completion_mask": mask})
    return rows


def _pair(chosen: TokenRow, rejected: TokenRow) -> TokenRow:
    """Return the row of preferences of two answers to one prompt.

    A token that both answers start with, and that one of them shares with the prompt alone, is part
    of the prompt only if it is for both.
    """
    prompt = min(row["completion_mask"].count(0) for row in (chosen, rejected))
    return {
        "prompt_ids": chosen["input_ids"][:prompt],
        "chosen_ids": chosen["input_ids"][prompt:],
        "rejected_ids": rejected["input_ids"][prompt:],
    }
