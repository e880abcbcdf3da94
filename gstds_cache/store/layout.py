"""The format on disk: names, and the bytes zarr itself would write under them.

::

    STORE/zarr.json          group; its attributes carry the specification
    STORE/embeddings/        [N, D] float16 or float32, one chunk (shard_rows, D) per shard, bytes + crc32c
    STORE/label/             [N] int64, -1 where there is none
    STORE/valid/             [N] uint8: 0 missing, 1 ok, 2 undecodable
    STORE/items.arrow        ordered item ids, SHA-256 of each item's bytes, labels
    STORE/commits/S.json     one per committed shard
    STORE/COMPLETE.json      written last
    STORE/repair.json        only while a repair is under way: the shards that it discarded
    STORE/parts/K-F/         rows appended by the K-th append, a store of its own (:mod:`gstds_cache.store.grown`)
    STORE/grown/K.json       the record that makes them count
    STORE/hidden/K.json      rows that selections leave out (:mod:`gstds_cache.store.hidden`)

Format 1 has other names for some of it (:mod:`gstds_cache.store.format`).

Bytes are made by zarr on an in-memory store, then written by :mod:`gstds_cache.store.transport`: the format is zarr's
own, the durability ours. Shards are read back without zarr, which takes a missing object for fill values and needs
three times as long (benchmarks/bench_store.py): one chunk with the codecs bytes and crc32c is the rows and four bytes.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from typing import IO, Any

import google_crc32c
import numpy as np
import zarr
from jaxtyping import Float, Int, Int64, UInt8
from zarr.codecs import Crc32cCodec
from zarr.core.buffer import Buffer
from zarr.storage import MemoryStore

from gstds_cache.files import mapped
from gstds_cache.store.format import FORMATS
from gstds_cache.store.spec import CacheSpec

GROUP = "zarr.json"
ITEMS = "items.arrow"
COMPLETE = "COMPLETE.json"
REPAIR = "repair.json"
LABEL = "label/c/0"
VALID = "valid/c/0"
GROWN = "grown"
PARTS = "parts"
HIDDEN = "hidden"
OWN_NAMES = frozenset(
    {GROUP, "embeddings", "label", "valid", ITEMS, COMPLETE, REPAIR, GROWN, PARTS, HIDDEN}
    | {names.commits for names in FORMATS.values()}
)

MISSING, OK, UNDECODABLE = 0, 1, 2

RESIDUE = 0x48674BC7  # the CRC-32C of any bytes followed by their CRC-32C, the lowest byte first, and of no others

_ROWS = 1 << 16


def object_key(shard: int) -> str:
    """Key of a shard's one object."""
    return f"embeddings/c/{shard}/0"


def metadata_objects(
    spec: CacheSpec, attributes: dict[str, Any], labels: Int64[np.ndarray, " N"]
) -> dict[str, bytes | memoryview]:
    """Objects of a store with no shard yet: the ``zarr.json`` files and the labels; the group's comes last."""
    objects, _ = _in_memory(spec, attributes)
    encoded: dict[str, bytes | memoryview] = {key: data.to_bytes() for key, data in objects.items()}
    encoded[LABEL] = _vector(labels.astype("<i8", copy=False))
    return {key: encoded[key] for key in sorted(encoded, key=lambda key: (key == GROUP, key))}


def shard_object(spec: CacheSpec, shard: int, rows: Float[np.ndarray, "R D"]) -> memoryview:
    """A shard's object: the rows as one chunk, the last shard filled up with NaN.

    The bytes are those that zarr writes (tests/store/test_store.py). Zarr makes three arrays and copies the rows three
    times for it, which takes three times as long.
    """
    end = shard_end(spec, shard, rows)
    size = spec.shard_rows * spec.dim * rows.dtype.itemsize + 4
    data = np.empty(size, np.uint8)
    data[: size - len(end)] = _bytes_of(rows)
    data[size - len(end) :] = np.frombuffer(end, np.uint8)
    return data.data


def shard_end(spec: CacheSpec, shard: int, rows: Float[np.ndarray, "R D"]) -> bytes:
    """What follows the rows in a shard's object: NaN, where the last shard has fewer rows, and the CRC-32C of all."""
    assert rows.shape == (len(spec.rows_of(shard)), spec.dim)
    missing = (spec.shard_rows - len(rows)) * spec.dim
    fill = np.full(missing, math.nan, np.dtype(spec.dtype).newbyteorder("<")).tobytes()
    crc = google_crc32c.extend(google_crc32c.value(_bytes_of(rows)), fill)
    return fill + int(crc).to_bytes(4, "little")


def hashes_of(rows: Float[np.ndarray, "R D"], end: bytes) -> tuple[str, str]:
    """SHA-256 of a shard's rows, and of its object, which is the rows and ``end``: the rows are hashed once."""
    content = hashlib.sha256(_bytes_of(rows).data)
    whole = content.copy()
    whole.update(end)
    return content.hexdigest(), whole.hexdigest()


def _bytes_of(rows: Float[np.ndarray, "R D"]) -> UInt8[np.ndarray, " B"]:
    little = np.ascontiguousarray(rows, rows.dtype.newbyteorder("<"))
    return little.reshape(-1).view(np.uint8)


def read_shard(spec: CacheSpec, shard: int, data: bytes) -> Float[np.ndarray, "R D"]:
    """The rows of a shard's object, without a copy of more than its bytes; read-only.

    Args:
        spec: What the store holds.
        shard: The shard.
        data: Its object.

    Returns:
        [R, D] in the store's dtype.

    Raises:
        ValueError: The object has another length, or its CRC-32C is wrong.
    """
    expected = spec.shard_rows * spec.dim * np.dtype(spec.dtype).itemsize
    if len(data) != expected + 4:
        raise ValueError(f"{len(data)} bytes, expected {expected + 4}")
    if google_crc32c.value(data) != RESIDUE:  # a slice without the last four bytes would be a copy of all others
        stored, computed = int.from_bytes(data[-4:], "little"), google_crc32c.value(data[:-4])
        raise ValueError(f"stored CRC-32C {stored:08x}, computed {computed:08x}")
    rows = np.frombuffer(data, np.dtype(spec.dtype).newbyteorder("<"), count=expected // np.dtype(spec.dtype).itemsize)
    return rows.reshape(spec.shard_rows, spec.dim)[: len(spec.rows_of(shard))].astype(spec.dtype, copy=False)


def label_values(spec: CacheSpec, pieces: Iterable[bytes], classes: int) -> Int[np.ndarray, " N"]:
    """The labels of the ``label`` array's object, which is not held whole.

    Args:
        spec: What the store holds.
        pieces: The object's bytes.
        classes: How many classes there should be; labels may be larger.

    Returns:
        [N] in the smallest signed integers that hold the classes and the labels.

    Raises:
        ValueError: The object has another length, or its CRC-32C is wrong.
    """
    values = np.empty(spec.items, np.min_scalar_type(-max(classes, 1)))
    done, crc, rest = 0, 0, b""
    for piece in pieces:
        data = rest + piece
        count = min(len(data) // 8, spec.items - done)
        part, rest = np.frombuffer(data, "<i8", count=count), data[8 * count :]
        crc = google_crc32c.extend(crc, data[: 8 * count])
        if count:
            # ~x is -x - 1, the negative number that needs as many bits.
            needed = np.min_scalar_type(min(int(part.min()), ~int(part.max()), -1))
            values = values.astype(np.promote_types(values.dtype, needed), copy=False)
        values[done : done + count] = part
        done += count
    if done != spec.items or len(rest) != 4 or int.from_bytes(rest, "little") != crc:
        raise ValueError(f"{8 * done + len(rest)} bytes, expected {spec.items * 8 + 4} and a right CRC-32C")
    return values


def valid_object(spec: CacheSpec, valid: UInt8[np.ndarray, " N"]) -> memoryview:
    """The object of the ``valid`` array."""
    assert valid.shape == (spec.items,)
    return _vector(valid)


def _vector(values: np.ndarray) -> memoryview:
    """The one chunk of an array of one number per row, as zarr writes it but without copies: numbers and CRC-32C."""

    def write(file: IO[bytes]) -> None:
        checksum = 0
        for start in range(0, len(values), _ROWS):
            part = values[start : start + _ROWS].tobytes()
            checksum = google_crc32c.extend(checksum, part)
            file.write(part)
        file.write(checksum.to_bytes(4, "little"))

    stored = mapped.written(write)
    mapped.release(values)
    return stored


def _in_memory(spec: CacheSpec, attributes: dict[str, Any]) -> tuple[dict[str, Buffer], dict[str, zarr.Array[Any]]]:
    objects: dict[str, Buffer] = {}
    group = zarr.create_group(store=MemoryStore(objects), attributes=attributes, zarr_format=3)
    shared: dict[str, Any] = {
        "filters": None,
        "compressors": [Crc32cCodec()],
        "config": {"write_empty_chunks": True},
    }
    vector = {"shape": (spec.items,), "chunks": (spec.items,), **shared}
    arrays = {
        "embeddings": group.create_array(
            "embeddings",
            shape=(spec.items, spec.dim),
            chunks=(spec.shard_rows, spec.dim),
            dtype=spec.dtype,
            fill_value=math.nan,
            **shared,
        ),
        "label": group.create_array("label", dtype="int64", fill_value=-1, **vector),
        "valid": group.create_array("valid", dtype="uint8", fill_value=MISSING, **vector),
    }
    return objects, arrays
