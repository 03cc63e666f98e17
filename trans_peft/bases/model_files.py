"""Validate the files of a Hugging Face model folder from streams, and compute the fingerprint.

This module defines which files transformers loads a causal language model from, how they must fit
together, and what of them the `Fingerprint` covers.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from trans_peft.bases.checkpoint import (
    GENERATION,
    MAX_TEXT_BYTES,
    Checkpoint,
    is_tokenizer_file,
)
from trans_peft.bases.safetensors_stream import tensor_signatures
from trans_peft.domain.base import Fingerprint, TensorSignature
from trans_peft.domain.bounds import MAX_TENSORS
from trans_peft.domain.identity import content_sha256
from trans_peft.domain.untrusted_json import parse_json
from trans_peft.errors import listed
from trans_peft.ports import StoredFile
from trans_peft.safetensors_header import MalformedSafetensorsError
from trans_peft.text.tokenizer_files import (
    chat_template_sha256,
    setting_conflicts,
    settings_of,
    tokenizer_sha256,
    vocabulary,
)

__all__ = [
    "INDEX",
    "MAX_TEXT_BYTES",
    "OUTPUT_NEUTRAL_FIELDS",
    "WEIGHTS",
    "ModelFiles",
    "affects_outputs",
    "config_sha256",
]

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_JSON_FILES = frozenset({
    INDEX, "config.json", "generation_config.json", "special_tokens_map.json", "tokenizer.json",
    "tokenizer_config.json",
})  # fmt: skip
_MAX_RECORDED_CHARACTERS = 1 << 20  # the catalog stores config.json with every version
_TEMPLATE = "chat_template.jinja"
_ADDED_TOKENS = "added_tokens.json"  # of old tokenizers: compared with tokenizer.json, never loaded
_MORE_TEMPLATES = "additional_chat_templates/"
_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")

# Fields of config.json that the fingerprint leaves out: names, versions, and settings that this
# library overrides when it loads or calls a model. All other fields are part of the fingerprint.
OUTPUT_NEUTRAL_FIELDS = frozenset({
    "_commit_hash", "_from_model_config", "_name_or_path", "dtype", "output_attentions",
    "output_hidden_states", "return_dict", "torch_dtype", "transformers_version", "use_cache",
})  # fmt: skip


def affects_outputs(name: str) -> bool:
    """Whether outputs depend on a file of this name. All other files can be removed."""
    return (
        name in _JSON_FILES
        or name == _TEMPLATE
        or (name.startswith(_MORE_TEMPLATES) and name.endswith(".jinja"))
        or name.endswith(".safetensors")
    )


class ModelFiles:
    """Collects what the fingerprint needs from one file after another.

    Attributes:
        problems: everything that is wrong with the files so far.
        checkpoint: set by `fingerprint` if there are no problems.
    """

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.checkpoint: Checkpoint | None = None
        self._seen: set[str] = set()
        self._texts: dict[str, str] = {}
        self._json: dict[str, dict[str, Any]] = {}
        self._templates: dict[str, str] = {}
        self._weights: dict[str, Mapping[str, TensorSignature]] = {}
        self._added: dict[str, Any] = {}

    def take(self, file: StoredFile, stream: Iterator[bytes]) -> None:
        """Read one file. A file that outputs do not depend on is not read."""
        self._seen.add(file.name)
        try:
            if file.name.endswith(".safetensors"):
                self._weights[file.name] = tensor_signatures(stream)
            elif affects_outputs(file.name) or file.name == _ADDED_TOKENS:
                self._take_text(file, stream)
        except (MalformedSafetensorsError, UnicodeDecodeError) as error:
            self.problems.append(f"{file.name}: {error}")

    def _take_text(self, file: StoredFile, stream: Iterator[bytes]) -> None:
        if file.size > MAX_TEXT_BYTES:
            self.problems.append(
                f"{file.name}: {file.size} bytes; at most {MAX_TEXT_BYTES} are allowed"
            )
            return
        text = b"".join(stream).decode()
        self._texts[file.name] = text
        if not file.name.endswith(".json"):
            name = file.name.removeprefix(_MORE_TEMPLATES).removesuffix(".jinja")
            self._templates["default" if file.name == _TEMPLATE else name] = text
            return
        try:
            value = _parsed(text)
        except ValueError as error:
            self.problems.append(f"{file.name}: not JSON: {error}")
            return
        if not isinstance(value, dict):
            self.problems.append(f"{file.name}: not a JSON object")
            return
        if file.name == _ADDED_TOKENS:
            self._added = value
            return
        self._json[file.name] = value
        if file.name.endswith("config.json") and (fields := _remote_code(value)):
            self.problems.append(
                f"{file.name}: needs remote code ({', '.join(fields)}), which is never run; "
                "convert the model (see `trans-peft convert --help` for the known layouts)"
            )

    def fingerprint(self) -> Fingerprint | None:
        """Return the fingerprint of all files, or None if there are `problems`."""
        missing = sorted({"config.json", "tokenizer.json"} - self._seen)
        self.problems += [f"{name}: missing" for name in missing]
        architecture, layers = self._shape()
        tensors = self._tensors()
        tokens = self._vocabulary()
        self.problems += self._tokenizer_problems(tokens)
        if self.problems:
            return None
        tokenizer = {name: text for name, text in self._texts.items() if is_tokenizer_file(name)}
        config = self._texts["config.json"]
        self.checkpoint = Checkpoint(config, tensors, tokenizer, self._texts.get(GENERATION, ""))
        return Fingerprint(
            architecture=architecture,
            layer_count=layers,
            tensors=tensors,
            config=config if len(config) <= _MAX_RECORDED_CHARACTERS else "",
            **self._text_hashes(tokens),
        )

    def text_hashes(self) -> dict[str, str] | None:
        """Return the hashes of the configuration and the tokenizer, by field of `Fingerprint`.

        None if there are `problems` with these files.
        """
        missing = sorted({"config.json", "tokenizer.json"} - self._seen)
        self.problems += [f"{name}: missing" for name in missing]
        tokens = self._vocabulary()
        return None if self.problems else self._text_hashes(tokens)

    def _text_hashes(self, tokens: dict[str, int]) -> dict[str, str]:
        special = self._json.get("special_tokens_map.json", {})
        settings = settings_of(special, self._json.get("tokenizer_config.json", {}))
        generation = self._json.get("generation_config.json", {})
        return {
            "config_sha256": content_sha256(
                [_relevant_fields(self._json["config.json"]), _relevant_fields(generation)]
            ),
            "vocabulary_sha256": content_sha256(tokens),
            "tokenizer_sha256": tokenizer_sha256(self._json["tokenizer.json"], settings),
            "chat_template_sha256": chat_template_sha256(settings, self._templates),
        }

    def _tokenizer_problems(self, tokens: dict[str, int]) -> list[str]:
        """Return settings for which transformers would read other files than the hashes cover."""
        settings = self._json.get("tokenizer_config.json", {})
        problems = setting_conflicts(self._json.get("special_tokens_map.json", {}), settings)
        if settings.get("fast_tokenizer_files") not in (None, [], ["tokenizer.json"]):
            problems.append(
                "tokenizer_config.json: fast_tokenizer_files names other files than "
                "tokenizer.json; remove the field"
            )
        missing = sorted(
            t for t, number in self._added.items() if tokens and tokens.get(t) != number
        )
        if missing:
            problems.append(
                f"added_tokens.json: {listed(missing)} missing in tokenizer.json, or with another "
                "id there; save the tokenizer again with this version of transformers"
            )
        return problems

    def _shape(self) -> tuple[str, int]:
        config = self._json.get("config.json")
        if config is None:
            return "", 0
        match config.get("architectures"):
            case [str(architecture), *_]:
                pass
            case other:
                architecture = ""
                self.problems.append(
                    f"config.json: `architectures` must name the model's class, not {other!r}"
                )
        text = config.get("text_config")
        sections = [config, text] if isinstance(text, dict) else [config]
        counts = [part[key] for part in sections for key in _LAYER_COUNTS if key in part]
        if not counts or type(counts[0]) is not int or counts[0] < 1:
            self.problems.append(f"config.json: no layer count (one of {', '.join(_LAYER_COUNTS)})")
            return architecture, 0
        return architecture, counts[0]

    def _vocabulary(self) -> dict[str, int]:
        if "tokenizer.json" not in self._json:
            return {}
        try:
            return vocabulary(self._json["tokenizer.json"])
        except ValueError as error:
            self.problems.append(f"tokenizer.json: {error}")
            return {}

    def _tensors(self) -> dict[str, TensorSignature]:
        """Return the tensors of all files. Their names and files must match the index."""
        index = self._index()
        if index is None:
            return {}
        stored = {name for name in self._seen if name.endswith(".safetensors")}
        needed = set(index.values()) or {WEIGHTS}
        self.problems += [f"{name}: missing" for name in sorted(needed - stored)]
        self.problems += [
            f"{name}: unused weights; expected {WEIGHTS}, or the files that {INDEX} lists"
            for name in sorted(stored - needed)
        ]
        found: dict[str, str] = {}
        tensors: dict[str, TensorSignature] = {}
        for file in sorted(needed & self._weights.keys()):
            duplicates = sorted(found.keys() & self._weights[file].keys())
            if duplicates:
                self.problems.append(f"{file}: also in another file: {listed(duplicates)}")
            found |= dict.fromkeys(self._weights[file], file)
            tensors |= self._weights[file]
        if len(tensors) > MAX_TENSORS:
            self.problems.append(f"{len(tensors)} tensors; at most {MAX_TENSORS} are allowed")
        if needed <= self._weights.keys():
            wrong = sorted(n for n in index.keys() | found.keys() if index.get(n) != found.get(n))
            if wrong:
                self.problems.append(f"{INDEX}: it does not match the files for {listed(wrong)}")
            if not tensors:
                self.problems.append("the weights contain no tensors")
        return tensors

    def _index(self) -> dict[str, str] | None:
        """Return tensor name -> file name, by the index or the files; None if it is invalid."""
        if INDEX not in self._seen:
            return dict.fromkeys(self._weights.get(WEIGHTS, {}), WEIGHTS)
        if WEIGHTS in self._seen:
            self.problems.append(
                f"{WEIGHTS} and {INDEX}: remove one of them; transformers loads only one"
            )
            return None
        if INDEX not in self._json:
            return None
        index = self._json[INDEX].get("weight_map")
        if not isinstance(index, dict) or not all(isinstance(n, str) for n in index.values()):
            self.problems.append(f"{INDEX}: no `weight_map` of tensor name -> file name")
            return None
        if not isinstance(self._json[INDEX].get("metadata"), dict):
            self.problems.append(
                f"{INDEX}: no `metadata`, which transformers reads; save the model again with "
                "save_pretrained, or add an empty object"
            )
        return index


def config_sha256(config: str, generation: str) -> str:
    """Return the `config_sha256` of a fingerprint for config.json and generation_config.json.

    Raises ValueError if one of the texts is not JSON.
    """
    return content_sha256(
        [_relevant_fields(_parsed(config)), _relevant_fields(_parsed(generation))]
    )


def _parsed(text: str) -> Any:
    return parse_json(text, parse_constant=str, parse_float=_finite)


def _finite(number: str) -> float | str:
    """Return the number, or its text if it is infinite, which JSON cannot represent."""
    return float(number) if math.isfinite(float(number)) else number


def _remote_code(value: Any) -> list[str]:
    if isinstance(value, list):
        return [field for item in value for field in _remote_code(item)]
    if not isinstance(value, dict):
        return []
    here = [key for key in ("auto_map", "custom_pipelines") if value.get(key)]
    return here + [field for item in value.values() for field in _remote_code(item)]


def _relevant_fields(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key: _relevant_fields(item)
            for key, item in value.items()
            if key not in OUTPUT_NEUTRAL_FIELDS
        }
    if isinstance(value, list):
        return [_relevant_fields(item) for item in value]
    return value
