"""The steps of the demo, in their order. Each can be repeated."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from mlflow import MlflowClient
from rich.padding import Padding
from rich.text import Text

from demo.base import FAMILY
from demo.deployments import run, set_parameters
from demo.files import base_v1_folder, rows_folder
from demo.picture import draw
from demo.programs import run_module
from demo.results import Result, notes, results, table
from demo.screen import Screen
from demo.settings import COMPENSATION, POLICY, PROMOTION, UPDATE, DemoTask, recipes
from demo.upload import upload
from infra.stack.settings import StackSettings
from tasks.composition import platform
from trans_peft.bases.publish import publish
from trans_peft.domain.base import BaseVersion
from trans_peft.domain.conventions import CHAMPION_ALIAS, SERVING_ALIAS, Deployment
from trans_peft.domain.recipe import TrainingRecipe
from trans_peft.errors import NotFoundError
from trans_peft.lifecycle.report import report
from trans_peft.lifecycle.resolve import find_base
from trans_peft.lifecycle.train import resolve_recipe

__all__ = ["Steps"]


class Steps:
    """The steps of one demo, on a running stack.

    `update_to` is the label of the new version. Its training text excludes the evaluation rows of
    these tasks only, so a demo with other tasks makes another version.
    """

    def __init__(
        self, stack: StackSettings, screen: Screen, demo_tasks: Sequence[DemoTask], update_to: str
    ) -> None:
        self._stack = stack
        self._screen = screen
        self._demo_tasks = demo_tasks
        self._update_to = update_to
        self._folder = stack.state / "demo"
        self._mlflow = MlflowClient()

    def base_v1(self) -> None:
        """Publish SmolLM2-135M as v1."""
        self._screen.section("Base v1", "SmolLM2-135M-Instruct, published and verified")
        if self._ready("v1") is None:
            publish(
                base_v1_folder(self._folder),
                _uri("v1"),
                family=FAMILY,
                version="v1",
                store=platform().store,
                on_progress=self._screen.progress_reporter("hashed and uploaded", "MB", 1e6),
            )
            self._screen.line(f"published at {_uri('v1')}")
        self._ingest("v1")

    def data(self) -> None:
        """Upload the rows of every task."""
        self._screen.section("Data", "rows of each task, and prompts for the recovery")
        for demo_task in self._demo_tasks:
            folder = self._rows_of(demo_task)
            counts = []
            for name in ("train.jsonl", "eval.jsonl"):
                with (folder / name).open("rb") as rows:
                    counts.append(len(rows.readlines()))
                    rows.seek(0)
                    platform().store.write(f"{demo_task.folder_uri}/{name}", rows)
            for recipe in recipes(demo_task):
                with (folder / "prompts.jsonl").open("rb") as prompts:
                    platform().store.write(COMPENSATION.prompts_of(recipe.adapter), prompts)
            self._screen.success(
                f"{demo_task.task.name}: {counts[0]:,} training rows, {counts[1]:,} evaluation rows"
            )
            row = json.loads((folder / "eval.jsonl").read_text().splitlines()[0])
            self._screen.line(f"for example {row['prompt']!r} -> {row['completion']!r}", "dim")

    def first_promotion(self) -> None:
        """Promote v1 if no version serves."""
        self._screen.section("v1 serves", "a user sets `champion`, reconcile moves `serving`")
        # A new champion and the schedule start reconcile too.
        policies = {"policy": POLICY, "promotion": PROMOTION}
        set_parameters(Deployment.RECONCILE, policies)
        if platform().catalog.alias(FAMILY, SERVING_ALIAS) is None:
            self._promote("v1")
            self._reconcile("first promotion")
        self._screen.success(f"serving: {report(FAMILY, platform()).serving}")

    def adapters(self) -> None:
        """Train every adapter on v1, in flow runs on the worker."""
        for demo_task in self._demo_tasks:
            for recipe in recipes(demo_task):
                self._screen.section(f"Train {recipe.adapter}", _description(recipe))
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
                self._screen.success(f"{recipe.adapter}: {score:.1f} % right on {base}")

    def base_v2(self) -> None:
        """Train v1 further, and upload the result with an S3 client."""
        new = self._update_to
        self._screen.section(
            f"Base {new}",
            f"v1 trained further: {UPDATE.tokens:,} tokens of Python source, {UPDATE.trained}",
        )
        folder, figures = self._folder / new, self._folder / f"{new}.json"
        if self._ready(new) is None:
            if not figures.exists():  # written last
                held_out = [str(self._rows_of(demo_task)) for demo_task in self._demo_tasks]
                run_module(
                    [
                        "demo.update",
                        *("--base", str(base_v1_folder(self._folder)), "--to", str(folder)),
                        *("--report", str(figures), "--held-out", *held_out),
                        *("--settings", json.dumps(asdict(UPDATE))),
                    ],
                    self._screen,
                )
            upload(
                folder,
                *_uri(new).removeprefix("s3://").split("/", 1),
                version=new,
                family=FAMILY,
                parent="v1",
                on_progress=self._screen.progress_reporter("uploaded with boto3", "MB", 1e6),
            )
            self._screen.line(f"uploaded to {_uri(new)}")
        self._ingest(new)
        update = json.loads(figures.read_text())["figures"]
        self._screen.line(
            f"held-out loss on source {update['held_out_loss_before']:.2f} -> "
            f"{update['held_out_loss_after']:.2f}; change of the weights: attention "
            f"{update['drift_attention_percent']:.2f} %, FFN {update['drift_ffn_percent']:.2f} %, "
            f"others {update['drift_other_percent']:.2f} %"
        )

    def upgrade(self) -> None:
        """Set `champion` to v2. Every adapter gets a verdict before v2 serves."""
        new = self._update_to
        self._screen.section(
            "Upgrade",
            f"`champion` moves to {new}: every adapter is judged, and serves if it passes",
        )
        self._promote(new)
        if not self._is_settled():
            self._reconcile(f"upgrade to {new}")
        self._screen.success(f"serving: {report(FAMILY, platform()).serving}")

    def ending(self) -> list[Result]:
        """Print the table and the links, and write the picture."""
        self._screen.section("Results", "scores and differences in points")
        found = results(self._demo_tasks, self._update_to, platform())
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

    def _rows_of(self, demo_task: DemoTask) -> Path:
        return rows_folder(self._folder, demo_task.task.name)

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
        self._screen.success(f"{base} is ready, fingerprint {base.fingerprint_sha256[:12]}")

    def _promote(self, version: str) -> None:
        """Set `champion` with MLflow's client, as a user does on MLflow's page."""
        base = find_base(FAMILY, version, platform())
        self._mlflow.set_registered_model_alias(FAMILY, CHAMPION_ALIAS, str(base.number))
        self._screen.line(f"champion: {base}")

    def _is_trained(self, recipe: TrainingRecipe) -> bool:
        if recipe.adapter not in platform().registry.adapters(FAMILY):
            return False
        versions = platform().registry.versions(recipe.adapter)
        return any(version.recipe_sha256 == recipe.sha256 for version in versions)

    def _is_settled(self) -> bool:
        seen = report(FAMILY, platform())
        judged = all(row.verdict for row in seen.rows if row.base == self._update_to)
        return judged and seen.serving == self._update_to

    def _reconcile(self, reason: str) -> None:
        parameters = {"family": FAMILY, "policy": POLICY, "promotion": PROMOTION, "wait": True}
        run(Deployment.RECONCILE, parameters, key=f"reconcile/{reason}", screen=self._screen)

    def _links(self, picture: Path, run_id: str) -> None:
        mlflow, prefect = (self._stack.urls[name] for name in ("mlflow", "prefect"))
        experiment = self._mlflow.get_run(run_id).info.experiment_id
        for name, link in (
            ("picture", str(picture)),
            ("fleet page", f"{self._stack.urls['ui']}/families/{FAMILY}"),
            ("base versions and adapters", f"{mlflow}/#/models"),
            ("the family", f"{mlflow}/#/models/{FAMILY}"),
            ("this result", f"{mlflow}/#/experiments/{experiment}/runs/{run_id}"),
            ("flow runs", f"{prefect}/runs"),
            ("fleet report", f"{prefect}/artifacts/key/fleet-{FAMILY}"),
            ("password of Prefect's pages", "make login"),
            ("stop the servers", "make down"),
        ):
            self._screen.console.print(f"  {name:27} {link}", highlight=False, soft_wrap=True)


def _uri(version: str) -> str:
    return f"s3://bases/{FAMILY}/{version}"


def _description(recipe: TrainingRecipe) -> str:
    perturbation, optimizer = recipe.perturbation, recipe.optimizer
    spared = ", ".join(map(str, perturbation.spared_layers)) or "none"
    how = (
        "plain LoRA"
        if perturbation.is_off
        else f"LoRA with Trans-PEFT: masking {perturbation.masking_p:g}, "
        f"dropping {perturbation.dropping_p:g}, spared layers: {spared}"
    )
    return f"{how}; {optimizer.duration}"
