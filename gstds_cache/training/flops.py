"""Floating-point operations of a training step, counted by torch without computing anything."""

from __future__ import annotations

import warnings

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from gstds_cache.training.network import build_network

SMALL_STEP = 250e6
"""FLOPs of a step that a core does in about 5 ms: up to there two threads gained nothing on two idle cores, and on busy
ones, where each operation waits for the thread that is not running, they took four to ninety times as long."""


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
    except Exception:  # A network of anyone's, which may object to its input in any way; training says what is wrong.
        return None
    return counter.get_total_flops() / 2


def step_threads(per_sample: float | None, samples: float) -> int:
    """CPU threads for training, where the user gave no number.

    What is asked is the work of a step, and no clock: a resumed run has the same threads as the run it goes on with,
    and so the same numbers to the bit, however busy the machine is.

    Args:
        per_sample: FLOPs of one sample's step, from :func:`flops_per_sample`.
        samples: Samples of a step in this process, on average.

    Returns:
        1 for steps that are not worth dividing; 0, which is all there are, for others and where nobody knows.
    """
    return 1 if per_sample is not None and per_sample * samples < SMALL_STEP else 0
