"""Rows of a store on a CUDA device: all of them, uploaded once, or those of each stack, copied under the computing.

A float16 row of 1,280 takes 2.5 KB, so that some 15 million of them fit beside the rest on a device of 80 GB. Gathering
a batch of 512 there takes about 1 us; through PCIe it takes 26, and the host's gathering before that 130 us of a core.
Rows stay as they are stored: products of float16 are exact in float32, and are divided by the rows' lengths afterwards.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import cache

import numpy as np
import torch
from jaxtyping import Float, Float32, Int32, Int64, Shaped
from torch import Tensor

from gstds_cache.errors import SolverError, UsageError
from gstds_cache.graph.cuda import inverse_lengths
from gstds_cache.graph.neighbors import ROWS_NAMED
from gstds_cache.runtime.devices import free_memory
from gstds_cache.runtime.threads import in_threads
from gstds_cache.store.reader import EmbeddingStore

SHARE = 0.6  # of the memory that is free on a device, for rows: the rest is for what is made of them
MOST_ROWS = 1 << 31  # that a stack is numbered in
CHECKED_ROWS = 1 << 16  # at once
STREAMED_BYTES = 256 << 20  # of rows that are copied at once
COPYING = -1  # the number of the stream that copies


class DeviceRows:
    """All rows of a store on a device."""

    def __init__(self, store: EmbeddingStore, device: torch.device, *, threads: int = 1) -> None:
        """Read the store once, shard by shard, and upload it.

        Args:
            store: The store; rows that have no embedding are zeros.
            device: Where the rows go.
            threads: Threads that read shards.

        Raises:
            SolverError: A row holds NaN or Inf.
        """
        spec = store.spec
        dtype = getattr(torch, spec.dtype)
        self._rows = torch.zeros(len(store), spec.dim, dtype=dtype, device=device)
        shards = sorted(store.commits)
        for shard, block in zip(shards, in_threads(store.shard, shards, threads), strict=True):
            span = spec.rows_of(shard)
            # Arrays that are read-only are none of torch's.
            self._rows[span.start : span.stop].copy_(torch.from_numpy(np.array(block)))
        inverse = torch.empty(len(store), device=device)
        for first in range(0, len(store), CHECKED_ROWS):
            # A sum's order depends on how many there are, if they are few: the last piece reaches back.
            some = slice(max(0, min(first, len(store) - CHECKED_ROWS)), first + CHECKED_ROWS)
            inverse[some] = _inverse(self._rows[some])
        self._inverse = inverse if dtype == torch.float16 else None
        self._refuse_nan(store, inverse)

    def most(self, nodes: int) -> int:
        """Batches of ``nodes`` rows that may be asked for at once: any number."""
        return MOST_ROWS // nodes

    def gather(self, rows: Int64[np.ndarray, " B"], out: Float[np.ndarray, "B D"]) -> None:
        """Back from the device: the store need not be read into memory for a few rows."""
        torch.from_numpy(out).copy_(self._rows[torch.from_numpy(rows).to(self._rows.device)])

    def of(
        self,
        indices: Int64[np.ndarray, "G B"],  # noqa: ARG002 - the other way to get at rows looks at these
        which: Int32[Tensor, "G B"],
    ) -> tuple[Float[Tensor, "G B D"], Float32[Tensor, "G B"] | None]:
        """Rows in the order of the device's current stream.

        Args:
            indices: Rows of the store, ``[G, B]``.
            which: The same on the device.

        Returns:
            The rows, ``[G, B, D]``, and 1 / length of each; None for float32 rows.
        """
        rows = self._rows.index_select(0, which.flatten()).view(*which.shape, -1)
        return rows, None if self._inverse is None else picked(self._inverse, which)

    @staticmethod
    def _refuse_nan(store: EmbeddingStore, inverse: Float32[Tensor, " N"]) -> None:
        bad: list[int] = (~inverse.isfinite()).nonzero().flatten().tolist()
        bad = sorted(set(bad) - set(store.without_embedding.tolist()))
        if bad:
            more = f" and {len(bad) - ROWS_NAMED} more" if len(bad) > ROWS_NAMED else ""
            raise SolverError(
                f"rows {bad[:ROWS_NAMED]}{more} of {store.location} hold NaN or Inf; expected finite embeddings",
                hint=f"check the store: gstds-cache verify {store.location}",
            )


class StreamedRows:
    """The rows of each stack: gathered by the CPU into pinned memory, and copied while the stack before is computed."""

    def __init__(self, store: EmbeddingStore, device: torch.device, *, threads: int = 1) -> None:
        """Nothing is read yet.

        Args:
            store: The store.
            device: Where the rows go.
            threads: Threads that gather.
        """
        self._store, self._device = store, device
        self._cuda = device.type == "cuda"
        self._pool = ThreadPoolExecutor(threads)
        self._stream = stream_of(device, COPYING) if self._cuda else None
        self._slots: list[tuple[Tensor, torch.cuda.Event | None]] = []
        self._turn = 0

    def most(self, nodes: int) -> int:
        """Batches of ``nodes`` rows that may be asked for at once: those that a buffer holds."""
        spec = self._store.spec
        return max(1, STREAMED_BYTES // (nodes * spec.dim * np.dtype(spec.dtype).itemsize))

    def gather(self, rows: Int64[np.ndarray, " B"], out: Float[np.ndarray, "B D"]) -> None:
        """From the store."""
        self._store.gather(rows, out)

    def of(
        self,
        indices: Int64[np.ndarray, "G B"],
        which: Int32[Tensor, "G B"],  # noqa: ARG002
    ) -> tuple[Float[Tensor, "G B D"], Float32[Tensor, "G B"] | None]:
        """As :meth:`DeviceRows.of`, by way of one of two buffers; the other may still be on its way to the device."""
        slot, copied = self._slot(indices.size)
        if copied is not None:
            copied.synchronize()
        shape = (*indices.shape, self._store.spec.dim)
        held = slot[: indices.size * shape[2]].view(shape)
        list(self._pool.map(self._store.gather, indices, held.numpy()))
        with torch.cuda.stream(self._stream) if self._stream is not None else nullcontext():
            rows = torch.empty(shape, dtype=held.dtype, device=self._device)
            rows.copy_(held, non_blocking=True)
            if self._stream is not None:
                copied = new_event()
                copied.record()
                self._slots[self._turn] = slot, copied
        if self._stream is not None and copied is not None:
            computing = torch.cuda.current_stream(self._device)
            computing.wait_event(copied)
            rows.record_stream(computing)
        self._turn ^= 1
        return rows, None

    def _slot(self, rows: int) -> tuple[Tensor, torch.cuda.Event | None]:
        spec = self._store.spec
        if len(self._slots) < 2 or self._slots[self._turn][0].numel() < rows * spec.dim:
            dtype = getattr(torch, spec.dtype)
            made = [torch.empty(rows * spec.dim, dtype=dtype, pin_memory=self._cuda) for _ in range(2)]
            for _, copied in self._slots:
                if copied is not None:
                    copied.synchronize()
            self._slots = [(buffer, None) for buffer in made]
        return self._slots[self._turn]


Rows = DeviceRows | StreamedRows


def choose_rows(store: EmbeddingStore, device: torch.device) -> tuple[bool, str]:
    """Whether all rows of a store go to a device, and why, in words.

    Args:
        store: The store, which was opened with an ``access``.
        device: Where rows are wanted.

    Returns:
        Whether they are uploaded once, and the reason.

    Raises:
        UsageError: They were asked for there, and do not fit.
    """
    asked, size = store.access_asked, f"{store.nbytes / 1e6:,.1f} MB of rows"
    if asked not in {"auto", "device"}:
        return False, f"{store.access_reason}; copied to {device} batch by batch"
    if device.type != "cuda":
        return True, f"all on {device}, {size}"
    free = free_memory(device)
    room = f"{free * SHARE / 1e6:,.1f} MB of the memory that is free on {device}"
    if store.nbytes <= free * SHARE:
        return True, f"all on {device}, {size}; they may take {room}"
    if asked == "device":
        raise UsageError(
            f"`access='device'`: got {size}, expected no more than {room}",
            hint="leave `access` out: rows are then copied there batch by batch",
        )
    return False, f"{store.access_reason}; copied to {device} batch by batch, since {size} are more than {room}"


def upload(array: np.ndarray, device: torch.device) -> Tensor:
    """Copy an array to a device in the order of its current stream, without waiting for it."""
    host = torch.from_numpy(np.ascontiguousarray(array))
    if device.type != "cuda":
        return host.clone()
    return host.pin_memory().to(device, non_blocking=True)


@cache
def stream_of(device: torch.device, number: int) -> torch.cuda.Stream:  # noqa: ARG001 - tells streams apart
    """A CUDA device's stream of a number, the same in every run: memory that torch keeps for it no other one gets."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def new_event() -> torch.cuda.Event:
    """An event with a time; whoever waits for it sleeps, as other threads may need the core."""
    return torch.cuda.Event(enable_timing=True, blocking=True)  # type: ignore[no-untyped-call]


def picked(x: Shaped[Tensor, " N"], which: Int32[Tensor, "G B"]) -> Shaped[Tensor, "G B"]:
    """The elements at ``which``."""
    return x.index_select(0, which.flatten()).view(which.shape)


def _inverse(rows: Float[Tensor, "R D"]) -> Float32[Tensor, " R"]:
    """1 / length; of float32 rows anything finite where the row is."""
    if rows.dtype == torch.float16:
        return inverse_lengths(rows)
    return torch.where(rows.isfinite().all(dim=1), 1.0, torch.nan)
