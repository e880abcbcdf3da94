"""Losses of steps: known at once on a CPU; on a GPU read in blocks, one block late, so that the host never waits.

A host that asks for each step's loss gives the GPU no work while it waits for the answer. Here the losses of a block of
steps are copied to page-locked memory behind the steps, and read when the next block is handed over: then the copy is
long done, and the GPU still has that next block to do. Blocks take about a quarter of a second, so that several ranks,
which agree on stopping along with the losses, do so in time.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from jaxtyping import Float32, Float64
from torch import Tensor, distributed

from gstds_cache.runtime.devices import to_device
from gstds_cache.training.distributed import Ranks

BLOCK_SECONDS = 0.25
MOST_STEPS = 64  # of a block


Losses: TypeAlias = list[tuple[int, float]]
"""Steps and their losses, the mean over the step's rows of all ranks, in order."""


@dataclass(frozen=True, eq=False)
class _Block:
    """A block on its way to the host.

    Attributes:
        first: Its first step.
        values: Losses, then two numbers of the ranks: how many want to stop, and how long rank 0 wants a block to be.
        arrived: Waits until they are there.
        told: Whether its losses have been given out, and only what ranks agree on is left to be read.
    """

    first: int
    values: Float64[Tensor, " _"]
    arrived: Callable[[], object]
    told: bool = False


class StepLosses:
    """Collects the losses of steps; each becomes known once.

    All ranks have to call :meth:`add` and :meth:`end_block` after the same steps; :meth:`wait` is this rank's alone.

    Attributes:
        deferred: Whether losses are read in blocks.
        stop: Whether to stop now, the same on every rank: one rank alone stops when it wants to, several when all know.
    """

    def __init__(self, ranks: Ranks, *, deferred: bool | None = None) -> None:
        """Nothing is collected yet.

        Args:
            ranks: This rank.
            deferred: Whether losses are read in blocks; None, where the device is a GPU.
        """
        self._ranks = ranks
        self.deferred = ranks.device.type == "cuda" if deferred is None else deferred
        self.stop = False
        self._losses: list[Float32[Tensor, ""]] = []  # of the block that is collected
        self._block_steps, self._first, self._wants_stop = 1, 0, False
        self._begun = time.perf_counter()
        self._sent: _Block | None = None

    def add(self, step: int, loss: Float32[Tensor, ""], wants_stop: bool) -> Losses:
        """Take over a step's loss.

        Args:
            step: The step.
            loss: This rank's part of its loss times the number of ranks.
            wants_stop: Whether this rank wants to stop.

        Returns:
            What became known.
        """
        if not self.deferred:
            value, wanted = self._ranks.sums([float(loss.detach()) / self._ranks.world_size, float(wants_stop)])
            self.stop = bool(wanted)
            return [(step, value)]
        if not self._losses:
            self._first = step
        self._losses.append(loss.detach())
        self._wants_stop |= wants_stop
        self.stop |= wants_stop and self._ranks.world_size == 1
        return self.end_block() if len(self._losses) >= self._block_steps else []

    def end_block(self) -> Losses:
        """Send what is collected on its way, and read what was sent before.

        Returns:
            What became known.
        """
        if not self._losses:
            return []
        # From one such moment to the next, with the wait for an earlier block: what the GPU takes, where that is more.
        seconds = time.perf_counter() - self._begun
        self._begun += seconds
        sent, self._sent = self._sent, self._send(round(BLOCK_SECONDS * len(self._losses) / seconds))
        self._losses = []
        return [] if sent is None else self._read(sent)

    def wait(self) -> Losses:
        """Wait for the device, until all that was taken over is known.

        What ranks agree on, when to stop and how long a block is, is left until the next block is sent, which they do
        after the same steps: each rank saves, and so waits, by its own clock.

        In the middle of a block, which happens where a selection ends in an error, several ranks do not add up its
        losses: this rank's stand for all.

        Returns:
            What became known.
        """
        known: Losses = []
        if self._ranks.world_size == 1:
            known += self.end_block()
        if self._sent is not None and not self._sent.told:
            self._sent.arrived()
            known += enumerate(self._sent.values[:-2].tolist(), self._sent.first)
            self._sent = replace(self._sent, told=True)
        known += [(self._first + place, float(loss)) for place, loss in enumerate(self._losses)]
        self._losses = []
        return known

    def _send(self, steps: int) -> _Block:
        """Send the block; with it rank 0's wish for a number of steps, which comes back to every rank."""
        wish = steps if self._ranks.first else 0
        extra = to_device(torch.tensor([self._wants_stop, wish], dtype=torch.float64), self._ranks.device)
        values = torch.cat([torch.stack(self._losses).double() / self._ranks.world_size, extra])
        if self._ranks.world_size > 1:
            distributed.all_reduce(values)
        if values.device.type != "cuda":
            return _Block(self._first, values, lambda: None)
        here = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        here.copy_(values, non_blocking=True)
        arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        arrived.record(torch.cuda.current_stream(values.device))  # not of the current device, which may be another
        return _Block(self._first, here, arrived.synchronize)

    def _read(self, block: _Block) -> Losses:
        block.arrived()
        *losses, stop, steps = block.values.tolist()
        self.stop |= stop > 0
        # At most twice as long: until the host has waited for a block, steps seem as quick as asking for them.
        self._block_steps = max(1, min(int(steps), 2 * self._block_steps, MOST_STEPS))
        return [] if block.told else list(enumerate(losses, block.first))
