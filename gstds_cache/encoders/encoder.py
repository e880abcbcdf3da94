"""A frozen reference model: images in, pooled and L2-normalised features out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float32, UInt8
from torch import nn

from gstds_cache.encoders.preprocessing import Preprocessing
from gstds_cache.errors import EncoderError


@dataclass(frozen=True)
class EncoderSpec:
    """What identifies the features a model gives; part of a store's fingerprint.

    Attributes:
        model: ``timm:NAME``, ``torchvision:NAME`` or ``module:factory``, without paths.
        weights: SHA-256 of the weights file, or of the state dict where there was no file.
        pretrained: Whether the weights were trained.
        layer: Where the features are taken.
        pooling: How positions become one vector.
        dim: Length of a feature vector (D).
        preprocessing: All of :class:`Preprocessing`.
        normalisation: ``l2``: rows have unit length.
        autocast: Precision of the forward pass.
    """

    model: str
    weights: str
    pretrained: bool
    layer: str
    pooling: str
    dim: int
    preprocessing: Preprocessing
    normalisation: str = "l2"
    autocast: str = "none"

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON-able values."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "preprocessing"}
        return fields | {"preprocessing": self.preprocessing.to_dict()}


class Encoder:
    """A model in eval mode with what it needs to read images.

    Attributes:
        spec: Identity of the features.
        notes: What the user should know, e.g. that the weights are not trained.
    """

    def __init__(self, model: nn.Module, spec: EncoderSpec, notes: tuple[str, ...] = ()) -> None:
        self.spec = spec
        self.notes = notes
        self._model = model.eval().requires_grad_(False)
        self._device = torch.device("cpu")
        self.to(self._device)

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Shape [3, H, W] of one image's pixels."""
        return (3, *self.spec.preprocessing.crop)

    def to(self, device: torch.device) -> Encoder:
        """Move the model to ``device``; returns self."""
        self._device = device
        self._model = self._model.to(device).to(memory_format=torch.channels_last)
        mean, std = self.spec.preprocessing.mean, self.spec.preprocessing.std
        self._mean = torch.tensor(mean, device=device).view(1, 3, 1, 1) * 255
        self._std = torch.tensor(std, device=device).view(1, 3, 1, 1) * 255
        return self

    def embed(self, pixels: UInt8[torch.Tensor, "B 3 H W"]) -> Float32[torch.Tensor, "B D"]:
        """Features of a batch of pixels, rows of unit length.

        Args:
            pixels: uint8 [B, 3, H, W], on any device.

        Returns:
            float32 [B, D] on the encoder's device. A row whose features are all zero stays zero.

        Raises:
            EncoderError: The model returned another shape, or NaN or Inf.
        """
        features = self.queue(pixels)
        self.require_finite(features)
        return features

    @torch.inference_mode()
    def queue(self, pixels: UInt8[torch.Tensor, "B 3 H W"]) -> Float32[torch.Tensor, "B D"]:
        """:meth:`embed` without a look at the values, which on a GPU would wait for them.

        Args:
            pixels: uint8 [B, 3, H, W], on any device.

        Returns:
            float32 [B, D] on the encoder's device; to be given to :meth:`require_finite`.

        Raises:
            EncoderError: The model returned another shape.
        """
        batch = pixels.to(self._device, non_blocking=True).to(dtype=torch.float32, memory_format=torch.channels_last)
        features = self._model((batch - self._mean) / self._std)
        if features.ndim != 2 or features.shape != (len(pixels), self.spec.dim):
            raise EncoderError(
                f"{self.spec.model} returned shape {tuple(features.shape)} for {len(pixels)} images, "
                f"expected [{len(pixels)}, {self.spec.dim}] (pooled features)"
            )
        return torch.nn.functional.normalize(features.float(), dim=1)

    def require_finite(self, features: Float32[torch.Tensor, "B D"]) -> None:
        """Refuse features that are no numbers.

        Raises:
            EncoderError: They hold NaN or Inf.
        """
        if not bool(torch.isfinite(features).all()):
            raise EncoderError(
                f"{self.spec.model} returned NaN or Inf", hint="check the weights file, or embed with --device cpu"
            )
