"""Make base v2: train v1 further on Python source code from this machine.

This is a small update of a language model, made locally because no hub is used: next-token
prediction, AdamW, cosine schedule, a fixed number of tokens. Neither the training text nor the
held-out text contains a file that supplied an evaluation row or repeats one. The same seed, files,
torch and processor give the same v2.

    python -m demo.update --base V1 --to V2 --report update.json --held-out DATA [...]
"""

import argparse
import json
import math
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from demo.sources import rank, source_files
from demo.tasks import HeldOut, read_held_out

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

__all__ = ["UpdateSettings", "main", "update", "update_text"]


@dataclass(frozen=True)
class UpdateSettings:
    """Settings of an update. It trains on `steps * rows * length` tokens.

    `weights` selects the weights to train: all, or only those of the FFNs.
    """

    steps: int = 40
    learning_rate: float = 3e-4
    rows: int = 4
    length: int = 256
    warmup_steps: int = 4
    weight_decay: float = 0.01
    seed: int = 0
    held_out_rows: int = 32
    tokens_per_file: int = 2_048
    weights: Literal["all", "ffn"] = "all"

    @property
    def trained(self) -> str:
        """The trained weights, as text."""
        return {"all": "all weights", "ffn": "the weights of the FFNs"}[self.weights]

    @property
    def tokens(self) -> int:
        """Number of tokens in training."""
        return self.steps * self.rows * self.length


def update_text(held_out: HeldOut, seed: int) -> Iterator[str]:
    """Yield the texts of source files, shuffled by the seed, without those that evaluation uses."""
    for file in sorted(source_files(), key=lambda file: rank(file.name, seed)):
        if not held_out.touches(file):
            yield file.text


def update(
    base: Path, folder: Path, settings: UpdateSettings, held_out: HeldOut
) -> dict[str, float]:
    """Train `base` further and write the new version (bfloat16, same tokenizer files) to `folder`.

    Returns the figures of the update: tokens, held-out loss before and after (nats per token), and
    the relative change (|new - old| / |old|, in percent) of attention, FFN and other weights.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from trans_peft.bases.drift import weight_drift
    from trans_peft.perturbation.ffn import find_layers

    logging.disable_progress_bar()
    torch.manual_seed(settings.seed)
    tokenizer = AutoTokenizer.from_pretrained(base)
    rows_needed = settings.held_out_rows + settings.steps * settings.rows
    rows = _rows(update_text(held_out, settings.seed), tokenizer, rows_needed, settings)
    test, train = rows[: settings.held_out_rows], rows[settings.held_out_rows :]
    print(f"update: {settings.tokens:,} tokens of Python source to train on", flush=True)

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.config.use_cache = False
    before = _loss(model, test)
    print(f"update: held-out loss of v1 {before:.3f}", flush=True)
    if settings.weights == "ffn":
        model.requires_grad_(False)
        for layer in find_layers(model)[1]:
            for unit in layer.ffn:
                for module in unit.modules:
                    module.requires_grad_(True)
    _train(model, train, settings)
    after = _loss(model, test)
    model.config.use_cache = True
    partial = folder / "partial"
    model.to(torch.bfloat16).save_pretrained(partial)
    for file in sorted(base.iterdir()):
        if file.suffix != ".safetensors":
            shutil.copyfile(file, folder / file.name)
    weights = partial / "model.safetensors"
    weights.replace(folder / weights.name)  # last: it marks the folder as complete
    shutil.rmtree(partial)

    drift = weight_drift(base, folder)
    figures = {
        "tokens": settings.tokens,
        "held_out_loss_before": before,
        "held_out_loss_after": after,
        "drift_attention_percent": 100 * drift.attention,
        "drift_ffn_percent": 100 * drift.ffn,
        "drift_other_percent": 100 * drift.other,
    }
    print("update: " + ", ".join(f"{name} {value:,.4g}" for name, value in figures.items()))
    return figures


def _rows(
    texts: Iterator[str], tokenizer: "object", count: int, settings: UpdateSettings
) -> "torch.Tensor":
    """Return (count, length) tokens from the beginnings of files, with an end token after each."""
    import torch

    stream: list[int] = []
    while len(stream) < count * settings.length:
        encoded = tokenizer(next(texts))["input_ids"]  # type: ignore[operator]
        stream += [*encoded[: settings.tokens_per_file], tokenizer.eos_token_id]  # type: ignore[attr-defined]
    return torch.tensor(stream[: count * settings.length]).view(count, settings.length)


def _bfloat16() -> "torch.autocast":
    """Compute in bfloat16 if the processor multiplies it natively, which halves the time."""
    import torch

    native = "amx_bf16" in _processor_flags() or "avx512_bf16" in _processor_flags()
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=native)


def _processor_flags() -> str:
    info = Path("/proc/cpuinfo")
    return info.read_text() if info.exists() else ""


def _loss(model: "PreTrainedModel", rows: "torch.Tensor") -> float:
    import torch

    model.eval()
    with torch.no_grad(), _bfloat16():
        losses = [model(input_ids=part, labels=part).loss.item() for part in rows.split(4)]
    return sum(losses) / len(losses)


def _train(model: "PreTrainedModel", rows: "torch.Tensor", settings: UpdateSettings) -> None:
    import torch

    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(
        trained,
        lr=settings.learning_rate,
        betas=(0.9, 0.95),
        weight_decay=settings.weight_decay,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: _share_of_rate(step, settings)
    )
    model.train()
    started = last_line = time.monotonic()
    for step, batch in enumerate(rows.split(settings.rows), start=1):
        with _bfloat16():
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        now = time.monotonic()
        if now - last_line > 2 or step == settings.steps:
            last_line, left = now, (now - started) / step * (settings.steps - step)
            print(
                f"update: step {step}/{settings.steps}, loss {loss.item():.3f}, "
                f"{step * batch.numel() / (now - started):.0f} tokens/s, {left:.0f} s left",
                flush=True,
            )


def _share_of_rate(step: int, settings: UpdateSettings) -> float:
    """Linear warm-up, then a cosine down to a tenth."""
    if step < settings.warmup_steps:
        return (step + 1) / settings.warmup_steps
    done = (step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * done))


def main(arguments: Sequence[str] | None = None) -> None:
    """Make v2. This runs in a separate process, so that its memory is free afterwards."""
    parser = argparse.ArgumentParser(description="train a base further")
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--to", type=Path, required=True)
    parser.add_argument("--report", type=Path, required=True)
    parser.add_argument("--held-out", type=Path, nargs="+", required=True)
    parser.add_argument("--settings", default="{}", help="fields of UpdateSettings, as JSON")
    given = parser.parse_args(arguments)
    settings = UpdateSettings(**json.loads(given.settings))

    started = time.monotonic()
    given.to.mkdir(parents=True, exist_ok=True)
    figures = update(given.base, given.to, settings, read_held_out(given.held_out))
    seconds = time.monotonic() - started
    report = {"settings": asdict(settings), "figures": figures, "seconds": seconds}
    given.report.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    os.environ["TQDM_DISABLE"] = "1"
    main()
