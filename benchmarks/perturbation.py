"""Measures a LoRA training step with masking and dropping, in a Llama of SmolLM2's size.

`benchmarks.ratios` describes how a ratio is measured. `floor` is the ratio at which only the FFNs'
share of the step, measured by dropping every FFN, shrinks by what is masked and dropped. `element`
restates what the authors' code computes (gccnlp/Trans-PEFT @cbd3a24, modeling_qwen2.py): a new
float mask of the whole activation, and a draw of Python's `random` for each layer.

    python benchmarks/perturbation.py [--pairs 15] [--clock wall|process] [--only NAME ...]
"""

import argparse
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from peak_memory import peak_memory_mib
from peft import LoraConfig, PeftModel, get_peft_model
from ratios import (
    Clock,
    keep_freed_memory,
    machine,
    middle,
    paired,
    parser,
    prepare,
    record,
)
from transformers import LlamaConfig, LlamaForCausalLM

from trans_peft.domain.recipe import Perturbation
from trans_peft.perturbation import perturbed

Arm = Callable[[PeftModel, int], AbstractContextManager]
"""Returns the context of a training step, given the model and the number of completed steps."""


def under(perturbation: Perturbation) -> Arm:
    return lambda model, steps: perturbed(model, perturbation, seed=1, step=steps)


@contextmanager
def element_wise(model: PeftModel, masking_p: float, dropping_p: float) -> Iterator[None]:
    ffns = [layer.mlp for layer in model.get_base_model().model.layers]

    def forward_of(ffn: torch.nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
        def forward(x: torch.Tensor) -> torch.Tensor:
            if random.random() < dropping_p:
                return torch.zeros_like(x)
            neurons = ffn.act_fn(ffn.gate_proj(x)) * ffn.up_proj(x)
            return ffn.down_proj(neurons * (torch.rand_like(neurons) > masking_p).float())

        return forward

    for ffn in ffns:
        ffn.forward = forward_of(ffn)
    try:
        yield
    finally:
        for ffn in ffns:
            del ffn.forward


def element(model: PeftModel, steps: int) -> AbstractContextManager:
    return element_wise(model, 0.2, 0.2)


def plain(model: PeftModel, steps: int) -> AbstractContextManager:
    return nullcontext()


off = under(Perturbation())
neuron = under(Perturbation(0.2, 0.2))
dropping = under(Perturbation(0.0, 0.1))
PAIRS: dict[str, tuple[Arm, Arm]] = {
    "train_step.neuron_0.2_0.2_vs_plain": (neuron, plain),
    "train_step.dropping_0.1_vs_plain": (dropping, plain),
    "train_step.neuron_vs_element_0.2_0.2": (neuron, element),
    "train_step.element_0.2_0.2_vs_plain": (element, plain),
    "train_step.off_vs_plain": (off, plain),
}
LEFT = {neuron: 0.8 * 0.8, dropping: 0.9, element: 0.8}
"""The share of the FFNs' computation that remains with masking and dropping."""

ALL_DROPPED = under(Perturbation(dropping_p=1 - 1e-12))
MEMORY = "train_memory.neuron_vs_plain"
BATCH, LENGTH = 8, 128


def smollm2(layers: int = 30) -> PeftModel:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=layers,
            num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True,
        )
    )  # fmt: skip
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    config = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, target_modules=targets)
    return get_peft_model(model, config).train()


class Step:
    """A training step of a model in one arm. Each call is the next step."""

    def __init__(self, model: PeftModel, arm: Arm) -> None:
        self.model, self.arm, self.steps = model, arm, 0
        self.ids = torch.randint(0, 49152, (BATCH, LENGTH))
        self.optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])

    def __call__(self, clock: Clock) -> float:
        with self.arm(self.model, self.steps):
            started = clock()
            self.model(input_ids=self.ids, labels=self.ids).loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            seconds = clock() - started
        self.steps += 1
        return seconds


def time_ratio(
    model: PeftModel, first: Arm, second: Arm, pairs: int, clock: Clock
) -> dict[str, float]:
    a, b = Step(model, first), Step(model, second)
    return middle(paired(lambda: a(clock), lambda: b(clock), pairs))


def peak_mib(which: str) -> float:
    """Run one arm in a process of its own and return its peak resident memory in MiB."""
    output = subprocess.run(
        [sys.executable, __file__, "--peak", which], capture_output=True, text=True, check=True
    ).stdout
    return float(output.split()[-1])


def main() -> None:
    options_of = parser(__doc__, pairs=15)
    options_of.add_argument("--only", nargs="*", choices=(*PAIRS, MEMORY), default=[*PAIRS, MEMORY])
    options_of.add_argument("--peak", choices=("neuron", "plain"), help=argparse.SUPPRESS)
    options = options_of.parse_args()
    clock = prepare(options)
    model = smollm2()
    if options.peak:
        step = Step(model, neuron if options.peak == "neuron" else plain)
        step(time.perf_counter)
        step(time.perf_counter)
        print(peak_memory_mib())
        return
    keep_freed_memory()
    shape = f"SmolLM2-135M, fp32, LoRA r 16 on q,k,v,o, batch {BATCH} x {LENGTH} tokens"
    facts = machine(options, shape)
    saving = any(
        name.endswith("vs_plain") and name.startswith("train_step.") for name in options.only
    )
    ffn_share = 0.0
    if saving:
        ffn_share = 1 - time_ratio(model, ALL_DROPPED, plain, 3, clock)["ratio"]
        print(f"the FFNs' share of a step: {ffn_share:.3f}", flush=True)
    for name in options.only:
        if name == MEMORY:
            entry = middle([peak_mib("neuron") / peak_mib("plain") for _ in range(3)])
        else:
            first, second = PAIRS[name]
            entry = time_ratio(model, first, second, options.pairs, clock)
            if first in LEFT and second is plain:
                entry["floor"] = round(1 - ffn_share * (1 - LEFT[first]), 4)
        record(name, entry, facts)


if __name__ == "__main__":
    main()
