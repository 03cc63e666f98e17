"""Find what in a PEFT folder a LoRA server would ignore, or fail on, on a given base.

Servers check little of an adapter. vLLM 0.32 answers with status 200 if tensors belong to a layer
that the base does not have, and those tensors then do nothing. The checks here read headers alone.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from trans_peft.domain.base import Fingerprint
from trans_peft.errors import AdapterError, listed
from trans_peft.transfer.peft_folder import PeftFolder, read_peft_folder

__all__ = [
    "VLLM_INPUT_EMBEDDINGS",
    "VLLM_OUTPUT_LAYERS",
    "EngineBase",
    "check_for_engine",
    "lora_rank",
    "ranks",
]

_TENSOR = re.compile(
    r"base_model\.model\.(?P<module>.+)\."
    r"(?P<part>lora_A\.weight|lora_B\.weight|lora_embedding_A|lora_embedding_B)"
)
_COPY_OF_BASE = (".embed_tokens.base_layer.weight", ".lm_head.base_layer.weight")
_EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "word_embeddings")
_OUTPUT_LAYERS = ("lm_head", "embed_out")

_WITHOUT_EFFECT = frozenset({
    # who made the adapter, and on what
    "auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version",
    "revision", "task_type",
    # which modules: the tensors say it
    "exclude_modules", "layers_pattern", "layers_to_transform", "target_modules",
    # how it was trained
    "corda_config", "ensure_weight_tying", "eva_config", "init_lora_weights", "loftq_config",
    "lora_dropout", "lora_ga_config", "megatron_config", "megatron_core", "qalora_group_size",
    "runtime_config", "fan_in_fan_out",
})  # fmt: skip
"""Fields of adapter_config.json that a server may ignore."""
_SUPPORTED = frozenset({"lora_alpha", "r", "use_rslora"})
_PATTERNS = frozenset({"alpha_pattern", "rank_pattern"})

VLLM_OUTPUT_LAYERS = frozenset({
    "ApertusForCausalLM", "Ernie4_5ForCausalLM", "Exaone4ForCausalLM", "ExaoneMoeForCausalLM",
    "FalconH1ForCausalLM", "GraniteForCausalLM", "GraniteMoeForCausalLM",
    "GraniteMoeHybridForCausalLM", "GraniteMoeSWAForCausalLM", "GraniteMoeSharedForCausalLM",
    "GraniteSWAForCausalLM", "HyperCLOVAXForCausalLM", "InklingForCausalLM", "JambaForCausalLM",
    "Lfm2ForCausalLM", "Lfm2MoeForCausalLM", "Llama4ForCausalLM", "LlamaForCausalLM",
    "MiniCPM3ForCausalLM", "MixtralForCausalLM", "NemotronForCausalLM", "NemotronHForCausalLM",
    "Phi3ForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM", "Qwen3_5ForCausalLM",
    "Qwen3_5MoeForCausalLM",
})  # fmt: skip
"""Architectures on whose output layer vLLM 0.32 applies LoRA. It refuses to load it on others."""
VLLM_INPUT_EMBEDDINGS = VLLM_OUTPUT_LAYERS - {"InklingForCausalLM"} | {
    "ArceeForCausalLM", "Cohere2ForCausalLM", "CohereForCausalLM", "CwmForCausalLM",
    "FlexOlmoForCausalLM", "GPTBigCodeForCausalLM", "GPTNeoXForCausalLM", "GlmForCausalLM",
    "HunYuanDenseV1ForCausalLM", "HunYuanMoEV1ForCausalLM", "Jais2ForCausalLM",
    "MellumForCausalLM", "Olmo2ForCausalLM", "Olmo3ForCausalLM", "OlmoForCausalLM",
    "PhiForCausalLM", "SeedOssForCausalLM", "SmolLM3ForCausalLM", "Starcoder2ForCausalLM",
    "VaultGemmaForCausalLM",
}  # fmt: skip
"""The same for the input embedding."""

_USE_PLAIN_LORA = (
    "train it with plain LoRA, or merge it into its base, unless it adapts an output layer that is "
    "tied to the input embedding, which merging would change"
)
_ALLOW_RANK = (
    "give the server a larger limit, such as --max-lora-rank, or a smaller rank to the adapter"
)
_LEAVE_OUT_OUTPUT_LAYER = (
    "set output_layer: false in the recovery policy's compensation and reconcile, or train the "
    "adapter on other modules"
)
_LEAVE_OUT_EMBEDDING = "train the adapter on linear modules alone"


@dataclass(frozen=True)
class EngineBase:
    """The base of a server, and what the server can load.

    Attributes:
        fingerprint: Fingerprint of the base, with the names and shapes of its tensors.
        max_rank: Largest rank that the server accepts; None if it has no limit.
        has_patterns: Whether the server reads `rank_pattern` and `alpha_pattern`.
        is_vllm: Whether the server is vLLM, which adapts the embeddings and the output layer of
            some architectures only.
    """

    fingerprint: Fingerprint
    max_rank: int | None = None
    has_patterns: bool = False
    is_vllm: bool = False


def check_for_engine(folder: Path, engine: EngineBase, *, transferred: bool = False) -> None:
    """Raise AdapterError with every reason why a server would not serve this adapter as trained.

    With `transferred`, the adapter may have been made for another base with equal shapes.
    """
    adapter = read_peft_folder(folder)
    is_lora = adapter.peft_type == "LORA"
    problems = {
        _USE_PLAIN_LORA: [
            *_config_problems(adapter, engine),
            *(_base_problems(adapter, engine) if is_lora and not transferred else ()),
            *(_tensor_problems(adapter, engine) if is_lora else ()),
        ],
        _ALLOW_RANK: _rank_problems(adapter, engine),
        _LEAVE_OUT_OUTPUT_LAYER: _output_layer_problems(adapter, engine),
        _LEAVE_OUT_EMBEDDING: _embedding_problems(adapter, engine),
    }
    if any(problems.values()):
        raise AdapterError(
            f"the server cannot serve the adapter in {folder} as it was trained",
            expected="LoRA tensors that fit the base, and options that the server applies",
            found="; ".join(chain.from_iterable(problems.values())),
            do="; ".join(advice for advice, found in problems.items() if found),
        )


def lora_rank(folder: Path) -> int:
    """Return the largest rank of the LoRA matrices in a PEFT folder; 1 without any."""
    return max(ranks(read_peft_folder(folder)).values(), default=1)


def _config_problems(adapter: PeftFolder, engine: EngineBase) -> list[str]:
    if adapter.peft_type != "LORA":
        return [f"its method is {adapter.peft_type}, and servers load LoRA only"]
    config = adapter.config
    problems = [
        f"adapter_config.json has no {name}"
        for name in ("r", "lora_alpha", "target_modules")
        if not config.get(name)
    ]
    if adapter.rewriting_init:
        problems.append(f"init_lora_weights={adapter.rewriting_init!r} changes the base")
    known = _WITHOUT_EFFECT | _SUPPORTED | (_PATTERNS if engine.has_patterns else frozenset())
    problems += [
        f"the option {name}={value!r} would be ignored"
        for name, value in sorted(config.items())
        if name not in known and value and value != "none"
    ]
    return problems


def _base_problems(adapter: PeftFolder, engine: EngineBase) -> list[str]:
    recorded, served = adapter.base_fingerprint_sha256, engine.fingerprint.digest
    if recorded in (None, served):
        return []
    return [f"it was made for the base {recorded[:12]}, and the server has {served[:12]}"]


def _tensor_problems(adapter: PeftFolder, engine: EngineBase) -> list[str]:
    weights = _module_shapes(engine.fingerprint)
    pairs: dict[str, dict[str, tuple[int, ...]]] = {}
    problems: list[str] = []
    unknown: list[str] = []
    unread: list[str] = []
    for key, shape in adapter.tensors.items():
        if key.endswith(_COPY_OF_BASE):
            problems.append(f"{key} is a weight of the base, which a server would ignore")
            continue
        match = _TENSOR.fullmatch(key)
        if match is None:
            unread.append(key)
        else:
            part = "A" if "_A" in match["part"] else "B"
            pairs.setdefault(match["module"], {})[part] = shape
    if unread:
        problems.append(f"no server reads these tensors: {listed(sorted(unread))}")
    for module, pair in sorted(pairs.items()):
        of_base = _shape_of(module, weights)
        if of_base is None:
            unknown.append(module)
        elif pair.keys() != {"A", "B"}:
            problems.append(f"{module} has only one of lora_A and lora_B")
        else:
            problems += _shape_problems(module, (pair["A"], pair["B"]), of_base)
    if unknown:
        problems.append(f"the base has no module {listed(unknown)}, so its weights do nothing")
    return problems


def _shape_problems(
    module: str,
    pair: tuple[tuple[int, ...], tuple[int, ...]],
    shape: tuple[int, ...],
) -> list[str]:
    first, second = pair
    if len(first) != 2 or len(second) != 2 or first[0] != second[1]:
        return [f"{module} has lora_A of shape {first} and lora_B of shape {second}"]
    # GPT-2 stores its linear layers transposed, and so does every embedding.
    if shape in ((second[0], first[1]), (first[1], second[0])):
        return []
    return [
        f"{module} has shape {shape} in the base, and the adapter is for {(second[0], first[1])}"
    ]


def ranks(adapter: PeftFolder) -> dict[str, int]:
    """Return the rank of each module that has LoRA matrices."""
    return {
        match["module"]: adapter.tensors[match.string][0]
        for match in _matches(adapter)
        if "_A" in match["part"] and len(adapter.tensors[match.string]) == 2
    }


def _matches(adapter: PeftFolder) -> list[re.Match[str]]:
    """Return the names of the LoRA matrices, in order."""
    return [*filter(None, map(_TENSOR.fullmatch, sorted(adapter.tensors)))]


def _rank_problems(adapter: PeftFolder, engine: EngineBase) -> list[str]:
    if engine.max_rank is None:
        return []
    modules = defaultdict(list)
    for module, rank in ranks(adapter).items():
        if rank > engine.max_rank:
            modules[rank].append(module)
    return [
        f"the rank is {rank} in {listed(names)}, and the server accepts at most {engine.max_rank}"
        for rank, names in sorted(modules.items())
    ]


def _output_layer_problems(adapter: PeftFolder, engine: EngineBase) -> list[str]:
    modules = (name for name in ranks(adapter) if name.rpartition(".")[2] in _OUTPUT_LAYERS)
    return _not_adapted(engine, VLLM_OUTPUT_LAYERS, "output layer", modules)


def _embedding_problems(adapter: PeftFolder, engine: EngineBase) -> list[str]:
    found = (match for match in _matches(adapter) if match["part"] == "lora_embedding_A")
    modules = (match["module"] for match in found)
    return _not_adapted(engine, VLLM_INPUT_EMBEDDINGS, "embedding", modules)


def _not_adapted(
    engine: EngineBase, adapted: frozenset[str], kind: str, modules: Iterable[str]
) -> list[str]:
    """Return a problem for each of these modules, unless the server adapts this kind of module."""
    architecture = engine.fingerprint.architecture
    if not engine.is_vllm or architecture in adapted:
        return []
    return [
        f"it adapts the {kind} {module}, and vLLM applies no LoRA matrices to that of "
        f"{architecture}"
        for module in modules
    ]


def _module_shapes(fingerprint: Fingerprint) -> dict[str, tuple[int, ...]]:
    """Return the shape of each module's weight, by the names in the files of the base."""
    shapes = {
        name.removesuffix(".weight"): tensor.shape
        for name, tensor in fingerprint.tensors.items()
        if name.endswith(".weight")
    }
    if "lm_head" not in shapes:  # a head that is tied to the embedding is in no file
        embedding = next((name for name in shapes if name.endswith(_EMBEDDINGS)), None)
        if embedding is not None:
            shapes["lm_head"] = shapes[embedding]
    return shapes


def _shape_of(module: str, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...] | None:
    """Return the shape of a module. Files may leave out its first part, such as `transformer.`."""
    return shapes.get(module) or shapes.get(module.partition(".")[2])
