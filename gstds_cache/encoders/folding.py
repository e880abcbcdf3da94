"""Batch normalisation of a frozen model, folded into the convolutions before it: the same features but for rounding.

In eval mode it multiplies and adds by fixed numbers, as a convolution does already; by itself it reads and writes every
map once more. The default model takes 0.84 of the CPU seconds without (benchmarks/bench_embed.py).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from gstds_cache.encoders.encoder import normalized_rows
from gstds_cache.encoders.initial import seeded

TOLERANCE = 1e-4
"""Largest distance of two rows of length 1: float32 rounds to about 1e-6."""


def folded(model: nn.Module, crop: tuple[int, int], layout: torch.memory_format) -> nn.Module:
    """A model without the batch normalisation that can be folded.

    What comes behind what is read off the order in which layers are registered, which need not be the order in which
    they run. So the rows of two random images are compared.

    Args:
        model: In eval mode on the CPU, from pixels [B, 3, H, W] to features [B, D] of float32.
        crop: Height and width of its pixels.
        layout: Of its pixels.

    Returns:
        A copy; or ``model`` itself, where there is nothing to fold, or a copy fails or gives other rows.
    """
    if next(_pairs(model), None) is None:
        return model
    pixels = torch.randn((2, 3, *crop), generator=torch.Generator().manual_seed(0)).to(memory_format=layout)
    try:
        quicker = copy.deepcopy(model)
        for parent, convolution, normalisation in list(_pairs(quicker)):
            fused = fuse_conv_bn_eval(getattr(parent, convolution), getattr(parent, normalisation))
            setattr(parent, normalisation, _rest_of(getattr(parent, normalisation)))
            setattr(parent, convolution, fused.requires_grad_(False))
        with torch.inference_mode(), seeded():
            expected, got = (normalized_rows(one(pixels)) for one in (model, quicker))
    except Exception:  # Whatever it is: a layer may be asked for its weight, or cannot be copied. The model works.
        return model
    lengths = torch.linalg.vector_norm(expected, dim=1)
    same = torch.linalg.vector_norm(got - expected, dim=1) <= TOLERANCE * lengths
    return quicker if bool((same & (lengths > 0.5)).all()) else model  # of zeros, or NaN, nothing can be said


def _pairs(model: nn.Module) -> Iterator[tuple[nn.Module, str, str]]:
    """Find what may be folded.

    Yields:
        A module, and the names in it of a convolution and of the normalisation that is registered behind it.
    """
    for parent in model.modules():
        before = ""
        for name, child in parent.named_children():
            if before and _can_be_folded(getattr(parent, before), child):
                yield parent, before, name
            before = name if isinstance(child, nn.Conv2d) else ""


def _can_be_folded(convolution: nn.Conv2d, behind: nn.Module) -> bool:
    known = type(behind) is nn.BatchNorm2d or type(behind).__name__ == "BatchNormAct2d"  # timm's, with an activation
    return (
        known
        and isinstance(behind, nn.BatchNorm2d)
        and behind.running_mean is not None
        and behind.num_features == convolution.out_channels  # else it is behind another layer
    )


def _rest_of(normalisation: nn.Module) -> nn.Module:
    """What a layer does besides normalising."""
    rest = [module for module in normalisation.children() if not isinstance(module, nn.Identity)]
    return rest[0] if len(rest) == 1 else nn.Sequential(*rest)
