"""The methods that `benchmarks.validate` compares. Each is a function of the workload."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from benchmarks.peak_memory import peak_memory_mib
from benchmarks.ratios import CLOCKS
from benchmarks.workload import Workload
from study.fleet import FAMILY
from trans_peft.data import pin, read_examples
from trans_peft.domain.data import DataSource
from trans_peft.domain.evaluation import BARE, Suite
from trans_peft.domain.outcome import Reason, TransferTask
from trans_peft.lifecycle.evaluation import tokenized_suite_for
from trans_peft.lifecycle.reconcile import observe_adapter
from trans_peft.lifecycle.transfer import transfer
from trans_peft.models import load_base, load_tokenizer
from trans_peft.transfer.load_adapter import attached
from trans_peft.validation.evaluate import answer, context_of, evaluate
from trans_peft.validation.tokenized_suite import prepare


class AdapterTimer:
    """The seconds that a method takes for each adapter. Its remaining time is shared by all."""

    def __init__(self, workload: Workload) -> None:
        self.seconds: dict[str, float] = {}
        self._clock = CLOCKS[workload.task.clock]

    @contextmanager
    def of(self, adapter: str) -> Iterator[None]:
        started = self._clock()
        yield
        self.seconds[adapter] = self._clock() - started


class TransformersGenerate:
    """`generate` of transformers in left-padded batches, in the given order or sorted by length."""

    def __init__(self, workload: Workload, *, by_length: bool) -> None:
        self.tokenizer = load_tokenizer(workload.folder)
        self.suite, self.batch = workload.suite, workload.task.batch
        examples = read_examples(
            workload.suite.data, workload.platform.store, limit=workload.suite.limit
        )
        self.prompts = [example.prompt_ids(self.tokenizer) for example in examples]
        self.order = list(range(len(self.prompts)))
        if by_length:
            self.order.sort(key=lambda i: -len(self.prompts[i]))

    def answers(self, model: Any) -> list[str]:
        """Return the answers in the suite's order."""
        own = model.generation_config.eos_token_id
        ends = {*(own if isinstance(own, list) else [own]), self.tokenizer.eos_token_id} - {None}
        texts = [""] * len(self.order)
        for start in range(0, len(self.order), self.batch):
            batch = self.order[start : start + self.batch]
            inputs = self.tokenizer.pad(
                {"input_ids": [self.prompts[i] for i in batch]},
                padding_side="left",
                return_tensors="pt",
            )
            out = model.generate(
                **inputs,
                do_sample=False,
                max_new_tokens=self.suite.max_new_tokens,
                eos_token_id=sorted(ends),
                pad_token_id=self.tokenizer.pad_token_id,
                stop_strings=list(self.suite.stop),
                tokenizer=self.tokenizer,
            )
            width = inputs["input_ids"].shape[1]
            decoded = self.tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)
            for i, text in zip(batch, decoded, strict=True):
                stops = [text.find(stop) for stop in self.suite.stop if stop in text]
                texts[i] = text[: min([len(text), *stops])]
        return texts


def reload(workload: Workload) -> dict[str, Any]:
    """Load base and adapter again for each adapter."""
    laps, loads = AdapterTimer(workload), AdapterTimer(workload)
    peer, texts = TransformersGenerate(workload, by_length=False), {}
    bare = peer.answers(from_pretrained(workload))
    for name, folder in workload.task.adapters.items():
        with laps.of(name):
            with loads.of(name):
                model = PeftModel.from_pretrained(from_pretrained(workload), folder).eval()
            texts[name] = peer.answers(model)
            del model
    loading_s = sum(loads.seconds.values())
    return {"adapters": workload.judged(texts, bare), "laps": laps.seconds, "loading_s": loading_s}


def set_adapter(workload: Workload) -> dict[str, Any]:
    """Load the base once, with all adapters of one type on it. One adapter is active at a time."""
    laps, peer, texts = AdapterTimer(workload), TransformersGenerate(workload, by_length=True), {}
    model = from_pretrained(workload)
    bare = peer.answers(model)
    by_type: dict[str, list[str]] = {}
    for name, folder in workload.task.adapters.items():
        config = json.loads((Path(folder) / "adapter_config.json").read_text())
        by_type.setdefault(config["peft_type"], []).append(name)
    for first, *others in by_type.values():
        folders = workload.task.adapters
        adapted = PeftModel.from_pretrained(model, folders[first], adapter_name=first).eval()
        for name in others:
            adapted.load_adapter(folders[name], adapter_name=name)
        for name in (first, *others):
            with laps.of(name):
                adapted.set_adapter(name)
                texts[name] = peer.answers(adapted)
        model = adapted.unload()
    in_order = {name: texts[name] for name in workload.task.adapters}
    return {"adapters": workload.judged(in_order, bare), "laps": laps.seconds}


def plain(workload: Workload) -> dict[str, Any]:
    """This project's decoding on one base, without drafts."""
    base = load_base(workload.folder, workload.suite.dtype)
    examples = read_examples(
        workload.suite.data, workload.platform.store, limit=workload.suite.limit
    )
    asked = prepare(base.tokenizer, workload.suite, examples, context=context_of(base.model))
    asked = replace(asked, expected=tuple([] for _ in asked.examples))

    def answers(model: Any) -> list[str]:
        found = answer(
            model,
            asked,
            weights_sha256=BARE,
            base_fingerprint_sha256="",
            batch_size=workload.task.batch,
        )
        return [item.answer or "" for item in found.items]

    laps, bare, texts = AdapterTimer(workload), answers(base.model), {}
    for name, folder in workload.task.adapters.items():
        with laps.of(name), attached(base.model, Path(folder)) as model:
            texts[name] = answers(model)
    return {"adapters": workload.judged(texts, bare), "laps": laps.seconds}


def transfer_every_adapter(workload: Workload, *, sequential: bool = False) -> dict[str, Any]:
    """Transfer each adapter, as a shard does."""
    policy = replace(workload.policy, sequential=sequential)
    laps, found = AdapterTimer(workload), {}
    for name, version in workload.versions.items():
        with laps.of(name):
            workload.platform.evaluations.put(workload.reference(name))  # stored, as on a platform
            task = TransferTask(name, version.number, workload.new.ref, Reason.NO_VERDICT)
            fleet = observe_adapter(name, FAMILY, workload.platform)
            outcome = transfer(task, fleet, policy, workload.platform)
        on_new_base = [
            e
            for e in outcome.evaluations
            if e.weights_sha256 == version.weights_sha256
            and e.base_fingerprint_sha256 == workload.new.fingerprint_sha256
        ]
        answers = [item.answer for e in on_new_base for item in e.items]
        found[name] = {"verdict": str(outcome.verdict), "answers": answers}
    return {"adapters": found, "laps": laps.seconds}


def from_pretrained(workload: Workload) -> Any:
    return AutoModelForCausalLM.from_pretrained(workload.folder, dtype=torch.float32).eval()


def references(workload: Workload) -> dict[str, Any]:
    for name in workload.task.adapters:
        print(f"{name} on v1: {workload.reference(name).score:.1f} % right", file=sys.stderr)
    return {}


def attach_and_detach(workload: Workload, count: int) -> dict[str, Any]:
    """Attach, answer and detach `count` times. Return the peak memory of the process."""
    base = load_base(workload.folder, workload.suite.dtype)
    asked = tokenized_suite_for(workload.suite, base, workload.platform)
    folders = list(workload.task.adapters.values())
    for turn in range(count):
        with attached(base.model, Path(folders[turn % len(folders)])) as model:
            answer(model, asked, weights_sha256=str(turn), base_fingerprint_sha256="")
    peak = peak_memory_mib() * 2**20
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
    return {"peak_bytes": peak}


_TASK = """
task: which_exception
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{choices.index(completion)}}}}"
target_delimiter: ""
metric_list: [{{metric: acc}}]
metadata: {{version: 1.0}}
"""


def which_exception(workload: Workload) -> Path:
    """Write the suite's messages with the classes as choices, and a task of the harness."""
    examples = read_examples(
        workload.suite.data, workload.platform.store, limit=workload.suite.limit
    )
    answers = {example.id: example.completion.partition("(")[0] for example in examples}
    choices = sorted(set(answers.values()))
    folder = (
        Path(workload.task.study)
        / "fleet"
        / f"which-exception-{workload.task.answers}-{len(examples)}"
    )
    folder.mkdir(exist_ok=True)
    rows = [
        {"id": e.id, "prompt": e.prompt, "completion": answers[e.id], "choices": choices}
        for e in examples
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "task.yaml").write_text(_TASK.format(rows=(folder / "rows.jsonl").resolve()))
    return folder


def choose(workload: Workload) -> dict[str, Any]:
    """Choose by likelihood with this project, from loading to the score."""
    source = pin(DataSource(str(which_exception(workload) / "rows.jsonl")), workload.platform.store)
    base = load_base(workload.folder, "float32")
    with attached(base.model, Path(next(iter(workload.task.adapters.values())))) as model:
        found = evaluate(
            model,
            base.tokenizer,
            Suite("which_exception", source, scoring="choice"),
            read_examples(source, workload.platform.store),
            weights_sha256="",
            base_fingerprint_sha256="",
            batch_size=workload.task.batch,
        )
    return {"score": found.score, "right": [item.correct for item in found.items]}


def harness(workload: Workload) -> dict[str, Any]:
    """Choose by likelihood with lm-evaluation-harness and `peft=`."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    folder = which_exception(workload)
    results = simple_evaluate(
        model="hf",
        model_args={
            "pretrained": str(workload.folder),
            "peft": next(iter(workload.task.adapters.values())),
            "dtype": "float32",
        },
        tasks=["which_exception"],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        batch_size=workload.task.batch,
        device="cuda" if torch.cuda.is_available() else "cpu",
        bootstrap_iters=0,
    )
    right = [bool(sample["acc"]) for sample in results["samples"]["which_exception"]]
    return {"score": 100 * results["results"]["which_exception"]["acc,none"], "right": right}


ARMS: dict[str, Callable[[Workload], dict[str, Any]]] = {
    "reload": reload,
    "set": set_adapter,
    "plain": plain,
    "whole": transfer_every_adapter,
    "early": lambda workload: transfer_every_adapter(workload, sequential=True),
}
HARNESS: dict[str, Callable[[Workload], dict[str, Any]]] = {"choose": choose, "harness": harness}
