"""faiss's search on a GPU without one: all of it but ``faiss.bfKnn``, in whose place ``faiss.knn`` reads and writes."""

from __future__ import annotations

import ctypes
import functools

import numpy as np
import torch

from gstds_cache.graph import faiss_search


class Stream:
    """A stream that only writes down who waits for whom."""

    cuda_stream = 0

    def __init__(self, log, name="", device=None):
        self.log, self.name, self.device = log, name or f"stream {len(log)}", device
        log.append((self.name, "new"))

    def wait_stream(self, other):
        self.log.append((self.name, "waits for", other.name))


def _at(pointer, shape, kind):
    size = int(np.prod(shape)) * np.dtype(kind).itemsize
    return np.frombuffer((ctypes.c_char * size).from_address(int(pointer)), kind).reshape(shape)


def bf_knn(resources, search):
    """``faiss.bfKnn`` by ``faiss.knn``: the same description of a search, at the same addresses."""
    import faiss

    kinds = {faiss.DistanceDataType_F32: np.float32, faiss.DistanceDataType_F16: np.float16}
    assert isinstance(resources, faiss.StandardGpuResources)
    assert search.vectorType == search.queryType
    assert search.outIndicesType == faiss.IndicesDataType_I64
    assert search.numVectors == search.numQueries
    assert int(search.vectors) == int(search.queries)
    rows = _at(search.vectors, (search.numVectors, search.dims), kinds[search.vectorType]).astype(np.float32)
    found = (search.numQueries, search.k)
    similarity, index = _at(search.outDistances, found, np.float32), _at(search.outIndices, found, np.int64)
    similarity[:], index[:] = faiss.knn(rows, rows, search.k, metric=search.metric)


def on_cpu(monkeypatch, search=bf_knn):
    """Let ``search_faiss_gpu`` run on tensors of the CPU; returns the log of streams and searches."""
    import faiss  # not by tests of other backends, on a machine without it

    log = []

    def logged(resources, description):
        log.append(("search", id(resources)))
        search(resources, description)

    current = Stream(log, "current")
    monkeypatch.setattr(faiss, "bfKnn", logged)
    monkeypatch.setattr(torch.cpu, "Stream", functools.partial(Stream, log))
    monkeypatch.setattr(torch.cpu, "current_stream", lambda _device: current)
    monkeypatch.setattr(faiss_search, "_on_gpu", lambda rows: rows)
    monkeypatch.setattr(faiss_search, "_streams_of", functools.cache(lambda _device: streams()))
    return log


def streams(*arguments, **options):
    """SearchStreams of a device that is the CPU."""
    return faiss_search.SearchStreams(torch.device("cpu", 0), *arguments, **options)
