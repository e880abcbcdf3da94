"""``webdataset:shards-{000000..000099}.tar``: samples of tar shards, in order, read by their place in the shard."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
from jaxtyping import Int64, UInt8
from PIL import Image

from gstds_cache.data.ahead import ReadAhead
from gstds_cache.data.containers import Container, if_same
from gstds_cache.data.decode import UndecodableError, decode_image
from gstds_cache.data.files import IMAGE_EXTENSIONS, MAX_BYTES, Files, printable
from gstds_cache.data.hash_cache import HashCache
from gstds_cache.data.hashed import require_same, require_unread_before
from gstds_cache.data.indexing import index_shards
from gstds_cache.data.labels import LabelColumn
from gstds_cache.data.members import LabelMember, image_members
from gstds_cache.data.names import Names, duplicate
from gstds_cache.data.shard_cache import ShardCache
from gstds_cache.data.shard_reading import LocalShards, Opened
from gstds_cache.data.shards import Shard, Shards, changed, find_shards, gone, signature_now
from gstds_cache.errors import DatasetError
from gstds_cache.files import mapped
from gstds_cache.files.bucket import ChangedError
from gstds_cache.files.fetch import Part
from gstds_cache.runtime.executor import Executor
from gstds_cache.runtime.resources import about_us


@dataclass(frozen=True, eq=False, kw_only=True)
class ShardSource:
    """Samples of tar shards. An item's payload is the bytes of its image member; none, where it has no image.

    Attributes:
        shards: The shards.
        first: [K + 1] the first row of each shard, and the number of rows.
        offset: [N] where each image begins in its shard.
        size: [N] its bytes; -1 for a sample without an image.
        containers: The shards, as what digests are kept of.
    """

    uri: str
    ids: Sequence[str] = field(repr=False)
    labels: Int64[np.ndarray, " N"] = field(repr=False)
    shards: Shards
    first: Int64[np.ndarray, " K"] = field(repr=False)
    offset: Int64[np.ndarray, " N"] = field(repr=False)
    size: Int64[np.ndarray, " N"] = field(repr=False)
    containers: Sequence[Container] = field(default=(), repr=False)
    classes: Sequence[str] = ()
    mirror_safe: bool = True
    notes: Sequence[str] = ()
    kind: str = "webdataset"
    hashed: UInt8[np.ndarray, "N 32"] | None = field(default=None, repr=False)
    reading: LocalShards | ReadAhead = field(init=False, repr=False)

    def __post_init__(self) -> None:
        bucket = self.shards.bucket
        reading = LocalShards(self.shards.shards) if bucket is None else ReadAhead(bucket, self._part)
        object.__setattr__(self, "reading", reading)

    @property
    def files(self) -> Files | None:
        """None: a shard holds many items."""
        return None

    def __repr__(self) -> str:
        return f"ShardSource({self.uri!r}, {len(self)} items in {len(self.shards.shards)} shards)"

    def __len__(self) -> int:
        return len(self.ids)

    def expect(self, rows: Sequence[int]) -> None:
        """Ask a bucket for what will be read next."""
        if isinstance(self.reading, ReadAhead):
            self.reading.expect(rows)

    def payload(self, row: int) -> bytes:
        """The image member of sample ``row``; no bytes where it has none.

        Raises:
            IntegrityError: The shard is gone, or another than when it was indexed or hashed.
            StoreUnavailableError: The bucket does not answer.
        """
        data = self._data(row) if self.size[row] > 0 else b""
        require_same(self, row, data)
        return data

    def _data(self, row: int) -> bytes:
        if isinstance(self.reading, LocalShards):
            return self.reading.read(self._shard(row), int(self.offset[row]), int(self.size[row]))
        shard = self.shards.shards[self._shard(row)]
        try:
            data = self.reading.take(row)
        except ChangedError as error:
            raise changed(shard) from error
        except FileNotFoundError as error:
            raise gone(shard) from error
        if len(data) < self.size[row]:
            raise changed(shard)
        return data

    def image(self, row: int) -> Image.Image:
        """The image of sample ``row`` in RGB.

        Raises:
            UndecodableError: The sample has no image, one of more than ``MAX_BYTES``, or one that cannot be decoded.
            IncompleteError: It cannot be read, and could when it was hashed.
            IntegrityError: The shard is gone, or another than when it was indexed or hashed.
            OSError: This process may open no more files.
        """
        size = int(self.size[row])
        if size < 0:
            raise UndecodableError("no image in the sample")
        if size > MAX_BYTES:
            raise UndecodableError(f"too large a file: {size} bytes, at most {MAX_BYTES} are decoded")
        try:
            data = self.payload(row)
        except OSError as error:
            if about_us(error) or isinstance(error, ConnectionError):
                raise
            require_unread_before(self, row, error)
            raise UndecodableError(f"unreadable: {error.strerror or type(error).__name__}") from None
        return decode_image(data)

    def as_hashed(self, sha256: UInt8[np.ndarray, "N 32"] | None) -> ShardSource:
        """The same samples, compared with their hashes (:func:`gstds_cache.data.hashed.as_hashed`)."""
        return replace(self, hashed=sha256)

    def _shard(self, row: int) -> int:
        return int(np.searchsorted(self.first, row, side="right")) - 1

    def _part(self, row: int) -> Part:
        shard = self.shards.shards[self._shard(row)]
        return Part(shard.name, int(self.offset[row]), max(int(self.size[row]), 0), shard.etag)


def open_webdataset(
    uri: str, target: str, params: Mapping[str, str], hash_cache: HashCache, executor: Executor | None = None
) -> ShardSource:
    """Open tar shards as the webdataset library, img2dataset, clip-retrieval and NeMo Curator write them.

    A sample is the members that follow each other with one key (:mod:`gstds_cache.data.tar_index`); row i is sample i,
    shard after shard. Its id is the key, or SHARD/KEY for all where a key occurs in more than one shard. Its image is
    the one member with an image's extension; one like ``seg.png`` counts where there is no plain one. A sample without
    an image is an item that cannot be decoded. Its label: see :class:`gstds_cache.data.members.LabelMember`.

    Each shard is indexed once, and read whole for that where it is in a bucket; then it is read where an image lies.

    Args:
        uri: The data set as the user named it.
        target: Which shards (:func:`gstds_cache.data.shards.find_shards`).
        params: ``image``, extensions in the order of preference, e.g. ``jpg;png``; and ``label``.
        hash_cache: Beside it the indices are kept; digests of images that were read meanwhile go there.
        executor: Where shards are indexed; None for this process.

    Returns:
        The source.

    Raises:
        UsageError: A name or parameter cannot be meant.
        DatasetError: A shard is not there, is damaged or was cut off, a sample has several images, a key occurs twice
            in one shard, or there is no image at all.
        StoreUnavailableError: The bucket does not answer.
    """
    shards = find_shards(uri, target)
    label = LabelMember.parse(uri, params.get("label"))
    images, cache = _preferred(params.get("image")), ShardCache(hash_cache.folder)
    table = _Table(uri, shards, images, label, hash_cache)
    for opened in index_shards(uri, shards, label, cache, executor):
        table.add(opened)
    return table.source(cache)


def _preferred(image: str | None) -> tuple[str, ...]:
    """Extensions of ``image=jpg;png``, in the order of preference; none asks the shards."""
    return tuple(part.strip().lstrip(".").lower() for part in image.replace(",", ";").split(";")) if image else ()


class _Table:
    """The rows of all shards, as one is added after the other."""

    def __init__(
        self, uri: str, shards: Shards, images: tuple[str, ...], label: LabelMember, hash_cache: HashCache
    ) -> None:
        self._uri, self._shards, self._images, self._label = uri, shards, images, label
        self._hash_cache = hash_cache
        self._parts: list[tuple[np.ndarray, np.ndarray, Names, bytes]] = []
        self._ignored: dict[str, int] = {}
        self._extensions: set[str] = set()
        self._without = 0

    def add(self, opened: Opened) -> None:
        """Take in a shard."""
        index, shard = opened.index, opened.shard
        chosen = image_members(index, self._images, f"data set {self._uri!r}, shard {printable(shard.where)}")
        there = chosen >= 0
        offset, size = mapped.zeros((len(index),), np.int64), mapped.zeros((len(index),), np.int64)
        offset[there], size[:] = index.offset[chosen[there]], -1
        size[there] = index.size[chosen[there]]
        keys = Names.of(printable(key.decode("utf-8", "surrogateescape")) for key in index.all_keys())
        self._parts.append((offset, size, keys, opened.labels))
        # Of an extension that image= names and that is no image's, nothing was hashed in passing.
        if opened.digests and len(index) and np.isin(chosen[there], list(opened.digests)).all():
            self._keep(opened, chosen)
        for kind, count in index.ignored.items():
            self._ignored[kind] = self._ignored.get(kind, 0) + count
        self._extensions.update(index.extensions)
        self._without += len(index) - int(there.sum())

    def _keep(self, opened: Opened, chosen: np.ndarray) -> None:
        """Keep the digests of a shard that was read whole."""
        digests = mapped.zeros((len(chosen), 32), np.uint8)
        for sample, member in enumerate(chosen.tolist()):
            digest = opened.digests[member] if member >= 0 else hashlib.sha256().digest()
            digests[sample] = np.frombuffer(digest, np.uint8)
        container = _Containers((opened.shard,), np.array([0, len(chosen)]), self._what)[0]
        self._hash_cache.record_contained(container.name, opened.shard.signature, digests)

    @property
    def _what(self) -> str:
        return ";".join(self._images) or "auto " + " ".join(IMAGE_EXTENSIONS)  # of which a package may add some

    def source(self, cache: ShardCache) -> ShardSource:
        """The data set."""
        first = np.cumsum([0, *(len(part[2]) for part in self._parts)], dtype=np.int64)
        rows = int(first[-1])
        if self._without == rows:
            raise self._no_image(rows)
        ids, prefixed = self._ids(first)
        offset, size = mapped.zeros((rows,), np.int64), mapped.zeros((rows,), np.int64)
        for place, part in enumerate(self._parts):
            there = slice(int(first[place]), int(first[place + 1]))
            offset[there], size[there] = part[0], part[1]
        column = LabelColumn(rows, self._uri, lambda row: f"sample {ids[row]!r} (row {row})")
        labels = column.read(value for part in self._parts for value in json.loads(part[3]))
        for array in (offset, size, labels):
            mapped.release(array)
        return ShardSource(
            uri=self._uri,
            ids=ids,
            labels=labels,
            shards=self._shards,
            first=first,
            offset=offset,
            size=size,
            containers=_Containers(self._shards.shards, first, self._what),
            classes=column.classes,
            notes=(*self._notes(rows, prefixed, labels), *column.notes, *cache.notes),
        )

    def _ids(self, first: np.ndarray) -> tuple[Names, str]:
        """The ids, and a key that several shards have, for which all of them are prefixed by the shard.

        Raises:
            DatasetError: A shard has a key twice.
        """
        ids = self._parts[0][2] if len(self._parts) == 1 else Names.of(key for part in self._parts for key in part[2])
        twice = duplicate(ids)
        if twice is None:
            return ids, ""
        stems = self._shards.stems()
        ids = Names.of(f"{stem}/{key}" for stem, part in zip(stems, self._parts, strict=True) for key in part[2])
        again = duplicate(ids)
        if again is not None:
            rows = [row for row, name in enumerate(ids) if name == again]
            place = int(np.searchsorted(first, rows[1], side="right")) - 1
            raise DatasetError(
                f"data set {self._uri!r}, shard {printable(self._shards.shards[place].where)}: got the key "
                f"{again.removeprefix(stems[place] + '/')!r} for two samples of it, expected members of one sample one "
                "after the other, and a key of its own for each",
                hint="write the shard again with webdataset's TarWriter; a shard must not be named twice",
            )
        return ids, twice

    def _notes(self, rows: int, prefixed: str, labels: np.ndarray) -> Iterator[str]:
        if prefixed:
            yield f"ids are SHARD/KEY: the key {prefixed!r} is in more than one shard"
        if self._without:
            yield f"{self._without:,} of {rows:,} samples have no image; they are items that cannot be decoded"
        if self._ignored:
            kinds = ", ".join(f"{count:,} {kind}" for kind, count in sorted(self._ignored.items()))
            yield f"ignored in the shards: {kinds}"
        yield from self._label.notes(self._extensions, labelled=bool((labels >= 0).any()))

    def _no_image(self, rows: int) -> DatasetError:
        there = ", ".join(sorted(self._extensions)[:12]) or "none"
        wanted = " or ".join(self._images) or "an image"
        return DatasetError(
            f"data set {self._uri!r}: got {rows:,} samples of which none has {wanted}; the members' extensions are "
            f"{there}",
            hint="say which is the image: image=EXTENSION",
        )


class _Containers(Sequence[Container]):
    """The shards as containers, each made when it is asked for."""

    def __init__(self, shards: Sequence[Shard], first: np.ndarray, what: str) -> None:
        self._shards, self._first, self._what = shards, first, what

    def __len__(self) -> int:
        return len(self._shards)

    def __getitem__(self, place: int) -> Container:  # type: ignore[override]
        shard = self._shards[place]
        rows = range(int(self._first[place]), int(self._first[place + 1]))
        now = partial(if_same, shard.signature, partial(signature_now, shard))
        return Container(f"{shard.where}\0images {self._what}", rows, now)
