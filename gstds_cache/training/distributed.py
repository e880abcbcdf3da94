"""Several processes on one run: who is which rank, and the few things they have to agree on."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import distributed, nn

from gstds_cache.config import as_type
from gstds_cache.errors import GstdsError, UsageError
from gstds_cache.runtime.devices import resolve_device
from gstds_cache.stream.ranks import TAIL, Tail, require_rank

T = TypeVar("T")


def default_ranks(rank: int | None, world_size: int | None, tail: Tail = TAIL) -> tuple[int, int]:
    """This process's rank and the number of ranks.

    Where they are not given, they are torch.distributed's once a process group is there; before that, RANK and
    WORLD_SIZE as torchrun sets them; else one rank alone. (PyTorch's ``DistributedSampler`` refuses to be made before
    the process group; a sampler that then took every row on every rank would be worse.)

    Returns:
        rank, world size.

    Raises:
        UsageError: One of the two is given without the other, or they do not fit together, or ``tail`` is unknown.
    """
    rank, world_size = as_type("rank", rank, int | None), as_type("world_size", world_size, int | None)
    if (rank is None) != (world_size is None):
        raise UsageError(f"got rank={rank} and world_size={world_size}, expected both or neither")
    if rank is None or world_size is None:
        if distributed.is_available() and distributed.is_initialized():
            rank, world_size = distributed.get_rank(), distributed.get_world_size()
        else:
            rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    require_rank(rank, world_size, tail)
    return rank, world_size


@dataclass(frozen=True)
class Ranks:
    """This process among the processes of a run. One process alone needs no process group.

    Attributes:
        device: Where this rank computes.
        rank: This process, from 0; rank 0 writes what is written.
        world_size: How many there are.
    """

    device: torch.device
    rank: int = 0
    world_size: int = 1

    @property
    def first(self) -> bool:
        """Whether this rank is the one that writes."""
        return self.rank == 0

    def wrap(self, network: nn.Module) -> nn.Module:
        """``network`` with gradients averaged over the ranks; on CUDA with batch statistics of the global batch.

        PyTorch has synchronised batch statistics for CUDA alone. On a CPU each rank normalises by its own slice.
        """
        if self.world_size == 1:
            return network
        if self.device.type == "cuda":
            network = nn.SyncBatchNorm.convert_sync_batchnorm(network)  # type: ignore[no-untyped-call]
        return nn.parallel.DistributedDataParallel(
            network, device_ids=[self.device] if self.device.type == "cuda" else None
        )

    def alone(self, model: nn.Module) -> AbstractContextManager[None]:
        """A context in which backward passes through ``model`` leave gradients on their rank; a later one sums them."""
        if isinstance(model, nn.parallel.DistributedDataParallel):
            return model.no_sync()
        return nullcontext()

    def sums(self, values: Sequence[float | int]) -> list[float]:
        """Each value summed over the ranks; every rank gets the same. All ranks have to ask."""
        if self.world_size == 1:
            return [float(value) for value in values]
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        distributed.all_reduce(total)
        return [float(value) for value in total.tolist()]

    def gather(self, value: T) -> list[T]:
        """The ``value`` of each rank, in order; every rank gets the same. All ranks have to ask."""
        if self.world_size == 1:
            return [value]
        values: list[T] = [value] * self.world_size
        distributed.all_gather_object(values, value)
        return values

    def same_buffers(self, network: nn.Module) -> None:
        """Give every rank the running statistics of rank 0, which are those in the checkpoint."""
        if self.world_size > 1:
            for buffer in network.buffers():
                distributed.broadcast(buffer, 0)

    def wait(self) -> None:
        """Go on when all ranks are here."""
        if self.world_size > 1:
            distributed.barrier()

    def after_first(self, work: Callable[[], T]) -> T:
        """Do ``work`` on rank 0, then on the others; all are done when this returns. All ranks have to ask.

        Args:
            work: What to do, e.g. look at what only rank 0 may hold.

        Returns:
            What it returned here.

        Raises:
            GstdsError: Rank 0 raised it. Every rank does then: none waits for one that has ended.
        """
        if self.world_size == 1:
            return work()
        met: list[GstdsError | None] = [None]
        done: list[T] = []
        if self.first:
            try:
                done.append(work())
            except GstdsError as error:
                met = [error]
        distributed.broadcast_object_list(met, src=0)
        if met[0] is not None:
            raise met[0]
        result = done[0] if self.first else work()
        self.wait()
        return result


@contextmanager
def process_group(device: str) -> Iterator[Ranks]:
    """Join the processes that torchrun started: NCCL where each has a CUDA device of its own, else gloo.

    A process group that is there already is used, and left as it is.

    Args:
        device: ``auto``, ``cpu`` or ``cuda``, which means this rank's own device, or ``cuda:N``.

    Yields:
        This process's place. Outside torchrun, one rank alone.

    Raises:
        UsageError: Several ranks were given one and the same device.
    """
    rank, world_size = default_ranks(None, None)
    own = resolve_device(device)
    if world_size == 1:
        yield Ranks(own)
        return
    if own.type == "cuda":
        if device not in {"auto", "cuda"}:
            raise UsageError(
                f"`device`: got {device!r}, but {world_size} ranks need a device each", hint="pass `device='cuda'`"
            )
        own = resolve_device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}")
    joined_before = distributed.is_initialized()
    with torch.cuda.device(own) if own.type == "cuda" else nullcontext():
        if not joined_before:
            distributed.init_process_group("nccl" if own.type == "cuda" else "gloo")
        try:
            yield Ranks(own, rank, world_size)
        finally:
            if not joined_before:
                # A wrapped network is a cycle that holds the group. Left to the end of the process, the group's threads
                # are still running when they are taken down, and the process aborts (seen in one of three runs).
                gc.collect()
                distributed.destroy_process_group()
