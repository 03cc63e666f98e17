"""Upgrades of a family on a running stack, and the resulting state of the registry.

All families have the same weights, adapters and questions, and a different chat template each.
Their answers are therefore equal and their fingerprints differ, and two families with the same
history end in the same state. `final_state` returns the content of MLflow's registry for one family
without times and without the family's names, so that two states can be compared with ==. A family
is upgraded repeatedly, from v1 to v2 to v3, because creating one takes as long as an upgrade.

MLflow keeps no history of its aliases. A trigger in its database, SQLite or Postgres, records one
(`record_alias_history`), so that tests can count the moves of an alias.
"""

import json
import os
import re
import time
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from hashlib import sha256
from pathlib import Path
from uuid import uuid4

import httpx
import pytest
import sqlalchemy
import torch
from botocore.exceptions import BotoCoreError, ClientError
from mlflow.exceptions import MlflowException
from peft import LoraConfig, get_peft_model

from tests.end_to_end.running_stack import FINAL, LENIENT, Stack, wait_until, write_update
from tests.tiny import CHAT_TEMPLATE, tiny_model, tiny_tokenizer
from trans_peft.bases.publish import publish
from trans_peft.domain.base import Manifest, Upload
from trans_peft.domain.data import DataSource
from trans_peft.domain.evaluation import GatePolicy, Suite, evaluation_key, verdict_key
from trans_peft.edges.mlflow_catalog import MlflowCatalog
from trans_peft.edges.mlflow_evaluations import MlflowEvaluations
from trans_peft.edges.mlflow_registry import MlflowRegistry
from trans_peft.edges.mlflow_runs import MlflowRunLog
from trans_peft.edges.stores import SchemeStore
from trans_peft.lifecycle.adopt import adopt
from trans_peft.lifecycle.bases import ingest
from trans_peft.ports import Platform

AWAY = (BotoCoreError, ClientError, MlflowException, httpx.HTTPError, OSError)
"""Errors of clients while a server is unavailable, or shortly afterwards."""

PATIENCE_S = 1800
QUESTIONS = "s3://data/faults.jsonl"
_TRIGGERS = {
    "sqlite": (
        "CREATE TABLE IF NOT EXISTS moves (name TEXT, alias TEXT, number TEXT)",
        *(
            f"CREATE TRIGGER IF NOT EXISTS {verb}_alias AFTER {verb} ON registered_model_aliases "
            f"BEGIN INSERT INTO moves VALUES ({row}.name, {row}.alias, {number}); END"
            for verb, row, number in (
                ("INSERT", "new", "new.version"),
                ("UPDATE", "new", "new.version"),
                ("DELETE", "old", "'none'"),
            )
        ),
    ),
    "postgresql": (
        "CREATE TABLE IF NOT EXISTS moves (rowid SERIAL, name TEXT, alias TEXT, number TEXT)",
        """
        CREATE OR REPLACE FUNCTION record_move() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            IF TG_OP = 'DELETE' THEN
                INSERT INTO moves (name, alias, number) VALUES (old.name, old.alias, 'none');
            ELSE
                INSERT INTO moves (name, alias, number) VALUES (new.name, new.alias, new.version);
            END IF;
            RETURN NULL;
        END $$
        """,
        "CREATE OR REPLACE TRIGGER record_move AFTER INSERT OR UPDATE OR DELETE "
        "ON registered_model_aliases FOR EACH ROW EXECUTE FUNCTION record_move()",
    ),
}
_TIMES = {"attempts", "run_id", "seconds", "time_ms"}


def retrying(call, *arguments, patience_s=PATIENCE_S):
    """Return the result of the call. Retries while a server is unavailable."""
    deadline = time.monotonic() + patience_s
    while True:
        try:
            return call(*arguments)
        except AWAY:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)


@dataclass(frozen=True)
class Family:
    """A family of the stack whose v1 serves, with live adapters."""

    stack: Stack
    name: str
    adapters: tuple[str, ...]
    folder: Path

    @property
    def serving(self):
        """The number of the version that serves."""
        return retrying(self.stack.alias, self.name, "serving")

    def write(self, label):
        """Write a version, with the same weights for every family, and return its folder."""
        folder = self.folder / label
        _write_base(folder, self.name, label)
        return folder

    def version(self, label):
        """Return MLflow's version of the base with this label; None while it is not ready."""
        for found in retrying(self.stack.mlflow.search_model_versions, f"name='{self.name}'"):
            tags = found.tags
            if (tags.get("trans_peft.version"), tags.get("trans_peft.ready")) == (label, "true"):
                return found
        return None


@dataclass
class Upgrade:
    """The upload of a base with a plain S3 client, and its promotion."""

    family: Family
    label: str = "v2"
    began: float = field(default_factory=time.monotonic)
    promoted: float | None = None
    person: Future | None = None

    def begin(self):
        """Upload and promote in a thread. Retries while a server is unavailable."""
        folder = self.family.write(self.label)
        self.began = time.monotonic()
        with_one = ThreadPoolExecutor(1)
        self.person = with_one.submit(self._upload_and_promote, folder)
        with_one.shutdown(wait=False)
        return self

    @property
    def seconds(self):
        """Seconds since the upgrade began."""
        return time.monotonic() - self.began

    def over(self):
        """Whether the fleet serves on the new version."""
        return self.person.done() and self.family.serving == self.person.result()  # or its error

    def wait(self, patience_s=PATIENCE_S):
        """Wait until the fleet serves on the new version, and then until no run is unfinished.

        Return the seconds until it served.
        """
        wait_until(self.over, patience_s)
        took_s = self.seconds
        wait_until(lambda: not unfinished_runs(self.family.stack), patience_s)
        return took_s

    def _upload_and_promote(self, folder):
        family, stack = self.family, self.family.stack
        upload(stack, folder, family.name, self.label)
        wait_until(lambda: family.version(self.label), PATIENCE_S)
        number = family.version(self.label).version
        retrying(stack.champion, number, family.name)
        self.promoted = time.monotonic()
        return number


@contextmanager
def prepared(stack):
    """Let this process be a client of the stack, with a policy that tiny models can pass."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in stack.settings.client_environment.items():
            patch.setenv(name, value)
        patch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")  # `retrying` repeats requests
        patch.setenv("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
        patch.setenv("NO_PROXY", os.environ.get("NO_PROXY", "") + ",127.0.0.1")
        retrying(lambda: stack.set_parameters_of_reconcile(policy=LENIENT))
        record_alias_history(stack)
        yield


def record_alias_history(stack):
    """Let MLflow's database record every move of an alias."""
    database = _database(stack)
    with database.begin() as connection:
        for statement in _TRIGGERS[database.dialect.name]:
            connection.exec_driver_sql(statement)


def make_family(stack, name, folder, adapters=2):
    """Make a family whose v1 serves with this many adapters, with the library in this process.

    The name gets a random suffix, because a family with the same name may exist.
    """
    name = f"{name}-{uuid4().hex[:6]}"
    folder = folder / name
    _write_base(folder / "v1", name, "v1")

    url = stack.settings.urls["mlflow"]
    platform = Platform(
        store=SchemeStore(),
        catalog=MlflowCatalog(url),
        registry=MlflowRegistry(url),
        evaluations=MlflowEvaluations(url),
        runs=MlflowRunLog(url),
        work_dir=folder / "work",
    )
    v1 = f"s3://data/{name}/v1"  # not watched: no notification is meant
    publish(folder / "v1", v1, family=name, version="v1", store=platform.store)
    ingest(Upload(v1), platform)
    suite = Suite("parity", DataSource(uri=_questions(stack)), scoring="choice")
    names = tuple(f"{name}-{number}" for number in range(adapters))
    for number, adapter in enumerate(names):
        adopt(adapter, str(_adapter(folder.parent, number)), name, [suite], platform,
              base_version="v1")  # fmt: skip
    stack.champion("1", name)
    wait_until(lambda: stack.alias(name, "serving") == "1", PATIENCE_S)
    wait_until(lambda: not unfinished_runs(stack), PATIENCE_S)
    return Family(stack, name, names, folder)


def forget(family):
    """Delete a family, its uploads first, so that later reconciles do not process it."""
    stack = family.stack
    uploads = {"Bucket": "bases", "Prefix": f"{family.name}/"}
    for found in stack.s3.list_objects_v2(**uploads).get("Contents", []):
        stack.s3.delete_object(Bucket="bases", Key=found["Key"])
    for name in (*family.adapters, family.name):
        stack.mlflow.delete_registered_model(name)


def upload(stack, folder, family, version, bucket="bases"):
    """Upload a base: the files, then the manifest. Retries while S3 is unavailable."""
    files = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    manifest = {
        "format": Manifest.FORMAT,
        "family": family,
        "version": version,
        "parent": None,
        "files": [
            {"name": name, "size": len(data), "sha256": sha256(data).hexdigest()}
            for name, data in files.items()
        ],
    }
    files[Manifest.FILE_NAME] = json.dumps(manifest).encode()
    for name, data in files.items():
        key = f"{family}/{version}/{name}"
        retrying(lambda key=key, data=data: stack.s3.put_object(Bucket=bucket, Key=key, Body=data))


def unfinished_runs(stack):
    """Return Prefect's unfinished flow runs by id, each with the name of its `flow`.

    Runs that are scheduled for later are left out.
    """
    soon = {"before_": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + 1))}
    wanted = {"state": {"type": {"not_any_": sorted(FINAL)}}, "expected_start_time": soon}
    found = retrying(
        lambda: stack.prefect("POST", "flow_runs/filter", json={"flow_runs": wanted, "limit": 200})
    )
    return {run["id"]: {**run, "flow": _flow(stack.settings, run["flow_id"])} for run in found}


def moves(stack, name, alias):
    """Return the versions to which an alias was moved, in order."""
    wanted = sqlalchemy.text(
        "SELECT number FROM moves WHERE name = :name AND alias = :alias ORDER BY rowid"
    )
    with _database(stack).connect() as connection:
        return list(connection.execute(wanted, {"name": name, "alias": alias}).scalars())


def promotions(family):
    """Return the bases of the family's promotion events.

    Events are sent after the write. There is none if the process died in between, and there are two
    if two processes wrote at the same time. `final_state` has the actual moves of the alias.
    """
    wanted = {"event": {"name": ["trans-peft.fleet.promoted"]}, "order": "ASC"}
    wanted["resource"] = {"id": [f"trans-peft.family.{family.name}"]}
    found = family.stack.prefect("POST", "events/filter", json={"filter": wanted, "limit": 50})
    return [event["payload"]["base"].removeprefix(f"{family.name}/") for event in found["events"]]


def final_state(family):
    """Return the content of the registry for a family, independent of the family's names.

    It has the registered models, their versions with tags and aliases (verdicts, outcomes,
    lineage), the moves of each alias, and the numbers of evaluations and verdicts per key. It omits
    times, the attempts of a verdict, unfinished MLflow runs (of killed processes) and superseded
    versions: if the response to a registration is lost, the version is registered again, and all
    but the lowest are tagged superseded. Versions are therefore numbered among the visible ones.
    Shards that start at the same time may each evaluate the bare base, so this counts once.

    Also asserts that the key of each verdict follows from its evaluations and policy, and that each
    run that a tag names exists and is finished.
    """
    client = family.stack.mlflow
    names = (family.name, *family.adapters)
    models = {name: client.get_registered_model(name) for name in names}
    found = {
        name: [
            version
            for version in client.search_model_versions(
                f"name='{name}'", order_by=["version_number ASC"]
            )
            if "trans_peft.superseded" not in version.tags
        ]
        for name in names
    }
    words = {family.name: "FAMILY", str(family.folder.parent): "FOLDER"}
    for base in found[family.name]:
        label = base.tags["trans_peft.version"]
        words[base.tags["trans_peft.fingerprint"]] = f"FINGERPRINT-{label}"
        words[base.tags["trans_peft.fingerprint"][:12]] = label
        words[base.tags["trans_peft.manifest"]] = f"MANIFEST-{label}"
    for adapter in family.adapters:  # the hash covers the chat template, which names the family
        words[found[adapter][0].tags["trans_peft.weights_sha256"]] = f"WEIGHTS-OF-{adapter}"
    numbers = {name: _numbers(found[name]) for name in names}
    state = {
        "models": {
            name: {
                "tags": _numbered(model.tags, numbers[name]),
                "aliases": _numbered(model.aliases, numbers[name]),
                "versions": [_version(client, version, numbers[name]) for version in found[name]],
            }
            for name, model in models.items()
        },
        "moves": {
            f"{name} {alias}": [
                numbers[name].get(number, number) for number in moves(family.stack, name, alias)
            ]
            for name, model in models.items()
            for alias in model.aliases
        },
        "evaluated": {
            evaluated: 1 if evaluated.startswith("bare ") else times
            for evaluated, times in _counted(
                family, "evaluations", "adapter", "base_version", "suite"
            ).items()
        },
        "judged": _counted(family, "transfers", "adapter", "base_version", "verdict"),
    }
    return json.loads(_with_labels(json.dumps(state, indent=1, sort_keys=True), words))


def _numbers(found):
    """Return the position of each visible version by MLflow's number."""
    return {version.version: str(place) for place, version in enumerate(found, start=1)}


def _numbered(values, numbers):
    return {name: numbers.get(value, value) for name, value in values.items()}


def _version(client, found, numbers):
    tags = {name.removeprefix("trans_peft."): text for name, text in found.tags.items()}
    if "fingerprint_run" in tags:
        assert client.get_run(tags["fingerprint_run"]).info.status == "FINISHED"
        tags["fingerprint_run"] = "FINISHED"
    if "verdict_key" in tags:
        (outcome,) = (json.loads(tags[name]) for name in tags if name.startswith("outcome."))
        path = client.download_artifacts(outcome["run_id"], "outcome.json")
        evaluations = json.loads(Path(path).read_text())["evaluations"]
        keys = tuple(_key_of(evaluation) for evaluation in evaluations)
        assert tags["verdict_key"] == verdict_key(keys, GatePolicy(**LENIENT).sha256)
        tags["verdict_key"] = "of its evaluations"
    for name in tags:
        if name.startswith("outcome."):
            kept = json.loads(tags[name])
            assert client.get_run(kept["run_id"]).info.status == "FINISHED"
            made = kept["outcome"]
            made["new_number"] = numbers.get(str(made["new_number"]))
            tags[name] = _timeless(kept)
    return {"status": found.status, "tags": tags,
            "source": re.sub(r"m-[0-9a-f]{32}", "MODEL", found.source)}  # fmt: skip


def _key_of(evaluation):
    parts = ("weights_sha256", "base_fingerprint_sha256", "suite_sha256", "decoding_sha256")
    return evaluation_key(*(evaluation[part] for part in parts))


def _timeless(value):
    if isinstance(value, dict):
        return {key: _timeless(inner) for key, inner in value.items() if key not in _TIMES}
    return [_timeless(inner) for inner in value] if isinstance(value, list) else value


def _counted(family, purpose, *tags):
    """Count the finished MLflow runs for each value of the tags, without failures."""
    client = family.stack.mlflow
    experiment = client.get_experiment_by_name(f"trans-peft/{purpose}")
    if experiment is None:
        return {}
    runs = client.search_runs(
        [experiment.experiment_id],
        f"tags.`trans_peft.family` = '{family.name}' AND attributes.status = 'FINISHED'",
        max_results=1000,
    )
    words = (
        " ".join(run.data.tags.get(f"trans_peft.{tag}", "bare") for tag in tags) for run in runs
    )
    return Counter(word for word in words if not word.endswith(" failed"))


def _with_labels(text, words):
    for literal in sorted(words, key=len, reverse=True):
        text = text.replace(literal, words[literal])
    return text


@cache
def _flow(settings, flow_id):
    url = f"{settings.urls['prefect']}/api/flows/{flow_id}"
    ask = partial(httpx.get, url, auth=settings.prefect_auth, timeout=60)
    return retrying(lambda: ask().raise_for_status().json())["name"]


def _database(stack):
    sqlite = f"sqlite:///{stack.settings.state}/mlflow/mlflow.db?timeout=60"
    return _engine(stack.settings.mlflow_database or sqlite)


@cache
def _engine(url):
    return sqlalchemy.create_engine(url, poolclass=sqlalchemy.NullPool)


def _questions(stack):
    rows = (
        {"prompt": f"{i} and", "completion": f" {i % 10}", "choices": [f" {d}" for d in range(10)]}
        for i in range(48)
    )
    body = "".join(json.dumps(row) + "\n" for row in rows)
    bucket, _, key = QUESTIONS.removeprefix("s3://").partition("/")
    stack.s3.put_object(Bucket=bucket, Key=key, Body=body.encode())
    return QUESTIONS


@cache
def _adapter(folder, number):
    """Write an adapter with random weights, in place of a trained one."""
    model = tiny_model()
    torch.manual_seed(number + 1)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    path = folder / f"adapter-{number}"
    get_peft_model(model, config).save_pretrained(path)
    return path


def _write_base(folder, family, label):
    """Write a base: v1, or an update that depends on the number of the version."""
    number = int(label.removeprefix("v"))
    if number == 1:
        tiny_model().save_pretrained(folder)
    else:
        write_update(folder, seed=number)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = f"{CHAT_TEMPLATE}{{# {family} #}}"
    tokenizer.save_pretrained(folder)
