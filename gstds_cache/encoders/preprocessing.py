"""From a decoded image to the pixels a model reads.

Resizing and cropping are the model's own library's transforms, so that our pixels are the ones the model was trained
on; only the last two steps (to float, subtract mean and divide by std) are left to the device, because uint8 batches
are a quarter of the size.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as tvf


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
    """

    resize: int | tuple[int, int] = 256
    crop: tuple[int, int] = (224, 224)
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] = "bilinear"
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    crop_mode: Literal["center", "squash"] = "center"
    source: str = "torchvision"
    max_aspect: int = 16

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON-able values."""
        fields = asdict(self)
        return {key: list(value) if isinstance(value, tuple) else value for key, value in fields.items()}

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
