"""Whether a checkpoint's tensors fill a model: the report of transformers, read strictly.

`from_pretrained` fills a weight that a checkpoint lacks with random numbers, leaves out a tensor
that the model does not have, and logs a warning. Two loads of the same files then give two models.
Here each entry of its report is a problem.
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
"""Constants that old versions of transformers saved with a model and current ones compute."""


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
        told = [f"{name} is {found}, the model needs {model}" for name, found, model in shapes]
        problems.append(f"{_count(told)} of another shape: {listed(told, 20)}")
    return problems


def unexpected_names(model: "PreTrainedModel", keys: Iterable[str]) -> list[str]:
    """Return the unexpected keys of a loading report, without buffers that the model computes."""
    computed = {name for name, _ in model.named_buffers()} - model.state_dict().keys()
    return sorted(
        name for name in keys if name not in computed and not _REMOVED_BUFFERS.search(name)
    )


def is_text_backbone(model_class: type, config: "PreTrainedConfig") -> bool:
    """Whether a class builds only the language model of a multimodal checkpoint.

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
