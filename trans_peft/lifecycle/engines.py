"""Choose the engine that answers each suite of a comparison, and open it on a base.

All evaluations of a comparison have the same engine. It is chosen before any of them: if the engine
of the gate policy cannot serve a suite or one of the adapters, the default engine answers all sides
of the comparison.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

from trans_peft.domain.base import BaseVersion
from trans_peft.domain.evaluation import DEFAULT_ENGINE, EngineKind, Judgment, Suite
from trans_peft.errors import AdapterError, WorkerError
from trans_peft.lifecycle.base_files import named_fingerprint
from trans_peft.ports import Engine, Platform

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from trans_peft.models import LoadedBase

__all__ = ["ONLY_DEFAULT", "Engines", "check_engine", "choose_engines", "opened"]

_LONGEST_NOTE = 300  # characters: the notes of an outcome are in a tag of MLflow


@dataclass(frozen=True)
class Engines:
    """The engine of each suite, for all sides of a comparison.

    Attributes:
        kind: The engine of the gate policy.
        name: Its name, which is part of the keys of its evaluations.
        notes: The suites that the default engine answers instead, each with the reason.
    """

    kind: EngineKind = DEFAULT_ENGINE
    name: str = DEFAULT_ENGINE
    notes: tuple[tuple[str, str], ...] = ()

    def kind_for(self, suite: Suite) -> EngineKind:
        """Return the engine of a suite."""
        return DEFAULT_ENGINE if suite.name in dict(self.notes) else self.kind

    def name_for(self, suite: Suite) -> str:
        """Return the name of the engine of a suite, as in `Evaluation.engine`."""
        return DEFAULT_ENGINE if self.kind_for(suite) == DEFAULT_ENGINE else self.name

    def noted_in(self, judgment: Judgment) -> Judgment:
        """Return a judgment with the reason in each suite that the default engine answered."""
        notes = dict(self.notes)
        suites = (replace(one, engine_note=notes.get(one.suite, "")) for one in judgment.suites)
        return replace(judgment, suites=tuple(suites))


ONLY_DEFAULT = Engines()
"""The default engine for every suite."""


def check_engine(kind: EngineKind, platform: Platform) -> str:
    """Return the name of an engine. Loads no model.

    Raises WorkerError if the engine is not installed or cannot run on this worker.
    """
    if kind == DEFAULT_ENGINE:
        return DEFAULT_ENGINE
    if kind == "vllm":
        from trans_peft.validation.vllm_engine import vllm_name

        return vllm_name(_vllm(platform))
    try:
        from trans_peft.validation.continuous_batching import ContinuousBatchingEngine
    except ImportError as error:
        raise WorkerError(
            "this worker has no continuous batching",
            expected="transformers 5.23 or newer",
            found=error,
            do="install the versions of constraints.txt, or choose another engine in the policy",
        ) from error
    return ContinuousBatchingEngine.name


def choose_engines(
    kind: EngineKind,
    suites: Sequence[Suite],
    adapters: Iterable[tuple[BaseVersion, Callable[[], Path]]],
    platform: Platform,
) -> Engines:
    """Return which engine answers each suite, for one comparison.

    `adapters` are all adapters of the comparison, each with the base that it is evaluated on and
    its PEFT folder. No weights are read. Raises what `check_engine` raises.
    """
    name = check_engine(kind, platform)
    if kind == DEFAULT_ENGINE:
        return ONLY_DEFAULT
    problems = (_adapter_problem(kind, base, folder(), platform) for base, folder in adapters)
    problem = next(filter(None, problems), "")
    notes = ((suite.name, problem or _suite_problem(suite)) for suite in suites)
    return Engines(
        kind, name, tuple((suite, note[:_LONGEST_NOTE]) for suite, note in notes if note)
    )


def _suite_problem(suite: Suite) -> str:
    if suite.is_choice:
        return "the default engine computes the likelihoods of choices"
    return "the default engine samples answers" if suite.is_sampled else ""


def _adapter_problem(kind: EngineKind, base: BaseVersion, folder: Path, platform: Platform) -> str:
    """Return why an engine cannot answer with an adapter on a base; empty if it can."""
    from trans_peft.transfer.engine_check import EngineBase, check_for_engine
    from trans_peft.transfer.peft_folder import read_peft_folder
    from trans_peft.validation.continuous_batching import unsupported
    from trans_peft.validation.vllm_engine import MAX_RANK

    fingerprint = named_fingerprint(base, platform)
    if kind == "vllm":
        try:
            check_for_engine(
                folder, EngineBase(fingerprint, MAX_RANK, is_vllm=True), transferred=True
            )
        except AdapterError as error:
            return str(error).partition("found:")[2].partition("\n")[0].strip()
        return ""
    if not fingerprint.config:
        return f"the fingerprint of {base} was written before it contained config.json"
    return unsupported(_model(fingerprint.config), read_peft_folder(folder).peft_type)


@lru_cache(maxsize=2)
def _model(config: str) -> "PreTrainedModel":
    """Return the model of a config.json on the meta device."""
    from trans_peft.bases.meta_model import build_model

    return build_model(config)[1]


@contextmanager
def opened(
    kind: EngineKind, base: Path, dtype: str, adapter: Path | None, platform: Platform
) -> "Iterator[tuple[LoadedBase, Engine]]":
    """Yield a base, and an engine that answers with an adapter on it; None: the bare base.

    With vLLM, the weights of the yielded base are on the meta device.
    """
    from trans_peft.models import base_files, load_base
    from trans_peft.transfer.engine_check import lora_rank
    from trans_peft.transfer.load_adapter import attached
    from trans_peft.validation.continuous_batching import ContinuousBatchingEngine
    from trans_peft.validation.engine import LoopEngine
    from trans_peft.validation.evaluate import context_of
    from trans_peft.validation.vllm_engine import VllmBase, VllmEngine

    if kind == "vllm":
        files = base_files(base)
        loaded = _without_weights(base, files)
        of_vllm = VllmBase(_vllm(platform), base, files, dtype, context_of(loaded.model))
        rank = 0 if adapter is None else lora_rank(adapter)
        default = partial(_default_engine, base, dtype, adapter, platform)
        yield loaded, VllmEngine(of_vllm, loaded.model, loaded.tokenizer, default, adapter, rank)
        return
    loaded = load_base(base, dtype)
    make = LoopEngine if kind == DEFAULT_ENGINE else ContinuousBatchingEngine
    with nullcontext(loaded.model) if adapter is None else attached(loaded.model, adapter) as model:
        yield loaded, make(model, loaded.tokenizer)


@contextmanager
def _default_engine(
    base: Path, dtype: str, adapter: Path | None, platform: Platform
) -> Iterator[Engine]:
    with opened(DEFAULT_ENGINE, base, dtype, adapter, platform) as (_, engine):
        yield engine


@lru_cache(maxsize=1)
def _without_weights(folder: Path, files: tuple[tuple[str, int, int], ...]) -> "LoadedBase":
    """Return a base without weights, with its end tokens and its tokenizer."""
    from transformers import GenerationConfig

    from trans_peft.bases.checkpoint import GENERATION
    from trans_peft.bases.meta_model import build_model
    from trans_peft.models import LoadedBase, load_tokenizer

    _, model = build_model((folder / "config.json").read_text(encoding="utf-8"))
    if (folder / GENERATION).is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return LoadedBase(model, load_tokenizer(folder))


def _vllm(platform: Platform) -> Path:
    """Return the Python environment with vLLM; by default this one."""
    return platform.vllm or Path(sys.prefix)
