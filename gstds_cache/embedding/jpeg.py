"""Which JPEGs a device decodes: told by the file's header, so that the same file goes the same way on every machine.

All others are decoded by Pillow: progressive ones, which a device decodes one after the other; grey, CMYK and RGB ones,
whose colours decoders understand in different ways; files without an end, which Pillow refuses and a device may
fill up with grey; and those that lack a table or hold one that cannot be, which Pillow refuses and nvJPEG decodes to
something.
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
_APP1, _APP14, _SCAN, _HUFFMAN, _QUANTIZATION = 0xE1, 0xEE, 0xDA, 0xC4, 0xDB
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
        Size and orientation of a sequential 8-bit YCbCr JPEG of the usual samplings (4:4:4, 4:2:2, 4:4:0, 4:2:0) in one
        scan that has an end, every table that the scan uses and at most ``max_pixels`` pixels.
    """
    if data[:2] != b"\xff\xd8" or data.rfind(b"\xff\xd9", -TAIL) < 0:
        return None
    at, has_app1 = 2, False
    frame: bytes | None = None
    scan = b""
    huffman, quantization = set[int](), set[int]()
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # filling
            at += 1
            continue
        size = int.from_bytes(data[at + 2 : at + 4], "big")
        body = data[at + 4 : at + 2 + size] if marker != _APP1 else b""
        if marker == _SCAN:
            scan = body
            break
        if marker in _FRAMES:
            if not _usual(marker, body):
                return None
            frame = body
        elif marker == _HUFFMAN:
            huffman |= _huffman_tables(body)
        elif marker == _QUANTIZATION:
            quantization |= _quantization_tables(body)
        elif marker == _APP14 and body[:5] == b"Adobe" and body[11:12] != b"\x01":
            return None
        has_app1 = has_app1 or marker == _APP1
        at += 2 + size
    if frame is None or not set(frame[8::3]) <= quantization or not _tables_of(scan, frame) <= huffman:
        return None
    height, width = int.from_bytes(frame[1:3], "big"), int.from_bytes(frame[3:5], "big")
    if not 0 < height * width <= max_pixels:
        return None
    orientation = _orientation(data) if has_app1 else 1
    return None if orientation is None else Jpeg(width, height, orientation)


def _usual(marker: int, body: bytes) -> bool:
    """Whether a device decodes such a frame."""
    if marker not in _SEQUENTIAL or len(body) != 15 or body[0] != 8 or body[5] != 3:
        return False
    return body[7] in _SAMPLINGS and body[10] == body[13] == 0x11 and bytes(body[6::3]) != _RGB_IDS


def _tables_of(scan: bytes, frame: bytes) -> set[int]:
    """Huffman tables that a scan of all three components uses: 0x00 to 0x03 for DC, 0x10 to 0x13 for AC.

    Of another scan, or none, a table that no file has.
    """
    if len(scan) != 10 or scan[0] != 3 or scan[1:7:2] != frame[6::3]:
        return {-1}
    return {table for both in scan[2:7:2] for table in (both >> 4, 0x10 | both & 15)}


def _huffman_tables(body: bytes) -> set[int]:
    """Tables of a segment, named as above; none where one is cut or has more codes than there are."""
    found, at = set[int](), 0
    while at + 17 <= len(body):
        counts = body[at + 1 : at + 17]
        taken = sum(count << (16 - length) for length, count in enumerate(counts, 1))
        if taken > 1 << 16 or at + 17 + sum(counts) > len(body):
            return set()
        found.add(body[at])
        at += 17 + sum(counts)
    return found


def _quantization_tables(body: bytes) -> set[int]:
    """Numbers of a segment's tables that are whole."""
    found, at = set[int](), 0
    while at < len(body):
        table = body[at]
        at += 129 if table >> 4 else 65
        if at <= len(body):
            found.add(table & 15)
    return found


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
