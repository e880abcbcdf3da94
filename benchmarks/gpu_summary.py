"""The figures of ``on_gpu.py`` beside their targets, out of the parts' results; a part that is missing is a gap."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Result = dict[str, Any]


@dataclass(frozen=True)
class Figure:
    """A line of the table.

    Attributes:
        what: What is measured.
        part: In which part.
        path: The keys that lead to it in that part's result; a number, or a dictionary of ``median``, ``min``, ``max``.
        target: What it should be; None where there is no number for it.
        most: True where it should be at most that.
        unit: Of both.
        scale: What the value is multiplied by.
    """

    what: str
    part: str
    path: tuple[str, ...]
    target: float | None
    most: bool = False
    unit: str = ""
    scale: float = 1.0


def number(value: float) -> str:
    """Three digits are enough."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def found(result: Result, path: Sequence[str]) -> Any:
    """What a path of keys leads to, or None."""
    for key in path:
        if not isinstance(result, dict) or key not in result:
            return None
        result = result[key]
    return result


def ends(value: Any, scale: float) -> list[float]:
    """Median, smallest and largest of a spread or a list; a number alone; nothing where there is none of these."""
    if isinstance(value, dict):
        value = [value.get(name) for name in ("median", "min", "max")]
    elif isinstance(value, list) and value:
        value = [statistics.median(value), min(value), max(value)]
    else:
        value = [value]
    numbers = [float(one) * scale for one in value if isinstance(one, int | float) and math.isfinite(one)]
    return numbers if len(numbers) == len(value) else []


def line(figure: Figure, parts: dict[str, Result]) -> str:
    """One row of the table."""
    part = parts.get(figure.part, {})
    values = ends(found(part.get("result") or {}, figure.path), figure.scale)
    bound = "<=" if figure.most else ">="
    target = "" if figure.target is None else f"{bound} {number(figure.target)} {figure.unit}".strip()
    if not values:
        why = part.get("status", "not run")
        return f"| {figure.what} | not measured ({figure.part}: {why}) | {target} | |"
    middle = values[0]
    spread = f" ({number(values[1])} to {number(values[2])})" if len(values) == 3 else ""
    measured = f"{number(middle)}{spread} {figure.unit}".strip()
    if figure.target is None:
        return f"| {figure.what} | {measured} | | |"
    met = middle <= figure.target if figure.most else middle >= figure.target
    return f"| {figure.what} | {measured} | {target} | {'yes' if met else '**no**'} |"


def solve_figures(size: int, q: int, target: float) -> list[Figure]:
    """The solver's time at one size and its ratio to the CPU's."""
    at = (f"solve, B={size}, Q={q}",)
    what = f"solve, B = {size}, Q = {q}"
    return [
        Figure(f"{what}, a graph", "throughput", (*at, "us_per_graph", "kernel"), target, True, "us"),
        Figure(f"{what}, all CPU cores over it", "throughput", (*at, "over_kernel", "cpu, all cores"), 20, unit="x"),
    ]


FIGURES: list[Figure] = [
    *solve_figures(512, 1, 10),
    *solve_figures(512, 8, 60),
    Figure("neighbours and graph, B = 512, a graph", "throughput",
           ("neighbours, B=512", "us_per_graph", "kernels"), 10, True, "us"),
    Figure("neighbours and graph, faiss.knn_gpu over it", "throughput",
           ("neighbours, B=512", "over_kernels", "faiss.knn_gpu"), 30, unit="x"),
    Figure("neighbours and graph, bmm and topk over it", "throughput",
           ("neighbours, B=512", "over_kernels", "bmm and topk, float32"), 20, unit="x"),
    Figure("whole path, rows on the device, million samples/s", "path", ("path", "million_samples_per_second"), 10),
    Figure("the same, four epochs in one run", "path", ("path, four epochs", "million_samples_per_second"), 10),
    Figure("the same, an epoch written to a file", "path", ("path_to_a_file", "million_samples_per_second"), None),
    Figure("an epoch of 1.28 million rows", "path", ("path", "seconds"), 1, True, "s"),
    Figure("the same, written to a file", "path", ("path_to_a_file", "seconds"), None, unit="s"),
    Figure("the same by all CPU cores, us a batch", "path", ("beside_the_cpu", "us_per_batch"), None, unit="us"),
    Figure("trainer, small network, over a bare loop", "trainer", ("conv7", "trainer_over_bare"), 0.95),
    Figure("trainer, ResNet-18, over a bare loop", "trainer", ("resnet18", "trainer_over_bare"), 0.95),
    *[
        Figure(f"the same, {what}", "trainer", (key, "trainer_over_bare"), None)
        for what, key in (
            ("small network in steps of 128", "conv7, steps of a quarter"),
            ("small network without CUDA graphs", "conv7, without graphs"),
            ("ResNet-18 without CUDA graphs", "resnet18, without graphs"),
        )
    ],
    *[
        Figure(f"CIFAR-10, small network, {what}: {name}", "recipe", (f"accuracy, {name}", what), None, unit=unit)
        for name in ("bare", "trainer", "half of each batch", "half of each batch, as many steps")
        for what, unit in (("seconds", "s"), ("accuracy", ""))
    ],
    *[
        Figure(f"embedding, {size:g} megapixels, {decoder}: {what}", "embedding",
               (f"{size:g} megapixels", "embed", decoder, key), target)
        for size in (0.2, 12.0) for decoder in ("nvjpeg", "pillow")
        for what, key, target in (
            ("over the slower of forward and decode", "over_limit", 0.9 if decoder == "nvjpeg" else None),
            ("over both side by side", "over_decode_and_forward", 0.9 if decoder == "nvjpeg" else None),
            ("images/s", "images_per_second", None),
        )
    ],
]  # fmt: skip


def verdicts(parts: dict[str, Result]) -> list[str]:
    """Lines on what has no number: correctness, tests, sanitizers."""
    told = []
    correct = parts.get("correct", {}).get("result") or {}
    if checks := correct.get("checks"):
        wrong = [name for name, good in checks.items() if not good]
        told.append(f"correct: {len(checks) - len(wrong)} of {len(checks)} checks hold" + failing(wrong))
    tests = parts.get("tests", {}).get("result") or {}
    if "counts" in tests:
        counts = ", ".join(f"{number} {word}" for word, number in tests["counts"].items())
        told.append(f"tests: {counts}" + failing(tests["failed"]))
    for name in ("memcheck", "racecheck"):
        result = parts.get(name, {}).get("result") or {}
        told += [f"{name}: {result['errors']} errors"] if result.get("errors") is not None else []
    return told


def failing(names: list[str]) -> str:
    """The names of what failed, after a colon."""
    return "; not: " + "; ".join(names[:8]) if names else ""


def peers(parts: dict[str, Result]) -> list[str]:
    """Everything that was timed in the same run as the kernels, and how exact it was."""
    result = parts.get("throughput", {}).get("result") or {}
    lines = []
    for name, case in result.items():
        if not isinstance(case, dict) or "us_per_graph" not in case:
            continue
        exact = case.get("largest_residual", {})
        times = [
            f"{way}: {number(spent['median'])}" + (f" (residual {exact[way]:.1e})" if way in exact else "")
            for way, spent in case["us_per_graph"].items()
        ]
        times += [f"{way}: left out ({why})" for way, why in case.get("left_out", {}).items()]
        lines.append(f"- {name}, us a graph: " + "; ".join(times))
    return lines


def shares(parts: dict[str, Result]) -> list[str]:
    """What each step of the whole path takes of a batch."""
    found = (parts.get("path", {}).get("result") or {}).get("shares_us_per_batch", {})
    steps = ", ".join(f"{step} {number(spent)}" for step, spent in found.items())
    return [f"path, us a batch by step, one stack at a time: {steps}"] if found else []


def versions(parts: dict[str, Result]) -> str:
    """Processor, cores and versions of the first part that tells them."""
    for part in parts.values():
        if environment := (part.get("result") or {}).get("environment"):
            told = {name: value for name, value in environment.items() if value is not None and name != "commit"}
            return ", ".join(f"{name} {value}" for name, value in told.items())
    return "unknown"


def summary(state: Result) -> str:
    """The whole page, Markdown."""
    parts: dict[str, Result] = state["parts"]
    card = state.get("gpu") or {}
    head = ", ".join(f"{name} {value}" for name, value in card.items()) or "none: run without one"
    ran = [
        f"{name} {part['status']}" + (f" ({part['seconds']} s)" if "seconds" in part else f" ({part.get('why', '')})")
        for name, part in parts.items()
    ]
    rows = [line(figure, parts) for figure in FIGURES]
    sections: list[Callable[[Result], list[str]]] = [verdicts, shares, peers]
    text = [f"GPU: {head}", f"commit {state.get('commit') or 'unknown'}; {versions(parts)}", "parts: " + ", ".join(ran)]
    told = [told for section in sections for told in section(parts)]
    table = ["| what | measured: median (smallest to largest) | target | met |", "|---|---|---|---|", *rows]
    return "\n\n".join([*text, "\n".join(table), "\n".join(told)]) + "\n"
