"""Reads the files that a device decodes, in processes, and decodes all other images there."""

from __future__ import annotations

import io
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from gstds_cache.data.ahead import expect_rows
from gstds_cache.data.decode import EXACT, Decoding, UndecodableError, decoding_as
from gstds_cache.data.files import MAX_BYTES, regular_file
from gstds_cache.data.hashed import require_same_in
from gstds_cache.data.source import ImageSource
from gstds_cache.data.workers import Room
from gstds_cache.embedding.jpeg import device_jpeg
from gstds_cache.encoders.preprocessing import Preprocessing
from gstds_cache.runtime.resources import about_us

PART_BYTES = 64 << 20
PART_DECODED_BYTES = 512 << 20
"""Files of one part, and what they are decoded to, end at about so much: 14 photographs of 12 megapixels."""


class Item(NamedTuple):
    """One row as a worker hands it over: a file for the device, pixels, or a reason why there is neither.

    Attributes:
        offset: Where it begins in the part's memory, in bytes.
        size: How long it is, in bytes.
        orientation: EXIF's, of a file for the device; 0 of pixels, which are upright.
        reason: Why the row cannot be decoded, if so.
    """

    offset: int
    size: int
    orientation: int = 0
    reason: str = ""


@dataclass(frozen=True)
class JpegReader:
    """Reads the files that the device decodes, and decodes all other images with Pillow.

    Attributes:
        source: The data set; of one whose items are no files the device decodes nothing.
        preprocessing: What Pillow's images go through.
        shape: Shape [3, H, W] of one image's pixels.
        how: How Pillow decodes.
    """

    source: ImageSource
    preprocessing: Preprocessing
    shape: tuple[int, int, int]
    how: Decoding = EXACT

    def __call__(self, rows: Sequence[int], room: Room) -> tuple[tuple[Item, ...], float]:
        """Fill ``room`` with files and pixels of as many of ``rows`` as a part holds, one at least.

        Returns:
            One item for each row that was done, from the first on; and the seconds that took.
        """
        begun = time.perf_counter()
        items, contents, total, decoded = list[Item](), list[Any](), 0, 0
        expect_rows(self.source, rows)
        for row in rows:
            content, orientation, after = self._read(row)
            if isinstance(content, str):
                items.append(Item(total, 0, reason=content))
                continue
            size = len(content)
            items.append(Item(total, size, orientation))
            contents.append(content)
            total, decoded = total + size, decoded + after
            if total >= PART_BYTES or decoded >= PART_DECODED_BYTES:
                break
        memory, at = room(total).numpy() if total else None, 0
        for content in contents:
            assert memory is not None
            memory[at : at + len(content)] = memoryview(content)
            at += len(content)
        return tuple(items), time.perf_counter() - begun

    def _read(self, row: int) -> tuple[Any, int, int]:
        """A row's file or pixels as bytes, or a reason; its orientation; and the bytes of the decoded image."""
        data = self._file(row)
        jpeg = None if data is None else device_jpeg(data, self.how.max_pixels)
        if jpeg is not None:
            return data, jpeg.orientation, 3 * jpeg.width * jpeg.height
        try:
            with decoding_as(self.how):
                image = self.source.image(row)
            return self.preprocessing.pixels(image).numpy().reshape(-1), 0, 0
        except UndecodableError as error:
            return error.reason, 0, 0

    def _file(self, row: int) -> bytes | None:
        """The bytes of a row's file, if it has one that can be read and may be a JPEG.

        Raises:
            IntegrityError: It is another than the one that was hashed.
            OSError: This process may open no more files.
        """
        if self.source.files is None:
            return self._packed(row)
        try:
            with io.FileIO(self.source.files.path(row), opener=regular_file) as file:
                if os.fstat(file.fileno()).st_size > MAX_BYTES:
                    return None
                begin = file.read(2)
                if begin != b"\xff\xd8":
                    return None
                data = begin + file.readall()
        except OSError as error:
            if about_us(error):
                raise
            return None
        require_same_in(self.source, row, data)
        return data

    def _packed(self, row: int) -> bytes | None:
        """The same of an image file that lies in a table or an archive, as the items of ``containers`` do.

        Raises:
            OSError: This process may open no more files.
        """
        if not hasattr(getattr(self.source, "base", self.source), "containers"):
            return None
        try:
            data = self.source.payload(row)
        except OSError as error:
            if about_us(error):
                raise
            return None
        return data if data[:2] == b"\xff\xd8" and len(data) <= MAX_BYTES else None
