"""`check` and `transfer`: an adapter and a new base."""

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Literal

from cyclopts import Parameter

from trans_peft.cli.files import read_policy, read_recipe, read_suites, write_json
from trans_peft.cli.options import Adapter, Json, NewBase, OldBase, Out, State, SuiteFiles
from trans_peft.cli.show import out as stdout
from trans_peft.cli.show import print_compatibility, print_json, print_outcome, progress
from trans_peft.cli.workspace import LOCAL, Workspace, adapter_name, check_free
from trans_peft.domain.adapter import AdapterVersion
from trans_peft.domain.evaluation import Verdict
from trans_peft.domain.outcome import Effect, Reason, TransferTask
from trans_peft.errors import InvalidSpecError

__all__ = ["check", "transfer"]


def check(
    adapter: Adapter,
    /,
    *,
    old: OldBase,
    new: NewBase,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"], Parameter(help="In what the base is loaded.")
    ] = "float32",
    json: Json = False,
    state: State = Path(".trans-peft"),
) -> int:
    """Tell whether an adapter fits a new base and does anything there. Evaluates nothing.

    Compares architecture, layers, the shapes where the adapter sits, tokens and sampled weights;
    then puts it on the new base and looks for a logit that it changes. Exit code 1 if it does not
    fit or changes nothing.

    Example: `trans-peft check runs/mine/adapter --old models/v1 --new models/v2`
    """
    from trans_peft.lifecycle.evaluations import base_folder, named_fingerprint, tokenizer_folder
    from trans_peft.transfer.compatibility import compare, may_differ

    with progress() as shown:
        workspace = Workspace.at(state, shown)
        platform, folder = workspace.platform, workspace.adapter(adapter)
        bases = [workspace.base(uri, LOCAL) for uri in (old, new)]
        before, after = (named_fingerprint(base, platform) for base in bases)
        tokenizers: list[Path | None] = [None, None]
        with TemporaryDirectory(prefix="trans-peft-") as scratch:
            if may_differ(before, after):
                tokenizers = [
                    tokenizer_folder(base, platform, Path(scratch) / base.alias) for base in bases
                ]
            found = compare(
                before, after, folder, old_tokenizer=tokenizers[0], new_tokenizer=tokenizers[1]
            )
        effect = _probe(base_folder(bases[1], platform), folder, dtype) if found.ok else None
    fits = found.ok and effect is not None and effect.found
    if json:
        print_json({"fits": fits, "compatibility": found, "effect": effect})
        return 0 if fits else 1
    print_compatibility(found)
    if effect is not None and effect.found:
        stdout.print(f"it changes logits on the new base by up to {effect.max_logit_change:.3g}")
    elif effect is not None:
        stdout.print("[red]it changes no logit on the new base[/]")
    return 0 if fits else 1


def transfer(
    adapter: Adapter,
    /,
    *,
    old: OldBase,
    new: NewBase,
    suite: SuiteFiles,
    out: Out,
    policy: Annotated[
        Path | None, Parameter(help="The gate's policy, JSON or YAML; default: margin 5 points.")
    ] = None,
    recipe: Annotated[
        Path | None,
        Parameter(help="The recipe it was trained by; the policy's remedies read its rows."),
    ] = None,
    json: Json = False,
    state: State = Path(".trans-peft"),
) -> int:
    """Judge an adapter on a new base, item by item against the base that it was trained on.

    Evaluates it on both bases, and the bare new base, as far as no earlier command did. Writes
    `outcome.json` (every figure behind the verdict) and `adapter/`, the same weights bound to the
    new base, with the chat template that the adapter keeps (its own, or that of the old base). Exit
    code 0 only if the verdict is `passed`.

    Example: `trans-peft transfer runs/mine/adapter --old models/v1 --new models/v2 --suite
    suite.yaml --out runs/mine-v2`
    """
    from trans_peft.lifecycle.evaluations import pin_suites
    from trans_peft.lifecycle.reconcile import observe_adapter
    from trans_peft.lifecycle.templates import keep_template
    from trans_peft.lifecycle.transfer import transfer as judge_on
    from trans_peft.models import adapter_weights_sha256
    from trans_peft.transfer.peft_folder import read_peft_folder

    check_free(out)
    suites, gate = read_suites(suite), read_policy(policy)
    with progress() as shown, TemporaryDirectory(prefix="trans-peft-") as scratch:
        workspace = Workspace.at(state, shown)
        platform, folder = workspace.platform, workspace.adapter(adapter)
        suites = pin_suites(suites, platform)
        trained_on, candidate = (workspace.base(uri, LOCAL) for uri in (old, new))
        if trained_on.fingerprint_sha256 == candidate.fingerprint_sha256:
            raise InvalidSpecError(
                "the two bases are the same, so there is nothing to judge",
                expected="a new base with other weights, config or tokens",
                found=f"the fingerprint {trained_on.fingerprint_sha256[:12]} at {old} and {new}",
            )
        folder = keep_template(folder, trained_on, candidate, platform, Path(scratch) / "peft")
        source = platform.registry.register(
            AdapterVersion(
                adapter=adapter_name(adapter),
                number=0,
                family=LOCAL,
                base_version=trained_on.version,
                base_fingerprint_sha256=trained_on.fingerprint_sha256,
                trained_on_version=trained_on.version,
                trained_on_fingerprint_sha256=trained_on.fingerprint_sha256,
                weights_sha256=adapter_weights_sha256(folder),
                method=read_peft_folder(folder).peft_type,
                suites=suites,
                recipe=None if recipe is None else read_recipe(recipe),
            ),
            folder,
        )
        outcome = judge_on(
            TransferTask(source.adapter, source.number, candidate.version, Reason.NEVER_JUDGED),
            observe_adapter(source.adapter, LOCAL, platform),
            gate,
            platform,
            on_progress=shown.evaluation,
        )
    write_json(out / "outcome.json", outcome)
    if outcome.new_number is not None:
        versions = {v.number: v for v in platform.registry.versions(source.adapter)}
        platform.registry.download(versions[outcome.new_number], out / "adapter")
    if json:
        print_json(replace(outcome, evaluations=()))
    else:
        print_outcome(outcome, suites)
        stdout.print(f"written to {out}")
    return 0 if outcome.verdict is Verdict.PASSED else 1


def _probe(base_folder: Path, adapter_folder: Path, dtype: str) -> Effect:
    from trans_peft.models import load_base
    from trans_peft.transfer.effect import probe_effect
    from trans_peft.transfer.load_adapter import attached

    base = load_base(base_folder, dtype)
    with attached(base.model, adapter_folder) as model:
        return probe_effect(model, base.tokenizer)
