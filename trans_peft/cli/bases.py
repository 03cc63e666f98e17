"""`fingerprint`, `convert` and `publish`: bases in folders and buckets."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from trans_peft.cli.options import Json, State
from trans_peft.cli.show import out, print_json, progress
from trans_peft.cli.workspace import Workspace, check_free

__all__ = ["convert", "fingerprint", "publish"]


def fingerprint(
    base: Annotated[str, Parameter(help="Folder or `s3://` prefix of a base.")],
    /,
    *,
    json: Json = False,
    state: State = Path(".trans-peft"),
) -> int:
    """Print what an adapter can feel of a base: its architecture, shapes, weights and tokens.

    Two bases with the same digest answer alike. No weight is loaded.

    Example: `trans-peft fingerprint models/v1`
    """
    with progress() as shown:
        found = Workspace.at(state, shown).fingerprint(base)
    if json:
        print_json({"digest": found.digest, **vars(found)})
        return 0
    out.print(f"digest         {found.digest}")
    out.print(f"architecture   {found.architecture}, {found.layer_count} layers")
    out.print(f"weights        {len(found.tensors)} tensors")
    out.print(f"config         {found.config_sha256}")
    out.print(f"vocabulary     {found.vocabulary_sha256}")
    out.print(f"tokenizer      {found.tokenizer_sha256}")
    out.print(f"chat template  {found.chat_template_sha256 or 'none'}")
    return 0


def convert(
    base: Annotated[str, Parameter(help="Folder or `s3://` prefix of an InternLM2 model.")],
    folder: Annotated[Path, Parameter(help="New folder for its Llama form.")],
    /,
    *,
    json: Json = False,
) -> int:
    """Make a Llama folder of an InternLM2 model, without running the code that came with it.

    The platform does the same by itself with an InternLM2 upload. The folder is an ordinary base.

    Example: `trans-peft convert models/internlm2_5-7b models/internlm2_5-7b-llama`
    """
    from trans_peft.bases.converters import convert as write
    from trans_peft.edges.stores import SchemeStore

    check_free(folder)
    with progress() as shown:
        write(
            base,
            SchemeStore(),
            folder,
            on_progress=lambda done, total: shown.show(f"converting {base}", done, total, "B"),
        )
    if json:
        print_json({"folder": str(folder)})
        return 0
    out.print(f"{base} is at {folder} as a Llama model")
    return 0


def publish(
    folder: Annotated[Path, Parameter(help="Hugging Face folder: config, safetensors, tokenizer.")],
    uri: Annotated[str, Parameter(help="Where to: `s3://bucket/prefix`, or a path.")],
    /,
    *,
    family: Annotated[str, Parameter(help="Family of the base, such as `smollm2`.")],
    version: Annotated[str, Parameter(help="Your word for this version, such as `v2`.")],
    parent: Annotated[str | None, Parameter(help="The version that it was made from.")] = None,
    sign_key: Annotated[
        Path | None, Parameter(help="Private key (PEM, elliptic curve) to sign the upload with.")
    ] = None,
    json: Json = False,
) -> int:
    """Upload a base as one version of a family: the files first, a manifest with their hashes last.

    The platform takes an upload up when its manifest is there. The same upload again changes
    nothing; another one in its place is refused. With a key, an OpenSSF model signature goes beside
    the manifest.

    Example: `trans-peft publish models/v2 s3://bases/smollm2/v2 --family smollm2 --version v2
    --parent v1`
    """
    from trans_peft.bases.publish import publish as upload
    from trans_peft.edges.stores import SchemeStore

    with progress() as shown:
        manifest = upload(
            folder,
            uri,
            family=family,
            version=version,
            parent=parent,
            store=SchemeStore(),
            sign_key=sign_key,
            on_progress=lambda done, total: shown.show(f"publishing {uri}", done, total, "B"),
        )
    if json:
        print_json({"uri": uri, **vars(manifest)})
        return 0
    size = sum(file.size for file in manifest.files)
    out.print(f"{family}/{version} is at {uri}: {len(manifest.files)} files, {size:,} bytes")
    return 0
