"""Base models: what a version is, what an adapter can feel of it, and what an upload must state."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from trans_peft.domain.conventions import ADAPTER_ALIAS_PREFIX
from trans_peft.domain.identity import content_sha256
from trans_peft.domain.names import check_names, name_problem
from trans_peft.errors import InvalidSpecError, listed

__all__ = [
    "BaseVersion",
    "Fingerprint",
    "Manifest",
    "ManifestFile",
    "TensorSignature",
    "Upload",
    "serving_alias",
]


def serving_alias(fingerprint_sha256: str) -> str:
    """Return the alias of an adapter version that serves on the base with this digest."""
    return f"{ADAPTER_ALIAS_PREFIX}{fingerprint_sha256[:12]}"


@dataclass(frozen=True)
class TensorSignature:
    """One weight of a base, told apart without keeping it.

    `sketch` holds some of its values at positions that depend on the shape alone, so that two
    versions of one weight can be compared (cosine, drift) without either file. It is derived from
    the content and therefore not part of the fingerprint's digest.
    """

    shape: tuple[int, ...]
    dtype: str
    sha256: str
    sketch: tuple[float, ...] = field(default=(), compare=False)


@dataclass(frozen=True)
class Fingerprint:
    """What an adapter can feel of a base: nothing that changes a logit is left out.

    `config_sha256` covers config.json and generation_config.json without what cannot change a
    result (names, library version).
    `vocabulary_sha256` covers token -> id, `tokenizer_sha256` the whole tokenizer (merges, added
    tokens, normaliser), `chat_template_sha256` is empty where there is no template. `config` is the
    text of config.json, from which the model's own names of the tensors follow; it is no part of
    the digest, and empty in fingerprints that older versions of this library recorded.
    """

    architecture: str
    layer_count: int
    config_sha256: str
    tensors: Mapping[str, TensorSignature]
    vocabulary_sha256: str
    tokenizer_sha256: str
    chat_template_sha256: str = ""
    config: str = field(default="", compare=False)

    @cached_property
    def digest(self) -> str:
        """The sha256 (64 hex digits) of everything above, sketches left out."""
        tensors = {
            name: [list(tensor.shape), tensor.dtype, tensor.sha256]
            for name, tensor in self.tensors.items()
        }
        return content_sha256(
            [
                self.architecture,
                self.layer_count,
                self.config_sha256,
                tensors,
                self.vocabulary_sha256,
                self.tokenizer_sha256,
                self.chat_template_sha256,
            ]
        )


@dataclass(frozen=True)
class BaseVersion:
    """One version of a base family, as the catalog knows it.

    `version` is the publisher's word for it ("v2", "2026-01"); `number` is its place in the
    family's order, given by the catalog (1 is the oldest). `fingerprint_sha256` is the digest of
    its `Fingerprint`, empty until ingestion has verified the files. Only a `ready` version exists
    for anything but ingestion. `manifest_sha256` is that of the manifest it was verified against,
    empty without one. `served`: the fleet uses it, or once did.
    """

    family: str
    version: str
    uri: str
    number: int
    fingerprint_sha256: str = ""
    parent: str | None = None
    ready: bool = False
    manifest_sha256: str = ""
    served: bool = False

    def __post_init__(self) -> None:
        names = {"family": self.family, "version": self.version}
        if self.parent is not None:
            names["parent"] = self.parent
        check_names(f"the base version with the number {self.number}", **names)

    @property
    def alias(self) -> str:
        """The alias of adapter versions that serve on this base."""
        return serving_alias(self.fingerprint_sha256)

    def __str__(self) -> str:
        return f"{self.family}/{self.version}"


@dataclass(frozen=True)
class ManifestFile:
    """One file of an upload: its name relative to the prefix, its size in bytes, its sha256."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What an upload claims to be. Written last, as `trans_peft_manifest.json`."""

    family: str
    version: str
    parent: str | None
    files: tuple[ManifestFile, ...]

    FILE_NAME = "trans_peft_manifest.json"
    FORMAT = "trans-peft/base-manifest/1"

    def __post_init__(self) -> None:
        names = {"family": self.family, "version": self.version}
        if self.parent is not None:
            names["parent"] = self.parent
        problems = [p for what, name in names.items() if (p := name_problem(what, name))]
        if not self.files:
            problems.append("it lists no files")
        counts = Counter(file.name for file in self.files)
        doubled = sorted(name for name, count in counts.items() if count > 1)
        if doubled:
            problems.append(f"it lists twice: {listed(doubled)}")
        if problems:
            raise InvalidSpecError(f"the manifest cannot be used: {'; '.join(problems)}")

    @cached_property
    def sha256(self) -> str:
        """The sha256 (64 hex digits) of what is claimed: family, version, and every file."""
        return content_sha256(
            [self.family, self.version, sorted(self.files, key=lambda file: file.name)]
        )


@dataclass(frozen=True)
class Upload:
    """Files that might become a base version: an uploaded prefix, or a version somebody registered.

    `registered` is the catalog's version that waits for its files to be verified; None for a prefix
    that came with a manifest.
    """

    uri: str
    registered: BaseVersion | None = None

    def __str__(self) -> str:
        return str(self.registered) if self.registered else self.uri
