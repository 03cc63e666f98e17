"""The command `resolve`: the version of an adapter that serves on a base, and its files."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from trans_peft.cli.options import Json
from trans_peft.cli.show import out, print_json
from trans_peft.files import check_unused

__all__ = ["resolve"]


def resolve(
    adapter: Annotated[str, Parameter(help="Name of the adapter in the registry.")],
    /,
    *,
    base: Annotated[
        str, Parameter(help="Base version, such as `v2`, or `serving` or `champion`.")
    ] = "serving",
    download: Annotated[
        Path | None, Parameter(help="New or empty folder for the adapter's PEFT files.")
    ] = None,
    tracking_uri: Annotated[
        str | None,
        Parameter(help="MLflow server. The default is the variable `MLFLOW_TRACKING_URI`."),
    ] = None,
    json: Json = False,
) -> int:
    """Print the version of an adapter that serves on a base, and download it with `--download`.

    Fails if no version of the adapter serves on that base. Never falls back to another version.

    Example: `trans-peft resolve chat --base serving --download adapters/chat`
    """
    from trans_peft.client import connect
    from trans_peft.lifecycle.resolve import resolve as find

    if download is not None:
        check_unused(download)
    platform = connect(tracking_uri)
    version = find(adapter, platform, base=base)
    folder = None if download is None else platform.registry.download(version, download)
    if json:
        print_json({**vars(version), "alias": version.base.alias, "folder": folder})
        return 0
    out.print(f"{version.adapter} version {version.number}")
    out.print(f"base           {version.base}")
    out.print(f"fingerprint    {version.base.fingerprint_sha256}")
    out.print(f"weights        {version.weights_sha256}")
    if folder is not None:
        out.print(f"files          {folder}")
    return 0
