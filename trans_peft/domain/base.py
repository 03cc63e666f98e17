"""Base versions, their fingerprints, and the manifests of uploads."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from trans_peft.domain.conventions import ADAPTER_ALIAS_PREFIX
from trans_peft.domain.identity import content_sha256
from trans_peft.domain.names import check_names, name_problem
from trans_peft.errors import InvalidSpecError, listed

__all__ = [
    "BaseRef",
    "BaseVersion",
    "Fingerprint",
    "Manifest",
    "ManifestFile",
    "TensorSignature",
    "Upload",
]


@dataclass(frozen=True)
class TensorSignature:
    """The identity of one tensor of a base.

    Attributes:
        shape: Shape of the tensor.
        dtype: Data type, in safetensors' spelling ("F32", "BF16").
        sha256: Hash of the tensor's bytes.
        sketch: Sampled values at positions that depend on the shape alone. They allow two versions
            of a tensor to be compared (cosine, drift) without the files. Not part of the digest.
    """

    shape: tuple[int, ...]
    dtype: str
    sha256: str
    sketch: tuple[float, ...] = field(default=(), compare=False)


@dataclass(frozen=True)
class Fingerprint:
    """Hashes of everything in a base that can change a model's output.

    Attributes:
        architecture: Class name of the model, as in config.json.
        layer_count: Number of layers.
        config_sha256: Hash of config.json and generation_config.json, without fields that cannot
            change an output (names, library version).
        tensors: Signature of each tensor, by its name in the files.
        vocabulary_sha256: Hash of the map from token to id.
        tokenizer_sha256: Hash of the whole tokenizer: merges, added tokens, normalizer.
        chat_template_sha256: Hash of the chat template. Empty without a template.
        config: Text of config.json, from which the model's own names of the tensors follow. Not
            part of the digest. Empty in fingerprints of older versions of this library.
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
        """The sha256 (64 hex digits) of all fields except `config` and the sketches."""
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
class BaseRef:
    """One base version whose files were verified, as adapters and their records refer to it.

    Attributes:
        family: Name of the family.
        version: Label of the version, for people. Another base version may get it later.
        fingerprint_sha256: Digest of the `Fingerprint`, which identifies the base.

    Raises:
        InvalidSpecError: a name is invalid, or there is no fingerprint.
    """

    family: str
    version: str
    fingerprint_sha256: str

    def __post_init__(self) -> None:
        check_names("the base version", family=self.family, version=self.version)
        if not self.fingerprint_sha256:
            raise InvalidSpecError(
                f"the base version {self} has no fingerprint",
                expected="the digest of its fingerprint",
                do="ingest the base first",
            )

    @property
    def alias(self) -> str:
        """The alias of the adapter version that serves on this base."""
        return f"{ADAPTER_ALIAS_PREFIX}{self.fingerprint_sha256[:12]}"

    @property
    def labels(self) -> dict[str, str]:
        """The tags (after `TAG_PREFIX`) by which MLflow's page finds what belongs to this base."""
        return {
            "family": self.family,
            "base_version": self.version,
            "base_fingerprint": self.fingerprint_sha256,
        }

    def __str__(self) -> str:
        return f"{self.family}/{self.version}"


@dataclass(frozen=True)
class BaseVersion:
    """One version of a base family, as registered in the catalog.

    Attributes:
        family: Name of the family.
        version: Label that the publisher chose, such as "v2" or "2026-01".
        uri: Folder or prefix of the files.
        number: Number in the order of the family, assigned by the catalog. 1 is the oldest.
        fingerprint_sha256: Digest of the `Fingerprint`. Empty until ingestion verified the files.
        parent: Label of the version that this one was trained from.
        ready: Whether ingestion verified the version. Everything else ignores other versions.
        manifest_sha256: Hash of the manifest that the files were verified against. Empty without.
        served: Whether the fleet serves on this version, or has served on it.
        drift: How far its weights moved from its predecessor, or why that is unknown, for people.
            Empty for a version without a predecessor.
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
    drift: str = ""

    def __post_init__(self) -> None:
        names = {"family": self.family, "version": self.version}
        if self.parent is not None:
            names["parent"] = self.parent
        check_names(f"the base version with the number {self.number}", **names)

    @property
    def ref(self) -> BaseRef:
        """The value by which records refer to this version. InvalidSpecError until it is ready."""
        return BaseRef(self.family, self.version, self.fingerprint_sha256)

    @property
    def alias(self) -> str:
        """The alias of the adapter version that serves on this base."""
        return self.ref.alias

    def __str__(self) -> str:
        return f"{self.family}/{self.version}"


@dataclass(frozen=True)
class ManifestFile:
    """One file of an upload: name relative to the prefix, size in bytes, sha256."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The manifest of an upload: its family, version and files. The publisher writes it last."""

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
            problems.append(f"it lists these files twice: {listed(doubled)}")
        if problems:
            raise InvalidSpecError(f"the manifest cannot be used: {'; '.join(problems)}")

    @cached_property
    def sha256(self) -> str:
        """The sha256 (64 hex digits) of the family, the version and all files."""
        return content_sha256(
            [self.family, self.version, sorted(self.files, key=lambda file: file.name)]
        )


@dataclass(frozen=True)
class Upload:
    """Files that ingestion can turn into a base version.

    Attributes:
        uri: Folder or prefix of the files.
        registered: The registered version that waits for its files to be verified. None for an
            upload that was found by its manifest.
    """

    uri: str
    registered: BaseVersion | None = None

    def __str__(self) -> str:
        return str(self.registered) if self.registered else self.uri
