"""What drafts save: an adapter's answers on an updated base, checked instead of written anew.

The drafts are the answers of the same adapter on the old base. `draft_vs_generate` is the time of
our `generate` with them beside transformers' own in batches of the same size, sorted by length;
`draft_vs_plain` beside our own without them; `draft_worst_vs_generate` and `draft_worst_vs_plain`
are the same with drafts of which no token is ever right. All answers must be the same tokens where
no two best logits lie within 1e-4; how a ratio is taken: `ratios`.

    python benchmarks/decode.py [--old FOLDER] [--new FOLDER] [--adapter FOLDER] [--rows FILE]
        [--items 64] [--batch 32] [--most 64] [--stop TEXT ...] [--pairs 5] [--clock wall|process]

The defaults are what `make study` makes. `--tiny` shows in seconds that it runs, and keeps nothing.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from ratios import Clock, machine, middle, paired, parser, prepare, record
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from trans_peft.data import Example, parse_examples
from trans_peft.models import load_base
from trans_peft.transfer.transplant import attached
from trans_peft.validation.generation import Answers, generate

STUDY = Path(".study")


class Suite:
    """Prompts, and how they are answered: by us, with drafts or without, and by transformers."""

    def __init__(self, tokenizer: Any, examples: Sequence[Example], options: Any) -> None:
        self.tokenizer, self.options = tokenizer, options
        self.prompts = [example.prompt_ids(tokenizer) for example in examples]

    def ours(self, model: Any, drafts: Sequence[Sequence[int]] | None = None) -> Answers:
        return generate(
            model,
            self.tokenizer,
            self.prompts,
            max_new_tokens=self.options.most,
            stop=self.options.stop,
            drafts=drafts,
            batch_size=self.options.batch,
        )

    def theirs(self, model: Any) -> list[list[int]]:
        """As a competent user writes it; padding behind an answer's end is cut off."""
        own = model.generation_config.eos_token_id
        ends = {*(own if isinstance(own, list) else [own]), self.tokenizer.eos_token_id} - {None}
        order = sorted(range(len(self.prompts)), key=lambda i: -len(self.prompts[i]))
        answers: list[list[int]] = [[] for _ in order]
        for start in range(0, len(order), self.options.batch):
            batch = order[start : start + self.options.batch]
            inputs = self.tokenizer.pad(
                {"input_ids": [self.prompts[i] for i in batch]},
                padding_side="left",
                return_tensors="pt",
            )
            stops = {"stop_strings": self.options.stop, "tokenizer": self.tokenizer}
            out = model.generate(
                **inputs,
                do_sample=False,
                max_new_tokens=self.options.most,
                eos_token_id=sorted(ends),
                pad_token_id=self.tokenizer.pad_token_id,
                **(stops if self.options.stop else {}),
            )
            width = inputs["input_ids"].shape[1]
            for i, ids in zip(batch, out[:, width:].tolist(), strict=True):
                answers[i] = ids
        return answers


def seconds(answer: Callable[[], object], clock: Clock) -> Callable[[], float]:
    def timed() -> float:
        started = clock()
        answer()
        return clock() - started

    return timed


def tiny(update: float) -> tuple[Any, Any]:
    """A random model, moved a little, and the tokenizer of bytes."""
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
def loaded(folder: Path, options: argparse.Namespace) -> Iterator[tuple[Any, Any]]:
    """A base in fp32 with the adapter on it, and its tokenizer."""
    if options.tiny:
        yield tiny(update=0.0 if folder == options.old else 0.001)
        return
    base = load_base(folder, "float32")
    with (
        attached(base.model, options.adapter)
        if options.adapter
        else nullcontext(base.model) as model
    ):
        yield model, base.tokenizer


def never_right(answers: Sequence[Sequence[int]]) -> list[list[int]]:
    """Drafts as long as the answers, of tokens that no answer has."""
    said = {token for answer in answers for token in answer}
    # Not one of the first ids: a draft that ends an answer would not be read at all.
    unsaid = next(token for token in range(50, len(said) + 51) if token not in said)
    return [[unsaid] * len(answer) for answer in answers]


def equal(a: Sequence[Sequence[int]], b: Sequence[Sequence[int]]) -> int:
    """How many answers agree, as far as the shorter of each pair goes."""
    return sum(x[: len(y)] == y[: len(x)] and bool(x) == bool(y) for x, y in zip(a, b, strict=True))


def main() -> None:
    ours = parser(__doc__, pairs=5)
    ours.add_argument("--old", type=Path, default=STUDY / "bases" / "v1")
    ours.add_argument("--new", type=Path, default=STUDY / "bases" / "all")
    ours.add_argument("--adapter", type=Path)
    ours.add_argument("--rows", type=Path, default=STUDY / "rows" / "signatures" / "eval.jsonl")
    ours.add_argument("--items", type=int, default=64)
    ours.add_argument("--batch", type=int, default=32)
    ours.add_argument("--most", type=int, default=64, help="new tokens of an answer")
    ours.add_argument("--stop", nargs="*", default=[])
    ours.add_argument("--tiny", action="store_true")
    options = ours.parse_args()
    clock = prepare(options)
    if options.tiny:
        examples = [Example(str(i), f"question {i} {'?' * (i % 7)}", "") for i in range(12)]
    else:
        examples = list(parse_examples(options.rows.read_bytes(), options.rows.name))
    examples = examples[: options.items]
    with loaded(options.old, options) as (model, tokenizer):
        recorded = Suite(tokenizer, examples, options).ours(model).ids
    with loaded(options.new, options) as (model, tokenizer):
        suite = Suite(tokenizer, examples, options)
        plain, drafted = suite.ours(model), suite.ours(model, recorded)
        wrong = never_right(plain.ids)
        worst, theirs = suite.ours(model, wrong), suite.theirs(model)
        told = (
            f"{len(examples)} items in batches of {options.batch}, answers of "
            f"{sum(map(len, plain.ids)) / len(examples):.1f} tokens; of {drafted.drafted} drafted "
            f"tokens {drafted.accepted / max(drafted.drafted, 1):.0%} accepted, which is "
            f"{drafted.accepted / sum(map(len, plain.ids)):.0%} of all tokens; equal answers: "
            f"drafts {equal(drafted.ids, plain.ids)}, never right {equal(worst.ids, plain.ids)}, "
            f"transformers {equal(theirs, plain.ids)}; near ties {plain.near_ties}"
        )
        print(told, flush=True)
        arms = {
            "draft": seconds(lambda: suite.ours(model, recorded), clock),
            "draft_worst": seconds(lambda: suite.ours(model, wrong), clock),
            "generate": seconds(lambda: suite.theirs(model), clock),
            "plain": seconds(lambda: suite.ours(model), clock),
        }
        for first in ("draft", "draft_worst"):
            for second in ("generate", "plain"):
                entry = middle(paired(arms[first], arms[second], options.pairs))
                name = f"decode.{first}_vs_{second}"
                if options.tiny:
                    print(name, entry, flush=True)
                else:
                    record(name, entry, machine(options, f"SmolLM2-135M, fp32, {told}"))


if __name__ == "__main__":
    main()
