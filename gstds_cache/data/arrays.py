"""Images that are held in memory, and scikit-learn's handwritten digits, which need no download."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Int64, UInt8
from PIL import Image

from gstds_cache.data.decode import to_rgb
from gstds_cache.data.files import Files


@dataclass(frozen=True, eq=False, kw_only=True)
class ArraySource:
    """Images in one array: grey [N, H, W] or RGB [N, H, W, 3]. An item's payload is its pixels, row by row."""

    uri: str
    kind: str
    ids: Sequence[str] = field(repr=False)
    labels: Int64[np.ndarray, " N"] = field(repr=False)
    pixels: UInt8[np.ndarray, "N H W *C"] = field(repr=False)
    classes: Sequence[str] = ()
    mirror_safe: bool = True
    notes: Sequence[str] = ()

    @property
    def files(self) -> Files | None:
        """None: a payload is not a file."""
        return None

    def __repr__(self) -> str:
        return f"ArraySource({self.uri!r}, {len(self)} items)"

    def __len__(self) -> int:
        return len(self.ids)

    def payload(self, row: int) -> bytes:
        """The pixels of item ``row``, without their shape, which all items share."""
        return bytes(self.pixels[row].tobytes())

    def image_size(self, _row: int) -> tuple[int, int, str]:
        """Width and height in pixels, which all items share; no format."""
        return self.pixels.shape[2], self.pixels.shape[1], ""

    def image(self, row: int) -> Image.Image:
        """Item ``row`` in RGB."""
        return to_rgb(Image.fromarray(self.pixels[row]))


def open_digits(uri: str, _path: str = "", _params: Mapping[str, str] | None = None) -> ArraySource:
    """Open scikit-learn's 1797 handwritten digits of 8 x 8 pixels, scaled from 0..16 to 0..255.

    Args:
        uri: The data set as the user named it.

    Returns:
        The source; ids ``digits/0000`` to ``digits/1796``.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    return ArraySource(
        uri=uri,
        kind="digits",
        ids=tuple(f"digits/{row:04d}" for row in range(len(digits.images))),
        labels=digits.target.astype(np.int64),
        pixels=np.rint(digits.images * 255 / 16).astype(np.uint8),
        classes=tuple(str(name) for name in digits.target_names),
        mirror_safe=False,
    )
