"""Images that are files: what is hashed is the file, not what a decoder makes of it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jaxtyping import Int64
from PIL import Image

from gstds_cache.data.decode import UndecodableError, decode_image

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".pgm", ".bmp", ".tif", ".tiff", ".webp", ".gif")


@dataclass(frozen=True, eq=False, kw_only=True)
class FileSource:
    """Images in files, one each. ``paths`` are plain strings: a million of them are held and pickled."""

    uri: str
    kind: str
    ids: tuple[str, ...] = field(repr=False)
    labels: Int64[np.ndarray, " N"] = field(repr=False)
    paths: tuple[str, ...] = field(repr=False)
    classes: Sequence[str] = ()
    mirror_safe: bool = True
    notes: Sequence[str] = ()

    def __len__(self) -> int:
        return len(self.ids)

    def payload(self, row: int) -> bytes:
        """The bytes of file ``row``.

        Raises:
            OSError: The file is gone, or cannot be read.
        """
        return Path(self.paths[row]).read_bytes()

    def image(self, row: int) -> Image.Image:
        """File ``row`` in RGB.

        Raises:
            UndecodableError: The file cannot be read, or is not an image.
        """
        try:
            data = self.payload(row)
        except OSError as error:
            raise UndecodableError(f"unreadable: {error.strerror or type(error).__name__}") from None
        return decode_image(data)


def printable(name: str) -> str:
    r"""Spell a file name so that it can be printed and stored: bytes that are not UTF-8 become ``\xNN``."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def has_image_extension(name: str) -> bool:
    """Whether a file name ends like an image's, in upper or lower case."""
    return name.lower().endswith(IMAGE_EXTENSIONS)
