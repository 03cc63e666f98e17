"""A small fleet for tests of serving: tiny bases on the disk, LoRA adapters with random weights.

The registry is in memory or a real MLflow server; the folders are real.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from tests.lifecycle.fleet import POLICY, SUITE
from trans_peft.bases.fingerprint import fingerprint
from trans_peft.domain.adapter import AdapterVersion
from trans_peft.domain.base import BaseVersion
from trans_peft.domain.evaluation import Judgment, Verdict
from trans_peft.domain.outcome import TransferOutcome
from trans_peft.edges.memory import memory_platform
from trans_peft.edges.stores import SchemeStore
from trans_peft.lifecycle.resolve import find_base
from trans_peft.models import adapter_weights_sha256
from trans_peft.ports import Platform
from trans_peft.serving.manifest import ServedAdapter, serving_manifest
from trans_peft.transfer.load_adapter import rebind_adapter

FAMILY = "small"
HIDDEN, VOCABULARY = 32, 258  # as in tests/tiny.py
RANK = 4


def lora_folder(
    folder: Path,
    seed: int = 0,
    *,
    hidden: int = HIDDEN,
    layers: int = 2,
    rank: int = RANK,
    output_layer: bool = False,
    **config,
) -> Path:
    """Write a PEFT folder like PEFT's own, for q_proj and down_proj of a tiny base, or lm_head."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(seed)
    modules = {
        f"model.layers.{layer}.{module}": (hidden, inputs)
        for layer in range(layers)
        for module, inputs in (("self_attn.q_proj", hidden), ("mlp.down_proj", 2 * hidden))
    }
    modules |= {"lm_head": (VOCABULARY, hidden)} if output_layer else {}
    tensors = {}
    for module, (outputs, inputs) in modules.items():
        prefix = f"base_model.model.{module}"
        tensors[f"{prefix}.lora_A.weight"] = random.normal(size=(rank, inputs)) * 0.3
        tensors[f"{prefix}.lora_B.weight"] = random.normal(size=(outputs, rank)) * 0.3
    save_file(
        {key: value.astype(np.float32) for key, value in tensors.items()},
        folder / "adapter_model.safetensors",
    )
    options = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "bases/v1",
        "r": rank, "lora_alpha": 8, "lora_dropout": 0.05, "bias": "none", "inference_mode": True,
        "target_modules": ["q_proj", "down_proj"], "use_dora": False, "modules_to_save": None,
        "init_lora_weights": True, "rank_pattern": {}, "alpha_pattern": {},
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps({**options, **config}))
    return folder


class ServingFleet:
    """A registry with bases and adapters whose files exist."""

    def __init__(self, folder: Path, platform: Platform | None = None, family: str = FAMILY):
        self.folder = folder
        self.family = family
        self.platform = platform or replace(memory_platform(folder / "work"), store=SchemeStore())
        self.registry, self.catalog = self.platform.registry, self.platform.catalog
        self.bases: dict[str, Path] = {}
        self._count = 0

    def add_base(self, version: str, base: Path) -> BaseVersion:
        """Register the base in a folder, as ingestion does after its upload."""
        self.bases[version] = base
        found = fingerprint(str(base), SchemeStore())
        return self.catalog.make_ready(
            BaseVersion(self.family, version, f"s3://bases/{self.family}/{version}", 0),
            fingerprint=found,
            source="upload",
        )

    def train(
        self, name: str, base: BaseVersion, seed: int = 0, *, serves: bool = True, **options
    ) -> AdapterVersion:
        """Register an adapter that was trained on a base; by default it serves there."""
        draft = lora_folder(self._new_folder(), seed, **options)
        return self._register(draft, name, base, None, serves)

    def add_folder(self, name: str, base: BaseVersion, folder: Path) -> AdapterVersion:
        """Register a PEFT folder as an adapter that serves on a base."""
        return self._register(folder, name, base, None)

    def transfer(
        self, name: str, base: BaseVersion, verdict: Verdict = Verdict.PASSED
    ) -> AdapterVersion:
        """Transfer the adapter's first version to a base with a given verdict."""
        source = self.registry.versions(name)[0]
        draft = self.registry.download(source, self._new_folder())
        version = self._register(draft, name, base, source, serves=verdict is Verdict.PASSED)
        self.registry.record(
            TransferOutcome(
                adapter=name,
                source_number=source.number,
                base=base.ref,
                weights_sha256=source.weights_sha256,
                policy_sha256=POLICY.sha256,
                judgment=Judgment(verdict, "the change lies between -8 and +2 points"),
                new_number=version.number,
            )
        )
        return version

    def served(self, name: str, base: str) -> ServedAdapter:
        manifest = serving_manifest(self.family, base, self.platform)
        return next(adapter for adapter in manifest.adapters if adapter.name == name)

    def _register(self, draft, name, base, source, serves=True) -> AdapterVersion:
        folder = rebind_adapter(
            draft, self._new_folder(), base_name=base.uri, base_revision=base.fingerprint_sha256
        )
        version = self.registry.register(
            AdapterVersion(
                adapter=name,
                number=0,
                base=base.ref,
                trained_on=source.trained_on if source else base.ref,
                weights_sha256=adapter_weights_sha256(folder),
                method="LORA",
                suites=(SUITE,),
                transferred_from=source.number if source else None,
            ),
            folder,
        )
        if serves:
            self.registry.set_alias(name, base.alias, version.number)
        return version

    def base(self, name: str) -> BaseVersion:
        return find_base(self.family, name, self.platform)

    def _new_folder(self) -> Path:
        self._count += 1
        folder = self.folder / "drafts" / str(self._count)
        shutil.rmtree(folder, ignore_errors=True)
        return folder
