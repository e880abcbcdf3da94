"""The probe's optimiser against torch's."""

from __future__ import annotations

import math

import torch
from torch import nn

from gstds_cache.selection.linear_probe import BETAS, EPSILON, FASTEST, FoldProbe, ProbeSettings


def test_a_step_is_that_of_torchs_adamw() -> None:
    dimensions, classes, steps, settings = 24, 5, 40, ProbeSettings()  # so few dimensions that the rate is FASTEST
    rng = torch.Generator().manual_seed(0)
    labels = torch.randint(0, classes, (steps, 32), generator=rng)
    x = torch.randn(steps, 32, dimensions + 1, generator=rng) + nn.functional.one_hot(labels, dimensions + 1)
    ours = FoldProbe(0, torch.zeros(dimensions + 1, classes), settings, steps * 32)
    theirs = torch.zeros(dimensions + 1, classes, requires_grad=True)
    optimizer = torch.optim.AdamW([theirs], lr=FASTEST, betas=BETAS, eps=EPSILON, weight_decay=settings.decay / FASTEST)
    for step in range(steps):
        ours.learn(x[step], labels[step])
        optimizer.param_groups[0]["lr"] = FASTEST * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.zero_grad()
        nn.functional.cross_entropy(x[step] @ theirs, labels[step]).backward()
        optimizer.step()
    assert ours.weight.abs().max() > 0.1
    assert torch.allclose(ours.weight, theirs, atol=1e-5)
