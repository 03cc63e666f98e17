"""Train adapters under random shares of an update of the FFNs: `python -m study.directions`.

The alternative to masking: while an adapter is trained, the FFN weights of its base are moved along
the direction of an update, by a share that is drawn anew at every step. The direction is a short
training of the FFNs on other text than that of the study's update `ffn`. The control moves each
weight matrix along a random direction of the same norm, drawn once. The scores are in
study/distilled.jsonl, beside those of masking.
"""

import argparse
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from unittest.mock import patch

import torch
from accelerate import PartialState
from torch import Tensor, nn

from demo.tasks import read_held_out
from demo.update import UpdateSettings
from study.cells import Prepared, end_with_parent, log, prepare, write_update
from study.distillation import SCORES, missing_scores
from study.plan import STEPS, TASKS, UPDATES, V1, PlannedTraining
from study.score_file import ScoreFile
from trans_peft.bases.drift import weight_pairs
from trans_peft.domain.recipe import Perturbation
from trans_peft.training import finetune
from trans_peft.training.events import EventMessage
from trans_peft.training.job import TrainingResult

__all__ = ["ARMS", "Direction", "moved"]

HISTORY, UNSEEN = "ffn-24", "ffn"
SETTINGS: UpdateSettings = replace(UPDATES["ffn"], steps=24, seed=21)


@dataclass(frozen=True)
class Direction:
    """How far the FFN weights are moved: by u Delta, u uniform in [0, `up_to`] at every step."""

    up_to: float
    is_random: bool = False


ARMS: Mapping[str, Direction] = {
    "update x 1.5": Direction(1.5),
    "update x 4": Direction(4.0),
    "noise x 1.5": Direction(1.5, is_random=True),
}


def main() -> None:
    """Run what the score file lacks."""
    parser = argparse.ArgumentParser(prog="python -m study.directions", description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path(".study"), help="folder for all files")
    options = parser.parse_args()
    os.environ.update(TQDM_DISABLE="1", OMP_WAIT_POLICY="PASSIVE")
    end_with_parent()
    known = ScoreFile(SCORES)
    prepared = prepare(options.folder.resolve(), [UNSEEN])
    deltas = history(prepared)
    log(f"cosine with {UNSEEN}: {cosine(deltas, difference(prepared, UNSEEN)):.3f}")
    for task in TASKS:
        for name, direction in ARMS.items():
            planned = PlannedTraining(task, name, Perturbation(), STEPS[0], seed=1)
            result = trained(prepared, planned, direction, deltas)
            for score in missing_scores(prepared, planned, (V1, UNSEEN), result, known):
                known.append(score)
                log(f"{task}, {name}, on {score.scored_on}: {score.points:.1f}")


def history(prepared: Prepared) -> Mapping[str, Tensor]:
    """Return the changes of weights by the short update, which is made unless it exists."""
    held_out = read_held_out(prepared.rows(name) for name in TASKS)
    write_update(prepared.base(V1), prepared.base(HISTORY), SETTINGS, held_out)
    return difference(prepared, HISTORY)


def difference(prepared: Prepared, base: str) -> dict[str, Tensor]:
    """Return new - old of every weight that differs between v1 and a base, in float32."""
    pairs = weight_pairs(prepared.base(V1), prepared.base(base))
    return {name: new - old for name, old, new in pairs if not torch.equal(old, new)}


def cosine(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """Return the cosine of two changes over all weights that both have."""
    names = sorted(one.keys() & other.keys())
    first, second = (torch.cat([part[name].flatten() for name in names]) for part in (one, other))
    return torch.nn.functional.cosine_similarity(first, second, dim=0).item()


def trained(
    prepared: Prepared,
    planned: PlannedTraining,
    direction: Direction,
    deltas: Mapping[str, Tensor],
) -> TrainingResult:
    """Train an adapter in this process, with moved FFN weights in place of a perturbation."""
    job = prepared.job(planned)
    work_dir = prepared.folder / "directions" / f"{planned.task} {planned.arm}"
    job = replace(job, recipe=replace(job.recipe, dtype="float32"), work_dir=work_dir)
    if job.result_file.exists():
        return TrainingResult.read(job.result_file)
    work_dir.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def perturbed(model: nn.Module, *_: object, seed: int, **__: object) -> Iterator[None]:
        with moved(model, deltas, direction, seed):
            yield

    def show(event: EventMessage) -> None:
        step = getattr(event, "step", None)
        if step is not None and step % 20 == 0:
            log(f"{planned}: {event}")

    with patch.object(finetune, "perturbed", perturbed):
        finetune.finetune(job, PartialState(), show)
    return TrainingResult.read(job.result_file)


@contextmanager
def moved(
    model: nn.Module, deltas: Mapping[str, Tensor], direction: Direction, seed: int
) -> Iterator[Callable[[], float]]:
    """Move the weights of a base before each training step, and restore them at the end.

    Yields a function that returns the current share.
    """
    generator = torch.Generator().manual_seed(seed)
    moves = []
    for name, weight in model.named_parameters():
        plain = name.replace(".base_layer", "").removeprefix("base_model.model.")
        if plain in deltas:
            delta = deltas[plain]
            if direction.is_random:
                drawn = torch.randn(delta.shape, generator=generator)
                delta = drawn * (delta.norm() / drawn.norm())
            moves.append((weight, weight.detach().clone(), delta))
    share = 0.0

    def move(module: nn.Module, _: object) -> None:
        nonlocal share
        if not module.training:
            return
        share = direction.up_to * torch.rand((), generator=generator).item()
        with torch.no_grad():
            for weight, original, delta in moves:
                weight.copy_(original + share * delta)

    handle = model.register_forward_pre_hook(move)
    try:
        yield lambda: share
    finally:
        handle.remove()
        with torch.no_grad():
            for weight, original, _ in moves:
                weight.copy_(original)


if __name__ == "__main__":
    main()
