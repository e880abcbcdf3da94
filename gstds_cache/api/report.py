"""A selection's view of each sample as a table, and the HTML page of selections and runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gstds_cache.data.hash_cache import HashCache
from gstds_cache.data.sources import open_source
from gstds_cache.errors import UsageError
from gstds_cache.files.derived import hashes_folder
from gstds_cache.files.location import LocationLike, local_file
from gstds_cache.report.recompute import RecomputeSettings, selector_of, watch_again
from gstds_cache.report.scores import SampleScores, check_target, write_scores
from gstds_cache.runtime.progress import Progress, showing
from gstds_cache.store.reader import EmbeddingStore
from gstds_cache.stream.reader import open_selection


@dataclass(frozen=True)
class ScoresReport:
    """What :func:`export_scores` wrote.

    Attributes:
        file: The table.
        rows: Samples in it.
        epochs: Epochs of the selection.
        never_kept: Samples that were in a batch and never stayed.
        unseen: Samples that were never in a batch, as they have no embedding.
        bytes: Size of the file.
    """

    file: Path
    rows: int
    epochs: int
    never_kept: int
    unseen: int
    bytes: int

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON-able values."""
        return vars(self) | {"file": str(self.file)}


@dataclass(frozen=True)
class PageReport:
    """What :func:`write_report` wrote.

    Attributes:
        out: The page.
        selections: Selections on it.
        runs: Training runs on it.
        missing: What was left out, and what to give for it.
        bytes: Size of the file.
    """

    out: Path
    selections: int
    runs: int
    missing: tuple[str, ...]
    bytes: int

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON-able values."""
        return vars(self) | {"out": str(self.out)}


def export_scores(
    store: LocationLike | EmbeddingStore,
    selection: str | Path,
    file: str | Path,
    *,
    device: str = "auto",
    guidance: str | None = None,
    schedule: str | None = None,
    replace: bool = False,
    progress: Progress | bool | None = True,
) -> ScoresReport:
    """Compute a selection again and write how it sees each sample: one row a sample.

    The columns are those of :func:`gstds_cache.report.scores.write_scores`.

    Args:
        store: The store the selection was made from, or its location.
        selection: The selection.
        file: ``.parquet`` or ``.arrow``.
        device: Where the selection is computed again.
        guidance: The selection's guidance, where it was a file or had parameters; None finds it out.
        schedule: The selection's schedule, where it was ``file:PATH``: a selection names no paths.
        replace: Whether ``file`` may exist.
        progress: As for :func:`gstds_cache.embed`; counts batches.

    Returns:
        What was written.

    Raises:
        UsageError: ``file`` cannot be written, or this version does not know the selection's settings.
        StreamError: The selection is damaged.
        FingerprintMismatchError: The store is not the selection's, or gives other rows here.
    """
    path = local_file(file, "`file`")
    check_target(path, replace=replace)
    opened = store if isinstance(store, EmbeddingStore) else EmbeddingStore(store)
    settings = RecomputeSettings(device=device, guidance=guidance, schedule=schedule)
    scores = SampleScores(len(opened))
    with open_selection(selection) as stream, showing(progress, "batches") as show:
        header = stream.header
        for batch in watch_again(selector_of(opened, header, settings), stream):
            scores.add(batch)
            show("score", batch.selection.seq + 1, header.total_batches, {})
    size = write_scores(scores, opened, header, path)
    unseen = int((scores.seen == 0).sum())
    never = int((scores.kept == 0).sum()) - unseen
    return ScoresReport(path, len(opened), header.epochs, never, unseen, size)


def write_report(
    *what: str | Path,
    out: str | Path = "report.html",
    cache: LocationLike | None = None,
    dataset: Any = None,
    batches: int = 48,
    device: str = "auto",
    guidance: str | None = None,
    schedule: str | None = None,
    replace: bool = False,
    progress: Progress | bool | None = True,
) -> PageReport:
    """Write one HTML page of selections and training runs: what is kept and dropped, and what it cost.

    Needs ``pip install 'gstds-cache[report]'``.

    Args:
        what: Selections, and run directories of :func:`gstds_cache.train`; several are shown side by side.
        out: The page.
        cache: The selections' store; None is where it was when they were made.
        dataset: Where the data set is now; None is where it was when the store was made.
        batches: Batches computed again to see their dropped rows, 3 or more.
        device: Where they are computed.
        guidance: As for :func:`export_scores`.
        schedule: As for :func:`export_scores`.
        replace: Whether ``out`` may exist.
        progress: As for :func:`gstds_cache.embed`; counts batches.

    Returns:
        What was written, and what the page had to leave out.

    Raises:
        UsageError: An argument cannot be meant, or what the page needs is not installed.
        StreamError: A selection is damaged.
        IntegrityError: A run is damaged.
        FingerprintMismatchError: A store is not the selection's, or gives other rows here.
    """
    file = local_file(out, "`out`")
    if not what:
        raise UsageError("`what`: got nothing, expected selections or run directories")
    if batches < 3:
        raise UsageError(f"`batches`: got {batches}, expected 3 or more")
    if file.exists() and not replace:
        raise UsageError(f"`out` {file}: the file exists", hint="give another name, or `replace=True`")
    try:
        from gstds_cache.report.page import render, write_page
    except ModuleNotFoundError as error:
        raise UsageError(
            f"the report needs {error.name}, which is not installed", hint="pip install 'gstds-cache[report]'"
        ) from error
    from gstds_cache.report.run_view import read_run
    from gstds_cache.report.selection_view import view_selection

    hash_cache = HashCache(hashes_folder())
    paths = [local_file(path, "`what`") for path in what]
    runs = [read_run(path, number) for number, path in enumerate((p for p in paths if p.is_dir()), 1)]
    with showing(progress, "batches") as show:
        selections = [
            view_selection(
                path,
                key=f"s{number}",
                cache=cache,
                dataset=lambda uri: open_source(uri, hash_cache=hash_cache),
                dataset_uri=dataset,
                recompute_settings=RecomputeSettings(device=device, guidance=guidance, schedule=schedule),
                most=batches,
                progress=lambda done, total: show("compute", done, total, {}),
            )
            for number, path in enumerate(p for p in paths if not p.is_dir())
        ]
    size = write_page(file, render(selections, runs))
    missing = sorted({panel.missing for view in selections for panel in view.panels if panel.missing})
    return PageReport(file, len(selections), len(runs), tuple(missing), size)
