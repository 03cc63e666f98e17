"""The commands `manifest` and `export`: what serves on a base, and its files for a server."""

import logging
import threading
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from trans_peft.cli.options import Json
from trans_peft.cli.show import out, print_json, print_wrapped, stderr, table
from trans_peft.domain.base import BaseRef
from trans_peft.serving.export import Exported, Layout
from trans_peft.serving.manifest import IdleEntry

__all__ = ["export", "manifest"]

_Family = Annotated[str, Parameter(help="Family of the base, such as `smollm2`.")]
_Base = Annotated[str, Parameter(help="Base version, such as `v2`, or `serving` or `champion`.")]
_TrackingUri = Annotated[
    str | None,
    Parameter(help="MLflow server. The default is the variable `MLFLOW_TRACKING_URI`."),
]


def manifest(
    *,
    family: _Family,
    base: _Base = "serving",
    tracking_uri: _TrackingUri = None,
    json: Json = False,
) -> int:
    """Print which version of every adapter serves on a base, and why the others do not.

    With `--json`, the output is a serving manifest (docs/reference/serving-manifest.json).

    Example: `trans-peft manifest --family smollm2 --base serving`
    """
    from trans_peft.client import connect
    from trans_peft.serving.manifest import serving_manifest

    found = serving_manifest(family, base, connect(tracking_uri))
    if json:
        print_json(found)
        return 0
    aliases = ", ".join(found.base_aliases) or "no alias"
    out.print(f"{found.base} ({aliases}), fingerprint {found.base.fingerprint_sha256[:12]}")
    texts = ("verdict", "made by", "weights")
    shown = table("adapter", "version", *texts, texts=texts)
    for adapter in found.adapters:
        verdict = adapter.verdict or "trained here"
        shown.add_row(
            adapter.name,
            str(adapter.number),
            f"{verdict}, approved manually" if adapter.is_manual else verdict,
            adapter.made_by,
            adapter.weights_sha256[:12],
        )
    print_wrapped(shown)
    if found.idle:
        idle = table("does not serve", "reason", "detail", texts=("reason", "detail"))
        for entry in found.idle:
            idle.add_row(entry.name, entry.reason, _without_names(entry, found.base))
        out.print()
        print_wrapped(idle)
    return 0


def _without_names(entry: IdleEntry, base: BaseRef) -> str:
    """Return the detail without the beginning that every row would repeat."""
    beginning = f"{entry.name} does not serve on {base}: "
    return entry.detail.removeprefix(beginning).removeprefix(f"verdict {entry.reason}: ")


def export(
    folder: Annotated[Path, Parameter(help="Folder to write; one for each base and server.")],
    /,
    *,
    family: _Family,
    layout: Annotated[Layout, Parameter(help="The server that reads the folder.")],
    model: Annotated[str, Parameter(help="The string that the server gets as `--model`.")],
    base: _Base = "serving",
    uri: Annotated[
        str, Parameter(help="URI of `FOLDER/adapters` for the pods; `kserve` needs it.")
    ] = "",
    max_rank: Annotated[
        int | None,
        Parameter(help="Leave out larger ranks: the server's `--max-lora-rank`. No limit without."),
    ] = None,
    watch: Annotated[
        float | None, Parameter(help="Keep the folder in step: seconds between two reads.")
    ] = None,
    grace_s: Annotated[
        float, Parameter(help="Seconds that a folder stays after its adapter stopped serving.")
    ] = 3600.0,
    tracking_uri: _TrackingUri = None,
    json: Json = False,
) -> int:
    """Write the adapters that serve on a base for another server: vLLM, NIM, SGLang, LoRAX, KServe.

    The folder belongs to the base version that `--base` names now. When another one serves, export
    to another folder. The exit code is 1 if an adapter was left out, or if another program had
    changed a folder.

    Example: `trans-peft export lora --family smollm2 --layout vllm-filesystem --model models/v2
    --watch 5`
    """
    from trans_peft.client import connect
    from trans_peft.serving.export import Export, ExportSettings, check_pause
    from trans_peft.serving.export import watch as keep_in_step

    settings = ExportSettings(folder, layout, model, uri, max_rank, grace_s)
    if watch is not None:
        check_pause(watch)
    job = Export(settings, family, base, connect(tracking_uri))

    def show(exported: Exported) -> None:
        if json:
            print_json(exported.manifest)
        else:
            _print_changes(exported)
        for name in exported.damaged:
            moved = folder / ".state" / "damaged" / name
            stderr.print(
                f"changed files were found in {name}: they are now in {moved}",
                style="red",
            )
        for entry in exported.refused:
            stderr.print(f"left out {entry.name}: {entry.detail}", style="red")

    if watch is None:
        exported = job.sync()
        show(exported)
        return 1 if exported.refused or exported.damaged else 0
    logging.basicConfig(format="%(levelname)s %(message)s")
    keep_in_step(job, watch, stopped=threading.Event(), on_change=show)
    return 0


def _print_changes(exported: Exported) -> None:
    before = {adapter.name: adapter.engine_name for adapter in exported.before}
    for adapter in exported.manifest.adapters:
        old, new = before.get(adapter.name), adapter.engine_name
        if old is None:
            out.print(f"added {adapter.name}: {new}")
        elif old != new:
            out.print(f"updated {adapter.name}: {new}, before {old}")
        else:
            out.print(f"unchanged {adapter.name}: {new}")
    for entry in exported.revoked:
        out.print(f"removed {entry.name}: {entry.detail}")
    for name in exported.removed:
        out.print(f"deleted the folder {name}")
