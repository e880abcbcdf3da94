"""A frozen reference model: images in, pooled and L2-normalised features out."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float32, UInt8
from torch import nn

from gstds_cache.encoders.module import TAKES, make_ready, run
from gstds_cache.encoders.preprocessing import DEVICE_FILTERS, Preprocessing
from gstds_cache.errors import EncoderError
from gstds_cache.plugins import own_code
from gstds_cache.runtime.resources import out_of_memory

Sizes = Callable[[int], tuple[int | tuple[int, int], tuple[int, int]]]
"""From the side of a square to the ``resize`` and ``crop`` of :class:`Preprocessing`."""


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
        autocast: Precision of the forward pass: ``none`` for float32; the name of the weights' dtype for a model that
            takes no float32 pixels.
        source: SHA-256 of the file in which the factory of a ``module:factory`` is written, be it a library's; '' of
            ``timm:NAME`` and ``torchvision:NAME``, whose specification has no such field.
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
    source: str = ""

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON-able values."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "preprocessing"}
        if not self.source:
            del fields["source"]
        return fields | {"preprocessing": self.preprocessing.to_dict()}


class Encoder:
    """A model in eval mode with what it needs to read images.

    Attributes:
        spec: Identity of the features.
        notes: What the user should know, e.g. that the weights are not trained.
        sizes: Resize and crop for another side of the square that the model looks at, where the data set may settle
            that: the model takes any, and nobody named one.
    """

    def __init__(
        self,
        model: nn.Module,
        spec: EncoderSpec,
        notes: tuple[str, ...] = (),
        layout: torch.memory_format = torch.channels_last,
        sizes: Sizes | None = None,
    ) -> None:
        self.spec = spec
        self.sizes = sizes
        self._layout = layout
        self.notes = notes
        make_ready(model, spec.model)
        # On one device alone the parallel kind needs GPUs to be there, and gives the same.
        self._model: nn.Module = model.module if isinstance(model, nn.DataParallel) else model
        self._dtype: torch.dtype = torch.float32 if spec.autocast == "none" else getattr(torch, spec.autocast)
        self._device = torch.device("cpu")
        self.to(self._device)

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Shape [3, H, W] of one image's pixels."""
        return (3, *self.spec.preprocessing.crop)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self._device

    def decoded_by(self, decoder: Literal["pillow", "nvjpeg"], version: str) -> Encoder:
        """Say that a device decodes the images, and torch resizes them; returns self.

        Args:
            decoder: Which.
            version: The version of the decoder.

        Raises:
            EncoderError: torch has no such filter for images.
        """
        preprocessing = self.spec.preprocessing
        if preprocessing.interpolation not in DEVICE_FILTERS:
            raise EncoderError(
                f"{self.spec.model}: got {preprocessing.interpolation!r} as filter of its resize, which a device has "
                f"not, expected one of {', '.join(DEVICE_FILTERS)}",
                hint="use `decoder='pillow'`",
            )
        self.spec = replace(self.spec, preprocessing=replace(preprocessing, decoder=decoder, decoder_version=version))
        return self

    def looking_at(self, side: int) -> Preprocessing:
        """The preprocessing with which the model would look at squares of ``side`` pixels; nothing is changed."""
        if self.sizes is None:
            return self.spec.preprocessing
        resize, crop = self.sizes(side)
        return replace(self.spec.preprocessing, resize=resize, crop=crop)

    def takes(self, side: int) -> bool:
        """Whether the model gives features of the same length for squares of ``side`` pixels."""
        try:
            with torch.inference_mode():
                pixels = torch.zeros(1, 3, side, side, dtype=self._dtype, device=self._device)
                return run(self._model, self.spec.model, pixels).shape[1] == self.spec.dim
        except EncoderError:
            return False

    def prepared_by(self, preprocessing: Preprocessing) -> Encoder:
        """Have images made ready in another way; returns self."""
        self.spec = replace(self.spec, preprocessing=preprocessing)
        return self

    def of_unknown_code(self) -> Encoder:
        """Leave out of the specification which code made the model, as earlier versions did; returns self."""
        self.spec = replace(self.spec, source="")
        return self

    def to(self, device: torch.device) -> Encoder:
        """Move the model to ``device``; returns self."""
        self._device = device
        with own_code(f"{self.spec.model}: moving it to {device}", EncoderError, but=out_of_memory):
            self._model.to(device)
            if self._layout == torch.channels_last:
                self._model.to(memory_format=torch.channels_last)
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
            EncoderError: The model failed, or returned another shape, or NaN or Inf.
        """
        features = self.queue(pixels)
        self.require_numbers(features)
        return features

    @torch.inference_mode()
    def queue(self, pixels: UInt8[torch.Tensor, "B 3 H W"]) -> Float32[torch.Tensor, "B D"]:
        """:meth:`embed` without checking the values, which on a GPU would wait for them.

        Args:
            pixels: uint8 [B, 3, H, W], on any device.

        Returns:
            float32 [B, D] on the encoder's device; to be given to :meth:`require_numbers`.

        Raises:
            EncoderError: The model failed, or returned another shape.
        """
        batch = pixels.to(self._device, non_blocking=True).to(dtype=torch.float32, memory_format=self._layout)
        features = run(self._model, self.spec.model, ((batch - self._mean) / self._std).to(self._dtype))
        if features.shape[1] != self.spec.dim:
            raise EncoderError(
                f"{self.spec.model} returned shape {tuple(features.shape)} for {len(pixels)} images, "
                f"expected [{len(pixels)}, {self.spec.dim}] (pooled features)"
            )
        with self.model_errors():
            return normalized_rows(features)

    def model_errors(self) -> AbstractContextManager[None]:
        """A context in which whatever is raised becomes the model's error: kernels fail where they are waited for."""
        return own_code(f"{self.spec.model}: the model", EncoderError, TAKES, but=out_of_memory)

    def require_numbers(
        self, rows: Float32[torch.Tensor, "B D"], name: Callable[[int], str] = "image {} of the batch".format
    ) -> list[int]:
        """Refuse rows that are no numbers.

        Args:
            rows: What :meth:`queue` returned, or some of its rows.
            name: From the position of a row to what to call it.

        Returns:
            The positions of rows that are all zero: the model gave no features for them.

        Raises:
            EncoderError: One holds NaN or Inf.
        """
        lengths = torch.linalg.vector_norm(rows, dim=1)  # 1, or 0, or not finite: one pass over the values
        if bool((lengths > 0).all()) and bool(torch.isfinite(lengths).all()):
            return []
        broken = torch.nonzero(~torch.isfinite(lengths)).flatten().tolist()
        if broken:
            raise EncoderError(
                f"{self.spec.model} returned NaN or Inf for {name(broken[0])}",
                hint="check the weights file, or embed with `device='cpu'`"
                if self._dtype is not torch.float16
                else "float16 ends at 65504: return model.float() from the factory",
            )
        return torch.nonzero(lengths == 0).flatten().tolist()


def normalized_rows(features: torch.Tensor) -> Float32[torch.Tensor, "B D"]:
    """Rows divided by their lengths, whatever their size.

    The sum of squares of a row of 1e30 is infinite in float32, that of 1e-30 is zero: such rows are first divided by
    their largest value. All others are what ``torch.nn.functional.normalize`` gives, to the last bit.

    Args:
        features: Real numbers [B, D].

    Returns:
        float32 [B, D]: rows of length 1; zeros where all features are zero, not finite where one of them is not.
    """
    single = features.float()
    rows = torch.nn.functional.normalize(single, dim=1)
    is_shard = (torch.linalg.vector_norm(rows, dim=1, keepdim=True) - 1).abs() < 1e-3
    exact = features if features.dtype == torch.float64 else single
    largest = exact.abs().amax(dim=1, keepdim=True)
    scaled = (exact / torch.where(largest > 0, largest, 1)).float()
    return torch.where(is_shard, rows, torch.nn.functional.normalize(scaled, dim=1))
