"""The kernels on a GPU: as their emulation, the same bits again and in every stack, and the rows that a CPU keeps."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from emulated import WHY_NOT, EmulatedKernels
from no_sync import forbid_waiting
from sklearn.datasets import load_digits

from gstds_cache.cuda import build, launch
from gstds_cache.graph.cuda import GraphStack, graph_stack, products
from gstds_cache.graph.knn import nearest
from gstds_cache.graph.neighbors import normalized_rows
from gstds_cache.selection.rule import RuleBatch, round_ties
from gstds_cache.selection.rules import find_rule
from gstds_cache.spectral.block import fiedler_of_stack, solve_stack
from gstds_cache.spectral.fiedler import fiedler_vectors

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
OPTIONS = {"laplacian": "combinatorial", "tolerance": 1e-6, "max_iterations": 500, "seed": 0}


def batches(g, b, d=128, noise=0.5, seed=0):
    gen = torch.Generator().manual_seed(seed)
    centres = torch.randn(10, d, generator=gen)
    return (centres[torch.randint(10, (g, b), generator=gen)] + noise * torch.randn(g, b, d, generator=gen)).half()


def to_cpu(stack):
    return GraphStack(**{name: value.cpu() for name, value in vars(stack).items()})


def assert_equal(part, whole, keep):
    for name, value in vars(part).items():
        if name != "finite":
            assert torch.equal(value, getattr(whole, name)[keep]), name


@pytest.mark.parametrize("device", range(torch.cuda.device_count()))
def test_kernels_load_on_each_gpu(device):
    where = torch.device("cuda", device)
    assert build.why_not(where) == ""
    kernel = build.kernel("solve.cu", "fiedler_block", ("M=2",), device=where)
    assert 0 < kernel.registers <= 255


@pytest.mark.parametrize(("b", "d"), [(96, 32), (512, 1280), (1001, 75)])
def test_products_of_float16_rows(b, d):
    x = batches(3, b, d).cuda()
    found = products(x)
    exact = x.double() @ x.double().mT
    size = torch.linalg.vector_norm(x.double(), dim=2)
    assert ((found - exact).abs() / (size[:, :, None] * size[:, None, :])).max() < 1e-5
    assert torch.equal(found, found.mT), "symmetric, to the bit"


@pytest.mark.parametrize("noise", [0.01, 0.5, 3.0])
def test_neighbours_are_those_of_float64(noise):
    x = batches(4, 512, 256, noise=noise)
    found = graph_stack(x.cuda(), 10)
    rows = x.double() / torch.linalg.vector_norm(x.double(), dim=2, keepdim=True)
    similarity = rows @ rows.mT
    similarity.diagonal(dim1=1, dim2=2).fill_(-2)
    values, _ = similarity.topk(10, dim=2)
    torch.testing.assert_close(found.similarities.cpu().double(), values, atol=1e-5, rtol=0)
    mine = found.knn().neighbors.cpu()
    torch.testing.assert_close(similarity.gather(2, mine), values, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("b", "q", "laplacian"),
    [
        (256, 1, "normalized"),
        (512, 1, "combinatorial"),
        (512, 8, "normalized"),
        (1024, 8, "combinatorial"),
        (3000, 1, "combinatorial"),
        (300, 12, "combinatorial"),
        (256, 16, "normalized"),
    ],
)
def test_as_its_emulation(request, b, q, laplacian):
    if WHY_NOT:
        pytest.skip(WHY_NOT)
    x = batches(2, b)
    stack = graph_stack(x.cuda(), 10)
    options = {**OPTIONS, "laplacian": laplacian}
    found = solve_stack(stack, q, **options)
    assert (found.converged == 1).all()
    with pytest.MonkeyPatch.context() as patch:
        limit = launch.shared_memory_limit(torch.device("cuda", 0))
        patch.setattr(build, "kernel", EmulatedKernels(request.getfixturevalue("_compiled_kernels")))
        patch.setattr(launch, "shared_memory_limit", lambda _: limit)
        emulated = solve_stack(to_cpu(stack), q, **options)
        made = graph_stack(x, 10)
    torch.testing.assert_close(found.values.cpu(), emulated.values, rtol=1e-10, atol=0)
    cosine = (found.basis.cpu() * emulated.basis).sum(2).abs()
    gaps = torch.cat([emulated.values, emulated.second[:, None]], 1)[:, : q + 1].diff(dim=1) if q == 1 else None
    if gaps is not None:
        assert (cosine[gaps[:, 0] > 1e-2 * emulated.second] > 1 - 1e-9).all()
    assert (found.iterations.cpu() - emulated.iterations).abs().max() <= 2
    same = (made.neighbors == stack.neighbors.cpu()).float().mean()
    assert same > 0.999, "rows whose neighbours the tensor cores' rounding changes"


@pytest.mark.parametrize(("b", "q"), [(200, 1), (512, 1), (512, 8), (1024, 1), (300, 16)])
def test_the_same_bits_alone_stacked_and_again(b, q):
    x = batches(65, b).cuda()
    stack = graph_stack(x, 10)
    solved = solve_stack(stack, q, **OPTIONS)
    for some in (slice(0, 65), slice(0, 1), slice(3, 35), slice(0, 33), slice(64, 65)):
        part = graph_stack(x[some], 10)
        keep = list(range(65))[some]
        edges = part.crow[:, -1:].long()
        assert torch.equal(edges[:, 0], stack.crow[keep, -1].long())
        held = torch.arange(part.col.shape[1], device=x.device) < edges
        for name in ("col", "weight"):  # beyond the last edge there is what was in memory before
            assert torch.equal(getattr(part, name)[held], getattr(stack, name)[keep][held]), name
        for name in ("crow", "components", "label", "neighbors", "similarities"):
            assert torch.equal(getattr(part, name), getattr(stack, name)[keep]), name
        assert_equal(solve_stack(part, q, **OPTIONS), solved, keep)


def test_launches_from_streams_of_several_threads():
    x = batches(8, 300).cuda()
    first = solve_stack(graph_stack(x, 10), 1, **OPTIONS)
    torch.cuda.synchronize()

    def work(_):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(5):
                found = solve_stack(graph_stack(x, 10), 1, **OPTIONS)
            stream.synchronize()
        return found

    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(work, range(4)):
            assert_equal(found, first, list(range(8)))


def test_nothing_waits_for_the_device():
    x = batches(40, 512).cuda()
    graph_stack(x, 10)
    solve_stack(graph_stack(x, 10), 1, **OPTIONS)  # compiled, and the start is on the device
    torch.cuda.synchronize()
    try:
        forbid_waiting(True)
        solve_stack(graph_stack(x, 10), 1, **OPTIONS)
    finally:
        forbid_waiting(False)


@pytest.mark.parametrize("rule", ["cells-squared", "extremes", "coverage", "gap"])
def test_the_rows_that_a_cpu_keeps(rule):
    images = torch.from_numpy(load_digits().data).half()
    gen = torch.Generator().manual_seed(0)
    x = torch.stack([images[torch.randperm(len(images), generator=gen)[:512]] for _ in range(16)])
    chosen, q = find_rule(rule), max(1, find_rule(rule).vectors)
    stack = graph_stack(x.cuda(), 10)
    gpu = fiedler_of_stack(stack, solve_stack(stack, q, **OPTIONS), x.cuda())
    cpu = fiedler_vectors(x, k=10, q=q)
    near = nearest(normalized_rows(x), 10)
    kept = []
    for result, knn in ((gpu, stack.knn()), (cpu, near)):
        for g in range(16):
            basis = round_ties(result.basis[g].cpu().numpy())
            seen = RuleBatch(
                vector=np.ascontiguousarray(basis[:, 0]),
                keep=384,
                rng=np.random.default_rng(g),
                per_batch_rng=np.random.default_rng(g),
                labels=np.zeros(512, np.int64),
                ratio=0.25,
                repeat=0,
                basis=basis,
                values=result.values[g].cpu().numpy(),
                neighbors=knn.neighbors[g].cpu().numpy(),
                similarities=knn.similarities[g].cpu().numpy(),
                guidance=np.zeros(512),
            )
            kept.append(set(chosen.choose(seen).tolist()))
    share = np.mean([len(a & b) / len(a) for a, b in zip(kept[:16], kept[16:], strict=True)])
    assert share >= 0.99


def test_a_large_graph_keeps_its_lists_in_global_memory():
    x = batches(2, 5000, 64).cuda()
    stack = graph_stack(x, 10)
    again = nearest(normalized_rows(x), 10, backend="torch")
    torch.testing.assert_close(stack.similarities, again.similarities, atol=1e-5, rtol=0)
    assert (solve_stack(stack, 1, **OPTIONS).converged == 1).all()


def test_no_tensor_is_left_on_the_device():
    x = batches(4, 256).cuda()
    solve_stack(graph_stack(x, 10), 1, **OPTIONS)
    before = torch.cuda.memory_allocated()
    for _ in range(3):
        solve_stack(graph_stack(x, 10), 1, **OPTIONS)
    assert torch.cuda.memory_allocated() == before
