"""``gstds_cache.write_report``: an HTML page of selections and training runs."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gstds_cache.config import DEVICE, REPORT_BATCHES, REPORT_FILE
from gstds_cache.data.hash_cache import HashCache
from gstds_cache.data.sources import open_source
from gstds_cache.errors import UsageError
from gstds_cache.files.derived import hashes_folder
from gstds_cache.files.location import Location, LocationLike, file_to_write, local_file
from gstds_cache.report.recompute import RecomputeSettings
from gstds_cache.runtime.progress import Progress, showing
from gstds_cache.store.reader import EmbeddingStore


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


def write_report(
    *what: str | os.PathLike[str],
    out: str | Path = REPORT_FILE,
    cache: LocationLike | EmbeddingStore | None = None,
    dataset: Any = None,
    batches: int = REPORT_BATCHES,
    device: str = DEVICE,
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
        cache: The selections' store, or its location; None is where it was when they were made.
        dataset: Where the data set is now; None is where it was when the store was made.
        batches: Batches computed again to see their dropped rows, 3 or more.
        device: Where they are computed.
        guidance: As for :func:`gstds_cache.export_scores`.
        schedule: As for :func:`gstds_cache.export_scores`.
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
    file = file_to_write(out, "`out`")
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

    if cache is not None and not isinstance(cache, EmbeddingStore):
        cache = Location.parse(cache, "`cache`")
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
