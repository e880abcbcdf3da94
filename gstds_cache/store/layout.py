"""Format 1 on disk: names, and the bytes zarr itself would write under them.

::

    STORE/zarr.json          group; its attributes carry the specification
    STORE/embeddings/        [N, D] float16 or float32, one chunk (unit_rows, D) per unit, bytes + crc32c
    STORE/label/             [N] int64, -1 where there is none
    STORE/valid/             [N] uint8: 0 missing, 1 ok, 2 undecodable
    STORE/items.arrow        ordered item ids, SHA-256 of each item's bytes, labels
    STORE/receipts/U.json    one per committed unit
    STORE/COMPLETE.json      written last

Bytes are made by zarr on an in-memory store, then written by :mod:`gstds_cache.store.transport`: the format is zarr's
own, the durability ours.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import zarr
from jaxtyping import Float, Int64, UInt8
from zarr.codecs import Crc32cCodec
from zarr.core.buffer import Buffer
from zarr.storage import MemoryStore

from gstds_cache.store.spec import CacheSpec

GROUP = "zarr.json"
ITEMS = "items.arrow"
COMPLETE = "COMPLETE.json"
LABEL = "label/c/0"
VALID = "valid/c/0"
OWN_NAMES = frozenset({"zarr.json", "embeddings", "label", "valid", ITEMS, "receipts", COMPLETE})

MISSING, OK, UNDECODABLE = 0, 1, 2


def object_key(unit: int) -> str:
    """Key of a unit's one object."""
    return f"embeddings/c/{unit}/0"


def receipt_key(unit: int) -> str:
    """Key of a unit's receipt."""
    return f"receipts/{unit}.json"


def metadata_objects(spec: CacheSpec, attributes: dict[str, Any], labels: Int64[np.ndarray, " N"]) -> dict[str, bytes]:
    """Objects of a store with no unit yet: the ``zarr.json`` files and the labels; the group's comes last."""
    objects, arrays = _in_memory(spec, attributes)
    arrays["label"][:] = labels
    return {key: objects[key].to_bytes() for key in sorted(objects, key=lambda key: (key == GROUP, key))}


def unit_object(spec: CacheSpec, unit: int, rows: Float[np.ndarray, "R D"]) -> bytes:
    """A unit's object: the rows as one chunk, the last unit filled up with NaN."""
    objects, arrays = _in_memory(spec, {})
    span = spec.rows_of(unit)
    arrays["embeddings"][span.start : span.stop] = rows
    return objects[object_key(unit)].to_bytes()


def valid_object(spec: CacheSpec, valid: UInt8[np.ndarray, " N"]) -> bytes:
    """The object of the ``valid`` array."""
    objects, arrays = _in_memory(spec, {})
    arrays["valid"][:] = valid
    return objects[VALID].to_bytes()


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
            chunks=(spec.unit_rows, spec.dim),
            dtype=spec.dtype,
            fill_value=math.nan,
            **shared,
        ),
        "label": group.create_array("label", dtype="int64", fill_value=-1, **vector),
        "valid": group.create_array("valid", dtype="uint8", fill_value=MISSING, **vector),
    }
    return objects, arrays
