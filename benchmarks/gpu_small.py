"""A small case through every kernel, for compute-sanitizer; with --full a large one, for a profiler.

    compute-sanitizer --tool racecheck python benchmarks/gpu_small.py

Products are made on the CPU: the tools look at our kernels, and cuBLAS takes minutes under them.
"""

from __future__ import annotations

import argparse

import torch
from batches import made_up
from gpu_kernels import K, arguments_of, changed, device_of, same_graphs, solved
from harness import Measured
from torch import Tensor

from gstds_cache.cuda import launch
from gstds_cache.embedding.device_resizing import Resizer, upright
from gstds_cache.encoders.preprocessing import Preprocessing
from gstds_cache.graph import cuda as graph_cuda
from gstds_cache.graph.cuda import graph_bytes, graph_stack, places
from gstds_cache.selection.cuda_rule import Draws, KeptRows, finish, keep_of_cells
from gstds_cache.selection.rules import RULES
from gstds_cache.spectral.block import BlockRitz

LITTLE = 64 << 10  # bytes of shared memory with which arrays of a small graph lie in global memory, as a large one's do


def products_on_the_cpu(rows: Tensor, out: Tensor) -> None:
    """The same as cuBLAS's."""
    whole = rows.float().cpu()
    out.copy_(torch.bmm(whole, whole.mT))


def kept_rows(pairs: BlockRitz) -> KeptRows:
    """A quarter of each batch by the default rule, from made-up guidance and random numbers."""
    graphs, _, nodes = pairs.basis.shape
    device, generator, keep = pairs.basis.device, torch.Generator().manual_seed(0), nodes // 4
    draws = Draws(
        guidance=torch.rand(graphs, nodes, dtype=torch.float64, generator=generator).to(device),
        keys=torch.randint(1 << 62, (graphs, 2), generator=generator).to(device),
        turned=torch.zeros(graphs, dtype=torch.float64, device=device),
        keeps=torch.full((graphs,), keep, dtype=torch.int32, device=device),
        most=keep,
    )
    finish(pairs.basis)
    return keep_of_cells(RULES["cells-squared"], pairs.basis, pairs.values, draws)


def largest_difference(device: torch.device) -> int:
    """Levels by which resized images of several sizes, some of them turned, are from torch's."""
    ours = Preprocessing(resize=256, crop=(224, 260), interpolation="bicubic")
    # The second and third have pixels whose last row or column is one or another, as their ends are rounded.
    sizes = ((60, 90), (405, 300), (725, 847), (9, 11), (1, 1), (30, 700))
    generator = torch.Generator().manual_seed(0)
    images = [torch.randint(256, (3, *size), generator=generator).to(torch.uint8).to(device) for size in sizes]
    decoded = [(place, image, place + 1) for place, image in enumerate(images)]
    pixels = torch.zeros((len(images), 3, *ours.crop), dtype=torch.uint8, device=device)
    Resizer(ours, device).resize(decoded, pixels)
    theirs = torch.cat([ours.resized(upright(image, turn)[None]) for _, image, turn in decoded])
    return int((pixels.int() - theirs.round().clamp(0, 255).int()).abs().max())


def run(device: torch.device, graphs: int, nodes: int) -> dict[str, object]:
    """Graphs, the first of them disconnected; pairs and kept rows; each kernel also with arrays in global memory."""
    made = torch.from_numpy(made_up(graphs, nodes))
    rows = (made * torch.linspace(1, 8, graphs)[:, None, None]).half()  # clusters further apart than others
    half = rows.shape[2] // 2
    rows[0, : nodes // 2, :half] = 0
    rows[0, nodes // 2 :, half:] = 0  # at a right angle to the others: two components at least
    x, k = rows.to(device), min(K, nodes - 1)
    stack = graph_stack(x, k)
    solutions = [solved(stack, 1), solved(stack, 8, "normalized"), solved(stack, 8)]
    kept = kept_rows(solutions[-1])
    with changed(launch, "shared_memory_limit", lambda _: LITTLE):
        solutions.append(solved(stack, 8))
    with changed(launch, "shared_memory_limit", lambda _: graph_bytes(nodes, places(k), spill=True)):
        graphs_again = graph_stack(x, k)
    with changed(launch, "shared_memory_limit", lambda _: 0):
        kept_again = kept_rows(solutions[2])
    return {
        "same_graphs_from_global_memory": same_graphs(stack, graphs_again),
        "same_rows_from_global_memory": torch.equal(kept.positions, kept_again.positions),
        "all_converge": all(bool((pairs.converged == 1).all()) for pairs in solutions),
        "components": stack.components.tolist()[:8],
        "levels_from_torchs_pixels": largest_difference(device),
    }


def measure(arguments: argparse.Namespace, device: torch.device) -> None:
    """One case."""
    measured = Measured("small", arguments)
    if arguments.full:
        measured.case("full", 0, lambda: run(device, 264, 512))
    else:
        with changed(graph_cuda, "_inner_products", products_on_the_cpu):
            measured.case("small", 0, lambda: run(device, arguments.graphs, arguments.nodes))
    (case,) = (case for name, case in measured.found.items() if name in {"small", "full"})
    # Two variants may round differently on a GPU, where a product and a sum become one step: that is only told.
    if "error" in case or not case["all_converge"] or case["levels_from_torchs_pixels"] > 1:
        raise SystemExit(1)


def main() -> None:
    arguments = arguments_of(__doc__)
    with device_of(arguments) as device:
        measure(arguments, device)


if __name__ == "__main__":
    main()
