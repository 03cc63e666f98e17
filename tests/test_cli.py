"""The command line: arguments, exit codes, output and files."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from tests.tiny import CHAT_TEMPLATE, tiny_model, tiny_tokenizer, write_tiny_base
from trans_peft.bases.drift import weight_drift
from trans_peft.cli import main
from trans_peft.cli.files import read_recipe, read_suites
from trans_peft.domain.data import DataSource
from trans_peft.errors import InvalidSpecError, NotFoundError
from trans_peft.perturbation import layer_criticality
from trans_peft.validation.suites import named

COMMANDS = (
    "train", "evaluate", "adopt", "check", "transfer", "resolve", "agreement",
    "fingerprint", "criticality", "analyse", "convert", "publish", "experiment",
)  # fmt: skip
SUITE = {"name": "sums", "data": {"uri": "rows.jsonl"}, "max_new_tokens": 2}
RECIPE = {
    "adapter": "sums",
    "family": "tiny",
    "data": {"uri": "rows.jsonl"},
    "suites": [SUITE],
    "spec": {"options": {"r": 4, "target_modules": ["q_proj", "v_proj"]}},
    "perturbation": {"masking_p": 0.1},
    "optimizer": {"learning_rate": 0.01, "steps": 2, "batch_size": 4, "max_length": 32},
}


class CommandLine:
    """Runs commands in a folder with two related bases, an unrelated one, data and an adapter."""

    def __init__(self, folder: Path, capsys) -> None:
        self.folder, self.capsys = folder, capsys

    def run(self, *arguments: str) -> tuple[int, str, str]:
        code = main([*map(str, arguments)])
        captured = self.capsys.readouterr()
        return code, captured.out, captured.err

    def json(self, *arguments: str) -> tuple[int, object]:
        code, out, _ = self.run(*arguments, "--json")
        return code, json.loads(out)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("command-line")
    write_tiny_base(folder / "v1")
    write_tiny_base(folder / "unrelated", seed=4)
    updated = tiny_model()
    with torch.no_grad():
        for weight in updated.parameters():
            weight += 0.01 * torch.randn_like(weight)
    updated.save_pretrained(folder / "v2")
    tiny_tokenizer().save_pretrained(folder / "v2")
    config = LoraConfig(target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(tiny_model(), config).save_pretrained(folder / "mine")
    rows = [{"prompt": f"{a}+1=", "completion": str(a + 1)} for a in range(8)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "suite.json").write_text(json.dumps(SUITE))
    (folder / "suite.yaml").write_text("name: sums\ndata: {uri: rows.jsonl}\nmax_new_tokens: 2\n")
    (folder / "recipe.json").write_text(json.dumps(RECIPE))
    return folder


@pytest.fixture
def cli(files, capsys, monkeypatch) -> CommandLine:
    monkeypatch.chdir(files)
    torch.set_num_threads(1)
    return CommandLine(files, capsys)


# Help.


def test_help_lists_the_commands_and_loads_no_machine_learning():
    program = (
        "import sys; from trans_peft.cli import main; code = main(['--help'])\n"
        "heavy = {'torch', 'transformers', 'peft', 'boto3', 'pydantic'} & set(sys.modules)\n"
        "sys.exit(code or ', '.join(heavy) or 0)"
    )
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - started < 10
    for word in (*COMMANDS, "Exit codes", "s3://", "--suite suite.yaml"):
        assert word in " ".join(done.stdout.split())


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_an_example_and_json(command, cli):
    code, out, _ = cli.run(command, "--help")
    assert code == 0
    assert f"Example: trans-peft {command} " in " ".join(out.split())
    assert "--json" in out


NO_FIELD = "there is no such field; valid fields, the most similar first: "

# Invalid input: exit code 2, a message without a traceback, no files written.

TRANSFER = ("transfer", "mine", "--old", "v1", "--new", "v2", "--suite", "suite.json")
BAD_INPUT = {
    "an unknown command": (["chekc"], 'Did you mean "check"'),
    "an argument missing": (["check", "mine", "--old", "v1"], "--new"),
    "no such recipe": (["train", "no.json", "--base", "v1", "--out", "x"], "no file no.json"),
    "no such base": (["fingerprint", "nowhere"], "no files below"),
    "no such policy": ([*TRANSFER, "--out", "x", "--policy", "no.yaml"], "no file no.yaml"),
    "not an adapter": (["check", "v1", "--old", "v1", "--new", "v2"], "no adapter_config.json"),
    "neither adapter nor bare": (["evaluate", "--base", "v1", "--suite", "suite.json"], "--bare"),
    "adapter and bare": (
        ["evaluate", "mine", "--bare", "--base", "v1", "--suite", "suite.json"],
        "either an adapter or --bare",
    ),
    "a folder with files": ([*TRANSFER, "--out", "v1"], "v1 is not empty"),
    "the same base": (
        ["transfer", "mine", "--old", "v1", "--new", "v1", "--suite", "suite.json", "--out", "x"],
        "the old and the new base are the same",
    ),
    "prompts whose answers are not kept": (
        ["agreement", "mine", "--old", "v1", "--new", "v2", "--prompts", "suite.yaml"],
        "keep_answers",
    ),
    "one suite twice": (
        [*TRANSFER, "--suite", "suite.yaml", "--out", "x"],
        "two suites have the same name",
    ),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_invalid_input_is_reported_without_a_traceback(case, cli):
    arguments, message = BAD_INPUT[case]
    code, out, err = cli.run(*arguments)
    assert code == 2
    assert message in err
    assert out == ""
    assert "Traceback" not in err
    assert not (cli.folder / "x").exists()


def test_one_option_takes_several_suites(cli, tmp_path):
    (tmp_path / "again.json").write_text(json.dumps(SUITE | {"name": "again"}))
    (tmp_path / "rows.jsonl").write_text((cli.folder / "rows.jsonl").read_text())
    suites = ("--suite", "suite.json", tmp_path / "again.json")
    code, found = cli.json("evaluate", "--bare", *suites, "--base", "v1", "--state", tmp_path / "s")
    assert code == 0
    assert [each["suite"] for each in found] == ["sums", "again"]
    code, _, err = cli.run("evaluate", "mine", "--suite", "--base", "v1")
    assert code == 2
    assert "--suite" in err


def test_a_suite_of_the_paper_is_named_in_a_recipe_and_in_a_file(tmp_path):
    listed = ["boolq", {"named": "gsm8k", "folder": "data", "limit": 200, "dtype": "bfloat16"}]
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps(RECIPE | {"suites": [*listed, SUITE]}))
    expected = (
        named("boolq"),
        replace(named("gsm8k", str(tmp_path / "data")), limit=200, dtype="bfloat16"),
    )
    assert read_recipe(recipe).suites[:2] == expected
    files = [tmp_path / "a.yaml", tmp_path / "b.json"]
    for file, suite in zip(files, listed, strict=True):
        file.write_text(json.dumps(suite))
    assert read_suites(files) == expected


def test_paths_of_a_judge_model_are_relative_to_the_file(tmp_path):
    judge = {
        "uri": "judge", "prompt": "{prompt}{answer}", "choices": ["y", "n"], "marks": [1, 0],
        "labeled": {"uri": "labeled.jsonl"},
    }  # fmt: skip
    (tmp_path / "suite.json").write_text(json.dumps(SUITE | {"scoring": "judge", "judge": judge}))
    (found,) = read_suites([tmp_path / "suite.json"])
    assert (found.judge.uri, found.judge.labeled.uri) == (
        str(tmp_path / "judge"),
        str(tmp_path / "labeled.jsonl"),
    )
    wrong = {"judge": judge | {"mark": 1, "uri": ""}}
    (tmp_path / "suite.json").write_text(json.dumps(SUITE | {"scoring": "judge"} | wrong))
    with pytest.raises(InvalidSpecError, match=r"(?s)judge.mark: there is no such.*uri must name"):
        read_suites([tmp_path / "suite.json"])


def test_the_papers_recipe_on_the_page_is_valid(tmp_path):
    page = (Path(__file__).parents[1] / "docs" / "training.md").read_text()
    (text,) = re.findall(r"```yaml\n(adapter: math\n.*?)```", page, re.DOTALL)
    (tmp_path / "recipe.yaml").write_text(text)
    recipe = read_recipe(tmp_path / "recipe.yaml")
    assert recipe.data == DataSource(
        "hub:meta-math/MetaMathQA::train[:100000]", template="metamathqa"
    )
    assert recipe.suites == (named("gsm8k"), named("math", str(tmp_path / "data")))


@pytest.mark.parametrize(
    ("suite", "kind", "message"),
    [
        ("squad", NotFoundError, "boolq, piqa"),
        ({"named": ["boolq"]}, InvalidSpecError, "named: NAME"),
        ({"named": "boolq", "folder": 5}, InvalidSpecError, "folder: 5"),
        ({"named": "boolq", "limits": 5}, InvalidSpecError, "suites.0.limits: there is no such"),
        ({"named": "boolq", "limit": 0}, InvalidSpecError, "limit must be at least 1"),
    ],
    ids=str,
)
def test_a_wrong_name_of_a_suite_is_reported(suite, kind, message, tmp_path):
    (tmp_path / "recipe.json").write_text(json.dumps(RECIPE | {"suites": [suite]}))
    with pytest.raises(kind, match=message):
        read_recipe(tmp_path / "recipe.json")


def test_all_problems_of_a_recipe_are_reported_at_once(cli, tmp_path):
    recipe = RECIPE | {
        "suites": [SUITE | {"max_new_tokens": "two", "scorings": "f1"}],
        "perturbation": {"maskng_p": 0.1},
        "optimizer": {"steps": -1},
    }
    (tmp_path / "bad.json").write_text(json.dumps(recipe))
    code, _, err = cli.run("train", tmp_path / "bad.json", "--base", "v1", "--out", "x")
    assert code == 2
    assert f"suites.0.scorings: {NO_FIELD}scoring, " in err
    assert "suites.0.max_new_tokens: input should be a valid integer" in err
    assert f"perturbation.maskng_p: {NO_FIELD}masking_p, " in err
    assert "optimizer: the optimizer settings are invalid: steps must be a whole number" in err
    assert "from 1 to 10,000,000, not -1" in err


def test_unknown_fields_hide_no_invalid_value(cli, tmp_path):
    recipe = RECIPE | {
        "family": "no/name", "sed": 1, "optimizer": {"steps": -1, "stepz": 2},
        "suites": [SUITE | {"limit": 0, "limits": 1}, SUITE | {"limits": 2}],
    }  # fmt: skip
    (tmp_path / "bad.json").write_text(json.dumps(recipe))
    code, _, err = cli.run("train", tmp_path / "bad.json", "--base", "v1", "--out", "x")
    assert code == 2
    for place, first in {
        "sed": "seed",
        "optimizer.stepz": "steps",
        "suites.0.limits": "limit",
        "suites.1.limits": "limit",
    }.items():
        assert f"{place}: {NO_FIELD}{first}, " in err
    assert "optimizer: the optimizer settings are invalid: steps must be" in err
    assert "suites.0: suite 'sums': limit must be at least 1, not 0" in err
    policy = {"margin_points": -1, "margin": 5, "recovery": {"scale": [0.5], "scales": [-1]}}
    (tmp_path / "bad.json").write_text(json.dumps(policy))
    code, _, err = cli.run(*TRANSFER, "--out", "x", "--policy", tmp_path / "bad.json")
    assert code == 2
    assert f"margin: {NO_FIELD}margin_points, " in err
    assert "recovery.scale: there is no such field" in err
    assert "recovery: " in err and "-1" in err
    recipe = RECIPE | {"family": "no/name", "sed": 1}
    (tmp_path / "bad.json").write_text(json.dumps(recipe))
    code, _, err = cli.run("train", tmp_path / "bad.json", "--base", "v1", "--out", "x")
    assert "sed: there is no such field" in err and "family must be 1 to 100 ASCII" in err


@pytest.mark.parametrize(
    ("data", "messages"),
    [
        ({"url": "t"}, [f"data.url: {NO_FIELD}uri, ", "data.uri: this field is missing"]),
        ([{"uri": "t", "weigth_": 2}], [f"data.0.weigth_: {NO_FIELD}weight, "]),
        ([{"uri": "t", "weight": 0}], ["data.0: the data source t is invalid: weight must be"]),
        ("t.jsonl", ["data: must have fields with values (found 't.jsonl')"]),
    ],
    ids=str,
)
def test_invalid_data_is_reported_by_its_place(data, messages, cli, tmp_path):
    """One source and a list of sources are both accepted, and the other form is not reported."""
    (tmp_path / "bad.json").write_text(json.dumps(RECIPE | {"data": data}))
    code, _, err = cli.run("train", tmp_path / "bad.json", "--base", "v1", "--out", "x")
    assert code == 2
    assert all(message in err for message in messages)
    assert "TrainingSource" not in err


@pytest.mark.parametrize(
    ("perturbation", "message"),
    [
        ({"masking_p": float("nan")}, "masking_p must lie in [0, 1), not nan"),
        ({"dropping_p": 1.0}, "dropping_p must lie in [0, 1), not 1.0"),
        ({"masking_p": 0.0, "dropping_p": 0.0, "spared_layers": [0]}, "spared_layers is given"),
    ],
)
def test_an_invalid_perturbation_is_reported(perturbation, message, cli, tmp_path):
    (tmp_path / "bad.json").write_text(json.dumps(RECIPE | {"perturbation": perturbation}))
    code, _, err = cli.run("train", tmp_path / "bad.json", "--base", "v1", "--out", "x")
    assert code == 2
    assert message in err


# 9 ** 29 texts, if aliases were copied
ALIASES = "".join(
    f"k{n}: &k{n} [{', '.join([f'*k{n - 1}'] * 9 if n else 'x')}]\n" for n in range(30)
)
ALIASES += "name: *k29\ndata: {uri: a}\n"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("s.json", "{", "cannot be read"),
        ("s.yaml", "a: [", "cannot be read"),
        ("s.json", '{"name": "a", "name": "b"}', "the key 'name' is repeated in one object"),
        ("s.yaml", "name: a\nname: b", "the key 'name' is repeated in one mapping"),
        ("s.yaml", "data: {uri: a, uri: b}", "the key 'uri' is repeated in one mapping"),
        ("s.toml", "", "has an unknown extension"),
        ("s.yaml", "- 1", "is not a valid Suite"),
        ("s.yaml", "", "the file: must have fields with values (found None)"),
        ("s.yaml", "name: \xe9", "can't decode byte 0xe9"),
        ("s.json", '{"name": "\xe9"}', "can't decode byte 0xe9"),
        ("s.yaml", "name: " + "[" * 5000, "nested more than 100 levels deep"),
        ("s.json", '{"name": ' + "[" * 100_000, "nested more than 100 levels deep"),
        ("s.yaml", "name: &a [*a]", "nested more than 100 levels deep"),
        ("s.yaml", ALIASES, "name: input should be a valid string (found [[[...], "),
        ("s.yaml", f"name: a\ndata: {'x' * 999}", "x...x"),
    ],
)
def test_files_that_cannot_be_read_are_reported(name, text, message, cli, tmp_path):
    (tmp_path / name).write_text(text, encoding="latin-1")
    code, _, err = cli.run("evaluate", "mine", "--base", "v1", "--suite", tmp_path / name)
    assert code == 2
    assert message in err
    assert len(err) < 10_000


def test_errors_of_folders_and_disks_have_no_traceback(cli, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    evaluate = ("evaluate", "--bare", "--base", "v1", "--suite", "suite.json")
    code, _, err = cli.run(*evaluate, "--state", tmp_path / "file")
    assert code == 3
    assert f"StoreError: {tmp_path}/file/fingerprints cannot be read or written" in err
    assert "Not a directory" in err and "Traceback" not in err
    analyse = ("analyse", "v1", "v2", "--rows", "0", "--state", tmp_path / "state", "--out")
    code, _, err = cli.run(*analyse, tmp_path / "file" / "out")
    assert code == 3 and f"{tmp_path}/file is a file" in err
    monkeypatch.setattr("os.access", lambda path, mode: False)
    code, _, err = cli.run(*analyse, tmp_path / "out")
    assert code == 3 and f"{tmp_path} is read-only" in err
    monkeypatch.undo()

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("trans_peft.cli.workspace.write_json", full)
    monkeypatch.chdir(cli.folder)
    code, _, err = cli.run(*evaluate, "--state", tmp_path / "state")
    assert code == 3 and "is full" in err and "Traceback" not in err


def test_a_failure_has_another_exit_code_than_invalid_input(cli, monkeypatch):
    def lost(*_: object, **__: object) -> None:
        raise trouble

    monkeypatch.setattr("trans_peft.cli.workspace.Workspace.fingerprint", lost)
    from trans_peft.errors import StoreError

    trouble: Exception = StoreError("the bucket does not answer")
    code, _, err = cli.run("fingerprint", "v1")
    assert (code, err) == (3, "StoreError: the bucket does not answer\n")
    trouble = RuntimeError("a bug")
    code, _, err = cli.run("fingerprint", "v1")
    assert code == 3
    assert "Traceback" in err


# What the commands do.


def test_criticality_prints_the_values_of_the_library_and_a_line_for_a_recipe(cli, tmp_path):
    rows = tmp_path / "long.jsonl"
    rows.write_text(json.dumps({"prompt": "1+" * 70, "completion": "70"}))
    code, found = cli.json("criticality", "v1", rows, "--tokens", "128")
    assert code == 0
    ids = tiny_tokenizer()("1+" * 70, return_tensors="pt")["input_ids"][:, :128]
    expected = layer_criticality(tiny_model(), [{"input_ids": ids, "labels": ids}])
    assert found["criticality"] == pytest.approx(expected, abs=1e-5)
    code, out, _ = cli.run("criticality", "v1", rows)
    assert code == 0 and out.splitlines()[-1] == f'"spared_layers": {found["spared_layers"]}'


def test_too_few_tokens_for_criticality_are_reported(cli, tmp_path):
    (tmp_path / "one.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b"}))
    code, _, err = cli.run("criticality", "v1", tmp_path / "one.jsonl")
    assert code == 2
    assert "too short to measure the criticality of layers" in err


def test_analyse_prints_and_writes_the_values_of_the_library(cli, tmp_path):
    code, found = cli.json("analyse", "v1", "v2", "--rows", "0")
    assert code == 0 and found["texts"] == 0 and found["measured"] is None
    drift = found["updates"][0]["drift"]
    assert drift["ffn"] == pytest.approx(weight_drift(Path("v1"), Path("v2")).ffn)
    out = tmp_path / "report"
    code, printed, _ = cli.run("analyse", "v1", "v2", "--rows", "2", "--tokens", "9", "--out", out)
    assert code == 0 and f"{drift['ffn']:.2%}" in printed and "FFN - attention" in printed
    assert json.loads((out / "analysis.json").read_text())["tokens"] == 18
    assert "data:image/png;base64," in (out / "index.html").read_text()


def test_analyse_refuses_other_bases_and_missing_adapters(cli):
    code, _, err = cli.run("analyse", "v1", "unrelated")
    assert code == 2 and "the weights are unrelated" in err
    code, _, err = cli.run("analyse", "v1", "v2", "--rows", "-1")
    assert code == 2 and "Must be >= 0" in err
    code, _, err = cli.run("analyse", "v1", "v2", "--adapter", "adapter")
    assert code == 2 and "one for each of the 2 bases" in err


def test_fingerprint_is_the_same_for_a_path_and_a_published_copy(cli, tmp_path):
    uri = (tmp_path / "bucket" / "v1").as_uri()
    code, out, err = cli.run(
        *("publish", "v1", uri, "--family", "tiny", "--version", "v1", "--parent", "v0")
    )
    assert (code, out.split()[:5]) == (0, ["tiny/v1", "was", "published", "to", f"{uri}:"])
    size = out.split(" files, ")[1].partition(" bytes")[0]
    assert f"hashing v1: {size} of {size} B\n" in err
    assert f"uploading to {uri}: {size} of {size} B\n" in err
    manifest = json.loads((tmp_path / "bucket/v1/trans_peft_manifest.json").read_text())
    assert (manifest["family"], manifest["version"], manifest["parent"]) == ("tiny", "v1", "v0")
    _, there = cli.json("fingerprint", uri)
    _, here = cli.json("fingerprint", "v1")
    _, other = cli.json("fingerprint", "v2")
    assert there["digest"] == here["digest"] != other["digest"]
    assert here["layer_count"] == 2


def test_publish_refuses_a_place_that_ingestion_would_refuse(cli, tmp_path, monkeypatch):
    root = (tmp_path / "bases").as_uri()
    monkeypatch.setenv("TRANS_PEFT_BASES_URI", f"{root}/")
    arguments = ("--family", "tiny", "--version", "v1")
    code, _, err = cli.run("publish", "v1", f"{root}/other/v1", *arguments)
    assert code == 2
    assert "cannot become a version of the base family tiny" in err
    assert f"expected: a URI below {root}/tiny/" in err
    assert not (tmp_path / "bases").exists()
    code, out, _ = cli.run("publish", "v1", f"{root}/tiny/v1", *arguments)
    assert code == 0 and "workers ingest it if" not in out
    monkeypatch.setenv(
        "TRANS_PEFT_FAMILIES", json.dumps({"tiny": {"prefixes": [f"{root}/other/"]}})
    )
    assert cli.run("publish", "v1", f"{root}/other/v1", *arguments)[0] == 0
    monkeypatch.setenv("TRANS_PEFT_FAMILIES", '{"tiny": {"prefix": []}}')
    code, _, err = cli.run("publish", "v1", f"{root}/tiny/v1", *arguments)
    assert code == 2 and "the variable TRANS_PEFT_FAMILIES cannot be used" in err
    monkeypatch.delenv("TRANS_PEFT_FAMILIES")
    monkeypatch.delenv("TRANS_PEFT_BASES_URI")
    code, out, _ = cli.run("publish", "v1", f"{root}/elsewhere", *arguments)
    assert code == 0
    assert "workers ingest it if their TRANS_PEFT_BASES_URI/tiny/, or the prefixes of tiny" in out


def test_a_changed_file_is_read_again(cli, tmp_path):
    write_tiny_base(tmp_path / "base")
    _, before = cli.json("fingerprint", tmp_path / "base")
    write_tiny_base(tmp_path / "base", seed=1)
    _, after = cli.json("fingerprint", tmp_path / "base")
    assert before["digest"] != after["digest"]


def bound(cli, folder, **fields):
    """Copy the adapter, with other fields in its config."""
    shutil.copytree(cli.folder / "mine", folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return folder


COMPARISONS = {
    "check": (),
    "transfer": ("--suite", "suite.json", "--out", "x"),
    "agreement": ("--prompts", "prompts.yaml"),
}


@pytest.mark.parametrize("command", COMPARISONS)
@pytest.mark.parametrize("by", ["fingerprint", "folder"])
def test_an_old_base_that_the_adapter_was_not_trained_on_is_refused(cli, tmp_path, command, by):
    kept = "name: open\ndata: {uri: rows.jsonl}\nkeep_answers: true\n"
    (cli.folder / "prompts.yaml").write_text(kept)
    _, v1 = cli.json("fingerprint", "v1")
    fields = (
        {"revision": v1["digest"]} if by == "fingerprint" else {"base_model_name_or_path": "v1"}
    )
    mine = bound(cli, tmp_path / "mine", **fields)
    arguments = (command, mine, "--old", "v2", "--new", "unrelated", *COMPARISONS[command])
    code, _, err = cli.run(*arguments)
    assert code == 2
    assert "the adapter was trained on another base than v2" in err
    assert f"fingerprint {v1['digest']}" in err.split("found:")[0].split("expected:")[1]
    assert "do:       pass the base that the adapter was trained on as --old" in err
    assert not (cli.folder / "x").exists()


def test_an_old_base_is_compared_with_what_the_adapter_records(cli, tmp_path):
    _, v1 = cli.json("fingerprint", "v1")
    known = [{"revision": v1["digest"]}, {"base_model_name_or_path": str(cli.folder / "v1")}]
    for number, fields in enumerate(known):
        mine = bound(cli, tmp_path / str(number), **fields)
        code, _, err = cli.run("check", mine, "--old", "v1", "--new", "v2")
        assert (code, "note:" in err) == (0, False)
    unknown = {"base_model_name_or_path": "hub/model", "revision": "main"}
    mine = bound(cli, tmp_path / "hub", **unknown)
    code, _, err = cli.run("check", mine, "--old", "v1", "--new", "v2")
    assert code == 0
    assert "note: the adapter records the base 'hub/model', which cannot be compared with v1" in err


def test_check_reports_whether_an_adapter_fits(cli):
    code, found = cli.json("check", "mine", "--old", "v1", "--new", "v2")
    assert (code, found["fits"], found["compatibility"]["mismatches"]) == (0, True, [])
    assert found["effect"]["max_logit_change"] > 0
    code, found = cli.json("check", "mine", "--old", "v1", "--new", "unrelated")
    assert (code, found["fits"], found["effect"]) == (1, False, None)
    assert "pretraining from scratch" in found["compatibility"]["mismatches"][0]
    code, out, _ = cli.run("check", "mine", "--old", "v1", "--new", "unrelated")
    assert code == 1
    assert out.startswith("not compatible: 1 mismatches\n  mismatch: the weights are unrelated")


def test_an_adapter_that_changes_no_logit_does_not_fit(cli, tmp_path):
    config = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(tiny_model(), config).save_pretrained(tmp_path / "zero")
    code, out, _ = cli.run("check", tmp_path / "zero", "--old", "v1", "--new", "v2")
    assert code == 1
    assert "the adapter changes no logit" in out


def test_a_damaged_cached_evaluation_is_computed_again(cli, tmp_path):
    arguments = ("evaluate", "--bare", "--base", "v1", "--suite", "suite.yaml", "--state", tmp_path)
    _, (first,) = cli.json(*arguments)
    (cached,) = (tmp_path / "evaluations").iterdir()
    cached.write_text("{")
    code, (again,) = cli.json(*arguments)
    assert (code, again) == (0, first)
    assert json.loads(cached.read_text())["suite"] == "sums"


def test_evaluate_writes_the_items_and_reuses_them(cli, tmp_path):
    arguments = ("evaluate", "mine", "--base", "v1", "--suite", "suite.yaml", "--state", tmp_path)
    code, _, err = cli.run(*arguments, "--out", tmp_path / "out")
    assert code == 0
    assert re.search(r"mine: sums on v1-[0-9a-f]{8}: 8 of 8 items", err)
    kept = json.loads((tmp_path / "out" / "sums.json").read_text())
    assert len(kept["items"]) == 8
    code, out, err = cli.run(*arguments, "--json")
    assert (code, err) == (0, "")  # nothing was evaluated again
    (summary,) = json.loads(out)
    assert summary["items"] == 8
    code, (bare,) = cli.json("evaluate", "--bare", *arguments[2:])
    assert (code, bare["weights_sha256"]) == (0, "bare")


def test_adopt_binds_a_folder_to_its_base(cli, tmp_path):
    folder = (cli.folder / "mine").as_uri()  # fetched, as from a bucket
    code, printed = cli.json(
        *("adopt", folder, "--base", "v1", "--suite", "suite.json", "--out", tmp_path / "out")
    )
    assert code == 0
    assert printed["record"]["adapter"] == "mine"
    assert printed["evaluations"][0]["items"] == 8
    config = json.loads((tmp_path / "out/adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(cli.folder / "v1")
    assert (tmp_path / "out/evaluations/sums.json").is_file()


def test_adopt_refuses_an_adapter_of_another_version(cli, tmp_path):
    _, v1 = cli.json("fingerprint", "v1")
    mine = bound(cli, tmp_path / "mine", revision=v1["digest"])
    arguments = ("--suite", "suite.json", "--out", tmp_path / "out")
    code, _, err = cli.run("adopt", mine, "--base", "v2", *arguments)
    assert code == 2
    assert "is bound to another base than" in err and v1["digest"] in err
    assert not (tmp_path / "out").exists()


def test_adopt_refuses_what_does_not_fit(cli, tmp_path):
    config = LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(tiny_model(layers=3), config).save_pretrained(tmp_path / "deep")
    code, _, err = cli.run(
        *("adopt", tmp_path / "deep", "--base", "v1", "--suite", "suite.json"),
        *("--out", tmp_path / "out"),
    )
    assert code == 2
    assert "model.layers.2.self_attn.q_proj" in err
    assert not (tmp_path / "out").exists()


def test_transfer_keeps_the_old_bases_chat_template(cli, tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    tiny_model().save_pretrained(tmp_path / "v3")
    tokenizer.save_pretrained(tmp_path / "v3")
    code, printed = cli.json("check", "mine", "--old", "v1", "--new", tmp_path / "v3")
    assert code == 0
    assert "has no template of its own" in printed["compatibility"]["notes"][0]
    cli.run(
        *("transfer", "mine", "--old", "v1", "--new", tmp_path / "v3", "--suite", "suite.json"),
        *("--out", tmp_path / "out"),
    )
    assert (tmp_path / "out/adapter/chat_template.jinja").read_text() == CHAT_TEMPLATE
    outcome = json.loads((tmp_path / "out/outcome.json").read_text())
    assert "keeps the one it was trained with" in outcome["compatibility"]["notes"][0]
    assert not (cli.folder / "mine/chat_template.jinja").exists()


def test_transfer_writes_the_verdict_and_the_rebound_adapter(cli, tmp_path):
    (tmp_path / "policy.yaml").write_text("margin_points: 60\nmust_beat_bare: false\n")
    code, _, _ = cli.run(
        *(*TRANSFER, "--out", tmp_path / "out", "--policy", tmp_path / "policy.yaml")
    )
    outcome = json.loads((tmp_path / "out/outcome.json").read_text())
    assert (code, outcome["judgment"]["verdict"]) == (0, "passed")
    assert len(outcome["evaluations"]) == 3
    assert (tmp_path / "out/adapter/adapter_model.safetensors").read_bytes() == (
        cli.folder / "mine/adapter_model.safetensors"
    ).read_bytes()
    PeftModel.from_pretrained(tiny_model(), tmp_path / "out/adapter")

    # Another policy is judged from the stored evaluations; the exit code reports its verdict.
    code, out, err = cli.run(*TRANSFER, "--out", tmp_path / "strict")
    assert code == 1
    assert "verdict: " in out
    assert "evaluating" not in err


def test_a_missing_file_of_prompts_is_an_error_before_the_evaluations(cli, tmp_path):
    uri = f"{tmp_path}/traffic/{{adapter}}.jsonl"
    (tmp_path / "policy.yaml").write_text(f'recovery: {{compensation: {{prompts_uri: "{uri}"}}}}')
    code, _, err = cli.run(*TRANSFER, "--out", "x", "--policy", tmp_path / "policy.yaml")
    assert code == 2
    assert f"there is no file {tmp_path}/traffic/" in err.replace("\n", "")
    assert not Path("x").exists()


def test_the_recovery_strategies_of_a_policy_are_tried_and_reported(cli, tmp_path):
    policy = "label: strict\nmargin_points: 1\nrecovery: {scales: [0.5, 2.0]}\n"
    (tmp_path / "policy.yaml").write_text(policy)
    arguments = (*TRANSFER, "--policy", tmp_path / "policy.yaml")
    code, out, _ = cli.run(*arguments, "--out", tmp_path / "out", "--recipe", "recipe.json")
    assert code == 1
    assert "tried: direct: " in out
    outcome = json.loads((tmp_path / "out/outcome.json").read_text())
    assert all(item["seconds"] >= 0 for item in outcome["tried"])
    assert "level 2.5 %" in outcome["judgment"]["reason"]
    (tmp_path / "policy.yaml").write_text("recovery: {scale: [0.5]}\n")
    code, _, err = cli.run(*arguments, "--out", tmp_path / "none")
    assert code == 2
    assert "recovery.scale: there is no such field" in err


def test_an_incompatible_adapter_has_a_verdict_and_raises_no_error(cli, tmp_path):
    arguments = ("transfer", "mine", "--old", "v1", "--new", "unrelated", "--suite", "suite.json")
    code, printed = cli.json(*arguments, "--out", tmp_path / "out")
    assert (code, printed["judgment"]["verdict"]) == (1, "incompatible")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"outcome.json"}


def test_agreement_needs_no_reference_answers(cli, tmp_path):
    kept = "name: open\ndata: {uri: %s}\nmax_new_tokens: 4\nkeep_answers: true\n"
    (tmp_path / "prompts.yaml").write_text(kept % (cli.folder / "rows.jsonl"))
    arguments = ("agreement", "mine", "--old", "v1", "--prompts", tmp_path / "prompts.yaml")
    code, same = cli.json(*arguments, "--new", "v1")
    assert code == 0
    for who in ("adapter", "bare"):
        assert (same[who]["prompts"], same[who]["equal"]) == (8, 8)
        assert same[who]["kl"] < 1e-6
    code, moved = cli.json(*arguments, "--new", "v2")
    assert code == 0
    assert moved["adapter"]["kl"] > 0 < moved["bare"]["kl"]
    assert moved["adapter"]["equal"] <= 8
    code, out, err = cli.run(*arguments, "--new", "v2")
    assert (code, "evaluating" in err) == (0, False)  # the answers were stored
    assert "equal answers" in out and "bare base" in out


def test_train_writes_a_stock_folder_and_its_evaluation(cli, tmp_path):
    out = tmp_path / "out"
    code, printed = cli.json("train", "recipe.json", "--base", "v1", "--out", out)
    assert code == 0
    assert printed["record"]["method"] == "LORA"
    assert printed["evaluations"][0]["items"] == 8
    assert [step["step"] for step in json.loads((out / "training.json").read_text())] == [1, 2]
    model = PeftModel.from_pretrained(tiny_model(), out / "adapter")
    assert model.peft_config["default"].base_model_name_or_path == str(cli.folder / "v1")
    assert json.loads((out / "evaluations/sums.json").read_text())["suite"] == "sums"
    code, _, err = cli.run("train", "recipe.json", "--base", "v1", "--out", out)
    assert code == 2
    assert f"{out} is not empty: it has the results of a command that is complete" in err
    assert f"found:    the adapter in {out / 'adapter'}" in err
    assert "pass another folder as --out, and also as --state" in err


def test_the_module_exits_with_the_exit_code_of_the_command():
    environment = os.environ | {"COLUMNS": "100"}
    done = subprocess.run(
        [sys.executable, "-m", "trans_peft.cli", "fingerprint", "/nowhere"],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "NotFoundError: there are no files below /nowhere\n"


@pytest.mark.servers
def test_bases_and_adapters_may_lie_in_buckets(cli, tmp_path, servers, unique):
    from trans_peft.edges.s3_store import S3Store

    root = f"s3://{servers.bucket}/{unique}"
    for name in ("v1", "v2"):
        code, _, _ = cli.run(
            "publish", name, f"{root}/{name}", "--family", unique, "--version", name
        )
        assert code == 0
    for path in (cli.folder / "mine").iterdir():
        with path.open("rb") as file:
            S3Store().write(f"{root}/mine/{path.name}", file)
    state = ("--state", tmp_path)
    bases = ("--old", f"{root}/v1", "--new", f"{root}/v2")
    code, found = cli.json("check", f"{root}/mine", *bases, *state)
    assert (code, found["fits"]) == (0, True)
    out = tmp_path / "out"
    arguments = ("transfer", f"{root}/mine", *bases, "--suite", "suite.json", "--out", out)
    code, printed = cli.json(*arguments, *state)
    assert printed["adapter"] == "mine"
    assert code == (printed["judgment"]["verdict"] != "passed")
    config = json.loads((out / "adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == f"{root}/v2"
    code, _, err = cli.run("fingerprint", f"s3://{servers.bucket}/{unique}/nothing")
    assert code == 2
    assert "no files below" in err
