"""Searches by faiss: exact, within each graph of a stack. The only file that imports faiss, and not before it is asked.

On a GPU a search of 512 rows is a few short kernels, and starting them takes the host longer than they run. So a stack
is spread over several CUDA streams, each with scratch memory of its own for faiss, and fed by several threads, since
faiss works outside Python's lock. Results are written where they belong in two tensors of the stack.
"""

from __future__ import annotations

import functools
import importlib
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from gstds_cache.errors import UsageError
from gstds_cache.graph.neighbors import Candidates
from gstds_cache.runtime.threads import cores

LARGEST_K = 2048  # GPU_MAX_SELECTION_K of faiss
STREAMS = 8
"""CUDA streams on each GPU. One product of 512 x 512 occupies an eighth of a large one."""

SMALLEST_SCRATCH, LARGEST_SCRATCH = 8 << 20, 1536 << 20
"""Bytes of a stream's scratch memory; faiss never keeps more than the latter, and beyond it allocates at each call."""

INSTALL = "pip install faiss-gpu; without it choose `knn_backend='auto'` or `'torch'`"


def gpus() -> int:
    """GPUs that faiss sees; 0 where faiss is missing or was built without them."""
    try:
        import faiss
    except Exception:
        return 0
    return int(faiss.get_num_gpus())


def require_faiss(backend: str) -> None:
    """Make sure that faiss can run a backend here.

    Args:
        backend: ``faiss-cpu`` or ``faiss-gpu``.

    Raises:
        UsageError: There is no faiss, it cannot be loaded, or it sees no GPU where it needs one.
    """
    try:
        import faiss
    except ModuleNotFoundError as error:
        raise UsageError(f"{backend} was asked for, but faiss is not installed", hint=INSTALL) from error
    except Exception as error:
        raise UsageError(f"{backend} was asked for, but faiss cannot be loaded: {error}", hint=INSTALL) from error
    if backend == "faiss-gpu" and faiss.get_num_gpus() == 0:
        raise UsageError(
            "faiss-gpu was asked for, but faiss sees no GPU on this machine",
            hint="choose auto, torch or faiss-cpu; with a GPU, check that faiss-gpu is the faiss installed",
        )


def search_faiss_cpu(rows: Float32[Tensor, "G B D"], candidates: int) -> Candidates:
    """The largest inner products by ``faiss.knn``.

    Args:
        rows: Unit rows, ``[G, B, D]`` float32, any device.
        candidates: Rows to find, self included, at most B.

    Returns:
        Similarities ``[G, B, candidates]`` float32 and row numbers int64, on the device of ``rows``.
    """
    import faiss

    host = rows.cpu().numpy()
    results = [faiss.knn(graph, graph, candidates, metric=faiss.METRIC_INNER_PRODUCT) for graph in host]
    similarity, index = (torch.from_numpy(np.stack(part)).to(rows.device) for part in zip(*results, strict=True))
    return similarity, index


def search_faiss_gpu(rows: Float[Tensor, "G B D"], candidates: int) -> Candidates:
    """The largest inner products by faiss on a GPU, without a copy through the host and without waiting for the GPU.

    Any number of threads may call it. What follows on the current stream sees the results.

    Args:
        rows: Unit rows, ``[G, B, D]`` float32 or float16 (products are summed in float32); moved to the current CUDA
            device if they are elsewhere.
        candidates: Rows to find, self included, at most B and at most ``LARGEST_K``.

    Returns:
        Similarities ``[G, B, candidates]`` float32 and row numbers int64, on the device of ``rows``.
    """
    on_gpu = _on_gpu(rows).contiguous()
    shape = (*rows.shape[:2], candidates)
    similarity = torch.empty(shape, dtype=torch.float32, device=on_gpu.device)
    index = torch.empty(shape, dtype=torch.int64, device=on_gpu.device)
    _streams_of(on_gpu.device).search(on_gpu, similarity, index)
    return similarity.to(rows.device), index.to(rows.device)


def _on_gpu(rows: Float[Tensor, "G B D"]) -> Float[Tensor, "G B D"]:
    return rows if rows.is_cuda else rows.to("cuda")


@functools.cache
def _streams_of(device: torch.device) -> SearchStreams:
    """One set for each GPU, for the life of the process."""
    return SearchStreams(device)


@dataclass(eq=False)
class _SearchStream:
    """A CUDA stream, and what searches on it need for themselves.

    Attributes:
        resources: faiss's scratch memory and cuBLAS handle.
        cuda: The CUDA stream, which orders the use of both.
        search: faiss's description of a search; only the places of rows and results differ from graph to graph.
        scratch: Bytes of scratch memory that it has.
    """

    resources: Any
    cuda: Any
    search: Any
    scratch: int

    def make_ready(self, needed: int, rows: Float[Tensor, "G B D"], candidates: int, device: torch.device) -> None:
        """Describe the searches of a stack, and have so much scratch memory for them, up to ``LARGEST_SCRATCH``.

        What is missing faiss would allocate, and free, in every call; both wait for the GPU.
        """
        import faiss

        needed = min(needed, LARGEST_SCRATCH)
        if self.scratch < needed:
            self.scratch = min(LARGEST_SCRATCH, 1 << (needed - 1).bit_length())
            self.resources.setTempMemory(self.scratch)
        search = self.search
        search.metric, search.device = faiss.METRIC_INNER_PRODUCT, device.index
        search.k, search.dims = candidates, rows.shape[2]
        search.numVectors = search.numQueries = rows.shape[1]
        half = rows.dtype == torch.float16
        search.vectorType = search.queryType = faiss.DistanceDataType_F16 if half else faiss.DistanceDataType_F32
        search.outIndicesType = faiss.IndicesDataType_I64

    def find(
        self,
        graph: int,
        rows: Float[Tensor, "G B D"],
        similarity: Float32[Tensor, "G B c"],
        index: Int64[Tensor, "G B c"],
    ) -> None:
        """Start the search of one graph of the stack."""
        import faiss

        search = self.search
        search.vectors = search.queries = faiss.cast_integer_to_void_ptr(_address(rows, graph))
        search.outDistances = faiss.cast_integer_to_float_ptr(_address(similarity, graph))
        search.outIndices = faiss.cast_integer_to_idx_t_ptr(_address(index, graph))
        faiss.bfKnn(self.resources, search)


def _address(stack: Tensor, graph: int) -> int:
    return stack.data_ptr() + graph * stack.stride(0) * stack.element_size()


class SearchStreams:
    """The streams of one GPU, and the threads that feed them. Any number of threads may search; they take turns."""

    def __init__(self, device: torch.device, streams: int = STREAMS, threads: int | None = None) -> None:
        """Take streams and little memory; faiss takes the scratch memory with the first search.

        Args:
            device: The GPU, with its number.
            streams: How many.
            threads: How many feed them, each some of the streams; 1 is the thread that searches. By default as many as
                there are cores for, up to one a stream.
        """
        self._device, self._backend = device, getattr(torch, device.type)
        self._turn = threading.Lock()
        self._streams = [self._new_stream() for _ in range(streams)]
        self._threads = min(streams, cores() if threads is None else threads)
        # No thread starts before it is needed. faiss goes back to a thread's GPU after each call: to another it would
        # cost memory on that one.
        self._pool = ThreadPoolExecutor(self._threads, "faiss", self._backend.set_device, (device,))

    def _new_stream(self) -> _SearchStream:
        faiss: Any = importlib.import_module("faiss")  # its types lack what it has on a GPU alone
        resources, stream = faiss.StandardGpuResources(), self._backend.Stream(device=self._device)
        resources.setPinnedMemory(0)  # 256 MiB by default, for copies from the host, of which there are none
        resources.setTempMemory(SMALLEST_SCRATCH)
        resources.setDefaultStream(self._device.index, faiss.cast_integer_to_cudastream_t(stream.cuda_stream))
        return _SearchStream(resources, stream, faiss.GpuDistanceParams(), SMALLEST_SCRATCH)

    def search(
        self, rows: Float[Tensor, "G B D"], similarity: Float32[Tensor, "G B c"], index: Int64[Tensor, "G B c"]
    ) -> None:
        """Fill ``similarity`` and ``index``, as seen by what is put on the current stream from now on.

        Args:
            rows: On this GPU, contiguous, float32 or float16.
            similarity: Where the ``c`` largest products of each row go, contiguous.
            index: Where the numbers of their rows go, contiguous.
        """
        _, nodes, dim = rows.shape
        needed = scratch_bytes(nodes, dim, similarity.shape[2])
        streams = self._streams[: max(1, min(len(rows), LARGEST_SCRATCH // needed))]  # a few large graphs fill a GPU
        threads = min(self._threads, len(streams))

        def feed(thread: int) -> None:
            mine = streams[thread::threads]
            for first in range(0, len(rows), len(streams)):
                for graph, stream in zip(range(first + thread, len(rows), threads), mine, strict=False):
                    stream.find(graph, rows, similarity, index)

        with self._turn, self._around(streams):
            for stream in streams:
                stream.make_ready(needed, rows, similarity.shape[2], self._device)
            if threads == 1:
                feed(0)
                return
            fed = [self._pool.submit(feed, thread) for thread in range(threads)]
            try:
                for one in fed:
                    one.result()
            finally:
                wait(fed)  # they write to memory that is the caller's

    @contextmanager
    def _around(self, streams: list[_SearchStream]) -> Iterator[None]:
        """Streams begin after what the current stream holds by now, and what it gets from now on waits for them."""
        current = self._backend.current_stream(self._device)
        for stream in streams:
            stream.cuda.wait_stream(current)
        try:
            yield
        finally:
            for stream in streams:
                current.wait_stream(stream.cuda)


def scratch_bytes(nodes: int, dim: int, candidates: int) -> int:
    """What faiss takes at once for one graph: two tiles of similarities, and what was found in each tile.

    A tile is up to 512 rows (1,024 where D is at most 32) by up to 131,072 columns.
    """
    rows, columns = min(nodes, 512 if dim > 32 else 1024), min(nodes, 1 << 17)
    found = rows * candidates * -(-nodes // columns) * (4 + 8)
    return 2 * (4 * rows * columns + found) + 4 * nodes + (64 << 10)
