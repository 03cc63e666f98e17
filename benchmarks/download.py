"""Measures what ranges save: the download of a base in ranges on 8 streams, relative to one stream.

Both sides call `trans_peft.bases.cache.download` with an empty cache, and include all that a worker
waits for: reading, hashing, fsync and the record of the hashes. The single stream is the same code
with ranges larger than the file. A server on this machine has no network delay;
`--connection-mib-s` limits the rate of each connection, and adds the rate to the name of the
result.

    python benchmarks/download.py s3://bucket/scratch [--mib 128] [--connection-mib-s 20]
        [--pairs 9] [--clock wall]

Needs an S3 server in the `AWS_*` variables; writes one base there, once.
"""

import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from ratios import machine, middle, paired, parser, prepare, record
from safetensors.numpy import save_file

from trans_peft.bases.cache import download
from trans_peft.bases.fingerprint import fingerprint
from trans_peft.bases.publish import publish
from trans_peft.bases.ranges import RANGE_BYTES, STREAMS
from trans_peft.edges.stores import SchemeStore
from trans_peft.ports import ArtifactStore


def write_base(folder: Path, mib: int) -> Path:
    """Write a folder whose weights are one file of `mib` MiB."""
    folder.mkdir()
    draw = np.random.default_rng(0)
    save_file(
        {f"layer.{i}": draw.integers(0, 255, 1 << 20, dtype=np.uint8) for i in range(mib)},
        folder / "model.safetensors",
    )
    config = {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": mib}
    tokenizer = {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


class Slowed:
    """A store that limits the rate of every stream, in MiB per second."""

    def __init__(self, store: ArtifactStore, mib_s: float) -> None:
        self.store, self.mib_s = store, mib_s
        self.list = store.list

    @contextmanager
    def read(self, uri: str, **how: Any) -> Iterator[Iterator[bytes]]:
        with self.store.read(uri, **how) as chunks:
            yield self._slowed(chunks)

    def _slowed(self, chunks: Iterator[bytes]) -> Iterator[bytes]:
        began, read = time.perf_counter(), 0
        for chunk in chunks:
            read += len(chunk)
            due_s = read / (self.mib_s * (1 << 20))
            time.sleep(max(0.0, began + due_s - time.perf_counter()))
            yield chunk


def main() -> None:
    options = parser(__doc__, pairs=9)
    options.add_argument("uri")
    options.add_argument("--mib", type=int, default=128)
    options.add_argument("--connection-mib-s", type=float)
    chosen = options.parse_args()
    clock = prepare(chosen)
    store: Any = SchemeStore()
    uri = f"{chosen.uri.rstrip('/')}/{chosen.mib}-mib"
    with tempfile.TemporaryDirectory() as scratch:
        folder = write_base(Path(scratch, "base"), chosen.mib)
        wanted = fingerprint(str(folder), store)
        publish(folder, uri, family="bench", version=f"{chosen.mib}", store=store)
    name = "download.ranges_vs_stream"
    if chosen.connection_mib_s:
        store = Slowed(store, chosen.connection_mib_s)
        name += f"_{chosen.connection_mib_s:g}_mib_s"

    def timed(range_bytes: int) -> float:
        with tempfile.TemporaryDirectory() as cache:
            began = clock()
            download(uri, store, Path(cache), fingerprint=wanted, range_bytes=range_bytes)
            return clock() - began

    ratios = paired(lambda: timed(RANGE_BYTES), lambda: timed(1 << 50), chosen.pairs)
    shape = f"{chosen.mib} MiB in one file, {STREAMS} streams of {RANGE_BYTES >> 20} MiB"
    record(name, middle(ratios), machine(chosen, f"{shape}, S3 server on this machine"))


if __name__ == "__main__":
    main()
