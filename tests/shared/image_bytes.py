"""Bytes of image files as they come: what Pillow writes, and what it does not."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
from PIL import Image

SIGNATURE = b"\x89PNG\r\n\x1a\n"
NOISE = np.random.Generator(np.random.Philox(7)).integers(0, 256, (9, 13, 3), np.uint8)
"""An image that no flip or rotation leaves as it is."""


def encode(image: Image.Image, fmt: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, fmt, **options)
    return buffer.getvalue()


def stored_as(orientation: int, upright: np.ndarray) -> np.ndarray:
    """What a camera stores so that a viewer shows ``upright``: the inverse of each orientation in the EXIF standard."""
    return np.ascontiguousarray(
        {
            1: upright,
            2: upright[:, ::-1],
            3: upright[::-1, ::-1],
            4: upright[::-1],
            5: upright.transpose(1, 0, 2),
            6: np.rot90(upright, 1),
            7: upright[::-1, ::-1].transpose(1, 0, 2),
            8: np.rot90(upright, -1),
        }[orientation]
    )


def oriented(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def png_header(width: int, height: int) -> bytes:
    """The beginning of a PNG; no pixel follows."""
    return SIGNATURE + _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)) + b"\x00\x00\x00\x00IDAT"


def png(pixels: np.ndarray, *, interlaced: bool = False, before_data: bytes = b"") -> bytes:
    """An RGB image [H, W, 3] of 8 or 16 bits as Pillow cannot write it; ``before_data`` are chunks."""
    height, width, _ = pixels.shape
    header = struct.pack(">IIBBBBB", width, height, pixels.dtype.itemsize * 8, 2, 0, 0, int(interlaced))
    # Adam7: first row and column of each pass, and the steps between them.
    passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
    parts = [pixels[y::down, x::right] for y, x, down, right in (passes if interlaced else [(0, 0, 1, 1)])]
    big = pixels.dtype.newbyteorder(">")
    rows = b"".join(b"\0" + row.astype(big).tobytes() for part in parts if part.size for row in part)
    return SIGNATURE + _chunk(b"IHDR", header) + before_data + png_end(rows)


def png_end(rows: bytes) -> bytes:
    return _chunk(b"IDAT", zlib.compress(rows)) + _chunk(b"IEND", b"")


def text_bomb(size: int) -> bytes:
    """A PNG chunk whose text has ``size`` characters once it is unpacked."""
    return _chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b" " * size, 9))


def with_right_checksums(data: bytes) -> bytes:
    """A damaged PNG as one that is whole."""
    out, at = data[:8], 8
    while at + 12 <= len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        body = data[at + 4 : at + 8 + length]
        out += data[at : at + 4] + body + struct.pack(">I", zlib.crc32(body))
        at += 12 + length
    return out


def segments(jpeg: bytes, marker: int) -> list[int]:
    """Where each of a JPEG's segments of one kind begins."""
    return [at for at in range(len(jpeg) - 1) if jpeg[at : at + 2] == bytes([0xFF, marker])]


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
