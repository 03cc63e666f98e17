"""The commands `fingerprint`, `convert` and `publish`: bases in folders and buckets."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from trans_peft.cli.environment import owners
from trans_peft.cli.options import Json, State
from trans_peft.cli.show import out, print_json, progress
from trans_peft.cli.workspace import Workspace
from trans_peft.files import check_unused

__all__ = ["convert", "fingerprint", "publish"]


def fingerprint(
    base: Annotated[str, Parameter(help="Folder or `s3://` prefix of a base.")],
    /,
    *,
    json: Json = False,
    state: State = Path(".trans-peft"),
) -> int:
    """Print the hash of everything in a base that can change a model's output, and its parts.

    Two bases with the same digest give the same outputs. The command reads the files and loads no
    model.

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
    folder: Annotated[Path, Parameter(help="New folder for the Llama model.")],
    /,
    *,
    json: Json = False,
) -> int:
    """Convert an InternLM2 model to a Llama model, without running the code that comes with it.

    The new folder can be used like any other base. Ingestion converts InternLM2 uploads itself.

    Example: `trans-peft convert models/internlm2_5-7b models/internlm2_5-7b-llama`
    """
    from trans_peft.bases.converters import convert as write
    from trans_peft.edges.stores import SchemeStore

    check_unused(folder)
    with progress() as shown:
        write(
            base,
            SchemeStore(),
            folder,
            on_progress=lambda done, total: shown.update(f"converting {base}", done, total, "B"),
        )
    if json:
        print_json({"folder": str(folder)})
        return 0
    out.print(f"the Llama form of {base} was written to {folder}")
    return 0


def publish(
    folder: Annotated[
        Path, Parameter(help="Hugging Face folder with config, safetensors and tokenizer.")
    ],
    uri: Annotated[str, Parameter(help="Destination: `s3://bucket/prefix` or a path.")],
    /,
    *,
    family: Annotated[str, Parameter(help="Family of the base, such as `smollm2`.")],
    version: Annotated[str, Parameter(help="Label of this version, such as `v2`.")],
    parent: Annotated[
        str | None, Parameter(help="Version from which this one was trained.")
    ] = None,
    sign_key: Annotated[
        Path | None, Parameter(help="Private key (PEM, elliptic curve) to sign the upload with.")
    ] = None,
    json: Json = False,
) -> int:
    """Upload a base as one version of a family: first the files, then a manifest of their hashes.

    Ingestion starts once the manifest exists. Publishing the same files again changes nothing;
    publishing other files to the same place is refused. With a key, the command writes an OpenSSF
    model signature next to the manifest.

    Ingestion accepts a version only below the prefixes of its family, which are settings of the
    workers: `TRANS_PEFT_BASES_URI`/FAMILY/, or what `TRANS_PEFT_FAMILIES` names. If these variables
    are set, the command refuses any other destination before it uploads.

    Example: `trans-peft publish models/v2 s3://bases/smollm2/v2 --family smollm2 --version v2
    --parent v1`
    """
    from trans_peft.bases.publish import publish as upload
    from trans_peft.edges.stores import SchemeStore

    rules = owners()
    if rules is not None:
        rules.check(family, uri, uri)
    with progress() as shown:

        def report(done: int, total: int) -> None:
            size = total // 2  # `upload` counts each byte twice: when it is hashed, and when sent
            if done <= size:
                shown.update(f"hashing {folder}", done, size, "B")
            else:
                shown.update(f"uploading to {uri}", done - size, size, "B")

        manifest = upload(
            folder,
            uri,
            family=family,
            version=version,
            parent=parent,
            store=SchemeStore(),
            sign_key=sign_key,
            on_progress=report,
        )
    if json:
        print_json({"uri": uri, **vars(manifest)})
        return 0
    size = sum(file.size for file in manifest.files)
    count = len(manifest.files)
    out.print(f"{family}/{version} was published to {uri}: {count} files, {size:,} bytes")
    if rules is None:
        out.print(
            f"workers ingest it if their TRANS_PEFT_BASES_URI/{family}/, or the prefixes of "
            f"{family} in their TRANS_PEFT_FAMILIES, contain this place; neither is set here"
        )
    return 0
