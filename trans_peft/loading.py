"""Report the differences between the tensors of a checkpoint and those of its model.

If a checkpoint lacks a weight, `from_pretrained` initializes it randomly and logs a warning, so two
loads of the same files give two models. It ignores tensors that the model does not have. These
functions turn each entry of its loading report into an error.
"""

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from trans_peft.errors import listed

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = ["is_text_backbone", "loading_problems", "unexpected_names"]

_REMOVED_BUFFERS = re.compile(
    r"(^|\.)(attn|attention)\.(bias|masked_bias|causal_mask|scale_attn|embed_positions)$"
    r"|(^|\.)rotary_emb\.(inv_freq|cos_cached|sin_cached)$"
)
"""Buffers that old versions of transformers saved, and that current versions compute."""


def loading_problems(
    missing: Iterable[str] = (),
    unexpected: Iterable[str] = (),
    mismatched: Iterable[tuple[str, Iterable[int], Iterable[int]]] = (),
) -> list[str]:
    """Return one sentence for each kind of difference between a checkpoint and its model.

    `mismatched` holds (name, shape in the file, shape in the model).
    """
    problems = []
    if names := sorted(missing):
        problems.append(
            f"{_count(names)} of the model missing from the files, which would be random:"
            f" {listed(names, 20)}"
        )
    if names := sorted(unexpected):
        problems.append(
            f"{_count(names)} in the files that the model does not have: {listed(names, 20)}"
        )
    if shapes := sorted((name, tuple(found), tuple(model)) for name, found, model in mismatched):
        descriptions = [
            f"{name} is {found}, the model needs {model}" for name, found, model in shapes
        ]
        problems.append(f"{_count(descriptions)} of another shape: {listed(descriptions, 20)}")
    return problems


def unexpected_names(model: "PreTrainedModel", keys: Iterable[str]) -> list[str]:
    """Return the unexpected keys of a loading report, without buffers that the model computes."""
    computed = {name for name, _ in model.named_buffers()} - model.state_dict().keys()
    return sorted(
        name for name in keys if name not in computed and not _REMOVED_BUFFERS.search(name)
    )


def is_text_backbone(model_class: type, config: "PreTrainedConfig") -> bool:
    """Whether a class is only the language model of a multimodal checkpoint.

    transformers then reports the tensors of the other modalities as unexpected.
    """
    text = config.sub_configs.get("text_config")
    return (
        text is not None
        and not isinstance(config, text)
        and getattr(model_class, "config_class", None) is text
    )


def _count(values: list[str]) -> str:
    return "1 tensor" if len(values) == 1 else f"{len(values)} tensors"
