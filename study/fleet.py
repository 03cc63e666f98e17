"""Train a fleet of adapters of eight kinds on a real model, and make its suites.

The bases and rows are those of `make study`. Other files are below `decode` and `fleet` in the
study's folder. The adapters are trained to write the whole `raise` statement, about 15 tokens, from
a message. A second suite scores only the class of the exception, the start of the statement.
`study.upgrade` runs this fleet through the flows, with the second suite. The benchmarks measure its
evaluation.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from demo.sources import source_files
from demo.tasks import read_held_out, split
from demo.update import UpdateSettings
from demo.update import update as train_on
from study.cells import prepare
from study.plan import DATA_SEED, TASKS
from trans_peft.data import Example, parse_examples, write_examples
from trans_peft.domain.adapter import AdapterSpec
from trans_peft.domain.data import DataSource
from trans_peft.domain.evaluation import Suite
from trans_peft.domain.recipe import OptimizerSettings, TrainingRecipe
from trans_peft.training.events import Event, TrainingMetrics
from trans_peft.training.job import TrainingJob
from trans_peft.training.launch import fit

MOST, STOP = 64, ("\n",)
STEPS = 60
"""The loss of an adapter of 120 steps did not fall after 60."""
FAMILY = "smollm2-135m"
PATCH = "patch"
"""The study's update `all` with a tenth of its learning rate, chosen before any evaluation."""

_ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
_FFN = ["gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Kind:
    """An adapter spec, and a learning rate at which it learns the suite in few steps."""

    spec: AdapterSpec
    learning_rate: float = 1e-3


def _lora(r: int, targets: list[str], **options: bool) -> AdapterSpec:
    return AdapterSpec("LORA", {"r": r, "lora_alpha": 2 * r, "target_modules": targets} | options)


KINDS: Mapping[str, Kind] = {
    "lora-16": Kind(_lora(16, _ATTENTION)),
    "ia3": Kind(
        AdapterSpec(
            "IA3",
            {
                "target_modules": ["k_proj", "v_proj", "down_proj"],
                "feedforward_modules": ["down_proj"],
            },
        ),
        learning_rate=1e-2,
    ),
    "bottleneck-64": Kind(AdapterSpec("BOTTLENECK", {"bottleneck_dim": 64})),
    "dora-16": Kind(_lora(16, _ATTENTION, use_dora=True)),
    "lora-4-qv": Kind(_lora(4, ["q_proj", "v_proj"])),
    "lora-32-all": Kind(_lora(32, [*_ATTENTION, *_FFN])),
    "lora-8-ffn": Kind(_lora(8, _FFN)),
    "bottleneck-16": Kind(AdapterSpec("BOTTLENECK", {"bottleneck_dim": 16})),
}


def bases_and_rows(study: Path, update: str) -> None:
    """Make the bases and rows of the study, and the update `PATCH`, unless they exist (minutes)."""
    needed = {study / "bases" / "v1" / "model.safetensors", study / "rows" / "exceptions"}
    if update != PATCH:
        needed.add(study / "bases" / update / "figures.json")
    if not all(path.exists() for path in needed):
        prepare(study)
    if update == PATCH and not (study / "patch.json").exists():
        folder = study / "bases" / PATCH
        folder.mkdir(exist_ok=True)
        held_out = read_held_out(study / "rows" / name for name in TASKS)
        settings = UpdateSettings(steps=32, learning_rate=3e-5, seed=0)
        figures = train_on(study / "bases" / "v1", folder, settings, held_out)
        (study / "patch.json").write_text(json.dumps(figures, indent=1))  # last


def statements(study: Path) -> dict[str, Path]:
    """Write rows whose answer is the whole statement. Return the files `train` and `eval`."""
    files = {}
    for name in ("train", "eval"):
        source = study / "rows" / "exceptions" / f"{name}.jsonl"
        rows = []
        for example in parse_examples(source.read_bytes(), source.name):
            message = example.prompt.removeprefix("# ").partition("\n")[0]
            if '"' not in message:
                answer = f' {example.completion.strip()}("{message}")\n'
                rows.append(replace(example, completion=answer))
        files[name] = write_examples(rows, study / "decode" / f"{name}.jsonl")
    return files


def suite(rows: Path) -> Suite:
    """Return the suite of statements, not pinned."""
    return Suite("raise", DataSource(str(rows)), max_new_tokens=MOST, stop=STOP, keep_answers=True)


def classes(study: Path) -> Path:
    """Write 1,037 rows whose answer is a class (half a minute). Return their file.

    They are from the files for evaluation, so no adapter was trained on them. An update may have
    been trained on those that are not rows of the study.
    """
    file = study / "fleet" / "classes.jsonl"
    if not file.exists():
        task = replace(TASKS["exceptions"], evaluation_per_label=160)
        rows = [
            Example(row.id, row.example.prompt, row.example.completion.rstrip())
            for row in split(task, source_files(), DATA_SEED).evaluation
        ]
        file.parent.mkdir(parents=True, exist_ok=True)
        write_examples(rows, file)
    return file


def class_suite(rows: Path) -> Suite:
    """Return the suite of classes, not pinned."""
    ends = ("(", *STOP)
    return Suite("class", DataSource(str(rows)), max_new_tokens=8, stop=ends, keep_answers=True)


def recipe(kind: str, seed: int, steps: int = STEPS) -> TrainingRecipe:
    """Return the recipe of an adapter of the fleet. The URIs of its data are placeholders."""
    return TrainingRecipe(
        adapter="raise",
        family=FAMILY,
        base_version="v1",
        data=DataSource("raise/train.jsonl"),
        suites=(Suite("raise", DataSource("raise/eval.jsonl"), max_new_tokens=MOST),),
        spec=KINDS[kind].spec,
        optimizer=OptimizerSettings(
            learning_rate=KINDS[kind].learning_rate,
            steps=steps,
            batch_size=8,
            warmup_steps=steps // 6,
            max_length=128,
        ),
        seed=seed,
    )


def adapter(
    study: Path, rows: Mapping[str, Path], kind: str, seed: int, steps: int = STEPS
) -> Path:
    """Train an adapter on base v1, unless it exists (minutes). Return its folder."""

    def show(event: Event) -> None:
        if isinstance(event, TrainingMetrics) and event.step % 20 == 0:
            print(f"{kind}, seed {seed}: {event}", flush=True)

    work = study / "fleet" / f"{kind}-{seed}"
    job = TrainingJob(
        recipe(kind, seed, steps), study / "bases" / "v1", "v1", "study", rows["train"], work
    )
    return fit(job, on_event=show).folder


def fleet(study: Path, rows: Mapping[str, Path], count: int) -> dict[str, Path]:
    """Return the folders of `count` adapters by name: one of each kind, then with other seeds."""

    def in_order() -> Iterator[tuple[str, int]]:
        for seed in range(1, count + 1):
            for kind in KINDS:
                yield kind, seed

    return {
        f"{kind}-{seed}": adapter(study, rows, kind, seed)
        for kind, seed in islice(in_order(), count)
    }
