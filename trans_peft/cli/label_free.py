"""`agreement`: what an update changes in an adapter's answers, without any label."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from trans_peft.cli.files import read_suites
from trans_peft.cli.options import Adapter, Json, NewBase, OldBase, State
from trans_peft.cli.show import out, print_json, progress, table
from trans_peft.cli.workspace import LOCAL, Workspace

__all__ = ["agreement"]


def agreement(
    adapter: Adapter,
    /,
    *,
    old: OldBase,
    new: NewBase,
    prompts: Annotated[
        Path,
        Parameter(help="Suite of public prompts with `keep_answers: true`, JSON or YAML."),
    ],
    json: Json = False,
    state: State = Path(".trans-peft"),
) -> int:
    """Tell how far an adapter says the same on a new base, beside the base's own change.

    Reads no label: the share of equal greedy answers, and the divergence of the next token's
    distribution along the old answers (KL, nats a token). It ranks risks and decides nothing: an
    answer that changed may have become right.

    Example: `trans-peft agreement runs/mine/adapter --old models/v1 --new models/v2 --prompts
    public.yaml`
    """
    from trans_peft.lifecycle.evaluations import pin_suites
    from trans_peft.lifecycle.label_free import compare_label_free

    (suite,) = read_suites([prompts])
    with progress() as shown:
        workspace = Workspace.at(state, shown)
        (suite,) = pin_suites([suite], workspace.platform)
        found = compare_label_free(
            workspace.adapter(adapter),
            workspace.base(old, LOCAL),
            workspace.base(new, LOCAL),
            suite,
            workspace.platform,
            on_progress=shown.evaluation,
        )
    if json:
        print_json(found)
        return 0
    shown_table = table("", "prompts", "equal answers", "KL, nats a token")
    for who, side in (("adapter", found.adapter), ("bare base", found.bare)):
        shown_table.add_row(who, str(side.prompts), f"{side.points:.1f} %", f"{side.kl:.3f}")
    out.print(shown_table)
    return 0
