"""Small images inside the page itself."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from dataclasses import dataclass

from PIL import Image, ImageOps

from gstds_cache.data.decode import UndecodableError
from gstds_cache.data.source import ImageSource

SIDE = 56  # pixels
QUALITY = 60


@dataclass(frozen=True)
class Thumbnail:
    """One image for a contact sheet.

    Attributes:
        uri: The image as a ``data:`` URI; empty where it cannot be decoded.
        title: What it is, in words.
    """

    uri: str
    title: str


def thumbnails(source: ImageSource, rows: Iterable[int], coordinates: Iterable[float]) -> list[Thumbnail]:
    """JPEGs of some rows, in that order; small images are enlarged.

    Args:
        source: The data set.
        rows: Which rows.
        coordinates: Fiedler coordinate of each.

    Returns:
        A thumbnail per row.
    """
    pictures = []
    for row, coordinate in zip(rows, coordinates, strict=True):
        label = int(source.labels[row])
        name = f", {source.classes[label]}" if 0 <= label < len(source.classes) else ""
        pictures.append(Thumbnail(_data_uri(source, row), f"{source.ids[row]}{name}, coordinate {coordinate:.4f}"))
    return pictures


def _data_uri(source: ImageSource, row: int) -> str:
    try:
        image = ImageOps.contain(source.image(row), (SIDE, SIDE))
    except UndecodableError:
        return ""
    square = Image.new("RGB", (SIDE, SIDE), "white")
    square.paste(image, ((SIDE - image.width) // 2, (SIDE - image.height) // 2))
    buffer = io.BytesIO()
    square.save(buffer, "JPEG", quality=QUALITY, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
