"""The fleet that `benchmarks.gpu` evaluates: in mixed batches, one by one, and by other programs.

All adapters are LoRA, because vLLM serves no other method, and have random weights. The right
answer of an item is the answer of the bare base, so that a score is the share of answers that the
adapter does not change.
"""

import json
import os
import subprocess
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_shapes import Shape, texts
from benchmarks.gpu_training import clock
from benchmarks.judge import Workload, save_random_adapter
from study.fleet import KINDS
from trans_peft.bases.fingerprint import fingerprint
from trans_peft.data import Example, pin, write_examples
from trans_peft.domain.base import BaseVersion
from trans_peft.domain.data import DataSource
from trans_peft.domain.evaluation import BARE, Suite
from trans_peft.edges.file_store import FileStore
from trans_peft.edges.memory import memory_platform
from trans_peft.lifecycle.base_files import base_folder
from trans_peft.lifecycle.evaluation import EvaluationSubject
from trans_peft.models import adapter_weights_sha256, load_base
from trans_peft.validation.evaluate import evaluate

FAMILY = "benchmark"
FLEET = ("lora-16", "lora-4-qv", "lora-8-ffn")
MAX_NEW_TOKENS = 4


@dataclass(frozen=True)
class JudgedFleet:
    """A fleet on a base with one suite, and where its files are."""

    shape: Shape
    base: Path
    work: Path
    rows: Path
    adapters: dict[str, Path]
    workload: Workload

    @classmethod
    def make(cls, shape: Shape, base: Path, work: Path) -> "JudgedFleet":
        """Write the adapters and the suite, whose right answers are those of the bare base."""
        work.mkdir()
        platform = replace(memory_platform(work / "platform"), store=FileStore())
        version = platform.catalog.make_ready(
            BaseVersion(FAMILY, "v1", str(base), 0),
            fingerprint=fingerprint(str(base), platform.store),
            source="benchmark",
        )
        loaded = load_base(base_folder(version, platform), shape.dtype)
        prompts = texts(shape.items, 16, 32, seed=2)
        examples = [Example(str(i), prompt, " w0") for i, prompt in enumerate(prompts)]
        suite = Suite(
            "short",
            DataSource(str(work / "rows.jsonl")),
            max_new_tokens=MAX_NEW_TOKENS,
            dtype=shape.dtype,
            keep_answers=True,
        )
        bare = evaluate(
            loaded.model,
            loaded.tokenizer,
            replace(suite, data=replace(suite.data, sha256="0" * 64)),
            examples,
            weights_sha256=BARE,
            base_fingerprint_sha256="",
        )
        # An empty answer is no valid row. No adapter is right there.
        examples = [
            replace(example, completion=" " + ((item.answer or "").strip() or "w0"))
            for example, item in zip(examples, bare.items, strict=True)
        ]
        rows = write_examples(examples, work / "rows.jsonl")
        adapters = {}
        for number in range(shape.adapters):
            kind = FLEET[number % len(FLEET)]
            adapters[f"{kind}-{number}"] = work / f"{kind}-{number}"
            save_random_adapter(loaded.model, kind, number, work / f"{kind}-{number}")
        suites = (replace(suite, data=pin(suite.data, platform.store)),)
        asked = [
            (EvaluationSubject(name, adapter_weights_sha256(folder), partial(Path, folder)), suites)
            for name, folder in adapters.items()
        ]
        return cls(shape, base, work, rows, adapters, Workload(platform, version, asked))

    def evaluated(self, *, together: bool) -> tuple[float, dict[str, float]]:
        """Return the seconds, and the score of each adapter."""
        seconds, found = self.workload.seconds(together=together, clock=clock)
        return seconds, dict(zip(self.adapters, (one.score for one in found), strict=True))

    def by_peer(self, peer: str, python: str, *, path: str = "") -> tuple[float, dict[str, float]]:
        """Return the seconds for all adapters, and scores, of another program.

        `python` runs it, with `path` before its own packages. Raises CalledProcessError.
        """
        names = [*self.adapters]
        if peer == "harness":
            names = names[: self.shape.harness_adapters]
        task: dict[str, Any] = {
            "base": str(self.base),
            "adapters": {name: str(self.adapters[name]) for name in names},
            "rows": str(self.rows),
            "work": str(self.work),
            "max_new_tokens": MAX_NEW_TOKENS,
            "stop": list(self.workload.asked[0][1][0].stop),
            "max_rank": max(KINDS[kind].spec.options["r"] for kind in FLEET),
            "dtype": self.shape.dtype,
            "batch": 32,
            "device": "cuda" if torch.cuda.is_available() else "cpu",
        }
        asked, answered = self.work / f"{peer}.json", self.work / f"{peer}-result.json"
        asked.write_text(json.dumps(task))
        script = Path(__file__).with_name("gpu_peers.py")
        subprocess.run(
            [python, script, peer, asked, answered],
            check=True,
            env={**os.environ, "PYTHONPATH": path},
        )
        found = json.loads(answered.read_text())
        return found["seconds"] * len(self.adapters) / len(names), found["scores"]


def equal_scores(ours: dict[str, float], theirs: dict[str, float]) -> str:
    """Return how many adapters have equal scores, and the largest difference in points."""
    differences = [abs(ours[name] - score) for name, score in theirs.items()]
    equal = sum(difference < 1e-6 for difference in differences)
    return f"{equal} of {len(theirs)} scores equal, largest difference {max(differences):.1f}"
