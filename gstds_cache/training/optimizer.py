"""The optimiser and its learning rate: SGD with Nesterov momentum, one cycle over the whole run."""

from __future__ import annotations

import math

import torch
from torch import nn

from gstds_cache.config import TrainConfig

WARM_UP = 0.25  # share of the steps in which the learning rate rises


def build_optimizer(network: nn.Module, config: TrainConfig) -> torch.optim.SGD:
    """SGD over ``network``'s parameters; biases and norms (one dimension) have no weight decay."""
    return torch.optim.SGD(
        [
            {"params": [p for p in network.parameters() if p.ndim > 1], "weight_decay": config.weight_decay},
            {"params": [p for p in network.parameters() if p.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=config.lr,
        momentum=config.momentum,
        nesterov=config.momentum > 0,
    )


def one_cycle(step: int, total: int) -> float:
    """Share of the peak learning rate at ``step`` of ``total``: up in a straight line, down along a cosine to nearly 0.

    Smith & Topin 2018, "Super-convergence", with the cosine of Loshchilov & Hutter 2017 for the way down.
    """
    rise = max(1, round(WARM_UP * total))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step + 1 - rise) / (total + 1 - rise)))
