"""Accuracy of a network on a data set it was not trained on."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from gstds_cache.data.loading import pixel_batches, worth_workers
from gstds_cache.data.source import ImageSource
from gstds_cache.runtime.devices import to_device
from gstds_cache.training.augment import to_input
from gstds_cache.training.distributed import Ranks
from gstds_cache.training.images import SquarePixels

BATCH = 256


@dataclass(frozen=True)
class Accuracy:
    """Accuracy with what it was measured on.

    Attributes:
        value: Share classified rightly, 0 to 1; None where there was no item to measure it on.
        items: Items it was measured on.
        undecodable: Items left out because they could not be decoded.
        unlabelled: Items left out because they have no label.
    """

    value: float | None
    items: int
    undecodable: int
    unlabelled: int


@torch.inference_mode()
def evaluate(
    network: nn.Module,
    source: ImageSource,
    device: torch.device,
    *,
    side: int,
    workers: int,
    ranks: Ranks | None = None,
) -> Accuracy:
    """Classify every item of ``source`` that has a label.

    Args:
        network: The network; left in eval mode.
        source: The data set.
        device: Where the network is.
        side: Side of the square images in pixels.
        workers: Processes that decode.
        ranks: Share the items out over these ranks; all of them have to call this.

    Returns:
        The accuracy, the same on every rank.
    """
    ranks = ranks or Ranks(device)
    ranks.same_buffers(network)
    network.eval()
    labels = torch.from_numpy(source.labels)
    labelled = np.flatnonzero(source.labels >= 0)
    batches = [labelled[start : start + BATCH].tolist() for start in range(0, len(labelled), BATCH)]
    batches = batches[ranks.rank :: ranks.world_size]
    items, undecodable = 0, 0
    rightly = torch.zeros((), dtype=torch.int64, device=device)  # counted there, so that the host does not wait
    workers, pin = worth_workers(source, side, workers), device.type == "cuda"
    decoded = pixel_batches(source, SquarePixels(side), (3, side, side), batches, workers=workers, pin=pin)
    with closing(decoded):
        for batch in decoded:
            failed = {row for row, _ in batch.failures}
            rows = [row for row in batch.rows if row not in failed]
            pixels = batch.pixels[[row not in failed for row in batch.rows]] if failed else batch.pixels
            predicted = network(to_input(to_device(pixels, device))).argmax(1)
            rightly += (predicted == to_device(labels[rows], device)).sum()
            items, undecodable = items + len(rows), undecodable + len(failed)
    right, items, undecodable = (int(count) for count in ranks.sums([int(rightly), items, undecodable]))
    return Accuracy(right / items if items else None, items, undecodable, len(source) - len(labelled))
