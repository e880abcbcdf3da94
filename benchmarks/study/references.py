"""Reference losses other than the probe's, for variants of drawing by losses (``variants.py``)."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float32, Int64, UInt8
from torch import nn

from gstds_cache.seeding import rng_for
from gstds_cache.training.augment import augment, to_input
from gstds_cache.training.network import build_network
from gstds_cache.training.optimizer import one_cycle

NEIGHBOURS, DIMENSIONS, BLOCK = 20, 128, 2048
EPOCHS, STEP = 3, 64


def neighbours_losses(
    embeddings: Float32[np.ndarray, "N D"], labels: Int64[np.ndarray, " N"], count: int = NEIGHBOURS
) -> Float32[np.ndarray, " N"]:
    """-log of the share of a row's nearest neighbours that have its label; a row is none of its own neighbours.

    Neighbours by cosine in the first 128 principal directions. One neighbour is added, with labels in equal parts, so
    that no loss is infinite.
    """
    rows = torch.from_numpy(embeddings)
    _, vectors = torch.linalg.eigh(rows.T @ rows)
    short = rows @ vectors[:, -DIMENSIONS:]
    short /= short.norm(dim=1, keepdim=True).clamp_min(1e-12)
    target, classes = torch.from_numpy(labels), int(labels.max()) + 1
    same = torch.empty(len(rows))
    for start in range(0, len(rows), BLOCK):
        cosines = short[start : start + BLOCK] @ short.T
        cosines[torch.arange(len(cosines)), torch.arange(start, start + len(cosines))] = -2.0
        near = cosines.topk(count, dim=1).indices
        same[start : start + BLOCK] = (target[near] == target[start : start + BLOCK, None]).float().sum(1)
    return (-torch.log((same + 1 / classes) / (count + 1))).numpy()


def proxy_losses(
    pixels: UInt8[torch.Tensor, "N 3 S S"], labels: Int64[np.ndarray, " N"], arch: str, lr: float
) -> Float32[np.ndarray, " N"]:
    """Held-out losses of ``arch`` on images of half the side, each half of the rows judged by the other's network.

    Three epochs with random shifts (and no mirroring, which a data set need not allow), from seed 0.
    """
    side = pixels.shape[-1] // 2
    small = torch.cat(
        [nn.functional.avg_pool2d(part.float(), 2).round().to(torch.uint8) for part in pixels.split(BLOCK)]
    )
    target, losses = torch.from_numpy(labels), torch.empty(len(labels))
    order = torch.from_numpy(rng_for(0, "proxy").permutation(len(labels)))
    halves = order.chunk(2)
    for own, other in (halves, halves[::-1]):
        network = build_network(arch, classes=int(labels.max()) + 1, side=side, seed=0)
        network = network.to(memory_format=torch.channels_last)
        steps = [step for epoch in range(EPOCHS) for step in _shuffled(own, epoch).split(STEP)]
        optimizer = torch.optim.SGD(network.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4, nesterov=True)
        for number, rows in enumerate(steps):
            optimizer.param_groups[0]["lr"] = lr * one_cycle(number, len(steps))
            shifted = augment(small[rows], shift=side // 8, mirror=False, seed=0, step=number)
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(to_input(shifted)), target[rows]).backward()
            optimizer.step()
        network.eval()
        with torch.inference_mode():
            for rows in other.split(BLOCK):
                found = nn.functional.cross_entropy(network(to_input(small[rows])), target[rows], reduction="none")
                losses[rows] = found
    return losses.numpy()


def _shuffled(rows: Int64[torch.Tensor, " n"], epoch: int) -> Int64[torch.Tensor, " n"]:
    return rows[torch.from_numpy(rng_for(0, "proxy", epoch).permutation(len(rows)))]
