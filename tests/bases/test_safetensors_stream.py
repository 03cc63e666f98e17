"""The stream reader, compared with the safetensors package, and with malformed files."""

import hashlib
import json
import tracemalloc
from collections.abc import Iterator
from contextlib import suppress
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save
from safetensors.torch import save as save_torch

from trans_peft.bases.safetensors_stream import (
    SKETCH_SIZE,
    sketch_positions,
    tensor_signatures,
)
from trans_peft.safetensors_header import MalformedSafetensorsError

SHAPES = st.lists(st.integers(0, 9), max_size=3).map(tuple)
DTYPES = st.sampled_from(["float32", "float16", "float64", "int8", "int64", "uint8", "bool"])


def chunks(data: bytes, size: int) -> Iterator[bytes]:
    return (data[at : at + size] for at in range(0, len(data), size))


@settings(deadline=None, max_examples=60)
@given(
    st.dictionaries(st.text("abc.", min_size=1, max_size=6), st.tuples(SHAPES, DTYPES), max_size=5),
    st.integers(1, 50),
    st.randoms(use_true_random=False),
)
def test_signatures_match_the_safetensors_package(shapes, chunk_bytes, random):
    draw = np.random.default_rng(random.randrange(2**32))
    tensors = {
        name: np.asarray(draw.normal(size=shape) * 9).astype(dtype)
        for name, (shape, dtype) in shapes.items()
    }
    found = tensor_signatures(chunks(save(tensors), chunk_bytes))
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].shape == tensor.shape
        assert found[name].sha256 == hashlib.sha256(tensor.tobytes()).hexdigest()
        flat = tensor.astype(np.float64).reshape(-1)
        assert found[name].sketch == tuple(flat[list(sketch_positions(flat.size))])


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn,
     torch.float8_e5m2, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool],
    ids=str,
)  # fmt: skip
def test_the_sketch_has_torchs_values(dtype):
    # every exponent, subnormal and sign of the eight-bit types; the others get some of theirs
    bits = torch.arange(256, dtype=torch.uint8)
    width = torch.empty(0, dtype=dtype).element_size()
    tensor = (
        bits % 2 == 0 if dtype is torch.bool else bits.repeat_interleave(width).view(dtype)
    ).reshape(16, 16)
    for part in tensor.split(2):  # 32 elements each: all of them are in the sketch
        found = tensor_signatures(iter([save_torch({"x": part.contiguous()})]))["x"]
        expected = part.reshape(-1).to(torch.float64).nan_to_num(0.0, posinf=0.0, neginf=0.0)
        assert found.sketch == tuple(expected.tolist())


@given(st.integers(0, 10**12))
def test_sketch_positions_lie_in_the_tensor_and_are_spread(elements):
    positions = sketch_positions(elements)
    assert len(positions) <= SKETCH_SIZE
    assert sorted(set(positions)) == list(positions)
    assert all(0 <= position < elements for position in positions)
    if elements > 100:
        edges = [0, *positions, elements]
        assert max(b - a for a, b in pairwise(edges)) < elements / 10


def test_sketch_positions_are_in_many_columns_of_a_matrix():
    assert len({position % 4096 for position in sketch_positions(4096 * 4096)}) == SKETCH_SIZE


def header(**tensors) -> bytes:
    text = json.dumps(tensors).encode()
    return len(text).to_bytes(8, "little") + text


ONE = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "too early"),
        (b"\x00\x00", "too early"),
        (b"\xff" * 8, "header would be"),
        ((4).to_bytes(8, "little") + b"{}", "too early"),
        ((4).to_bytes(8, "little") + b"nope", "not JSON"),
        ((2).to_bytes(8, "little") + b"[]", "not a JSON object"),
        ((10**5).to_bytes(8, "little") + b"[" * 10**5, "not JSON"),
        (header(x=ONE) + b"123", "1 bytes too early"),
        (header(x=ONE) + b"12345", "1 bytes follow"),
        (header(x=ONE | {"dtype": "F99"}) + b"1234", "unknown dtype"),
        (header(x=ONE | {"shape": [2]}) + b"1234", "needs 8 bytes, but has 4"),
        (header(x=ONE | {"shape": [-1]}) + b"1234", "missing or invalid"),
        (header(x=ONE | {"shape": [True]}) + b"1234", "missing or invalid"),
        (header(x=ONE | {"data_offsets": [4, 0]}), "needs 4 bytes, but has -4"),
        (header(x={"dtype": "F32"}), "missing or invalid"),
        (header(x=ONE, y=ONE) + b"1234", "starts at byte 0; expected 4"),
        (header(x=ONE | {"data_offsets": [4, 8]}) + b"12345678", "starts at byte 4; expected 0"),
        (
            (len(t := b'{"x":{},"x":{}}')).to_bytes(8, "little") + t,
            "occurs twice",
        ),
    ],
)
def test_malformed_files_are_refused_with_a_reason(data, reason):
    with pytest.raises(MalformedSafetensorsError, match=reason):
        tensor_signatures(chunks(data, 3))


@settings(deadline=None)
@given(st.data())
def test_any_damage_is_detected(data):
    whole = save({"x": np.arange(6, dtype=np.float32), "y": np.ones((2, 2), np.float16)})
    at = data.draw(st.integers(0, len(whole) - 1))
    damaged = data.draw(
        st.sampled_from([whole[:at], whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :]])
    )
    with suppress(MalformedSafetensorsError):
        assert tensor_signatures(iter([damaged])) != tensor_signatures(iter([whole]))


def test_a_large_tensor_takes_no_more_memory_than_a_chunk():
    size = 64 << 20
    start = header(x={"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]})
    zeros = bytes(1 << 20)
    tracemalloc.start()
    found = tensor_signatures(iter([start, *[zeros] * 64]))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found["x"].sha256 == hashlib.sha256(bytes(size)).hexdigest()
    assert peak < 1 << 20
