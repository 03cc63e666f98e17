"""Measures what drafts save: answers on an updated base, verified and not decoded one by one.

An adapter that was trained to write `raise` statements on base v1 (`study.fleet`) writes them on an
updated base. The drafts are its answers on v1. `draft_vs_generate` is the time of `generate` of
this project with drafts, relative to that of transformers in batches of the same size, sorted by
length. `draft_vs_plain` is relative to this project without drafts. `draft_worst_...` has drafts of
which no token is right. Answers that differ are counted. Names without a suffix are for the update
`patch` and one answer at a time. A round runs all four methods in random order and gives one ratio.

    python -m benchmarks.decode [--study .study] [--update patch all] [--items 64] [--batch 1 32]
        [--pairs 5] [--clock wall|process] [--threads 2] [--tiny]

Missing bases, rows and adapters are made first (minutes). Results of fewer than 64 items are shown
and not recorded. `--tiny` needs no files, and checks in seconds that the benchmark runs.
"""

import argparse
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.ratios import Clock, machine, middle, parser, prepare, record
from study.fleet import MOST, PATCH, STOP, adapter, bases_and_rows, statements
from trans_peft.data import Example, parse_examples
from trans_peft.models import load_base
from trans_peft.transfer.load_adapter import attached
from trans_peft.validation.decoding.generation import Answers, generate

ITEMS = 64


class DecodingWorkload:
    """Tokenized prompts, and the methods to answer them: this project's and transformers'."""

    def __init__(self, tokenizer: Any, examples: Sequence[Example]) -> None:
        self.tokenizer = tokenizer
        self.prompts = [example.prompt_ids(tokenizer) for example in examples]

    def ours(
        self, model: Any, batch: int, drafts: Sequence[Sequence[int]] | None = None
    ) -> Answers:
        return generate(
            model,
            self.tokenizer,
            self.prompts,
            max_new_tokens=MOST,
            stop=STOP,
            drafts=drafts,
            batch_size=batch,
        )

    def theirs(self, model: Any, batch: int) -> list[list[int]]:
        """Return the answers of transformers' `generate`, in batches sorted by length."""
        own = model.generation_config.eos_token_id
        ends = {*(own if isinstance(own, list) else [own]), self.tokenizer.eos_token_id} - {None}
        order = sorted(range(len(self.prompts)), key=lambda i: -len(self.prompts[i]))
        answers: list[list[int]] = [[] for _ in order]
        for start in range(0, len(order), batch):
            asked = order[start : start + batch]
            inputs = self.tokenizer.pad(
                {"input_ids": [self.prompts[i] for i in asked]},
                padding_side="left",
                return_tensors="pt",
            )
            out = model.generate(
                **inputs,
                do_sample=False,
                max_new_tokens=MOST,
                eos_token_id=sorted(ends),
                pad_token_id=self.tokenizer.pad_token_id,
                stop_strings=list(STOP),
                tokenizer=self.tokenizer,
            )
            width = inputs["input_ids"].shape[1]
            for i, ids in zip(asked, out[:, width:].tolist(), strict=True):
                answers[i] = ids
        return answers


def seconds(answer: Callable[[], object], clock: Clock) -> Callable[[], float]:
    def timed() -> float:
        started = clock()
        answer()
        return clock() - started

    return timed


def tiny(update: float) -> tuple[Any, Any]:
    """A random model with a small change, and a tokenizer of bytes."""
    names = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    words.add_special_tokens(["<eos>"])
    end = {"eos_token": "<eos>", "pad_token": "<eos>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, **end)
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    config = LlamaConfig(
        vocab_size=257, num_hidden_layers=2, eos_token_id=256, pad_token_id=256, **shape
    )
    model = LlamaForCausalLM(config).eval()
    for weight in model.parameters():
        weight.data += update * torch.randn_like(weight)
    return model, tokenizer


@contextmanager
def loaded(folder: Path, adapter: Path) -> Iterator[tuple[Any, Any]]:
    """A base in fp32 with the adapter on it, and its tokenizer."""
    base = load_base(folder, "float32")
    with attached(base.model, adapter) as model:
        yield model, base.tokenizer


@contextmanager
def both(
    options: argparse.Namespace, update: str
) -> Iterator[tuple[Any, DecodingWorkload, list[list[int]]]]:
    """The adapter on the updated base, the prompts, and its answers on the old base."""
    if options.tiny:
        examples = [Example(str(i), f"question {i} {'?' * (i % 7)}", "") for i in range(4)]
        (old, tokenizer), (new, _) = tiny(update=0.0), tiny(update=0.001)
        tokenized = DecodingWorkload(tokenizer, examples)
        yield new, tokenized, tokenized.ours(old, 4).ids
        return
    bases_and_rows(options.study, update)
    rows = statements(options.study)
    folder = adapter(options.study, rows, "lora-16", seed=1)
    examples = list(parse_examples(rows["eval"].read_bytes(), "eval.jsonl"))[: options.items]
    with loaded(options.study / "bases" / "v1", folder) as (model, tokenizer):
        recorded = DecodingWorkload(tokenizer, examples).ours(model, 32).ids
    with loaded(options.study / "bases" / update, folder) as (model, tokenizer):
        yield model, DecodingWorkload(tokenizer, examples), recorded


def wrong_drafts(answers: Sequence[Sequence[int]]) -> list[list[int]]:
    """Drafts as long as the answers, of tokens that no answer has."""
    used = {token for answer in answers for token in answer}
    # Not one of the first ids: a draft that starts with an end token would be ignored.
    unused = next(token for token in range(50, len(used) + 51) if token not in used)
    return [[unused] * len(answer) for answer in answers]


def equal(a: Sequence[Sequence[int]], b: Sequence[Sequence[int]]) -> int:
    """Count the pairs in which one answer starts with the other."""
    return sum(x[: len(y)] == y[: len(x)] and bool(x) == bool(y) for x, y in zip(a, b, strict=True))


def compare(
    batch: int,
    suffix: str,
    model: Any,
    tokenized: DecodingWorkload,
    recorded: list[list[int]],
    options: argparse.Namespace,
    clock: Clock,
) -> None:
    """Measure and record the four ratios at one batch size."""
    plain, drafted = tokenized.ours(model, batch), tokenized.ours(model, batch, recorded)
    wrong = wrong_drafts(plain.ids)
    worst, theirs = tokenized.ours(model, batch, wrong), tokenized.theirs(model, batch)
    items, tokens = len(plain.ids), sum(map(len, plain.ids))
    summary = (
        f"{items} items in batches of {batch}, answers of {tokens / items:.1f} tokens, "
        f"{equal(recorded, plain.ids)} the same as on the old base; of {drafted.drafted} drafted "
        f"tokens {drafted.accepted / max(drafted.drafted, 1):.0%} accepted, "
        f"{drafted.accepted / tokens:.0%} of all; tokens as in plain decoding: with drafts "
        f"{equal(drafted.ids, plain.ids)}, with wrong ones {equal(worst.ids, plain.ids)}, "
        f"transformers {equal(theirs, plain.ids)} of {items}; near ties {plain.near_ties}"
    )
    print(summary, flush=True)
    arms = {
        "draft": seconds(lambda: tokenized.ours(model, batch, recorded), clock),
        "draft_worst": seconds(lambda: tokenized.ours(model, batch, wrong), clock),
        "generate": seconds(lambda: tokenized.theirs(model, batch), clock),
        "plain": seconds(lambda: tokenized.ours(model, batch), clock),
    }
    rounds = measured(arms, options.pairs)
    for first in ("draft", "draft_worst"):
        for second in ("generate", "plain"):
            entry = middle([took[first] / took[second] for took in rounds])
            name = f"decode.{first}_vs_{second}{suffix}"
            if options.tiny or items < ITEMS:
                print(name, entry, "not recorded", flush=True)
            else:
                record(name, entry, machine(options, f"SmolLM2-135M, fp32, {summary}"))


def measured(arms: dict[str, Callable[[], float]], rounds: int) -> list[dict[str, float]]:
    """Return the seconds of each method by round, in random order. All have run once before."""
    order, names = random.Random(0), list(arms)
    took = []
    for _ in range(rounds):
        order.shuffle(names)
        took.append({name: arms[name]() for name in names})
    return took


def main() -> None:
    ours = parser(__doc__, pairs=5)
    ours.add_argument("--study", type=Path, default=Path(".study"))
    ours.add_argument("--update", nargs="+", default=[PATCH, "all"])
    ours.add_argument("--items", type=int, default=ITEMS)
    ours.add_argument("--batch", type=int, nargs="+", default=[1, 32])
    ours.add_argument("--tiny", action="store_true")
    options = ours.parse_args()
    clock = prepare(options)
    for update in options.update:
        mark = "" if update == PATCH else f"_{update}"
        with both(options, update) as (model, tokenized, recorded):
            for batch in options.batch:
                suffix = mark + ("" if batch == 1 else f"_batch_{batch}")
                print(f"update {update}, batches of {batch}", flush=True)
                compare(batch, suffix, model, tokenized, recorded, options, clock)


if __name__ == "__main__":
    main()
