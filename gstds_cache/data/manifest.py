"""The ordered manifest: which items, in which order, with which bytes and labels. Its root is a data set's identity."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import IO

import numpy as np
import pyarrow as pa
from jaxtyping import Int64, UInt8

from gstds_cache.data.hash_cache import HashCache
from gstds_cache.data.item_hashes import HASH_THREADS, hash_items
from gstds_cache.data.names import AT_ONCE, Names
from gstds_cache.data.source import ImageSource
from gstds_cache.errors import IntegrityError
from gstds_cache.files import mapped
from gstds_cache.files.digest import merkle_root
from gstds_cache.runtime.executor import Executor
from gstds_cache.runtime.progress import Counted

_RECORDS = 1 << 16
_SCHEMA = pa.schema(
    [
        pa.field("id", pa.utf8(), nullable=False),
        pa.field("sha256", pa.binary(32), nullable=False),
        pa.field("label", pa.int64(), nullable=False),
    ]
)


@dataclass(frozen=True, eq=False)
class DatasetManifest:
    """What was in a data set, in order. Compare two by their ``root``.

    Attributes:
        kind: The source's kind, e.g. ``imagefolder``; provenance, and no part of the root.
        ids: Name of every item.
        sha256: [N, 32] SHA-256 of every item's bytes, or ``UNREADABLE``.
        labels: [N] class index of every item, -1 where there is none.
        classes: Class names by label; provenance, and no part of the root.
    """

    kind: str
    ids: Sequence[str]
    sha256: UInt8[np.ndarray, "N 32"]
    labels: Int64[np.ndarray, " N"]
    classes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        rows = len(self.ids)
        if self.sha256.shape != (rows, 32) or self.labels.shape != (rows,):
            raise ValueError(
                f"manifest of {rows} ids: got sha256 {self.sha256.shape} and labels {self.labels.shape}, "
                f"expected {(rows, 32)} and {(rows,)}"
            )

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def root(self) -> str:
        """Merkle root over the items in order, as 64 hexadecimal digits.

        A leaf is the id's length in UTF-8 bytes (8 bytes, big-endian), the id, the item's SHA-256 (32 bytes) and the
        label (8 bytes, big-endian, signed). Order, names, content and labels all change it; kind and paths do not.
        """
        return merkle_root(self._leaves())

    def roots_without_hashes(self) -> tuple[str, str]:
        """The roots that these items have where what their bytes hash to is not known: with their labels, and without.

        Vectors that were imported without their data set are of items that are known so.
        """
        unknown, none = mapped.zeros(self.sha256.shape, np.uint8), mapped.zeros(self.labels.shape, np.int64)
        none[:] = -1
        with_labels, without = (replace(self, sha256=unknown, labels=labels) for labels in (self.labels, none))
        return with_labels.root, without.root

    def _leaves(self) -> Iterator[bytes]:
        names = Names.of(self.ids, "strict")
        for start in range(0, len(self), AT_ONCE):
            part = slice(start, start + AT_ONCE)
            digests, labels = self.sha256[part].tobytes(), self.labels[part].astype(">i8").tobytes()
            for row, name in enumerate(names.encoded(part.start, part.stop)):
                yield (
                    len(name).to_bytes(8, "big")
                    + name
                    + digests[32 * row : 32 * row + 32]
                    + labels[8 * row : 8 * row + 8]
                )
            mapped.release(self.sha256, self.labels, names.file)

    def to_arrow(self) -> memoryview:
        """Serialise to an Arrow IPC file: columns ``id``, ``sha256``, ``label``; kind and classes in the metadata.

        Returns:
            The file's bytes, mapped; the same for the same manifest and pyarrow version.
        """
        schema = _SCHEMA.with_metadata(
            {"kind": self.kind, "classes": json.dumps(list(self.classes), ensure_ascii=False)}
        )

        names = Names.of(self.ids, "strict")

        def write(file: IO[bytes]) -> None:
            with pa.ipc.new_file(file, schema) as writer:
                for start in range(0, max(len(self), 1), _RECORDS):
                    part = slice(start, start + _RECORDS)
                    arrays = list(names.arrays(part.start, part.stop))
                    digests = np.ascontiguousarray(self.sha256[part])
                    columns = [
                        pa.concat_arrays(arrays or [pa.array([], pa.binary())]).cast(pa.utf8()),
                        pa.FixedSizeBinaryArray.from_buffers(
                            pa.binary(32), len(digests), [None, pa.py_buffer(digests)]
                        ),
                        pa.array(self.labels[part]),
                    ]
                    writer.write_batch(pa.record_batch(columns, schema=schema))
                    mapped.release(self.sha256, self.labels, names.file)

        return mapped.written(write)

    @classmethod
    def from_arrow(cls, data: bytes | memoryview) -> DatasetManifest:
        """Read what :meth:`to_arrow` wrote.

        Args:
            data: The bytes of an Arrow IPC file.

        Returns:
            The manifest.

        Raises:
            IntegrityError: ``data`` is damaged, or is another kind of Arrow file.
        """
        try:
            table = pa.ipc.open_file(pa.BufferReader(data)).read_all()
            table.validate(full=True)
            table = table.cast(_SCHEMA.with_metadata(table.schema.metadata))
            metadata, batches = table.schema.metadata, [batch for batch in table.to_batches(AT_ONCE) if len(batch)]
            sha256, labels, done = mapped.zeros((len(table), 32), np.uint8), mapped.zeros((len(table),), np.int64), 0
            for batch in batches:
                part, digests = slice(done, done + len(batch)), batch["sha256"]
                # Without an object for each row: of a hundred million rows they took minutes.
                whole = np.frombuffer(digests.buffers()[1], np.uint8).reshape(-1, 32)
                sha256[part] = whole[digests.offset : digests.offset + len(digests)]
                labels[part] = batch["label"].to_numpy()
                done += len(batch)
                mapped.release(sha256, labels, memoryview(data))
            return cls(
                kind=metadata[b"kind"].decode(),
                ids=Names.of_arrays(batch["id"].cast(pa.binary()) for batch in batches),
                sha256=sha256,
                labels=labels,
                classes=tuple(json.loads(metadata[b"classes"])),
            )
        except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
            raise IntegrityError(
                f"the manifest of items is damaged: {error}, expected an Arrow file as written",
                hint="restore items.arrow from a copy, or embed the data set into a new store",
            ) from error


def build_manifest(
    source: ImageSource,
    *,
    hash_cache: HashCache | None = None,
    progress: Counted | None = None,
    threads: int = HASH_THREADS,
    executor: Executor | None = None,
) -> DatasetManifest:
    """Read and hash every item of a source.

    Args:
        source: The data set.
        hash_cache: Digests of files kept from before: a file that has not changed since is not opened.
        progress: Called with (items done, items in all) about every 100 items and at the end.
        threads: Threads that read and hash; hashing and file reads leave Python's lock.
        executor: Where items are read and hashed instead; None for this process.

    Returns:
        The manifest, in the source's order, with ``UNREADABLE`` for items whose bytes could not be read.
    """
    return DatasetManifest(
        kind=source.kind,
        ids=Names.of(source.ids, "strict"),
        sha256=hash_items(source, hash_cache=hash_cache, progress=progress, threads=threads, executor=executor),
        labels=source.labels,
        classes=tuple(source.classes),
    )
