"""Metrics of a real stack, and its backup: in an empty stack, reconcile finds nothing to do."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.edges.examples import draft, peft_folder
from tests.end_to_end.running_stack import ROOT, Stack, settings_below, wait_until
from trans_peft.client import connect

pytestmark = pytest.mark.stack

BACKUP = "tar --create --gzip --file {file} --directory {state} --exclude ./work --exclude ./logs ."
RESTORE = "tar --extract --gzip --file {file} --directory {state}"


def manage(verb, settings):
    environment = {**os.environ, **settings.to_environment()}
    command = [sys.executable, "-m", "infra.stack", verb]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)


def samples(settings, program):
    answer = httpx.get(f"{settings.urls[program]}/metrics", timeout=30, trust_env=False)
    return {
        (sample.name.removeprefix("trans_peft_"), *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(answer.raise_for_status().text)
        for sample in family.samples
    }


def registered(settings, monkeypatch, scratch):
    """What the registry and the buckets of a stack have, read as a client does."""
    for name, value in settings.client_environment.items():
        monkeypatch.setenv(name, value)
    platform = connect(work_dir=scratch)
    found = platform.registry.adapter("chat")
    folder = platform.registry.download(found.source, scratch / "chat")
    return {
        "bases": platform.catalog.versions("tiny"),
        "serving": platform.catalog.alias("tiny", "serving"),
        "adapter": found,
        "weights": (folder / "adapter_model.safetensors").read_bytes(),
        "objects": platform.store.list("s3://bases/tiny/v1"),
    }


@pytest.fixture(scope="module")
def story(tmp_path_factory, tiny_base):
    """A base is published and ingested, an adapter serves on it; backup; restore elsewhere."""
    folder = tmp_path_factory.mktemp("operation")
    first = settings_below(folder / "first")
    with pytest.MonkeyPatch.context() as patch:
        manage("up", first)
        try:
            stack = Stack(first)
            stack.publish(str(tiny_base), "v1")
            ingested = stack.run("ingest-base", uri="s3://bases/tiny/v1")
            assert ingested["type"] == "COMPLETED"
            for name, value in first.client_environment.items():
                patch.setenv(name, value)
            platform = connect(work_dir=folder / "client")
            (base,) = platform.catalog.versions("tiny")
            peft = peft_folder(folder / "peft")
            version = replace(draft("chat", "tiny", peft), base=base.ref, trained_on=base.ref)
            version = platform.registry.register(version, peft)
            platform.registry.set_alias("chat", base.alias, version.number)
            stack.champion(1)
            wait_until(lambda: stack.alias("tiny", "serving") == "1")
            assert stack.run("reconcile")["message"] == "no verdict is missing"
            # The fleet page reads a new family in the background.
            wait_until(lambda: ("verdicts_missing", "tiny") in samples(first, "ui"))
            scraped = {name: samples(first, name) for name in ("bridge", "ui", "exporter")}
            before = registered(first, patch, folder / "before")
        finally:
            manage("down", first)
        second = settings_below(folder / "second")
        second.state.mkdir(mode=0o700)
        for command, settings in ((BACKUP, first), (RESTORE, second)):
            words = command.format(file=folder / "backup.tgz", state=settings.state).split()
            subprocess.run(words, check=True)
        manage("up", second)
        try:
            stack = Stack(second)
            state = stack.run("reconcile")
            shards = stack.prefect(
                "POST", "flow_runs/filter", json={"flows": {"name": {"any_": ["transfer-shard"]}}}
            )
            after = registered(second, patch, folder / "after")
        finally:
            manage("down", second)
    return scraped, before, after, state, shards


def test_reconcile_of_the_restored_stack_finds_nothing_to_do(story):
    *_, state, shards = story
    assert (state["type"], state["message"]) == ("COMPLETED", "no verdict is missing")
    assert shards == []


def test_registry_and_files_are_those_of_the_backup(story):
    _, before, after, *_ = story
    assert before["serving"] == 1
    assert [base.ready for base in before["bases"]] == [True]
    assert {name: after[name] for name in before} == before


def test_every_program_serves_its_numbers(story):
    scraped, *_ = story
    bridge, ui, worker = scraped["bridge"], scraped["ui"], scraped["exporter"]
    assert bridge["prefect_up",] == 1
    assert bridge["workers_online",] == 1
    assert bridge["queue_poll_age_seconds", "gpu"] < 60
    assert bridge["reconcile_end_timestamp_seconds", "completed"] > 0
    assert ui["promotion_pending", "tiny"] == 0
    assert worker["downloaded_bytes_total", "s3"] > 0


def test_the_page_has_these_commands():
    page = (Path(__file__).parents[2] / "docs" / "operations.md").read_text()
    for command in (BACKUP, RESTORE):
        assert command.format(file="backup.tgz", state=".state") in page
