"""Tar shards by pattern, on this machine or in a bucket: ``shards-{000000..000099}.tar``, ``*.tar``, or a folder."""

from __future__ import annotations

import glob
import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import product
from pathlib import Path

from gstds_cache.data.containers import Signature
from gstds_cache.data.files import printable
from gstds_cache.data.hash_cache import signature_of
from gstds_cache.errors import DatasetError, IntegrityError, UsageError
from gstds_cache.files.bucket import Bucket, Entry
from gstds_cache.files.location import Location, local_file

MOST = 1_000_000
"""Shards that a pattern may name; more is a slip of the keyboard."""
EXPECTED = "expected a tar file, a folder of them, or a pattern: shards-{000000..000099}.tar, shards-*.tar"

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_MAGIC = re.compile(r"[*\[]")  # a name of a data set has no question mark: its query begins there
_BUCKET = re.compile(r"s3://([A-Za-z0-9][A-Za-z0-9._-]{1,254})/(.*)", re.I)


@dataclass(frozen=True)
class Shard:
    """One tar archive.

    Attributes:
        name: An absolute path, or an object's name below the bucket's location.
        where: How it is named to the user, and in caches: an absolute path, or ``s3://...``.
        signature: What it had when it was found.
        etag: The object's version; empty for a file.
    """

    name: str
    where: str
    signature: Signature
    etag: str = ""

    @property
    def size(self) -> int:
        """Bytes of the archive."""
        return self.signature[0]


@dataclass(frozen=True)
class Shards:
    """The shards of a data set, in order.

    Attributes:
        shards: Each of them.
        bucket: Where they are; None for files.
    """

    shards: tuple[Shard, ...] = field(repr=False)
    bucket: Bucket | None = None

    def stems(self) -> list[str]:
        """The shards' names without ``.tar``, as far as they differ: the folder that all of them lie in is left out."""
        parts = [shard.where.split("/") for shard in self.shards]
        shared = len(os.path.commonprefix([folders for *folders, _ in parts]))  # noqa: RUF071 - of lists of names
        return [printable("/".join(names[shared:]).removesuffix(".tar")) for names in parts]


def find_shards(uri: str, target: str) -> Shards:
    """Find the shards that ``target`` names.

    Braces are expanded first, in the order they are written: ``{000000..000099}`` counts, ``{train,val}`` lists. What
    ``*`` and ``[]`` match is sorted by bytes, and so are the archives of a folder.

    Args:
        uri: The data set as the user named it.
        target: A path, ``file:///path`` or ``s3://bucket/name``, with braces and wildcards.

    Returns:
        The shards, one at least.

    Raises:
        UsageError: ``target`` is empty, has a range that is none, or wildcards in the folders of a bucket.
        DatasetError: A shard is not there, or none is.
    """  # noqa: DOC501
    if not target:
        raise UsageError(f"data set {uri!r}: got no shards, {EXPECTED}", hint="e.g. webdataset:shards-{000000..9}.tar")
    names = list(_expanded(uri, target))
    if target[:5].lower() == "s3://":
        return _in_bucket(uri, names)
    paths = map(os.path.abspath, _on_disk(uri, names))  # a worker elsewhere has another current folder
    shards = [Shard(path, path, signature_of(path)) for path in paths]
    for shard in shards:
        if shard.signature[0] < 0 or not os.path.isfile(shard.name):  # noqa: PTH113
            got = "no file" if os.path.exists(shard.name) else "nothing there"  # noqa: PTH110
            raise _missing(uri, shard.where, got, len(shards))
    return Shards(tuple(shards))


def _expanded(uri: str, pattern: str) -> Iterator[str]:
    """The names that a pattern's braces stand for.

    Yields:
        One after the other.

    Raises:
        UsageError: They are too many, or a range goes backwards.
    """
    pieces: list[list[str]] = []
    at, count = 0, 1
    for match in _BRACES.finditer(pattern):
        inner = match[1]
        numbers = _RANGE.fullmatch(inner)
        if numbers:
            first, last = int(numbers[1]), int(numbers[2])
            if first > last:
                raise UsageError(f"data set {uri!r}: got the range {match[0]}, expected one that counts upwards")
            count *= last - first + 1
            width = len(numbers[1]) if numbers[1][0] == "0" or len(numbers[1]) == len(numbers[2]) else 0
            choices = [f"{number:0{width}d}" for number in range(first, last + 1)] if count <= MOST else []
        elif "," in inner:
            choices = inner.split(",")
            count *= len(choices)
        else:
            choices = [match[0]]  # not a pattern: a name may have braces
        if count > MOST:
            raise UsageError(f"data set {uri!r}: names more than {MOST:,} shards, expected fewer")
        pieces += [[pattern[at : match.start()]], choices]
        at = match.end()
    for chosen in product(*pieces, [pattern[at:]]):
        yield "".join(chosen)


def _on_disk(uri: str, names: list[str]) -> Iterator[str]:
    """The files that names without braces stand for.

    Yields:
        Each path.

    Raises:
        DatasetError: A pattern or folder has no archive.
    """
    for name in names:
        path = str(local_file(name, f"data set {uri!r}"))
        if os.path.isdir(path):  # noqa: PTH112
            found = [str(file) for file in Path(path).glob("*.tar") if not file.name.startswith(".")]
        elif _MAGIC.search(path) and not os.path.exists(path):  # noqa: PTH110
            found = glob.glob(path)  # noqa: PTH207 - Path's takes no absolute pattern
        else:
            yield path
            continue
        if not found:
            raise DatasetError(f"data set {uri!r}: {printable(path)} has no .tar file, {EXPECTED}")
        yield from sorted(found, key=os.fsencode)


def _in_bucket(uri: str, names: list[str]) -> Shards:
    """Shards that are objects: each folder is listed once.

    Raises:
        UsageError: A name is no object's.
        DatasetError: A shard is not there.
    """  # noqa: DOC501
    found: list[Shard] = []
    matches = [_BUCKET.fullmatch(name) for name in names]
    buckets = {match[1] for match in matches if match}
    if None in matches or len(buckets) != 1:
        raise UsageError(
            f"data set {uri!r}: got shards in {len(buckets)} buckets, expected s3://bucket/prefix/shards-{{..}}.tar"
        )
    name = buckets.pop()
    bucket = Bucket(Location(None, name), "data sets")
    listed: dict[str, dict[str, Entry]] = {}
    for match in matches:
        assert match is not None
        folder, slash, last = match[2].rpartition("/")
        if _MAGIC.search(folder):
            raise UsageError(f"data set {uri!r}: got wildcards in a folder of a bucket, expected them in the last part")
        if folder not in listed:
            listed[folder] = {entry.path: entry for entry in bucket.folder(folder)}
        there = listed[folder]
        wanted = [match[2]]
        if not last or _MAGIC.search(last):
            pattern = folder + slash + (last or "*.tar")
            hidden = f"{folder}{slash}."  # passed over as on disk, unless the pattern asks for them
            matched = (path for path in there if fnmatchcase(path, pattern))
            wanted = sorted(
                (path for path in matched if last.startswith(".") or not path.startswith(hidden)), key=str.encode
            )
            if not wanted:
                raise DatasetError(
                    f"data set {uri!r}: s3://{name}/{folder} has no object {last or '*.tar'}, {EXPECTED}"
                )
        for path in wanted:
            if path not in there:
                raise _missing(uri, f"s3://{name}/{path}", "no such object", len(names))
            found.append(_object(there[path], f"s3://{name}/{path}"))
    return Shards(tuple(found), bucket)


def object_signature(entry: Entry) -> Signature:
    """What tells versions of an object apart: size and etag; where there is no etag, size and time."""
    if not entry.etag:
        return entry.size, int(entry.changed * 1e9), 0, 0
    # An etag changes with the content, however soon: no time is needed, and none that could be too recent.
    mark = hashlib.sha256(f"{entry.etag} {entry.changed}".encode()).digest()
    return entry.size, 0, 0, int.from_bytes(mark[:8], "big") >> 1


def _object(entry: Entry, where: str) -> Shard:
    return Shard(entry.path, where, object_signature(entry), entry.etag)


def _missing(uri: str, where: str, got: str, count: int) -> DatasetError:
    folder = where.startswith("s3://") and not where.endswith(".tar")
    return DatasetError(
        f"data set {uri!r}: shard {printable(where)}: got {got}, expected a tar file"
        + (f"; it is one of {count:,} that the pattern names" if count > 1 else ""),
        hint=f"end a folder of a bucket with /: {printable(where)}/"
        if folder
        else "check the numbers in the braces, or download what is missing",
    )


def signature_now(shard: Shard) -> Signature:
    """The signature of a shard now; of an object, what the listing said."""
    return shard.signature if shard.etag or shard.where.startswith("s3://") else signature_of(shard.name)


def changed(shard: Shard) -> IntegrityError:
    """The error of a shard that is another than when it was indexed."""
    return IntegrityError(
        f"tar shard {printable(shard.where)}: changed since it was indexed, expected the archive that was there then",
        hint="nothing committed is lost: leave shards as they are while they are read, and run the same command again. "
        "With other images or labels it is another data set, and needs another store",
    )


def gone(shard: Shard) -> IntegrityError:
    """The error of a shard that is there no longer."""
    return IntegrityError(
        f"tar shard {printable(shard.where)}: is there no longer, expected the archive that was indexed",
        hint="nothing committed is lost: put it back, and run the same command again",
    )
