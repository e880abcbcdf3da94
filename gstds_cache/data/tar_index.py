"""Where the members of a tar archive lie, and which of them are one sample, as the webdataset library groups them.

A member is ``KEY.EXTENSION``: the key ends before the first dot of the file's name, and members that follow each other
with one key are one sample. Names are read in all the ways that writers spell them: POSIX's prefix, GNU's long names
and PAX records. The headers are read one after the other, members are passed over, so that indexing a local archive
reads a few kilobytes of each; an archive that comes as a stream is read whole, and its images are hashed on the way.

Differs from Python's tarfile in that every header's checksum is verified and a missing end is an error: an archive that
was cut off is told from a whole one, wherever it was cut.
"""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Int64, UInt8, UInt16

BLOCK = 512
WINDOW = 1 << 14
"""Bytes that are read at a time: headers of many small members, without much of a large one."""
MOST_NAME = 1 << 20
"""Bytes that a long name may have; more is damage."""

_REGULAR = b"0\x007"
_AFTER_END = 1 << 14
"""Bytes after an archive's end that are looked at: what follows there when two archives were joined by ``cat``."""
_CHECKED = 4096
"""Headers whose checksums are verified at a time."""
_KINDS = {b"1": "links", b"2": "links", b"3": "devices", b"4": "devices", b"5": "folders", b"6": "pipes"}

ReadAt = Callable[[int, int], bytes]
"""Bytes of the archive: from an offset, so many; fewer where it ends."""


class TarError(ValueError):
    """What is wrong with an archive, in words that follow its name."""


@dataclass(eq=False)
class TarIndex:
    """The members of one archive, by sample.

    Attributes:
        keys: The samples' keys, joined.
        ends: [S] where each key ends in ``keys``.
        sample: [M] which sample each member belongs to.
        extension: [M] its extension: a place in ``extensions``.
        offset: [M] where its bytes begin in the archive.
        size: [M] how many they are.
        extensions: Every extension that occurs, in lower case and without the first dot, e.g. ``jpg`` or ``seg.png``.
        ignored: How many entries were passed over, by kind.
    """

    keys: bytes
    ends: Int64[np.ndarray, " S"]
    sample: Int64[np.ndarray, " M"]
    extension: UInt16[np.ndarray, " M"]
    offset: Int64[np.ndarray, " M"]
    size: Int64[np.ndarray, " M"]
    extensions: tuple[str, ...]
    ignored: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ends)

    def key(self, sample: int) -> bytes:
        """The key of a sample."""
        return self.keys[int(self.ends[sample - 1]) if sample else 0 : int(self.ends[sample])]

    def all_keys(self) -> Iterator[bytes]:
        """The keys of all samples.

        Yields:
            One after the other.
        """
        start = 0
        for end in self.ends.tolist():
            yield self.keys[start:end]
            start = end

    def to_bytes(self) -> bytes:
        """Serialise; :meth:`from_bytes` reads it."""
        about = {"extensions": self.extensions, "ignored": self.ignored, "keys": len(self.keys)}
        head = json.dumps(about | {"samples": len(self.ends), "members": len(self.sample)}).encode()
        arrays = (self.ends, self.sample, self.offset, self.size, self.extension)
        return b"".join([len(head).to_bytes(8, "little"), head, *(part.tobytes() for part in arrays), self.keys])

    @classmethod
    def from_bytes(cls, data: bytes) -> TarIndex:
        """Read what :meth:`to_bytes` gave.

        Args:
            data: Its bytes.

        Returns:
            The index; its arrays are views of ``data``.

        Raises:
            ValueError: It is something else.
        """
        at = 8 + int.from_bytes(data[:8], "little")
        about = json.loads(data[8:at])
        samples, members = about["samples"], about["members"]
        if len(data) != at + 8 * samples + 26 * members + about["keys"]:
            raise ValueError("an index of another length")
        parts = []
        for count, kind in ((samples, "<i8"), (members, "<i8"), (members, "<i8"), (members, "<i8"), (members, "<u2")):
            parts.append(np.frombuffer(data, kind, count, at))
            at += parts[-1].nbytes
        ends, sample, offset, size, extension = parts
        return cls(data[at:], ends, sample, extension, offset, size, tuple(about["extensions"]), about["ignored"])


class TarScan:
    """One pass over an archive.

    Attributes:
        index: What was found, once :meth:`run` is done.
        contents: Content of the members whose extension ``wanted`` names, by member.
        digests: SHA-256 of the members that ``hashed`` names, by member.
    """

    def __init__(
        self,
        read_at: ReadAt,
        size: int,
        *,
        wanted: Callable[[str], bool] = lambda _: False,
        hashed: Callable[[str], bool] = lambda _: False,
    ) -> None:
        """Prepare it.

        Args:
            read_at: Gives bytes of the archive, at offsets that only grow but for what was given last.
            size: Bytes of the archive.
            wanted: Whether the content of members with an extension is to be kept.
            hashed: Whether members with an extension are to be hashed.
        """
        self._read_at, self._archive = read_at, size
        self._wanted, self._hashed = wanted, hashed
        self.contents: dict[int, bytes] = {}
        self.digests: dict[int, bytes] = {}
        self._keys, self._ends = bytearray(), array("q")
        self._sample, self._extension = array("q"), array("H")
        self._offset, self._size = array("q"), array("q")
        self._extensions: dict[str, int] = {}
        self._ignored: Counter[str] = Counter()
        self._key: bytes | None = None
        self._of_key: set[int] = set()
        self._unchecked: list[bytes] = []
        self._headers: list[int] = []
        self.index = self._done()

    def run(self) -> TarScan:
        """Go through the archive.

        Returns:
            This scan.

        Raises:
            TarError: It is damaged, cut off, compressed or no tar archive, or has two members of one name.
        """
        offset, size, name = 0, -1, b""
        window, begins = b"", 0
        while True:
            at = offset - begins
            if at < 0 or at + BLOCK > len(window):
                window, begins, at = self._read_at(offset, WINDOW), offset, 0
            header = window[at : at + BLOCK]
            if len(header) < BLOCK or header[:1] == b"\0":
                self._require_end(header, offset)
                break
            self._unchecked.append(header)
            self._headers.append(offset)
            if len(self._unchecked) == _CHECKED:
                self._check()
            content = offset + BLOCK
            own = self._number(header[124:136], offset)
            kind = header[156:157]
            member_size = own if size < 0 or kind not in _REGULAR else size
            offset = content + (member_size + BLOCK - 1) // BLOCK * BLOCK
            if offset > self._archive or own < 0:
                self._check()
                raise TarError(self._cut(content, member_size))
            if kind in b"xgLKXN":
                if kind in b"xXL":
                    name, size = self._long(kind, content, own, name, size)
                continue
            full = name or _name(header)
            name, size = b"", -1
            if kind in _REGULAR and not full.endswith(b"/"):
                self._member(full, content, member_size, window[at + BLOCK : at + BLOCK + member_size])
            else:
                self._ignored[_KINDS.get(kind, "folders" if full.endswith(b"/") else "entries of another kind")] += 1
        self._check()
        self.index = self._done()
        return self

    def _done(self) -> TarIndex:
        return TarIndex(
            bytes(self._keys),
            np.array(self._ends, np.int64),
            np.array(self._sample, np.int64),
            np.array(self._extension, np.uint16),
            np.array(self._offset, np.int64),
            np.array(self._size, np.int64),
            tuple(self._extensions),
            dict(self._ignored),
        )

    def _member(self, full: bytes, offset: int, size: int, content: bytes) -> None:
        """Take in a regular file; ``content`` is what of it was read already.

        Raises:
            TarError: There is another of that name.
        """
        slash = full.rfind(b"/") + 1
        dot = full.find(b".", slash)
        if dot <= slash or (full.startswith(b"__") and _is_meta(full)):
            self._ignored["files without an extension" if dot <= slash else "files of metadata"] += 1
            return
        key, extension = full[:dot], full[dot + 1 :].lower().decode("utf-8", "surrogateescape")
        code = self._extensions.get(extension)
        if code is None:
            code = self._extensions[extension] = len(self._extensions)
            if code > np.iinfo(np.uint16).max:
                raise TarError("has more than 65,536 different extensions, expected files named KEY.EXTENSION")
        if key != self._key:
            self._keys += key
            self._ends.append(len(self._keys))
            self._key, self._of_key = key, set()
        if code in self._of_key:
            name = full.decode("utf-8", "backslashreplace")
            raise TarError(f"has the member {name!r} twice, expected each once")
        self._of_key.add(code)
        member = len(self._sample)
        self._sample.append(len(self._ends) - 1)
        self._extension.append(code)
        self._offset.append(offset)
        self._size.append(size)
        wanted, hashed = self._wanted(extension), self._hashed(extension)
        if wanted or hashed:
            content = content if len(content) == size else self._content(offset, size)
            if wanted:
                self.contents[member] = content
            if hashed:
                self.digests[member] = hashlib.sha256(content).digest()

    def _long(self, kind: bytes, offset: int, size: int, name: bytes, known: int) -> tuple[bytes, int]:
        """Name and size of the next member, from an entry that holds them.

        Raises:
            TarError: It holds something else.
        """
        if size > MOST_NAME:
            raise TarError(f"has a name of {size} bytes at byte {offset}: it is damaged there")
        data = self._content(offset, size)
        if kind == b"L":
            return data.partition(b"\0")[0], known
        try:
            records = _pax(data)
            return records.get(b"path", name), int(records.get(b"size", known))
        except ValueError:
            raise TarError(f"has PAX records at byte {offset} that are none: it is damaged there") from None

    def _content(self, offset: int, size: int) -> bytes:
        data = self._read_at(offset, size)
        if len(data) < size:
            raise TarError(self._cut(offset, size))
        return data[:size]

    def _number(self, digits: bytes, offset: int) -> int:
        if digits[0] & 0x80:  # GNU's way to write more than 8 GiB
            return int.from_bytes(digits[1:], "big") if digits[0] == 0x80 else -1
        try:
            return int(digits.rstrip(b" \0") or b"0", 8)
        except ValueError:
            raise TarError(self._no_header(offset)) from None

    def _check(self) -> None:
        """Compare the checksums of the headers since the last time.

        Raises:
            TarError: One is another.
        """
        if not self._unchecked:
            return
        headers: UInt8[np.ndarray, "n 512"] = np.frombuffer(b"".join(self._unchecked), np.uint8).reshape(-1, BLOCK)
        sums = headers.sum(axis=1, dtype=np.int64) - headers[:, 148:156].sum(axis=1, dtype=np.int64) + 8 * ord(" ")
        for header, offset, total in zip(self._unchecked, self._headers, sums.tolist(), strict=True):
            if self._number(header[148:156].strip(b" \0")[:8] or b"0", offset) != total:
                raise TarError(self._no_header(offset))
        self._unchecked.clear()
        self._headers.clear()

    def _no_header(self, offset: int) -> str:
        if offset == 0:
            head = self._read_at(0, 8)
            packed = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2", b"\xfd7zXZ": "xz"}
            kind = next((name for magic, name in packed.items() if head.startswith(magic)), "")
            if kind:
                return f"is compressed ({kind}), expected a plain tar archive: members are read by their place in it"
            return "is no tar archive: its first 512 bytes are no header"
        return f"is damaged: no member's header at byte {offset}, where one should be"

    def _require_end(self, header: bytes, offset: int) -> None:
        """Raise unless a block of zeros marks the archive's end here.

        Raises:
            TarError: There is none.
        """
        if len(header) == BLOCK and not any(header):
            if any(self._read_at(offset + BLOCK, _AFTER_END)):
                raise TarError(f"goes on after its end at byte {offset}, expected one archive; join several into one")
            return
        self._check()
        if len(header) == BLOCK:
            raise TarError(self._no_header(offset))
        if offset == 0:
            raise TarError(f"is no tar archive: it has {len(header)} bytes")
        raise TarError(f"was cut off: it ends at byte {self._archive} without the mark of an archive's end")

    def _cut(self, offset: int, size: int) -> str:
        return (
            f"was cut off: it has {self._archive} bytes, and the member that begins at byte {offset} alone has {size}"
        )


def _name(header: bytes) -> bytes:
    name = header[:100].partition(b"\0")[0]
    if header[345] and header[257:262] == b"ustar" and header[262] == 0:  # GNU's format has other things there
        return header[345:500].partition(b"\0")[0] + b"/" + name
    return name


def _is_meta(name: bytes) -> bool:
    """Whether the path begins with ``__NAME__``, which webdataset passes over."""
    first = name.partition(b"/")[0]
    return first.startswith(b"__") and first.endswith(b"__") and len(first) > 3


def _pax(data: bytes) -> dict[bytes, bytes]:
    records = {}
    while data:
        length, _, _ = data.partition(b" ")
        record, data = data[len(length) + 1 : int(length)], data[int(length) :]
        name, equals, value = record.partition(b"=")
        if not equals or not value.endswith(b"\n"):
            raise ValueError("no record")
        records[name] = value[:-1]
    return records


def read_at(descriptor: int) -> ReadAt:
    """Reads an open local file, whose position it leaves alone."""
    return lambda offset, size: os.pread(descriptor, size, offset)
