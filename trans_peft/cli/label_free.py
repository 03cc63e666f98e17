"""The command `agreement`: how much an update changes an adapter's answers, without labels."""

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
        Parameter(
            help="Suite of prompts with `keep_answers: true`, as a JSON or YAML file. The prompts "
            "need no reference answers."
        ),
    ],
    json: Json = False,
    state: State = Path(".trans-peft"),
) -> int:
    """Compare the answers of an adapter on two bases, without reference answers.

    Prints the share of equal greedy answers and the KL divergence of the next-token distributions
    along the old answers (nats per token), for the adapter and for the bare base. Use it to rank
    risks. It is no verdict: an answer that changed can have become correct.

    Example: `trans-peft agreement runs/mine/adapter --old models/v1 --new models/v2 --prompts
    public.yaml`
    """
    from trans_peft.lifecycle.evaluation import pin_suites
    from trans_peft.lifecycle.label_free import compare_label_free

    (suite,) = read_suites([prompts])
    with progress() as shown:
        workspace = Workspace.at(state, shown)
        (suite,) = pin_suites([suite], workspace.platform)
        folder = workspace.adapter(adapter)
        found = compare_label_free(
            folder,
            workspace.base_trained_on(old, folder),
            workspace.base(new, LOCAL),
            suite,
            workspace.platform,
            on_progress=shown.work,
        )
    if json:
        print_json(found)
        return 0
    shown_table = table("", "prompts", "equal answers", "KL (nats per token)")
    for who, side in (("adapter", found.adapter), ("bare base", found.bare)):
        shown_table.add_row(who, str(side.prompts), f"{side.points:.1f} %", f"{side.kl:.3f}")
    out.print(shown_table)
    return 0
