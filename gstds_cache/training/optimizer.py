"""The optimiser and its learning rate: SGD with Nesterov momentum, one cycle over the whole run."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from gstds_cache.config import TrainConfig

WARM_UP = 0.25  # share of the steps in which the learning rate rises


def build_optimizer(network: nn.Module, config: TrainConfig) -> torch.optim.SGD:
    """SGD over ``network``'s parameters; biases and norms (one dimension) have no weight decay.

    On CUDA all parameters of a group are updated by one kernel (``fused``).
    """
    fused = True if all(p.is_cuda for p in network.parameters()) else None
    return torch.optim.SGD(
        [
            {"params": [p for p in network.parameters() if p.ndim > 1], "weight_decay": config.weight_decay},
            {"params": [p for p in network.parameters() if p.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=config.lr,
        momentum=config.momentum,
        nesterov=config.momentum > 0,
        fused=fused,
    )


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Go on from ``state``, which may be of another device: how this one computes its update stays."""
    own = [{name: group[name] for name in ("fused", "foreach")} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, ways in zip(optimizer.param_groups, own, strict=True):
        group.update(ways)


def one_cycle(step: int, total: int) -> float:
    """Share of the peak learning rate at ``step`` of ``total``: up in a straight line, down along a cosine to nearly 0.

    Smith & Topin 2018, "Super-convergence", with the cosine of Loshchilov & Hutter 2017 for the way down.
    """
    rise = max(1, round(WARM_UP * total))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step + 1 - rise) / (total + 1 - rise)))
