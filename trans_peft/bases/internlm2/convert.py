"""The converter of InternLM2 checkpoints to Llama checkpoints."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from trans_peft.bases.conversion import SourceFiles, TargetFiles, json_bytes
from trans_peft.bases.internlm2 import config as internlm2
from trans_peft.bases.internlm2.tokenizer import llama_tokenizer, tokenizer_problems
from trans_peft.bases.internlm2.weights import WeightLayout, llama_shard, tensor_problems
from trans_peft.bases.model_files import INDEX, WEIGHTS, affects_outputs
from trans_peft.bases.safetensors_stream import ByteStream
from trans_peft.errors import UploadError
from trans_peft.safetensors_header import MalformedSafetensorsError, TensorEntry, read_header

__all__ = ["InternLM2Converter"]

_TOKENIZER, _SETTINGS = "tokenizer.json", "tokenizer_config.json"
_SPECIAL = "special_tokens_map.json"


class InternLM2Converter:
    """`trans_peft.bases.conversion.Converter` for InternLM2."""

    name = "InternLM2"
    architecture = internlm2.ARCHITECTURE

    def needs(self, config: Mapping[str, Any]) -> bool:
        """Whether config.json has the model type `internlm2`."""
        return internlm2.is_internlm2(config)

    def plan(self, source: SourceFiles) -> tuple[TargetFiles, list[str]]:
        """Return the Llama files to write, and all reasons why there can be none."""
        config = source.json("config.json")
        problems = internlm2.config_problems(config)
        layout = None if problems else WeightLayout.of(config)
        tokenizer, more = _tokenizer(source)
        problems += more
        headers: dict[str, Sequence[TensorEntry]] = {}
        for name in source.files:
            if not name.endswith(".safetensors"):
                continue
            try:
                with source.open(name) as chunks:
                    headers[name] = read_header(ByteStream(chunks).exactly)
            except MalformedSafetensorsError as error:
                problems.append(f"{name}: {error}")
        if layout is not None:
            problems += tensor_problems(headers, layout)
        if problems or layout is None:
            return {}, problems

        targets: TargetFiles = {name: _unchanged for name in source.files if affects_outputs(name)}
        targets |= dict.fromkeys(headers, partial(llama_shard, layout=layout))
        targets["config.json"] = json_bytes(internlm2.llama_config(config))
        targets |= {name: json_bytes(value) for name, value in tokenizer.items()}
        targets.pop(INDEX, None)
        if headers.keys() != {WEIGHTS}:
            targets[INDEX] = json_bytes(_index(headers, layout))
        return targets, []


def _tokenizer(source: SourceFiles) -> tuple[dict[str, Any], list[str]]:
    """Return name -> JSON of the converted tokenizer files, and why they cannot be converted."""
    found, problems = {}, []
    for name in (_TOKENIZER, _SETTINGS, _SPECIAL):
        try:
            found[name] = source.json(name)
        except UploadError as error:
            problems.append(str(error))
    problems += tokenizer_problems(source.files, found.get(_SETTINGS, {}))
    if problems:
        return {}, problems
    try:
        tokenizer, settings = llama_tokenizer(found[_TOKENIZER], found[_SETTINGS], found[_SPECIAL])
    except ValueError as error:
        return {}, [f"{_TOKENIZER}: {error}"]
    return {_TOKENIZER: tokenizer, _SETTINGS: settings}, []


def _index(headers: Mapping[str, Sequence[TensorEntry]], layout: WeightLayout) -> dict[str, Any]:
    """Return the content of the index file of sharded weights."""
    weights = layout.weights()
    return {
        "metadata": {
            "total_size": sum(e.end - e.start for found in headers.values() for e in found)
        },
        "weight_map": {
            llama: name
            for name, entries in headers.items()
            for entry in entries
            for llama in weights[entry.name].llama
        },
    }


def _unchanged(chunks: Iterator[bytes]) -> Iterator[bytes]:
    return chunks
