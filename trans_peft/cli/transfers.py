"""The commands `check` and `transfer`: an adapter on a new base."""

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Literal

from cyclopts import Parameter

from trans_peft.cli.files import (
    check_results_folder,
    read_policy,
    read_recipe,
    read_suites,
    write_json,
)
from trans_peft.cli.options import Adapter, Json, NewBase, OldBase, Out, State, SuiteFiles
from trans_peft.cli.show import out as stdout
from trans_peft.cli.show import print_compatibility, print_json, print_outcome, progress
from trans_peft.cli.workspace import LOCAL, Workspace, adapter_name
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
        Literal["float32", "bfloat16", "float16"], Parameter(help="Data type of the loaded base.")
    ] = "float32",
    json: Json = False,
    state: State = Path(".trans-peft"),
) -> int:
    """Check whether an adapter fits a new base and changes its logits. Runs no evaluation.

    Compares the architecture, the layers, the shapes of the adapted modules, the tokens and sampled
    weights of both bases. Then loads the adapter on the new base and compares logits with and
    without it. Exit code 1 if the adapter does not fit or changes no logit.

    Example: `trans-peft check runs/mine/adapter --old models/v1 --new models/v2`
    """
    from trans_peft.lifecycle.base_files import base_folder, named_fingerprint, tokenizer_folder
    from trans_peft.transfer.compatibility import compare, tokenizers_may_differ

    with progress() as shown:
        workspace = Workspace.at(state, shown)
        platform, folder = workspace.platform, workspace.adapter(adapter)
        bases = [workspace.base_trained_on(old, folder), workspace.base(new, LOCAL)]
        before, after = (named_fingerprint(base, platform) for base in bases)
        tokenizers: list[Path | None] = [None, None]
        with TemporaryDirectory(prefix="trans-peft-") as scratch:
            if tokenizers_may_differ(before, after):
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
        change = effect.max_logit_change
        stdout.print(f"the adapter changes logits on the new base by up to {change:.3g}")
    elif effect is not None:
        stdout.print("the adapter changes no logit on the new base", style="red")
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
        Path | None,
        Parameter(
            help="Gate policy, as a JSON or YAML file. Default: a margin of 5 points, and no "
            "recovery.",
            show_default=False,
        ),
    ] = None,
    recipe: Annotated[
        Path | None,
        Parameter(
            help="Recipe that the adapter was trained with. Distillation needs it; rescaling and "
            "re-tuning also read its data; compensation needs none."
        ),
    ] = None,
    json: Json = False,
    state: State = Path(".trans-peft"),
) -> int:
    """Judge an adapter on a new base, item by item against the base that it was trained on.

    Evaluates the adapter on both bases, and the bare new base; reuses evaluations of earlier
    commands. Writes `outcome.json` (the verdict with all its figures) and `adapter/`: the same
    weights, or those of the recovery strategy in `outcome.json`, bound to the new base, with the
    adapter's chat template or that of the old base. Exit code 0 only if the verdict is `passed`.

    Example: `trans-peft transfer runs/mine/adapter --old models/v1 --new models/v2 --suite
    suite.yaml --out runs/mine-v2`
    """
    from trans_peft.lifecycle.evaluation import pin_suites
    from trans_peft.lifecycle.reconcile import observe_adapter
    from trans_peft.lifecycle.templates import keep_template
    from trans_peft.lifecycle.transfer import transfer as judge_on
    from trans_peft.models import adapter_weights_sha256
    from trans_peft.transfer.peft_folder import read_peft_folder

    check_results_folder(out)
    suites, gate = read_suites(suite), read_policy(policy)
    with progress() as shown, TemporaryDirectory(prefix="trans-peft-") as scratch:
        workspace = Workspace.at(state, shown)
        platform, folder = workspace.platform, workspace.adapter(adapter)
        suites = pin_suites(suites, platform)
        for strategy in (gate.recovery.compensation, gate.recovery.distillation):
            if strategy is not None and strategy.prompts_uri:
                with platform.store.read(strategy.prompts_of(adapter_name(adapter))):
                    pass  # a missing file is an error before anything is evaluated
        trained_on, candidate = workspace.base_trained_on(old, folder), workspace.base(new, LOCAL)
        if trained_on.fingerprint_sha256 == candidate.fingerprint_sha256:
            raise InvalidSpecError(
                "the old and the new base are the same",
                expected="a new base with other weights, config or tokens",
                found=f"the fingerprint {trained_on.fingerprint_sha256[:12]} at {old} and {new}",
                do="check --old and --new",
            )
        folder = keep_template(folder, trained_on, candidate, platform, Path(scratch) / "peft")
        source = platform.registry.register(
            AdapterVersion(
                adapter=adapter_name(adapter),
                number=0,
                base=trained_on.ref,
                trained_on=trained_on.ref,
                weights_sha256=adapter_weights_sha256(folder),
                method=read_peft_folder(folder).peft_type,
                suites=suites,
                recipe=None if recipe is None else read_recipe(recipe),
            ),
            folder,
        )
        outcome = judge_on(
            TransferTask(source.adapter, source.number, candidate.ref, Reason.NO_VERDICT),
            observe_adapter(source.adapter, LOCAL, platform),
            gate,
            platform,
            on_progress=shown.work,
        )
    write_json(out / "outcome.json", outcome)
    if outcome.new_number is not None:
        versions = {v.number: v for v in platform.registry.versions(source.adapter)}
        platform.registry.download(versions[outcome.new_number], out / "adapter")
    if json:
        print_json(replace(outcome, evaluations=()))
    else:
        print_outcome(outcome, suites)
        stdout.print(f"the results were written to {out}")
    return 0 if outcome.verdict is Verdict.PASSED else 1


def _probe(base_folder: Path, adapter_folder: Path, dtype: str) -> Effect:
    from trans_peft.models import load_base
    from trans_peft.transfer.effect import probe_effect
    from trans_peft.transfer.load_adapter import attached

    base = load_base(base_folder, dtype)
    with attached(base.model, adapter_folder) as model:
        return probe_effect(model, base.tokenizer)
