"""The steps of the demo, in the order in which they happen. Each can be repeated."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from mlflow import MlflowClient
from rich.padding import Padding
from rich.text import Text

from demo.base import FAMILY
from demo.deployments import run
from demo.picture import draw
from demo.programs import run_module
from demo.results import Result, notes, results, table
from demo.screen import Screen
from demo.settings import DATA_SEED, POLICY, PROMOTION, UPDATE, Chapter, recipes
from demo.sources import source_files
from demo.tasks import split, write
from demo.upload import upload
from infra.stack.settings import StackSettings
from tasks.composition import platform
from trans_peft.bases.publish import publish
from trans_peft.domain.base import BaseVersion
from trans_peft.domain.conventions import CHAMPION_ALIAS, SERVING_ALIAS, Deployment
from trans_peft.domain.recipe import TrainingRecipe
from trans_peft.errors import NotFoundError
from trans_peft.lifecycle.evaluation import EvaluationProgress, evaluate_on, pin_suites
from trans_peft.lifecycle.report import report
from trans_peft.lifecycle.resolve import find_base
from trans_peft.lifecycle.train import resolve_recipe

__all__ = ["Story"]

_ROWS = ("train.jsonl", "eval.jsonl", "held_out.json")


class Story:
    """One telling: a stack that runs, a screen, the chapters (one task each).

    `update_to` is the new version's name. An update leaves out the evaluation rows of its own
    chapters alone, so tellings with other chapters make versions of their own.
    """

    def __init__(
        self, stack: StackSettings, screen: Screen, chapters: Sequence[Chapter], update_to: str
    ) -> None:
        self._stack = stack
        self._screen = screen
        self._chapters = chapters
        self._update_to = update_to
        self._folder = stack.state / "demo"
        self._mlflow = MlflowClient()

    def base_v1(self) -> None:
        """Publish SmolLM2-135M as v1."""
        self._screen.chapter("Base v1", "SmolLM2-135M-Instruct, published and verified")
        if self._ready("v1") is None:
            run_module(["demo.base", str(self._folder / "v1")], self._screen)
            publish(
                self._folder / "v1",
                _uri("v1"),
                family=FAMILY,
                version="v1",
                store=platform().store,
                on_progress=self._screen.progress_reporter("hashed and sent", "MB", 1e6),
            )
            self._screen.say(f"published at {_uri('v1')}")
        self._ingest("v1")

    def data(self) -> None:
        """Mine the rows of every task and upload them."""
        self._screen.chapter("Data", "from the Python packages on this machine")
        files = None
        for chapter in self._chapters:
            folder = self._rows_of(chapter)
            if not all((folder / name).exists() for name in _ROWS):
                if files is None:
                    self._screen.say("reading the source of the installed packages")
                    files = list(source_files())
                self._screen.say(f"{chapter.task.name}: mining {len(files):,} files")
                write(split(chapter.task, files, DATA_SEED), folder)
            counts = []
            for name in ("train.jsonl", "eval.jsonl"):
                with (folder / name).open("rb") as rows:
                    counts.append(len(rows.readlines()))
                    rows.seek(0)
                    platform().store.write(f"{chapter.folder_uri}/{name}", rows)
            self._screen.done(
                f"{chapter.task.name}: {counts[0]:,} rows to train on, {counts[1]:,} to evaluate on"
            )
            row = json.loads((folder / "eval.jsonl").read_text().splitlines()[0])
            self._screen.say(f"for example {row['prompt']!r} -> {row['completion']!r}", "dim")

    def first_promotion(self) -> None:
        """Let v1 serve, unless something serves already."""
        self._screen.chapter("v1 serves", "a person sets `champion`, reconcile moves `serving`")
        if platform().catalog.alias(FAMILY, SERVING_ALIAS) is None:
            self._promote("v1")
            self._reconcile("first promotion")
        self._screen.done(f"serving: {report(FAMILY, platform()).serving}")

    def adapters(self) -> None:
        """Train every adapter on v1, as flow runs on the worker."""
        for chapter in self._chapters:
            for recipe in recipes(chapter):
                self._screen.chapter(f"Train {recipe.adapter}", _in_words(recipe))
                resolved, base = resolve_recipe(recipe, platform())
                if not self._is_trained(resolved):
                    key = f"train/{resolved.sha256}/{base.fingerprint_sha256}"
                    run(Deployment.TRAIN_ADAPTER, {"recipe": recipe}, key=key, screen=self._screen)
                suite = resolved.suites[0]
                score = next(
                    score
                    for row in report(FAMILY, platform()).rows
                    if (row.adapter, row.base) == (recipe.adapter, base.version)
                    for name, score in row.scores
                    if name == suite.name
                )
                self._screen.done(f"{recipe.adapter}: {score:.1f} % right on {base}")
        self._bare_v1()

    def base_v2(self) -> None:
        """Train v1 on with all its weights and upload the result as any S3 client would."""
        new = self._update_to
        self._screen.chapter(
            f"Base {new}", f"v1 trained on: {UPDATE.tokens:,} tokens of Python source, all weights"
        )
        folder, figures = self._folder / new, self._folder / f"{new}.json"
        if self._ready(new) is None:
            if not figures.exists():  # written last
                held_out = [str(self._rows_of(chapter)) for chapter in self._chapters]
                run_module(
                    [
                        "demo.update",
                        *("--base", str(self._folder / "v1"), "--to", str(folder)),
                        *("--report", str(figures), "--held-out", *held_out),
                        *("--steps", str(UPDATE.steps), "--seed", str(UPDATE.seed)),
                        *("--learning-rate", str(UPDATE.learning_rate)),
                    ],
                    self._screen,
                )
            upload(
                folder,
                *_uri(new).removeprefix("s3://").split("/", 1),
                version=new,
                family=FAMILY,
                parent="v1",
                on_progress=self._screen.progress_reporter("sent with boto3", "MB", 1e6),
            )
            self._screen.say(f"uploaded to {_uri(new)}")
        self._ingest(new)
        update = json.loads(figures.read_text())["figures"]
        self._screen.say(
            f"held-out loss on source {update['held_out_loss_before']:.2f} -> "
            f"{update['held_out_loss_after']:.2f}; weights moved: attention "
            f"{update['drift_attention_percent']:.2f} %, FFN {update['drift_ffn_percent']:.2f} %, "
            f"the rest {update['drift_other_percent']:.2f} %"
        )

    def upgrade(self) -> None:
        """Let a person wish for v2; every adapter gets its verdict before v2 serves."""
        new = self._update_to
        self._screen.chapter(
            "Upgrade", f"`champion` moves to {new}: every adapter is judged, then it serves"
        )
        self._promote(new)
        if not self._is_settled():
            self._reconcile(f"upgrade to {new}")
        self._screen.done(f"serving: {report(FAMILY, platform()).serving}")

    def ending(self) -> list[Result]:
        """Print the table, the links, and draw the picture."""
        self._screen.chapter("What came of it", "scores and differences in points")
        found = results(self._chapters, self._update_to, platform())
        self._screen.console.print(table(found))
        for note in notes(found):
            self._screen.console.print(Padding(Text(note), (0, 0, 0, 2)))
        picture = draw(found, self._folder / f"{self._update_to}.png")
        with platform().runs.run("demo", tags={"family": FAMILY}) as logged:
            logged.params({"update": asdict(UPDATE), "policy": asdict(POLICY)})
            for result in found:
                logged.metrics(
                    {
                        f"{result.adapter}/v1": result.figures.versus_old_base.reference_score,
                        f"{result.adapter}/v2": result.figures.score,
                        f"{result.adapter}/difference": result.figures.versus_old_base.difference,
                    },
                    0,
                )
            logged.file(picture)
        self._links(picture, logged.id)
        return found

    def _rows_of(self, chapter: Chapter) -> Path:
        return self._folder / "data" / chapter.task.name

    def _ready(self, version: str) -> BaseVersion | None:
        try:
            return find_base(FAMILY, version, platform())
        except NotFoundError:
            return None

    def _ingest(self, version: str) -> None:
        if self._ready(version) is None:
            uri = _uri(version)
            run(Deployment.INGEST_BASE, {"uri": uri}, key=f"ingest/{uri}", screen=self._screen)
        base = find_base(FAMILY, version, platform())
        self._screen.done(f"{base} is ready, fingerprint {base.fingerprint_sha256[:12]}")

    def _promote(self, version: str) -> None:
        """Set `champion` with MLflow's own client, as a person does on its page."""
        base = find_base(FAMILY, version, platform())
        self._mlflow.set_registered_model_alias(FAMILY, CHAMPION_ALIAS, str(base.number))
        self._screen.say(f"champion: {base}")

    def _is_trained(self, recipe: TrainingRecipe) -> bool:
        if recipe.adapter not in platform().registry.adapters(FAMILY):
            return False
        versions = platform().registry.versions(recipe.adapter)
        return any(version.recipe_sha256 == recipe.sha256 for version in versions)

    def _is_settled(self) -> bool:
        seen = report(FAMILY, platform())
        judged = all(row.verdict for row in seen.rows if row.base == self._update_to)
        return judged and seen.serving == self._update_to

    def _reconcile(self, why: str) -> None:
        parameters = {"family": FAMILY, "policy": POLICY, "promotion": PROMOTION, "wait": True}
        run(Deployment.RECONCILE, parameters, key=f"reconcile/{why}", screen=self._screen)

    def _bare_v1(self) -> None:
        """Answer the questions with the bare v1 too: what did the adapters learn?"""
        for chapter in self._chapters:
            suites = pin_suites((chapter.suite,), platform())
            base = find_base(FAMILY, "v1", platform())
            self._screen.say(f"the bare v1 on {chapter.task.name}", "dim")
            found = evaluate_on(base, suites, platform(), on_progress=self._items)
            score = found[chapter.suite.name].score
            self._screen.done(f"bare v1 on {chapter.task.name}: {score:.1f} % right")

    def _items(self, answered: EvaluationProgress) -> None:
        self._screen.alive(str(answered))

    def _links(self, picture: Path, run_id: str) -> None:
        mlflow, prefect = (self._stack.urls[name] for name in ("mlflow", "prefect"))
        experiment = self._mlflow.get_run(run_id).info.experiment_id
        for name, link in (
            ("picture", str(picture)),
            ("base versions and adapters", f"{mlflow}/#/models"),
            ("the family", f"{mlflow}/#/models/{FAMILY}"),
            ("this result", f"{mlflow}/#/experiments/{experiment}/runs/{run_id}"),
            ("flow runs", f"{prefect}/runs"),
            ("fleet report", f"{prefect}/artifacts/key/fleet-{FAMILY}"),
            ("password of Prefect's pages", "make login"),
        ):
            self._screen.console.print(f"  {name:27} {link}", highlight=False, soft_wrap=True)


def _uri(version: str) -> str:
    return f"s3://bases/{FAMILY}/{version}"


def _in_words(recipe: TrainingRecipe) -> str:
    perturbation, optimizer = recipe.perturbation, recipe.optimizer
    how = (
        "plain LoRA"
        if perturbation.is_off
        else f"LoRA under Trans-PEFT: masking {perturbation.masking_p:g}, "
        f"dropping {perturbation.dropping_p:g}, spared layers {perturbation.spared_layers}"
    )
    return f"{how}; {optimizer.steps} steps of {optimizer.batch_size} rows"
