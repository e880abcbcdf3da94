"""How large a data set's images are, from the headers of a few of them."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from gstds_cache.data.decode import UndecodableError, header_size
from gstds_cache.data.files import regular_file
from gstds_cache.data.source import ImageSource
from gstds_cache.runtime.resources import about_us
from gstds_cache.seeding import rng_for

SAMPLE = 64
"""Images whose size is looked at: the median of their sides is settled by far fewer."""
_HEADER_BYTES = 1 << 16
"""Read of a file at first: EXIF blocks with thumbnails stand before the size."""


@dataclass(frozen=True)
class SampledSizes:
    """Sizes of some images.

    Attributes:
        shorter: Shorter side of each, in pixels.
        jpeg: Shorter side of each that is decoded from a JPEG.
    """

    shorter: tuple[int, ...]
    jpeg: tuple[int, ...]

    @property
    def median(self) -> int:
        """The median of the shorter sides, in pixels; 0 where no image could be looked at."""
        return int(np.median(self.shorter)) if self.shorter else 0


def sample_sizes(source: ImageSource) -> SampledSizes:
    """Sizes of ``SAMPLE`` images of a data set, or of all where it has fewer; always of the same ones.

    Of files the header is read and no pixel decoded. Items of other kinds tell their size (``image_size``), or are
    opened as the data set opens them. What is no image is left out.

    Args:
        source: The data set.

    Returns:
        What was found.
    """
    count = len(source)
    rows = rng_for(0, "image-sizes", count).choice(count, min(count, SAMPLE), replace=False)
    shorter, jpeg = [], []
    for row in np.sort(rows).tolist():
        try:
            width, height, kind = _size_of(source, row)
        except UndecodableError:
            continue
        shorter.append(min(width, height))
        jpeg += [shorter[-1]] if kind in {"JPEG", "MPO"} else []
    return SampledSizes(tuple(shorter), tuple(jpeg))


def _size_of(source: ImageSource, row: int) -> tuple[int, int, str]:
    tell: Callable[[int], tuple[int, int, str]] | None = getattr(source, "image_size", None)
    if tell is not None:
        return tell(row)
    if source.files is None:
        try:
            return header_size(source.payload(row))  # of archives and tables, whose payload is a file
        except OSError:
            raise UndecodableError("unreadable") from None
        except UndecodableError:
            return *source.image(row).size, ""
    try:
        with io.FileIO(source.files.path(row), opener=regular_file) as file:
            data = file.read(_HEADER_BYTES)
            try:
                return header_size(data)
            except UndecodableError:  # a longer header, or none
                return header_size(data + file.readall())
    except OSError as error:
        if about_us(error):
            raise
        raise UndecodableError("unreadable") from None
