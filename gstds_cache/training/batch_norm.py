"""Running statistics of batch normalisation, re-estimated from random rows once training is done.

While a network trains, its running means and variances follow the batches it is trained on. Where a selection prefers
hard rows, they describe hard rows, and testing with them costs accuracy: most at high filter ratios.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from itertools import chain
from typing import TypeAlias

import numpy as np
import torch
from jaxtyping import Float32, Int64
from torch import nn

from gstds_cache.errors import GstdsError, UsageError
from gstds_cache.seeding import rng_for
from gstds_cache.training.augment import to_input
from gstds_cache.training.images import ImageFeed
from gstds_cache.training.network import build_network

BatchNorm: TypeAlias = nn.modules.batchnorm._BatchNorm
BATCH = 256  # rows of a forward pass, at most


@torch.no_grad()
def reestimate_batch_norm(network: nn.Module, batches: Iterable[torch.Tensor]) -> int:
    """Replace the running statistics of batch normalisation by those of ``batches``.

    Call it before testing, with a few thousand random, unaugmented rows of the whole data set in batches of one size,
    e.g. 16 of 256. The statistics become the plain mean over the batches (``momentum=None`` in PyTorch's words), each
    batch counting once. Only batch normalisation is in training mode meanwhile: dropout is off, as it is in testing.

    Layers that were frozen with ``eval()`` are re-estimated as well; those without running statistics
    (``track_running_stats=False``) are left alone. On several ranks, pass every rank the same batches and the network
    inside its DistributedDataParallel (``model.module``).

    Args:
        network: The network. Its parameters, gradients and modes stay as they are.
        batches: Inputs of the network, each a tensor [B, ...] with B >= 2 on any device. Not read where there is
            nothing to re-estimate.

    Returns:
        The samples that passed through the network; 0 where it has no batch normalisation with running statistics.

    Raises:
        UsageError: ``batches`` is empty. On this and any other error the statistics are as they were.
    """
    norms = running_norms(network)
    if not norms:
        return 0
    device, samples = next(chain(network.parameters(), network.buffers())).device, 0
    with _fresh_statistics(network, norms):
        for batch in batches:
            network(batch.to(device))
            samples += len(batch)
        if not samples:
            raise UsageError("`batches`: got none, expected one or more", hint="a generator can be read only once")
    return samples


@contextmanager
def _fresh_statistics(network: nn.Module, norms: list[BatchNorm]) -> Iterator[None]:
    """Collect the plain mean of batch statistics, all else as in testing; after an error there are the old ones.

    Yields:
        Nothing.
    """
    modes = {module: module.training for module in network.modules()}
    momenta = [norm.momentum for norm in norms]
    before = [[buffer.clone() for buffer in norm.buffers()] for norm in norms]
    try:
        network.eval()
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the exact mean over the batches, not one that decays
            norm.train()
        yield
    except BaseException:
        for norm, saved in zip(norms, before, strict=True):
            for buffer, values in zip(norm.buffers(), saved, strict=True):
                buffer.copy_(values)
        raise
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, training in modes.items():
            module.training = training


def running_norms(network: nn.Module) -> list[BatchNorm]:
    """The layers of ``network`` that test with running statistics."""
    norms = [module for module in network.modules() if isinstance(module, BatchNorm)]
    return [norm for norm in norms if norm.running_mean is not None]


@lru_cache
def has_running_norms(arch: str, side: int) -> bool:
    """Whether an architecture tests with running statistics; True where it cannot be built, and training says why."""
    arch = arch.partition("?")[0]  # which weights it starts from changes nothing
    try:
        try:
            with torch.device("meta"):
                return bool(running_norms(build_network(arch, classes=2, side=side, seed=0)))
        except (RuntimeError, NotImplementedError):  # some read numbers while they are built, which meta has not
            return bool(running_norms(build_network(arch, classes=2, side=side, seed=0)))
    except (GstdsError, RuntimeError, ValueError):
        return True


def random_batches(items: int, samples: int, seed: int) -> list[Int64[np.ndarray, " _"]]:
    """Rows whose forward passes re-estimate the statistics, drawn once each from all rows.

    Args:
        items: Rows of the data set.
        samples: Rows to draw; all there are where there are fewer.
        seed: The run's seed, on which alone the rows depend.

    Returns:
        Rows of each batch, int64, of sizes that differ by one at most, as each counts the same.
    """
    rows = rng_for(seed, "norms").permutation(items)[:samples]
    return np.array_split(rows, -(-len(rows) // BATCH))


def random_inputs(
    feed: ImageFeed, batches: list[Int64[np.ndarray, " _"]]
) -> Generator[Float32[torch.Tensor, "B 3 S S"], None, None]:
    """The network's inputs for :func:`random_batches`, not augmented.

    Args:
        feed: The data set's pixels.
        batches: Rows of each batch.

    Yields:
        float32 [B, 3, S, S] of each batch, less the images that cannot be decoded; only where two or more are left.
    """
    for pixels in feed.decodable_batches(batches):
        if len(pixels) > 1:  # batch statistics of one sample are undefined
            yield to_input(pixels)
