"""The process of the vLLM engine, with a fake package in place of vLLM."""

import json
import shutil
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.tiny import tiny_model, tiny_tokenizer, write_tiny_base
from trans_peft import models
from trans_peft.errors import EvaluationError, InvalidSpecError, WorkerError
from trans_peft.ports import Sampling
from trans_peft.validation import vllm_engine
from trans_peft.validation.engine import LoopEngine
from trans_peft.validation.vllm_engine import VllmBase, VllmEngine, vllm_name

RAISES, DIES, IS_NAN, ENDS_EARLY = range(4)
VLLM = """
import json, os
from types import SimpleNamespace

__version__ = "1.2.3+cpu"

class SamplingParams(SimpleNamespace):
    pass

class LLM:
    def __init__(self, **arguments):
        print("this is not a result", flush=True)
        with open(os.environ["FAKE_VLLM"], "a") as log:
            log.write(json.dumps(arguments) + "\\n")
        if arguments["dtype"] == "float8":
            raise ValueError("no kernel")

    def generate(self, prompts, sampling, *, lora_request, use_tqdm):
        return [self._answer(one["prompt_token_ids"], sampling, lora_request) for one in prompts]

    def _answer(self, prompt, sampling, adapter):
        if prompt[0] == 0:
            raise RuntimeError("out of blocks")
        if prompt[0] == 1:
            os.write(2, b"Killed by the kernel")
            os._exit(9)
        log_p = float("nan") if prompt[0] == 2 else -1.0
        tokens = 1 if prompt[0] == 3 and sampling.detokenize else sampling.max_tokens
        ids = [prompt[-1] + (adapter.number if adapter else 0)] * tokens
        return SimpleNamespace(
            outputs=[SimpleNamespace(
                token_ids=ids,
                logprobs=[{token: SimpleNamespace(logprob=log_p)} for token in ids],
            )],
        )
"""
PLATFORMS = """
import os
from types import SimpleNamespace
current_platform = SimpleNamespace(device_type=os.environ.get("FAKE_DEVICE", "cpu"))
"""
LORA = """
class LoRARequest:
    def __init__(self, name, number, folder):
        assert name == f"adapter-{number}"
        self.number = number
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """A Python environment that has the fake package."""
    root = tmp_path_factory.mktemp("environment")
    files = {
        "site/vllm/__init__.py": VLLM,
        "site/vllm/platforms.py": PLATFORMS,
        "site/vllm/lora/__init__.py": "",
        "site/vllm/lora/request.py": LORA,
        "bin/python": f'#!/bin/sh\nPYTHONPATH={root}/site exec {sys.executable} "$@"\n',
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    (root / "bin/python").chmod(0o755)
    return root


@pytest.fixture
def starts(tmp_path, monkeypatch):
    """Returns the arguments of each start of vLLM so far."""
    log = tmp_path / "starts.jsonl"
    monkeypatch.setenv("FAKE_VLLM", str(log))
    yield lambda: [json.loads(line) for line in log.read_text().splitlines()]
    vllm_engine._stop()


@pytest.fixture
def engine_of(environment, starts, tokenizer):
    def make(*adapter, dtype="float32", context=None, folder=Path("/bases/1"), default=nullcontext):
        base = VllmBase(environment, folder, (), dtype, context)
        with torch.device("meta"):
            return VllmEngine(base, tiny_model(), tokenizer, default, *adapter)

    return make


def ids(answers):
    return [list(one.ids) for one in answers]


def test_the_name_has_the_version_of_vllm(environment, engine_of):
    assert vllm_name(environment) == engine_of().name == "vllm 1.2.3"


def test_an_environment_that_cannot_run_vllm_is_an_error(environment, tmp_path, monkeypatch):
    vllm_name.cache_clear()
    monkeypatch.setenv("FAKE_DEVICE", "")
    with pytest.raises(WorkerError, match=r"found: +vLLM 1.2.3.cpu and no device"):
        vllm_name(environment)
    with pytest.raises(WorkerError, match="No such file"):
        vllm_name(tmp_path)
    without = tmp_path / "bin" / "python"
    without.parent.mkdir()
    without.symlink_to(sys.executable)
    with pytest.raises(WorkerError, match="No module named 'vllm'"):
        vllm_name(tmp_path)


def test_the_process_stays_for_the_next_adapter_of_a_base(engine_of, starts):
    bare, one, two = engine_of(), engine_of(Path("/a"), 4), engine_of(Path("/b"), 8)
    answers = [ids(engine.answers([[9, 40]], max_new_tokens=2)) for engine in (bare, one, two)]
    assert answers[0] == [[40, 40]]
    assert answers[1] != answers[2]  # the fake adds the number of the adapter
    (start,) = starts()
    assert (start["max_lora_rank"], start["max_model_len"]) == (8, 1024)
    assert start["model"] == "/bases/1" and start["enable_lora"] and start["enforce_eager"]

    engine_of(Path("/c"), 9).answers([[9, 40]], max_new_tokens=1200)
    assert [(one["max_lora_rank"], one["max_model_len"]) for one in starts()[1:]] == [(16, 2048)]
    bare.answers([[9, 40]], max_new_tokens=2)
    engine_of(folder=Path("/bases/2"), context=500).answers([[9, 40]], max_new_tokens=2)
    assert [one["max_model_len"] for one in starts()[2:]] == [500]


def test_a_base_is_loaded_after_vllm_has_ended(engine_of, tmp_path):
    engine_of().answers([[9, 40]], max_new_tokens=1)
    process = vllm_engine._running._running
    assert models._cached is None
    models.load_base(write_tiny_base(tmp_path / "base"), "float32")
    assert process.poll() is not None
    engine_of().answers([[9, 40]], max_new_tokens=1)
    assert models._cached is None


def test_likelihoods_and_scores_are_those_of_the_default_engine(engine_of):
    model, tokenizer = tiny_model(), tiny_tokenizer()
    loop = LoopEngine(model, tokenizer)
    engine = engine_of(default=lambda: nullcontext(loop))
    questions, texts = [([9, 40], [[1, 2], [3]])], [([9, 40], [1, 2])]
    assert engine.likelihoods(questions) == loop.likelihoods(questions)
    assert engine.scores(texts) == loop.scores(texts)


class Interrupted(SimpleNamespace):
    """A pipe to wait for, until the user presses Ctrl-C."""

    def __init__(self, pipe):
        super().__init__(close=pipe.close)

    def readline(self):
        raise KeyboardInterrupt


def test_an_interrupted_call_leaves_no_answers_for_the_next_one(engine_of):
    """The results of the first call are in the pipe when it is interrupted."""
    engine = engine_of()
    engine.answers([[9, 40]], max_new_tokens=1)
    process = vllm_engine._running._running

    process.stdout = Interrupted(process.stdout)
    with pytest.raises(KeyboardInterrupt):
        engine.answers([[9, 41]], max_new_tokens=1)
    assert ids(engine.answers([[9, 42]], max_new_tokens=1)) == [[42]]
    assert process.poll() is not None


def test_an_interrupted_start_ends_the_process(engine_of, monkeypatch):
    started, plain = [], subprocess.Popen

    def popen(*arguments, **options):
        started.append(plain(*arguments, **options))
        started[0].stdout = Interrupted(started[0].stdout)
        return started[0]

    monkeypatch.setattr(vllm_engine.subprocess, "Popen", popen)
    with pytest.raises(KeyboardInterrupt):
        engine_of().answers([[9, 40]], max_new_tokens=1)
    assert started[0].poll() is not None


def test_a_stopped_process_leaves_no_open_files(engine_of):
    engine_of().answers([[9, 40]], max_new_tokens=1)
    process = vllm_engine._running
    vllm_engine._stop()
    files = (process._running.stdin, process._running.stdout, process._log)
    assert all(file.closed for file in files)


def test_a_version_of_vllm_that_was_installed_meanwhile_is_another_engine(
    environment, engine_of, tmp_path
):
    engine, changed = engine_of(), tmp_path / "changed"
    shutil.copytree(environment, changed, symlinks=True)
    package = changed / "site" / "vllm" / "__init__.py"
    package.write_text(package.read_text().replace("1.2.3", "1.2.4"))
    python = changed / "bin" / "python"
    python.write_text(python.read_text().replace(str(environment), str(changed)))
    engine._base = replace(engine._base, environment=changed)
    with pytest.raises(WorkerError, match=r"(?s)expected: vllm 1.2.3\n.*found: +vllm 1.2.4"):
        engine.answers([[9, 40]], max_new_tokens=1)


@pytest.mark.parametrize(
    ("first", "message"),
    [
        (RAISES, "RuntimeError: out of blocks"),
        (DIES, "the process ended: .*Killed by the kernel"),
        (IS_NAN, "logits are not finite"),
    ],
)
def test_an_error_of_vllm_is_an_evaluation_error(engine_of, starts, first, message):
    engine = engine_of()
    with pytest.raises(EvaluationError, match=f"(?s){message}"):
        engine.answers([[9], [first, 40]], max_new_tokens=2, stop=["x"])
    assert ids(engine.answers([[9]], max_new_tokens=2)) == [[9, 9]]
    assert len(starts()) == (2 if first == DIES else 1)


def test_an_answer_that_only_vllm_ends_is_asked_again(engine_of):
    answers = engine_of().answers([[ENDS_EARLY, 40], [9, 40]], max_new_tokens=3, stop=["x"])
    assert ids(answers) == [[40] * 3] * 2


def test_a_base_that_vllm_does_not_load_is_an_error_of_the_engine(engine_of):
    with pytest.raises(WorkerError, match="ValueError: no kernel"):
        engine_of(dtype="float8").answers([[9]], max_new_tokens=1)


def test_vllm_samples_no_answers(engine_of):
    with pytest.raises(InvalidSpecError, match="vLLM cannot sample"):
        engine_of().answers([[9]], max_new_tokens=1, sampling=Sampling(1.0, 1.0, [1]))
    assert engine_of().answers([], max_new_tokens=1) == []
