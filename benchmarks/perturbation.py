"""What perturbing costs and saves: one LoRA train step of a SmolLM2-size Llama, in pairs.

How a ratio is taken: `ratios`. `floor` is the ratio at which exactly the FFN's share of the step,
measured by dropping every FFN, shrinks by what is masked and dropped.

    python benchmarks/perturbation.py [--pairs 15] [--clock wall|process] [--only NAME ...]
"""

import argparse
import resource
import subprocess
import sys
import time
from contextlib import nullcontext

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from ratios import Clock, machine, middle, paired, parser, prepare, record
from transformers import LlamaConfig, LlamaForCausalLM

from trans_peft.domain.recipe import Perturbation
from trans_peft.perturbation import perturbed

PLAIN = None
OFF = Perturbation()
NEURON = Perturbation(0.2, 0.2)
ELEMENT = Perturbation(0.2, 0.2, granularity="element")
DROPPING = Perturbation(0.0, 0.1)
PAIRS = {
    "train_step.neuron_0.2_0.2_vs_plain": (NEURON, PLAIN),
    "train_step.dropping_0.1_vs_plain": (DROPPING, PLAIN),
    "train_step.neuron_vs_element_0.2_0.2": (NEURON, ELEMENT),
    "train_step.off_vs_plain": (OFF, PLAIN),
}
ALL_DROPPED = Perturbation(dropping_p=1 - 1e-12)
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
    """One train step of a model under one perturbation, at the next moment each time."""

    def __init__(self, model: PeftModel, perturbation: Perturbation | None) -> None:
        self.model, self.perturbation, self.steps = model, perturbation, 0
        self.ids = torch.randint(0, 49152, (BATCH, LENGTH))
        self.optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])

    def __call__(self, clock: Clock) -> float:
        around = (
            nullcontext()
            if self.perturbation is None
            else perturbed(self.model, self.perturbation, seed=1, step=self.steps)
        )
        with around:
            started = clock()
            self.model(input_ids=self.ids, labels=self.ids).loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            seconds = clock() - started
        self.steps += 1
        return seconds


def time_ratio(
    model: PeftModel,
    first: Perturbation | None,
    second: Perturbation | None,
    pairs: int,
    clock: Clock,
) -> dict[str, float]:
    a, b = Step(model, first), Step(model, second)
    return middle(paired(lambda: a(clock), lambda: b(clock), pairs))


def floor(perturbation: Perturbation, ffn_share: float) -> float:
    left = (1 - perturbation.masking_p) * (1 - perturbation.dropping_p)
    return round(1 - ffn_share * (1 - left), 4)


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
        step = Step(model, NEURON if options.peak == "neuron" else PLAIN)
        step(time.perf_counter)
        step(time.perf_counter)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        return
    shape = f"SmolLM2-135M, fp32, LoRA r 16 on q,k,v,o, batch {BATCH} x {LENGTH} tokens"
    facts = machine(options, shape)
    saving = any(
        name.endswith("vs_plain") and name.startswith("train_step.") for name in options.only
    )
    ffn_share = 0.0
    if saving:
        ffn_share = 1 - time_ratio(model, ALL_DROPPED, PLAIN, 3, clock)["ratio"]
        print(f"the FFNs' share of a step: {ffn_share:.3f}", flush=True)
    for name in options.only:
        if name == MEMORY:
            entry = middle([peak_mib("neuron") / peak_mib("plain") for _ in range(3)])
        else:
            first, second = PAIRS[name]
            entry = time_ratio(model, first, second, options.pairs, clock)
            if second is PLAIN and first is not OFF:
                entry["floor"] = floor(first, ffn_share)
        record(name, entry, facts)


if __name__ == "__main__":
    main()
