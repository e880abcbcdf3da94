"""Images that are files: what is hashed is the file, not what a decoder makes of it."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from jaxtyping import Int64, UInt8
from PIL import Image

from gstds_cache.data.decode import FORMATS, HAS_HEIC, UndecodableError, decode_image
from gstds_cache.data.hashed import require_same, require_same_digest, require_unread_before
from gstds_cache.data.names import Names
from gstds_cache.runtime.resources import about_us

MAX_BYTES = 1 << 30
"""Largest file that is read to be decoded: 64 million pixels of any format, at 16 bits and uncompressed, are less."""

_AT_ONCE = 64 << 20
HEIC_EXTENSIONS = (".heic", ".heif", ".hif")
NEWER_EXTENSIONS = (".avif", *HEIC_EXTENSIONS)
"""Of files that earlier versions left out."""
IMAGE_EXTENSIONS = (
    *(".jpg", ".jpeg", ".png", ".ppm", ".pgm", ".bmp", ".tif", ".tiff", ".webp", ".gif"),
    *((".avif",) if "AVIF" in FORMATS else ()),
    *(HEIC_EXTENSIONS if HAS_HEIC else ()),
)
"""Of files that are items. Those that nothing here decodes are none: they would be quarantined for good."""


@dataclass(frozen=True)
class Files:
    """Files below one folder, in a fixed order. A million names are held and pickled; :class:`Names` take no memory.

    Attributes:
        folder: What every path begins with: '' or a path that ends with a slash.
        names: The rest of every path.
    """

    folder: str
    names: Sequence[str] = field(repr=False)

    @classmethod
    def at(cls, paths: Sequence[str | Path]) -> Files:
        """The files at ``paths``, with the deepest folder that all of them lie in."""
        ends = [choose(map(str, paths), default="") for choose in (min, max)]
        common = os.path.commonprefix(ends)  # noqa: RUF071 - cut at a slash in the next line
        folder = common[: common.rfind("/") + 1]
        return cls(folder, Names.of(str(path)[len(folder) :] for path in paths))

    def __len__(self) -> int:
        return len(self.names)

    def path(self, row: int) -> str:
        """The path of file ``row``."""
        return self.folder + self.names[row]

    def paths(self, rows: range) -> list[str]:
        """The paths of files one after the other."""
        return [self.folder + name for name in self.names[rows.start : rows.stop]]

    def sha256(self, row: int) -> bytes:
        """SHA-256 of file ``row``, in memory that does not grow with the file.

        Raises:
            OSError: The file is gone, or cannot be read.
        """
        with io.FileIO(self.path(row), opener=regular_file) as file:  # Half the system calls of a buffered file.
            if os.fstat(file.fileno()).st_size > _AT_ONCE:
                return hashlib.file_digest(file, "sha256").digest()
            return hashlib.sha256(file.readall()).digest()

    def part(self, rows: Iterable[int]) -> Files:
        """Some of the files; they keep the folder, even where all of them lie deeper."""
        return Files(self.folder, Names.of(self.names[row] for row in rows))


@dataclass(frozen=True, eq=False, kw_only=True)
class FileSource:
    """Images in files, one each."""

    uri: str
    kind: str
    ids: Sequence[str] = field(repr=False)
    labels: Int64[np.ndarray, " N"] = field(repr=False)
    files: Files
    classes: Sequence[str] = ()
    mirror_safe: bool = True
    notes: Sequence[str] = ()
    hashed: UInt8[np.ndarray, "N 32"] | None = field(default=None, repr=False)

    def __repr__(self) -> str:
        return f"FileSource({self.uri!r}, {len(self)} items)"

    def __len__(self) -> int:
        return len(self.ids)

    def payload(self, row: int) -> bytes:
        """The bytes of file ``row``.

        Raises:
            OSError: The file is gone, or cannot be read.
            IntegrityError: It is another than the one that was hashed.
        """
        with io.FileIO(self.files.path(row), opener=regular_file) as file:
            data = file.readall()
        require_same(self, row, data)
        return data

    def image(self, row: int) -> Image.Image:
        """File ``row`` in RGB.

        Raises:
            UndecodableError: The file cannot be read, has more than ``MAX_BYTES``, or is not an image.
            IncompleteError: It cannot be read, and could when it was hashed.
            IntegrityError: It is another than the one that was hashed.
            OSError: This process may open no more files.
        """
        try:
            with io.FileIO(self.files.path(row), opener=regular_file) as file:
                size = os.fstat(file.fileno()).st_size
                if size > MAX_BYTES:
                    if self.hashed is not None:  # It may have grown; what was as large then has the hash of all of it.
                        require_same_digest(self, row, hashlib.file_digest(file, "sha256").digest())
                    raise UndecodableError(f"too large a file: {size} bytes, at most {MAX_BYTES} are decoded")
                data = file.readall()
        except OSError as error:
            if about_us(error):
                raise
            require_unread_before(self, row, error)
            raise UndecodableError(f"unreadable: {error.strerror or type(error).__name__}") from None
        require_same(self, row, data)
        return decode_image(data)

    def as_hashed(self, sha256: UInt8[np.ndarray, "N 32"] | None) -> FileSource:
        """The same files, compared with their hashes (:func:`gstds_cache.data.hashed.as_hashed`)."""
        return replace(self, hashed=sha256)


def regular_file(path: str, flags: int) -> int:
    """Open a file for ``opener=``, unless opening or reading it might never end: a pipe, or a device such as /dev/zero.

    Args:
        path: The file, links followed.
        flags: Those of ``os.open``.

    Returns:
        The descriptor.

    Raises:
        OSError: It cannot be opened, or is neither a regular file nor a folder, of which Python says so itself.
    """
    number = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)
    mode = os.fstat(number).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        os.close(number)
        raise OSError(errno.EINVAL, "no regular file", path)
    return number


def printable(name: str) -> str:
    r"""Spell a file name so that it can be printed and stored: bytes that are not UTF-8 become ``\xNN``."""
    return name if name.isascii() else os.fsencode(name).decode("utf-8", "backslashreplace")


def has_image_extension(name: str) -> bool:
    """Whether a file name ends like an image's, in upper or lower case."""
    return name.lower().endswith(IMAGE_EXTENSIONS)
