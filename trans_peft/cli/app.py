"""The list of commands, and the text of `trans-peft --help`."""

from collections.abc import Callable
from importlib.metadata import version

from cyclopts import App

from trans_peft.cli.adapters import adopt, evaluate, train
from trans_peft.cli.analyse import analyse
from trans_peft.cli.bases import convert, fingerprint, publish
from trans_peft.cli.experiment import experiment
from trans_peft.cli.label_free import agreement
from trans_peft.cli.layers import criticality
from trans_peft.cli.resolve import resolve
from trans_peft.cli.serving import export, manifest
from trans_peft.cli.transfers import check, transfer
from trans_peft.cli.ui import ui

__all__ = ["app"]

_INTRODUCTION = """
Train adapters that lose less when their base model is updated, and judge them on each version.

All commands except `resolve`, `manifest`, `export` and `ui` work on local folders and `s3://`
prefixes, without a server. From training to serving in five commands:

1. `trans-peft train recipe.yaml --base models/v1 --out runs/mine`
2. `trans-peft publish models/v2 s3://bases/mine/v2 --family mine --version v2 --parent v1`
3. `trans-peft check runs/mine/adapter --old models/v1 --new models/v2`
4. `trans-peft transfer runs/mine/adapter --old models/v1 --new models/v2 --suite suite.yaml --out runs/mine-v2`
5. serve `runs/mine-v2/adapter` if the verdict is `passed`
"""  # noqa: E501

_EPILOGUE = """
**Exit codes:** 0 success · 1 the adapter is incompatible, or its verdict is not `passed` ·
2 invalid input · 3 the command failed.
Every command except `ui` accepts `--json`: it then prints one JSON value to stdout. Progress and
errors go to stderr.
"""

app = App(
    name="trans-peft",
    help=_INTRODUCTION,
    help_epilogue=_EPILOGUE,
    help_format="markdown",
    version=lambda: version("trans-peft"),
)
_COMMANDS: tuple[Callable[..., int], ...] = (
    train,
    evaluate,
    adopt,
    check,
    transfer,
    resolve,
    manifest,
    export,
    experiment,
    agreement,
    fingerprint,
    criticality,
    analyse,
    convert,
    publish,
    ui,
)
for _position, _command in enumerate(_COMMANDS, start=1):
    app.command(_command, sort_key=_position)
