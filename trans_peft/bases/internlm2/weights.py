"""Convert InternLM2's weights to Llama's: rename tensors and split the fused projection.

Follows modeling_internlm2.py of the release, which was read and is never run. Apart from names, one
tensor differs: the rows of `wqkv` are, for each key/value head, those of the query heads of its
group, then that key head, then that value head. A safetensors file stores tensors row by row.
The conversion therefore moves bytes, without torch, arithmetic or rounding.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trans_peft.bases.safetensors_stream import ByteStream
from trans_peft.errors import listed
from trans_peft.safetensors_header import TensorEntry, read_header

__all__ = ["Weight", "WeightLayout", "llama_shard", "tensor_problems"]

Shape = tuple[int, ...]

_DTYPES = frozenset({"BF16", "F16", "F32", "F64"})


@dataclass(frozen=True)
class Weight:
    """A tensor of InternLM2: its shape, and name -> shape of the Llama tensors made of it."""

    shape: Shape
    llama: Mapping[str, Shape]


@dataclass(frozen=True)
class WeightLayout:
    """The sizes that determine names, shapes and the order of rows."""

    layers: int
    vocabulary: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    bias: bool
    tied: bool

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "WeightLayout":
        """Read the sizes from an InternLM2 config without `config_problems`."""
        return cls(
            layers=config["num_hidden_layers"],
            vocabulary=config["vocab_size"],
            hidden=config["hidden_size"],
            intermediate=config["intermediate_size"],
            heads=config["num_attention_heads"],
            kv_heads=config["num_key_value_heads"],
            bias=config["bias"],
            tied=config["tie_word_embeddings"],
        )

    def weights(self) -> dict[str, Weight]:
        """Return InternLM2 name -> weight for exactly the tensors of the model."""
        table, width = (self.vocabulary, self.hidden), (self.hidden,)
        found = {
            "model.tok_embeddings.weight": _same("model.embed_tokens.weight", table),
            "model.norm.weight": _same("model.norm.weight", width),
        }
        if not self.tied:
            found["output.weight"] = _same("lm_head.weight", table)
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}."
            for name, weight in self._layer().items():
                renamed = {prefix + llama: shape for llama, shape in weight.llama.items()}
                found[prefix + name] = Weight(weight.shape, renamed)
        return found

    def _layer(self) -> dict[str, Weight]:
        width, square = (self.hidden,), (self.hidden, self.hidden)
        widening, narrowing = (self.intermediate, self.hidden), (self.hidden, self.intermediate)
        found = {
            "attention_norm.weight": _same("input_layernorm.weight", width),
            "attention.wqkv.weight": self._fused("weight", width),
            "attention.wo.weight": _same("self_attn.o_proj.weight", square),
            "ffn_norm.weight": _same("post_attention_layernorm.weight", width),
            "feed_forward.w1.weight": _same("mlp.gate_proj.weight", widening),
            "feed_forward.w3.weight": _same("mlp.up_proj.weight", widening),
            "feed_forward.w2.weight": _same("mlp.down_proj.weight", narrowing),
        }
        if self.bias:
            found["attention.wqkv.bias"] = self._fused("bias", ())
            found["attention.wo.bias"] = _same("self_attn.o_proj.bias", width)
        return found

    def _fused(self, part: str, row: Shape) -> Weight:
        narrow = self.hidden // self.heads * self.kv_heads
        rows = {"q": self.hidden, "k": narrow, "v": narrow}
        split = {f"self_attn.{n}_proj.{part}": (count, *row) for n, count in rows.items()}
        return Weight((sum(rows.values()), *row), split)

    def split(self, wqkv: bytes) -> tuple[bytes, bytes, bytes]:
        """Return the rows of q, k and v from the rows of a fused weight or bias, all as bytes."""
        head = len(wqkv) // (self.heads + 2 * self.kv_heads)
        queries = self.heads // self.kv_heads * head
        groups = range(0, len(wqkv), queries + 2 * head)
        rows = memoryview(wqkv)

        def gathered(begin: int, end: int) -> bytes:
            return b"".join(rows[at + begin : at + end] for at in groups)

        return (
            gathered(0, queries),
            gathered(queries, queries + head),
            gathered(queries + head, queries + 2 * head),
        )


def tensor_problems(files: Mapping[str, Sequence[TensorEntry]], layout: WeightLayout) -> list[str]:
    """Return all differences between the tensors of the files and those of the layout."""
    weights, problems, seen = layout.weights(), [], set[str]()
    for file, entries in files.items():
        names = [entry.name for entry in entries]
        if duplicates := sorted(seen.intersection(names)):
            problems.append(f"{file}: also in another file: {listed(duplicates)}")
        if unknown := sorted(set(names) - weights.keys()):
            problems.append(f"{file}: not tensors of InternLM2: {listed(unknown)}")
        seen.update(names)
        for entry in entries:
            expected = weights.get(entry.name)
            if expected and entry.shape != expected.shape:
                problems.append(
                    f"{file}: {entry.name} has the shape {list(entry.shape)}, "
                    f"but config.json requires {list(expected.shape)}"
                )
            if expected and entry.dtype not in _DTYPES:
                dtypes = ", ".join(sorted(_DTYPES))
                problems.append(f"{file}: {entry.name} has dtype {entry.dtype}; expected {dtypes}")
    if missing := sorted(weights.keys() - seen):
        problems.append(f"missing tensors: {listed(missing)}")
    return problems


def llama_shard(chunks: Iterator[bytes], layout: WeightLayout) -> Iterator[bytes | memoryview]:
    """Convert the stream of one InternLM2 safetensors file to the stream of a Llama file.

    Needs memory for one chunk and twice the largest fused tensor. The file must be without
    `tensor_problems`. Raises MalformedSafetensorsError if its bytes do not match its header.
    """
    stream, weights = ByteStream(chunks), layout.weights()
    entries = read_header(stream.exactly)
    yield _header(entries, weights)
    for entry in entries:
        size = entry.end - entry.start
        if len(weights[entry.name].llama) == 1:
            yield from stream.take(size)
        else:
            yield from layout.split(stream.exactly(size))
    stream.end()


def _header(entries: Sequence[TensorEntry], weights: Mapping[str, Weight]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for entry in entries:
        width = (entry.end - entry.start) // math.prod(entry.shape)
        for name, shape in weights[entry.name].llama.items():
            end = start + width * math.prod(shape)
            header[name] = {"dtype": entry.dtype, "shape": shape, "data_offsets": [start, end]}
            start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # aligns the tensors, as the safetensors package does
    return len(text).to_bytes(8, "little") + text


def _same(name: str, shape: Shape) -> Weight:
    return Weight(shape, {name: shape})
