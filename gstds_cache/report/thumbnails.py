"""Small images inside the page itself."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageOps

from gstds_cache.data.decode import UndecodableError
from gstds_cache.data.source import ImageSource
from gstds_cache.errors import GstdsError
from gstds_cache.store.reader import EmbeddingStore

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
        pictures.append(thumbnail(source, row, f"{source.ids[row]}{name}, coordinate {coordinate:.4f}"))
    return pictures


def thumbnail(source: ImageSource, row: int, title: str, side: int = SIDE) -> Thumbnail:
    """A row's image in a square of ``side`` pixels, under a title."""
    return Thumbnail(_data_uri(source, row, side), title)


def find_images(
    store: EmbeddingStore, dataset: Any, open_dataset: Callable[[Any], ImageSource], name: str = "dataset"
) -> tuple[ImageSource | None, str]:
    """The data set that a store was made from, for its images.

    Args:
        store: The store.
        dataset: Where the data set is now; None is where it was when the store was made.
        open_dataset: Opens a data set.
        name: The argument that says where it is, for what is missing.

    Returns:
        The data set, or None and why there is none, with what to pass.

    Raises:
        GstdsError: ``dataset`` was given, and cannot be opened.
    """
    where = store.dataset_uri if dataset is None else dataset
    if where is None:
        return None, f"Needs the images, and the store does not say where they are: pass `{name}=DATASET`."
    try:
        source = open_dataset(where)
    except GstdsError as error:
        if dataset is not None:
            raise
        return None, f"Needs the images, which were at {where}: {error.message}. Pass `{name}=DATASET`."
    if len(source) != len(store):
        return None, f"{source.uri} has {len(source):,} items, the store has {len(store):,}: another data set."
    return source, ""


def _data_uri(source: ImageSource, row: int, side: int) -> str:
    try:
        image = ImageOps.contain(source.image(row), (side, side))
    except UndecodableError:
        return ""
    square = Image.new("RGB", (side, side), "white")
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    buffer = io.BytesIO()
    square.save(buffer, "JPEG", quality=QUALITY, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
