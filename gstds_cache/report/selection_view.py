"""What the page shows of one selection: numbers and charts from its stream, its store and its data set.

Each source may be missing. Then the panels that need it say so, with what to type; the others are there all the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64

from gstds_cache.costs.records import recall, selection_costs
from gstds_cache.data.source import ImageSource
from gstds_cache.errors import GstdsError
from gstds_cache.files.location import LocationLike
from gstds_cache.report import charts
from gstds_cache.report.recompute import (
    AS_RECORDED,
    RecomputeSettings,
    SeenBatch,
    selector_of,
    spans,
    store_of,
    watch_again,
)
from gstds_cache.report.scores import percentile
from gstds_cache.report.thumbnails import Thumbnail, find_images, thumbnails
from gstds_cache.runtime.progress import Counted
from gstds_cache.selection.run import BatchSelector
from gstds_cache.selection.selected_batch import SelectedBatch
from gstds_cache.spectral.fiedler import fiedler_vectors
from gstds_cache.spectral.status import Status
from gstds_cache.store.reader import EmbeddingStore
from gstds_cache.stream.reader import open_selection
from gstds_cache.stream.schema import Header

MOST_CLASSES = 40


@dataclass(frozen=True)
class Panel:
    """A part of the page.

    Attributes:
        title: Its heading.
        text: How to read it, a sentence or two.
        charts: SVG texts.
        missing: What it lacks and what to type; empty where it is whole.
    """

    title: str
    text: str
    charts: tuple[str, ...] = ()
    missing: str = ""


@dataclass(frozen=True)
class Sheet:
    """Images of one batch in Fiedler order, kept and dropped apart."""

    title: str
    kept: list[Thumbnail]
    dropped: list[Thumbnail]


@dataclass
class SelectionView:
    """One selection on the page.

    Attributes:
        title: Its file's name.
        facts: Names and values.
        panels: Charts.
        sheets: Contact sheets.
        sheets_missing: Why there are none.
    """

    title: str
    facts: list[tuple[str, str]]
    panels: list[Panel] = field(default_factory=list)
    sheets: list[Sheet] = field(default_factory=list)
    sheets_missing: str = ""


def view_selection(
    file: Path,
    *,
    key: str,
    cache: LocationLike | EmbeddingStore | None = None,
    dataset: Callable[[Any], ImageSource],
    dataset_uri: Any = None,
    recompute_settings: RecomputeSettings = AS_RECORDED,
    most: int = 48,
    per_sheet: int = 40,
    progress: Counted = lambda _done, _total: None,
) -> SelectionView:
    """Read a selection and whatever else can be found, and draw.

    Args:
        file: The selection.
        key: Prefix of names in the SVGs, unique on the page.
        cache: Its store; by default where gstds-select wrote down that it was.
        dataset: Opens a data set by its URI.
        dataset_uri: Its data set; by default where gstds-embed wrote down that it was.
        recompute_settings: What the selection does not say of how it was made.
        most: Batches computed again, for their dropped rows.
        per_sheet: Images of a contact sheet, kept and dropped each.
        progress: Called with batches computed again and batches in all.

    Returns:
        The view.

    Raises:
        UsageError: There is no selection at ``file``.
        StreamError: The selection is damaged.
        FingerprintMismatchError: The store named is not the selection's, or gives other rows.
    """
    with open_selection(file) as stream:
        header, batches = stream.header, list(stream)
    view = SelectionView(file.name, _facts(header, file))
    _from_stream(view, key, header, batches)
    store, why = _find_store(file, header, cache)
    if header.candidates:
        store, why = None, "Of candidates, which rows are trained on is decided while training, by their losses."
    if "once" in header.settings:
        store, why = None, "A core set was chosen once over the whole data set, and not in its batches."
    if store is None:
        for title in ("Kept and dropped along the Fiedler coordinate", "Spectral map", "Keep rates by class"):
            view.panels.append(Panel(title, "", missing=why))
        view.sheets_missing = why
        return view
    selector = selector_of(store, header, recompute_settings)
    view.facts.insert(0, ("data set", store.dataset_uri or store.kind))
    chosen = spans(batches, most=most)
    seen: list[list[SeenBatch]] = []
    for span in chosen:
        seen.append([])
        for batch in watch_again(selector, span):
            seen[-1].append(batch)
            progress(sum(map(len, seen)), sum(map(len, chosen)))
    every = [batch for part in seen for batch in part]
    if every and every[0].has_spectrum:
        _along_the_coordinate(view, key, every, len(batches))
        _iterations(view, key, selector)
        _map(view, key, selector, every[0])
    else:
        how = f"The draw {header.settings['draw']!r} with one stratum" if header.candidates else ""
        how = how or f"The rule {header.settings.get('rule')!r}"
        missing = f"{how} computes no graph, so there is no coordinate to show."
        view.panels += [Panel("Kept and dropped along the Fiedler coordinate", "", missing=missing)]
    _by_class(view, key, selector, batches)
    some = dict.fromkeys(every[place] for place in (0, len(every) // 2, -1)) if every else {}
    _sheets(view, store, list(some), dataset, dataset_uri, per_sheet)
    return view


def _facts(header: Header, file: Path) -> list[tuple[str, str]]:
    settings = header.settings
    names = {
        "rule": "rule",
        "draw": "draw",
        "strata": "strata",
        "reference": "reference losses",
        "schedule": "schedule",
        "order": "order",
        "batch_size": "batch size",
        "knn": "neighbours",
        "seed": "seed",
    }
    cost = recall(selection_costs(file), header.selection_digest)
    return [
        *((text, str(settings[name])) for name, text in names.items() if name in settings),
        ("epochs", f"{header.epochs:,} of {header.batches_per_epoch:,} batches"),
        ("items", f"{header.items:,}"),
        ("drawn while training" if header.candidates else "kept", f"{header.total_kept:,} samples"),
        ("selection took", f"{cost.seconds:,.1f} s" if cost else "unknown"),
        ("digest", header.selection_digest[:16]),
        ("cache", header.cache_fingerprint[:16]),
    ]


def _from_stream(view: SelectionView, key: str, header: Header, batches: list[SelectedBatch]) -> None:
    n_in = np.array([batch.n_in for batch in batches], dtype=np.int64)
    kept = np.array([batch.count for batch in batches], dtype=np.int64)
    saved = 1 - kept.sum() / n_in.sum()
    view.panels.append(
        Panel(
            "Schedule and saving",
            f"{kept.sum():,} gradients instead of {n_in.sum():,} in as many epochs: {saved:.1%} saved.",
            (
                charts.schedule(f"{key}-schedule", kept / n_in, header.batches_per_epoch),
                charts.spent(f"{key}-spent", n_in, kept, header.batches_per_epoch),
            ),
        )
    )
    batch_assignments = int(header.settings.get("partitions", 0))  # from the epoch of that number on, graphs come again
    graphs = [batch for batch in batches if not batch_assignments or batch.epoch < batch_assignments]
    solved = [batch for batch in graphs if Status.NOT_COMPUTED not in batch.status]
    if not solved:
        return
    values = [batch.value for batch in solved if np.isfinite(batch.value) and batch.value > 0]
    residuals = [batch.residual for batch in solved if np.isfinite(batch.residual) and batch.residual > 0]
    names: dict[str, int] = {}
    for batch in solved:
        flags = [str(flag.name).lower() for flag in batch.status] or ["converged"]
        for name in flags:
            names[name] = names.get(name, 0) + 1
    drawn = []
    if values:
        label = "algebraic connectivity λ₂ of the batch's graph"
        drawn.append(charts.histogram(f"{key}-value", values, label, log=True))
    if residuals:
        drawn.append(charts.histogram(f"{key}-residual", residuals, "relative residual ‖Lv - λv‖ / λ", log=True))
    ordered = sorted(names, key=lambda name: names[name])
    drawn.append(charts.bars(f"{key}-status", ordered, [names[name] for name in ordered], "graphs"))
    view.panels.append(
        Panel(
            "Spectral health",
            f"{len(solved):,} graphs, each counted once however often its batch comes. "
            "A small λ₂ is a graph that nearly falls apart: its Fiedler vector tells one tight cluster from the rest. "
            "Residuals lie below the tolerance where the solver converged. 'bridged' graphs had several components.",
            tuple(drawn),
        )
    )


def _find_store(
    file: Path, header: Header, cache: LocationLike | EmbeddingStore | None
) -> tuple[EmbeddingStore | None, str]:
    if isinstance(cache, EmbeddingStore):
        return cache, ""
    cost = recall(selection_costs(file), header.selection_digest)
    where = cache or (cost.store if cost else None)
    if where is None:
        return None, "Needs the store, and nothing beside the selection says where it is: pass `cache=STORE`."
    try:
        return store_of(header, where), ""
    except GstdsError as error:
        if cache is not None:
            raise
        return None, f"Needs the store, which was at {where}: {error.message}. Pass `cache=STORE`."


def _along_the_coordinate(view: SelectionView, key: str, seen: list[SeenBatch], total: int) -> None:
    scaled = np.concatenate([batch.seen.vector * np.sqrt(len(batch.indices)) for batch in seen])
    place = np.concatenate([percentile(batch.seen.vector) for batch in seen])
    stays = np.concatenate([batch.stays for batch in seen])
    part = "all" if len(seen) == total else f"{len(seen)} of {total:,}"
    view.panels.append(
        Panel(
            "Kept and dropped along the Fiedler coordinate",
            f"From {part} batches, computed again. First: where samples lie, kept above the line and dropped "
            "below. Second: how much of each twentieth of the order stays; a flat line covers the batch evenly.",
            (
                charts.coordinates(f"{key}-coordinates", scaled[stays], scaled[~stays]),
                charts.keep_rate(f"{key}-rate", place, stays),
            ),
        )
    )


def _iterations(view: SelectionView, key: str, selector: BatchSelector) -> None:
    counted = [float(number) for number in selector.counts.iterations.elements()]
    if not counted:
        return
    chart = charts.histogram(f"{key}-iterations", counted, "LOBPCG iterations (0: solved densely)", log=False)
    for place, panel in enumerate(view.panels):
        if panel.title == "Spectral health":
            view.panels[place] = Panel(panel.title, panel.text, (*panel.charts, chart))


def _map(view: SelectionView, key: str, selector: BatchSelector, batch: SeenBatch) -> None:
    config, basis = selector.config, batch.seen.basis
    if basis is None or basis.shape[1] < 2:
        rows = selector.store.gather(batch.indices).astype(np.float32)
        found = fiedler_vectors(rows, k=config.knn, q=2, laplacian=config.laplacian, seed=config.seed, threads=1)
        basis = found.basis.reshape(len(rows), 2).cpu().numpy()
    percentiles = 100 * np.stack([percentile(basis[:, 0]), percentile(basis[:, 1])], axis=1)
    near = batch.seen.neighbors
    assert near is not None
    ends = np.stack([np.repeat(np.arange(len(near)), near.shape[1]), near.reshape(-1)], axis=1)
    edges = np.unique(np.sort(ends, axis=1), axis=0).astype(np.int64)
    view.panels.append(
        Panel(
            "Spectral map",
            f"Batch {batch.selection.batch_id} of epoch {batch.selection.epoch}: each row by its rank along the first "
            "two eigenvectors, with the graph's edges. Rows close to each other look alike to the reference model.",
            (charts.spectral_map(f"{key}-map", percentiles, edges, batch.stays),),
        )
    )


def _by_class(view: SelectionView, key: str, selector: BatchSelector, batches: list[SelectedBatch]) -> None:
    store = selector.store
    labels, classes = store.labels, list(store.classes)
    rows = selector.plan.rows.all()
    title = "Keep rates by class"
    if not len(labels) or labels.max(initial=-1) < 0:
        view.panels.append(Panel(title, "", missing="The data set has no labels."))
        return
    present, items = np.unique(labels[rows][labels[rows] >= 0], return_counts=True)  # labels may be huge numbers
    epochs = batches[-1].epoch + 1
    kept_rows = np.concatenate([batch.kept for batch in batches])
    kept = np.bincount(np.searchsorted(present, labels[kept_rows][labels[kept_rows] >= 0]), minlength=len(present))
    # By turns each comes as often, whatever items it has.
    seen = epochs * (np.full(len(items), len(rows) / len(items)) if selector.plan.order.balanced else items)
    rate: Float64[np.ndarray, " C"] = kept / seen
    order = np.argsort(rate, kind="stable")
    text = "How often a sample of each class stays where it is seen, and how many items the class has. A class that is "
    text += "starved shows here."
    if len(order) > MOST_CLASSES:
        half = MOST_CLASSES // 2
        text += f" The {half} lowest and the {half} highest of {len(order):,} classes."
        order = np.concatenate([order[:half], order[-half:]])
    names = [classes[label] if label < len(classes) else f"class {label}" for label in present[order]]
    chart = charts.class_rates(
        f"{key}-classes",
        names,
        rate[order].tolist(),
        items[order].tolist(),
        float(kept.sum() / seen.sum()),
    )
    view.panels.append(Panel(title, text, (chart,)))


def _sheets(
    view: SelectionView,
    store: EmbeddingStore,
    batches: list[SeenBatch],
    open_dataset: Callable[[Any], ImageSource],
    uri: Any,
    per_sheet: int,
) -> None:
    source, view.sheets_missing = find_images(store, uri, open_dataset)
    if source is None:
        return
    for batch in batches:
        order = np.argsort(batch.seen.vector, kind="stable") if batch.has_spectrum else np.arange(len(batch.indices))
        parts = []
        for which in (batch.stays, ~batch.stays):
            mine = order[which[order]]
            spread = np.unique(np.linspace(0, len(mine) - 1, min(per_sheet, len(mine))).round().astype(np.int64))
            picked = mine[spread] if len(mine) else mine
            parts.append(thumbnails(source, batch.indices[picked].tolist(), batch.seen.vector[picked].tolist()))
        title = f"Epoch {batch.selection.epoch}, batch {batch.selection.batch_id}"
        view.sheets.append(Sheet(title, *parts))
