"""A module that computes features: prepared and run, with whatever it raises turned into one error of the model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from itertools import chain
from typing import Any

import torch
from torch import nn

from gstds_cache.errors import EncoderError
from gstds_cache.plugins import own_code
from gstds_cache.runtime.resources import out_of_memory

TAKES = (
    "it has to take normalised float32 [B, 3, H, W] for any B, and give [B, D]. H and W are 224 unless it has an "
    "attribute preprocessing = Preprocessing(resize=..., crop=(H, W)); another number of channels or a fixed B needs a "
    "module around it that brings images into its form"
)
_AS_FEATURES = {
    1: "keep a row for each image, e.g. return features.flatten(1) and not features.squeeze() or .flatten()",
    3: "take one vector of each image, e.g. return tokens[:, 0] or tokens.mean(dim=1)",
    4: "pool over the positions, e.g. return maps.mean(dim=(2, 3))",
}


def bare(model: nn.Module) -> nn.Module:
    """The module inside torch.compile's and data parallelism's: its parameters have the names it gave them."""
    while True:
        inside = dict(model.named_children()).get("_orig_mod")
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inside = model.module
        if not isinstance(inside, nn.Module):
            return model
        model = inside


def make_ready(model: nn.Module, name: str) -> None:
    """Put a model in eval mode, on the CPU, with fixed weights.

    Args:
        model: The model.
        name: What to call it in errors.

    Raises:
        EncoderError: It has no values, or refuses.
    """
    empty = [key for key, tensor in chain(model.named_parameters(), model.named_buffers()) if tensor.is_meta]
    if empty:
        raise EncoderError(
            f"{name}: {len(empty)} of its tensors are on the meta device and have no values, first {empty[0]!r}",
            hint="build the model on the CPU and load its weights in the factory",
        )
    with own_code(f"{name}: putting the model in eval mode, on the CPU,", EncoderError, but=out_of_memory):
        # An exported program has the mode in which it was exported: the check tells which (embedding/determinism.py).
        with suppress(NotImplementedError):
            model.eval()
        for parameter in _existing(model.parameters()):  # compiled modules have no requires_grad_ of their own
            parameter.requires_grad_(False)
        model.to("cpu")


def own_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of a model's weights: that of the first that has a fraction, or float32 if none has."""
    found = (t.dtype for t in _existing(chain(model.parameters(), model.buffers())) if t.is_floating_point())
    return next(found, torch.float32)


def run(model: nn.Module, name: str, pixels: torch.Tensor) -> torch.Tensor:
    """A model's features of some images, as it gives them.

    Args:
        model: The model.
        name: What to call it in errors.
        pixels: Normalised pixels, [B, 3, H, W].

    Returns:
        Real numbers, [B, D] with D > 0.

    Raises:
        EncoderError: The model raised something, or what it returned is something else.
    """
    given, count = f"{_word(pixels.dtype)} {list(pixels.shape)}", len(pixels)
    hint = TAKES if bare(model) is model else f"return the module without torch.compile; {TAKES}"
    with own_code(f"{name}: given {given}, the model", EncoderError, hint, but=out_of_memory):
        features: Any = model(pixels)
    if isinstance(features, torch.Tensor) and not features.is_nested:
        of_each_image = features.ndim == 2 and len(features) == count and features.shape[1] > 0
        if of_each_image and not features.is_complex():
            return features.detach()
    raise EncoderError(
        f"{name}: got {_kind(features)} for {count} images, expected pooled features [{count}, D]",
        hint=_remedy(features),
    )


def _existing(tensors: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Tensors that exist already; lazy modules make theirs when they are first run."""
    return (tensor for tensor in tensors if not nn.parameter.is_lazy(tensor))


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _kind(features: Any) -> str:
    if isinstance(features, torch.Tensor) and features.is_nested:
        return "a nested tensor"
    if isinstance(features, torch.Tensor):
        return f"{_word(features.dtype)} {list(features.shape)}"
    if isinstance(features, Mapping):
        return f"a {type(features).__name__} of {', '.join(map(repr, features))}"
    if isinstance(features, tuple | list):
        return f"a {type(features).__name__} of {len(features)}"
    return f"a {type(features).__name__}"


def _remedy(features: Any) -> str:
    if isinstance(features, torch.Tensor) and not features.is_nested:
        return _AS_FEATURES.get(features.ndim, "return one row of D real numbers for each image, D > 0")
    if isinstance(features, Mapping):
        pooled = next((key for key in features if "pool" in str(key)), "NAME")
        return f"return one tensor from its forward, e.g. output[{pooled!r}]"
    return f"return one tensor from its forward{', e.g. output[0]' if isinstance(features, tuple | list) else ''}"
