"""The command `criticality`: how much the loss depends on the FFN of each layer."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from trans_peft.cli.options import Json, State
from trans_peft.cli.show import out, print_json, progress, table
from trans_peft.cli.workspace import LOCAL, Workspace

__all__ = ["criticality"]

_LENGTH = 128


def criticality(
    base: Annotated[str, Parameter(help="Folder or `s3://` prefix of a base.")],
    rows: Annotated[str, Parameter(help="Training data, as a recipe's `data.uri`.")],
    /,
    *,
    tokens: Annotated[int, Parameter(help="Number of tokens to read from the data.")] = 1024,
    json: Json = False,
    state: State = Path(".trans-peft"),
) -> int:
    """Measure how much the loss rises without each layer's FFN, and propose layers to spare.

    Small models often have a few FFNs without which a training step is useless. Copy the last line
    of the output into the `perturbation` of a recipe, so that these layers are never perturbed.

    Example: `trans-peft criticality models/v1 train.jsonl`
    """
    from itertools import chain

    import torch

    from trans_peft.data import full_ids, read_examples
    from trans_peft.domain.data import DataSource
    from trans_peft.errors import DataError
    from trans_peft.lifecycle.base_files import base_folder
    from trans_peft.models import load_base
    from trans_peft.perturbation import layer_criticality, propose_spared_layers

    with progress() as shown:
        workspace = Workspace.at(state, shown)
        examples = read_examples(DataSource(rows), workspace.platform.store)
        folder = base_folder(workspace.base(base, LOCAL), workspace.platform)
        loaded = load_base(folder, "float32")
        stream = list(chain.from_iterable(full_ids(examples[:tokens], loaded.tokenizer)))
        count = min(len(stream), tokens) // _LENGTH
        if not count:
            raise DataError(
                f"{rows} is too short to measure the criticality of layers",
                expected=f"at least {_LENGTH} tokens",
                found=f"{len(stream)} tokens",
                do="use a longer file, or raise --tokens",
            )
        ids = torch.tensor(stream[: count * _LENGTH]).view(count, _LENGTH)
        ids = ids.to(loaded.model.device)
        shown.print_line(f"measuring each layer on {count * _LENGTH} tokens")
        added = layer_criticality(loaded.model, [{"input_ids": ids, "labels": ids}])
    spared = propose_spared_layers(added)
    if json:
        print_json({"criticality": added, "spared_layers": spared})
        return 0
    found = table("layer", "nats per token", "")
    for layer, nats in enumerate(added):
        found.add_row(str(layer), f"{nats:.2f}", "spare" if layer in spared else "")
    out.print(found)
    out.print(f'"spared_layers": {list(spared)}', markup=False)
    return 0
