"""From a decoded image to the pixels a model reads.

Resizing and cropping are the model's own library's transforms, so that our pixels are the ones the model was trained
on; only the last two steps (to float, subtract mean and divide by std) are left to the device, because uint8 batches
are a quarter of the size.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float32, UInt8
from PIL import Image
from torch.nn.functional import interpolate
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as tvf

from gstds_cache.config import EmbedConfig
from gstds_cache.errors import EncoderError

FILTERS = tuple(mode.value for mode in InterpolationMode)
DEVICE_FILTERS = ("bilinear", "bicubic")
"""Those that torch has with antialiasing, which Pillow always does."""
SCALED_GAP = 2
"""How many times as large as what it is resized to an image still is that a JPEG decoder scaled down. With 2 the resize
filter has the last word, as in Pillow's `thumbnail`; with 1 embeddings differ ten times as much
(`benchmarks/bench_decode.py`)."""


@dataclass(frozen=True)
class Preprocessing:
    """Every parameter between a decoded RGB image and the model's input; all of it is identity.

    Attributes:
        resize: Length of the shorter side after resizing, in pixels, or (height, width).
        crop: (height, width) of the centre crop, in pixels.
        interpolation: Filter of the resize.
        mean: Per-channel mean subtracted, on the scale 0 to 1.
        std: Per-channel standard deviation divided by, on the scale 0 to 1.
        crop_mode: ``center`` keeps the aspect ratio; ``squash`` resizes both sides to a given length.
        source: The library whose transform this is.
        max_aspect: Longer side over shorter side beyond which the ends are cut off before resizing. Of a longer image
            the centre crop shows less than that in any case; resized whole, 1 x 20,000 pixels took 6 GB and 30 s.
        decoder: What turns a file into an image: ``pillow``, which resizes it too, or ``nvjpeg``; then torch does that.
        decoder_version: Of a decoder other than Pillow, whose pixels have not changed in years.
        decode: ``scaled`` where Pillow decodes large JPEGs at 1/2, 1/4 or 1/8 of their size.
        max_pixels: Most pixels of an image that is decoded.
    """

    resize: int | tuple[int, int] = 256
    crop: tuple[int, int] = (224, 224)
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] = "bilinear"
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    crop_mode: Literal["center", "squash"] = "center"
    source: str = "torchvision"
    max_aspect: int = 16
    decoder: Literal["pillow", "nvjpeg"] = "pillow"
    decoder_version: str = ""
    decode: Literal["exact", "scaled"] = "exact"
    max_pixels: int = EmbedConfig.max_pixels

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            EncoderError: One is of another kind.
        """
        pairs = {"crop": self.crop} if isinstance(self.resize, int) else {"crop": self.crop, "resize": self.resize}
        checks = [
            *((name, value, "(height, width) in pixels", _whole(value, 2)) for name, value in pairs.items()),
            ("resize", self.resize, "a number of pixels", not isinstance(self.resize, int) or _whole([self.resize], 1)),
            ("interpolation", self.interpolation, f"one of {', '.join(FILTERS)}", self.interpolation in FILTERS),
            ("crop_mode", self.crop_mode, "center or squash", self.crop_mode in ("center", "squash")),
            ("mean", self.mean, "a number for each of three channels", _numbers(self.mean)),
            ("std", self.std, "a number > 0 for each of three channels", _numbers(self.std) and min(self.std) > 0),
            ("max_aspect", self.max_aspect, "a whole number >= 1", _whole([self.max_aspect], 1)),
        ]
        for name, value, expected, right in checks:
            if not right:
                raise EncoderError(
                    f"Preprocessing: {name}: got {value!r:.80}, expected {expected}",
                    hint="e.g. Preprocessing(resize=256, crop=(224, 224))",
                )

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON-able values."""
        fields = asdict(self)
        if self.decoder == "pillow":  # As before there were others: stores keep their fingerprints.
            del fields["decoder"], fields["decoder_version"]
        else:
            fields["resized_by"] = "torch"
        if self.decode == "exact":
            del fields["decode"]
        if self.max_pixels == EmbedConfig.max_pixels:
            del fields["max_pixels"]
        return {key: list(value) if isinstance(value, tuple) else value for key, value in fields.items()}

    @property
    def scaled_side(self) -> int:
        """Shorter side, in pixels, that a JPEG has at least where it is decoded scaled down; 0 where none is."""
        return 0 if self.decode == "exact" else SCALED_GAP * np.max(self.resize).item()

    def pixels(self, image: Image.Image) -> UInt8[torch.Tensor, "3 H W"]:
        """Resize and crop ``image`` (RGB) to uint8 pixels [3, H, W] in 0..255.

        Follows torchvision's ``ImageClassification`` preset, which for ``center`` and ``squash`` is timm's evaluation
        transform too (tests/encoders/test_preprocessing.py compares all three).
        """
        if isinstance(self.resize, int):
            size, image = [self.resize], without_ends(image, self.max_aspect)
        else:
            size = list(self.resize)
        resized = tvf.resize(image, size, InterpolationMode(self.interpolation), antialias=True)
        cropped = tvf.center_crop(resized, list(self.crop))
        return torch.from_numpy(np.asarray(cropped, dtype=np.uint8).transpose(2, 0, 1).copy())

    def resized(self, images: UInt8[torch.Tensor, "n 3 H W"]) -> Float32[torch.Tensor, "n 3 h w"]:
        """Resize and crop decoded images of one size on their device; :meth:`pixels` for what no Pillow has seen.

        Values differ from Pillow's by its rounding between columns and rows; they are not rounded at all here.

        Args:
            images: RGB, upright, on any device.

        Returns:
            float32 [n, 3, h, w] in about 0..255 (a bicubic filter exceeds that), h and w as in ``crop``.
        """
        at = self.placing(images.shape[2], images.shape[3])
        images = images[..., at.cut[0] : at.cut[0] + at.kept[0], at.cut[1] : at.cut[1] + at.kept[1]]
        values = images.to(torch.float32)
        if at.kept != at.size:
            values = interpolate(values, at.size, mode=self.interpolation, antialias=True)
        if min(at.corner) < 0:
            return torch.as_tensor(tvf.center_crop(values, list(self.crop)))  # which fills up with black
        top, left = at.corner
        return values[..., top : top + self.crop[0], left : left + self.crop[1]]

    def placing(self, height: int, width: int) -> Placing:
        """What becomes of an image of so many pixels.

        Args:
            height: Of the upright image.
            width: Likewise.
        """
        cut, kept = (0, 0), (height, width)
        if isinstance(self.resize, int):
            beyond = max(height, width) - self.max_aspect * min(height, width)
            if beyond > 0 and width > height:
                cut, kept = (0, beyond // 2), (height, self.max_aspect * height)
            elif beyond > 0:
                cut, kept = (beyond // 2, 0), (self.max_aspect * width, width)
            longer = int(self.resize * max(kept) / min(kept))
            size = (longer, self.resize) if kept[0] > kept[1] else (self.resize, longer)
        else:
            size = self.resize
        top, left = (
            round((length - crop) / 2) if length >= crop else -((crop - length) // 2)  # as torchvision's center_crop
            for length, crop in zip(size, self.crop, strict=True)
        )
        return Placing(cut, kept, size, (top, left))


@dataclass(frozen=True)
class Placing:
    """What becomes of images of one size; (height, width) or (top, left) each, in pixels.

    Attributes:
        cut: Where that which is kept begins, in the image.
        kept: How large it is.
        size: What that is resized to.
        corner: Where the crop begins in the resized image; below 0 where that is smaller, and black surrounds it.
    """

    cut: tuple[int, int]
    kept: tuple[int, int]
    size: tuple[int, int]
    corner: tuple[int, int]


def without_ends(image: Image.Image, max_aspect: int) -> Image.Image:
    """Cut the ends off an image whose longer side is more than ``max_aspect`` times its shorter side; others stay."""
    shorter, longer = sorted(image.size)
    cut = longer - max_aspect * shorter
    if cut <= 0:
        return image
    width, height = image.size
    if width > height:
        return image.crop((cut // 2, 0, cut // 2 + max_aspect * height, height))
    return image.crop((0, cut // 2, width, cut // 2 + max_aspect * width))


def _whole(values: object, count: int) -> bool:
    """Whether ``values`` are ``count`` whole numbers of pixels."""
    return (
        isinstance(values, tuple | list)
        and len(values) == count
        and all(isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= 1 << 16 for value in values)
    )


def _numbers(values: object) -> bool:
    return (
        isinstance(values, tuple | list)
        and len(values) == 3
        and all(isinstance(value, int | float) and math.isfinite(value) for value in values)
    )
