"""Which JPEGs a device decodes: told by the file's header, so that the same file goes the same way on every machine.

All others are decoded by Pillow: progressive ones, which a device decodes one after the other; grey, CMYK and RGB ones,
whose colours decoders understand in different ways; and files without an end, which Pillow refuses and a device may
fill up with grey.
"""

from __future__ import annotations

import io
import warnings
from typing import NamedTuple

from PIL import ExifTags, Image

from gstds_cache.config import EmbedConfig
from gstds_cache.runtime.resources import about_us

TAIL = 1024
"""Bytes at a file's end among which its end marker is looked for: some writers put something behind it."""
_SEQUENTIAL = (0xC0, 0xC1)
_FRAMES = frozenset({*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC})
_APP1, _APP14, _SCAN = 0xE1, 0xEE, 0xDA
_SAMPLINGS = (0x11, 0x12, 0x21, 0x22)
_RGB_IDS = b"RGB"


class Jpeg(NamedTuple):
    """A JPEG that a device decodes.

    Attributes:
        width: In pixels, as stored.
        height: In pixels, as stored.
        orientation: EXIF's number of how the stored pixels lie, from 1 (upright) to 8.
    """

    width: int
    height: int
    orientation: int


def device_jpeg(data: bytes, max_pixels: int = EmbedConfig.max_pixels) -> Jpeg | None:
    """What the header of a file tells of a JPEG that a device decodes; None for every other file.

    Args:
        data: The bytes of a file.
        max_pixels: Most pixels that are decoded.

    Returns:
        Size and orientation of a sequential 8-bit YCbCr JPEG of the usual samplings (4:4:4, 4:2:2, 4:4:0, 4:2:0) that
        has an end and at most ``max_pixels`` pixels.
    """
    if data[:2] != b"\xff\xd8" or data.rfind(b"\xff\xd9", -TAIL) < 0:
        return None
    at, has_app1 = 2, False
    frame: tuple[int, int] | None = None
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # filling
            at += 1
            continue
        size = int.from_bytes(data[at + 2 : at + 4], "big")
        body = data[at + 4 : at + 2 + size] if marker != _APP1 else b""
        if marker == _SCAN:
            break
        if marker in _FRAMES:
            frame = _frame(marker, body)
            if frame is None or not 0 < frame[0] * frame[1] <= max_pixels:
                return None
        elif marker == _APP14 and body[:5] == b"Adobe" and body[11:12] != b"\x01":
            return None
        has_app1 = has_app1 or marker == _APP1
        at += 2 + size
    if frame is None:
        return None
    orientation = _orientation(data) if has_app1 else 1
    return None if orientation is None else Jpeg(*frame, orientation)


def _frame(marker: int, body: bytes) -> tuple[int, int] | None:
    """Width and height of a frame that a device decodes."""
    if marker not in _SEQUENTIAL or len(body) != 15 or body[0] != 8 or body[5] != 3:
        return None
    height, width = int.from_bytes(body[1:3], "big"), int.from_bytes(body[3:5], "big")
    usual = body[7] in _SAMPLINGS and body[10] == body[13] == 0x11 and bytes(body[6::3]) != _RGB_IDS
    return (width, height) if usual else None


def _orientation(data: bytes) -> int | None:
    """As Pillow reads it, from EXIF or XMP; None where it is none, which is Pillow's to deal with."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
                orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception as error:
        if about_us(error):
            raise
        return None
    return orientation if isinstance(orientation, int) and 1 <= orientation <= 8 else None
