"""A local ``.npy`` copy of a store's rows, for exact random order over more rows than memory holds.

The rows are compared with the content hashes in the commit records after the copy is made, and again whenever the
file is not the one that was checked: another size, time or inode than noted beside it. A mirror that does not match is
made anew. It is derived: deleting it loses nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from gstds_cache.errors import IntegrityError, command_line
from gstds_cache.files.atomic import atomic_write, discard_leftovers
from gstds_cache.files.digest import canonical_json, sha256_hex
from gstds_cache.files.lock import exclusive
from gstds_cache.store.commit_record import CommitRecord, commits_root
from gstds_cache.store.spec import CacheSpec

ROWS, RECORD, LOCK = "embeddings.npy", "mirror.json", ".lock"


def open_mirror(
    folder: Path,
    spec: CacheSpec,
    commits: dict[int, CommitRecord],
    read: Callable[[int], Float[np.ndarray, "R D"]],
) -> Float[np.ndarray, "N D"]:
    """Map the mirror in ``folder``, making or renewing it if need be.

    Args:
        folder: Where it lies.
        spec: What the store holds.
        commits: All commit records of a whole store.
        read: Reads the rows of a shard from the store, checked.

    Returns:
        [N, D] in the store's dtype, memory-mapped and read-only.

    Raises:
        ChunkCorruptError: A shard of the store is damaged.
        IncompleteError: Another process is making the mirror.
        IntegrityError: The copy is not what the commit records tell of.
        OSError: It cannot be written.
    """
    identity = {"fingerprint": spec.fingerprint, spec.names.commits_sha256: commits_root(commits, spec.names)}
    path = folder / ROWS
    if _recorded(folder) != {**identity, "signature": _signature(path)}:
        try:
            _make(folder, spec, commits, read, identity)
        except OSError:
            if not _matches(path, spec, commits):
                raise
            # A mirror that may only be read, and whose record is of another copy, is checked each time.
    rows: Float[np.ndarray, "N D"] = np.load(path, mmap_mode="r")
    return rows


def _make(
    folder: Path,
    spec: CacheSpec,
    commits: dict[int, CommitRecord],
    read: Callable[[int], Float[np.ndarray, "R D"]],
    identity: dict[str, str],
) -> None:
    """Make the mirror, or find that what is there holds the rows, and record which file was checked.

    Raises:
        IntegrityError: The copy is not what the commit records tell of.
    """
    path = folder / ROWS
    folder.mkdir(parents=True, exist_ok=True)
    with exclusive(folder / LOCK, of=folder):
        if not _matches(path, spec, commits):
            discard_leftovers(path, alone=True)
            write_rows(path, spec, (read(shard) for shard in range(spec.shards)))
            if not _matches(path, spec, commits):
                raise IntegrityError(
                    f"{path} does not hold the rows that were written to it, or the store not those it was made of",
                    hint=f"check both with: {command_line('gstds-cache', 'verify', 'STORE', '--level', 'full')}",
                )
        # The record comes last: without it the file is checked again.
        with atomic_write(folder / RECORD, durable=False, leftovers="all") as file:
            file.write(canonical_json({**identity, "signature": _signature(path)}))


def write_rows(path: Path, spec: CacheSpec, blocks: Iterator[Float[np.ndarray, "R D"]]) -> None:
    """Write ``blocks``, which follow each other from row 0 to row N, as one durable ``.npy`` file."""
    with atomic_write(path, durable=True) as file:
        header = {"descr": np.lib.format.dtype_to_descr(np.dtype(spec.dtype)), "fortran_order": False}
        np.lib.format.write_array_header_1_0(file, {**header, "shape": (spec.items, spec.dim)})
        for block in blocks:
            file.write(np.ascontiguousarray(block).data)


def _matches(path: Path, spec: CacheSpec, commits: dict[int, CommitRecord]) -> bool:
    """Whether the file holds exactly the rows that the commit records tell of."""
    try:
        rows = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return False
    if rows.shape != (spec.items, spec.dim) or rows.dtype != np.dtype(spec.dtype):
        return False
    return all(
        sha256_hex(np.ascontiguousarray(rows[slice(*commit.rows)]).data) == commit.content_sha256
        for commit in commits.values()
    )


def _signature(path: Path) -> list[int]:
    try:
        stat = path.stat()
    except FileNotFoundError:
        return []
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def _recorded(folder: Path) -> dict[str, Any]:
    try:
        record = json.loads((folder / RECORD).read_bytes())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}
