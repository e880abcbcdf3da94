"""cuda/rule.cu against the rule written out for a CPU: the same rows, to the last bit, for the same eigenvectors."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gstds_cache.cuda import launch
from gstds_cache.seeding import keys_for, rng_for
from gstds_cache.selection.cuda_rule import Draws, cells_bytes, finish, finish_bytes, keep_of_cells
from gstds_cache.selection.rule import RuleBatch, round_ties
from gstds_cache.selection.rules import RULES
from gstds_cache.selection.strata import GOLDEN
from gstds_cache.spectral.result import canonical_sign

SIZES = (33, 64, 100, 127, 128, 129, 257, 512, 1030)
SCHEDULES = ((1, "ascending"), (7, "shuffled"), (64, "descending"), (256, "shuffled"))


def vectors(kind: str, rng: np.random.Generator, graphs: int, q: int, rows: int) -> torch.Tensor:
    """Eigenvectors with ties of several kinds, [G, Q, B]."""
    x = rng.standard_normal((graphs, q, rows))
    if kind == "rounded":
        x = np.round(x, 1)
    elif kind == "signs":
        x = rng.integers(-1, 2, x.shape).astype(float)
    elif kind == "duplicates":
        x = np.repeat(x[:, :, : -(-rows // 8)], 8, axis=2)[:, :, :rows] * (1 + 1e-9 * rng.standard_normal(x.shape))
    elif kind == "constant":
        x[:] = 0
        x[:, :, :3] = -1
    elif kind == "equals":  # of both signs, within the tie
        x[:, :, rows // 2 :] = -x[:, :, : rows - rows // 2] * (1 + 1e-7)
    return torch.from_numpy(x / np.maximum(np.linalg.norm(x, axis=2, keepdims=True), 1e-300))


def guidances(rng: np.random.Generator, graphs: int, rows: int) -> list[np.ndarray | None]:
    some = np.round(rng.random((graphs, rows)), 1) * (rng.random((graphs, rows)) < 0.3)
    return [None, rng.random((graphs, rows)), np.zeros((graphs, rows)), some]


@pytest.mark.parametrize("kind", ["normal", "rounded", "signs", "duplicates", "constant", "equals"])
def test_the_rows_are_those_of_the_rule_on_a_cpu(emulated_kernels, monkeypatch, kind: str) -> None:
    rng = np.random.default_rng(len(kind))
    graphs, compared = 3, 0
    for turn, rows in enumerate(SIZES):
        q = 8 if turn % 2 else int(rng.integers(1, 8))
        basis, values = vectors(kind, rng, graphs, q, rows), np.sort(rng.random((graphs, q)), axis=1)
        values[0, -1] = [values[0, -1], np.inf][turn % 2]
        keeps = np.array([rng.integers(1, rows + 1), rows // 4, [1, rows, 2][turn % 3]], np.int32)
        repeat, group, seed = rng.integers(0, 30, graphs), np.arange(graphs), turn
        guidance = guidances(rng, graphs, rows)[turn % 4]
        expected = canonical_sign(basis.mT.contiguous())
        rule = RULES[("cells", "cells-squared")[turn // 2 % 2]]
        for threads, schedule in SCHEDULES[:: 1 if rows < 200 else 3]:
            for kernel in ("finish_block", "cells_block"):
                emulated = emulated_kernels("rule.cu", kernel)
                emulated.threads, emulated.schedule = threads, schedule
            finished = basis.clone()
            finish(finished)
            for g in range(graphs):
                assert finished[g].numpy().T.tobytes() == round_ties(expected[g].numpy()).tobytes(), (rows, g)
            draws = Draws(
                guidance=None if guidance is None else torch.from_numpy(guidance),
                keys=torch.from_numpy(keys_for(seed, "steady", 0 * group, group).view(np.int64)),
                turned=torch.from_numpy(repeat * GOLDEN),
                keeps=torch.from_numpy(keeps),
                most=int(keeps.max()),
            )
            for limit in (227 << 10, cells_bytes(rows, q, draws.most, far=True)):  # points in global memory as well
                monkeypatch.setattr(launch, "shared_memory_limit", lambda _device, limit=limit: limit)
                kept = keep_of_cells(rule, finished, torch.from_numpy(values), draws)
                for g in range(graphs):
                    seen = RuleBatch(
                        vector=finished[g, 0].numpy(),
                        keep=int(keeps[g]),
                        basis=np.ascontiguousarray(finished[g].numpy().T),
                        values=values[g],
                        guidance=np.ones(rows) if guidance is None else guidance[g],
                        repeat=int(repeat[g]),
                        per_batch_rng=rng_for(seed, "steady", 0, g),
                    )
                    want = rule(seen)
                    got = kept.positions[g, : keeps[g]].numpy().view(np.uint16)
                    assert got.tolist() == want.tolist(), (rows, q, keeps[g], threads, schedule, limit)
                    assert kept.score[g, : keeps[g]].numpy().tobytes() == seen.vector[want].astype(np.float32).tobytes()
                    compared += 1
    assert compared > 100


def test_the_bytes_of_a_block_are_those_of_the_kernel(emulated_kernels) -> None:
    library = emulated_kernels("rule.cu", "cells_block").library
    assert library.finish_bytes(8) == finish_bytes(8)
    for rows, q, most, far in ((33, 1, 1, 0), (512, 8, 128, 0), (700, 3, 700, 1), (8192, 8, 2048, 1)):
        assert cells_bytes(rows, q, most, far=bool(far)) == library.cells_bytes(rows, q, most, far)


def test_numbers_that_are_none_keep_rows_of_the_batch(emulated_kernels) -> None:
    """What a graph that did not converge leaves behind does no harm: its rule is run on the CPU."""
    emulated_kernels("rule.cu", "cells_block").threads = 64
    basis = torch.full((1, 8, 100), torch.nan, dtype=torch.float64)
    draws = Draws(
        guidance=None,
        keys=torch.zeros(1, 2, dtype=torch.int64),
        turned=torch.zeros(1, dtype=torch.float64),
        keeps=torch.tensor([25], dtype=torch.int32),
        most=25,
    )
    finish(basis)
    kept = keep_of_cells(RULES["cells"], basis, torch.full((1, 8), torch.nan, dtype=torch.float64), draws)
    assert ((kept.positions >= 0) & (kept.positions < 100)).all()
