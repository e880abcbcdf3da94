"""Floating-point operations of a training step, counted by torch without computing anything."""

from __future__ import annotations

import warnings

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from gstds_cache.train.network import build_network


def flops_per_sample(arch: str, *, classes: int, side: int) -> float | None:
    """FLOPs of one sample's forward and backward pass.

    ``torch.utils.flop_counter`` counts convolutions, matrix products and attention, a multiplication and an addition
    as two; what it leaves out (norms, activations, the optimiser) is small beside them. The network lies on the meta
    device, where shapes are worked out and numbers are not, so that counting takes no time from training.

    Args:
        arch: The network.
        classes: Number of classes.
        side: Side of the square images in pixels.

    Returns:
        FLOPs, or None where the network cannot be run on the meta device.
    """
    network = build_network(arch, classes=classes, side=side, seed=0).to("meta").train()
    pixels = torch.empty(2, 3, side, side, device="meta")  # two: batch statistics of one sample are undefined
    counter = FlopCounterMode(display=False)
    try:
        with warnings.catch_warnings(), counter:
            warnings.simplefilter("ignore")
            loss = nn.functional.cross_entropy(network(pixels), torch.zeros(2, dtype=torch.long, device="meta"))
            loss.backward()  # type: ignore[no-untyped-call]
    except (RuntimeError, NotImplementedError, ValueError, TypeError):
        return None
    return counter.get_total_flops() / 2
