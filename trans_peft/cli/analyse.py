"""The command `analyse`: how updates changed a base, without training."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter, validators

from trans_peft.cli.options import Json, State
from trans_peft.cli.show import out as terminal
from trans_peft.cli.show import print_json, print_wrapped, progress, table
from trans_peft.cli.workspace import LOCAL, Workspace
from trans_peft.errors import InvalidSpecError
from trans_peft.files import check_unused

__all__ = ["analyse"]


def analyse(
    old: Annotated[str, Parameter(help="Folder or `s3://` prefix of the old base.")],
    /,
    *news: Annotated[str, Parameter(help="Updates of the old base, one or several.")],
    data: Annotated[
        str, Parameter(help="Texts to run the bases on, as a recipe's `data.uri`.")
    ] = "",
    rows: Annotated[
        int,
        Parameter(
            validator=validators.Number(gte=0),
            help="Number of texts. 0: compare the weights alone, without a model.",
        ),
    ] = 64,
    tokens: Annotated[int, Parameter(help="Tokens of each text to use, from its start.")] = 256,
    adapter: Annotated[
        list[Path] | None,
        Parameter(
            negative=(),
            help="PEFT folder of an adapter that was trained on a base. Repeat it for every base, "
            "the old one first.",
        ),
    ] = None,
    masking_p: Annotated[float, Parameter(help="p_m of theorem 1's regularizer.")] = 0.1,
    dropping_p: Annotated[float, Parameter(help="p_d of theorem 1's regularizer.")] = 0.1,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"],
        Parameter(help="torch dtype in which the bases run."),
    ] = "float32",
    out: Annotated[
        Path | None, Parameter(help="New folder for JSON, Markdown, an HTML page and figures.")
    ] = None,
    json: Json = False,
    state: State = Path(".trans-peft"),
) -> int:
    """Compare a base with updates of it: weights, activations, and the terms of theorem 1.

    Needs no training and no labels. Several updates are printed in the order of the theorem, the
    smallest shift of the FFNs first. Without `--data`, the bases run on 24 short public texts.

    Example: `trans-peft analyse models/v1 models/v2 --out analysis`
    """
    from trans_peft.analysis import (
        AnalysisSettings,
        BaseSide,
        public_rows,
        tables,
        write_report,
    )
    from trans_peft.analysis import analyse as compare
    from trans_peft.data import read_examples
    from trans_peft.domain.data import DataSource
    from trans_peft.domain.recipe import Perturbation
    from trans_peft.lifecycle.base_files import base_folder

    uris = (old, *news)
    adapters: Sequence[Path | None] = adapter or [None] * len(uris)
    if len(adapters) != len(uris):
        raise InvalidSpecError(
            "the adapters do not match the bases",
            expected=f"no adapter, or one for each of the {len(uris)} bases",
            found=f"{len(adapters)} adapters",
            do="repeat --adapter for every base, the old one first",
        )
    if out is not None:
        check_unused(out)
    with progress() as shown:
        workspace = Workspace.at(state, shown)
        store = workspace.platform.store
        texts = read_examples(DataSource(data), store, limit=rows) if data else public_rows()
        old_side, *new_sides = (
            BaseSide(
                name,
                base_folder(workspace.base(uri, LOCAL), workspace.platform).resolve(),
                folder and workspace.adapter(str(folder)),
            )
            for name, uri, folder in zip(_names(uris), uris, adapters, strict=True)
        )
        found = compare(
            old_side,
            new_sides,
            texts[:rows],
            AnalysisSettings(tokens, Perturbation(masking_p, dropping_p), dtype),
            lambda name, done, total: shown.update(f"running {name}", done, total, "texts"),
        )
        written = () if out is None else write_report(found, out)
    if json:
        print_json(found)
        return 0
    for printed in tables(found):
        terminal.print(printed.title, style="bold")
        shown_table = table(*printed.header)
        for row in printed.rows:
            shown_table.add_row(*row)
        print_wrapped(shown_table)
        terminal.print(f"{printed.note}\n", style="dim")
    for path in written:
        terminal.print(f"written: {path}")
    return 0


def _names(uris: tuple[str, ...]) -> tuple[str, ...]:
    """Return the last parts of the paths; the whole paths if two of them would be equal."""
    names = tuple(uri.rstrip("/").rpartition("/")[2] for uri in uris)
    return names if len(set(names)) == len(names) else uris
