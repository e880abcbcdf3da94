"""``gstds_cache.audit``: what a store's embeddings say of its data set."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Unpack

from gstds_cache.auditing.labels import FlipTest
from gstds_cache.auditing.run import FILES, Findings, audit_store, write_tables
from gstds_cache.cluster.engine import Engine
from gstds_cache.config import AUDIT_FOLDER, DEVICE, ENGINE, AuditConfig, AuditSettings, require_settings
from gstds_cache.data.hash_cache import HashCache
from gstds_cache.data.sources import open_source
from gstds_cache.errors import UsageError
from gstds_cache.files.atomic import make_folder
from gstds_cache.files.derived import hashes_folder
from gstds_cache.files.location import LocationLike, local_file
from gstds_cache.runtime.devices import resolve_device
from gstds_cache.runtime.notify import Notify, log
from gstds_cache.runtime.progress import Progress, showing
from gstds_cache.runtime.threads import limited_threads
from gstds_cache.store.reader import EmbeddingStore


@dataclass(frozen=True, kw_only=True)
class AuditReport:
    """What :func:`audit` found, in numbers; the rows are in its files.

    Attributes:
        out: The folder.
        files: The tables, and the page last, where one was made.
        rows: Rows that were looked at.
        exact: Whether every row was compared with every other.
        groups: Groups of near-duplicates.
        grouped: Rows in them.
        spare: Rows that could go, each a near-duplicate of one that stays.
        leaks: Pairs of near-duplicates in both stores; None without another store.
        leaked: Rows of the other store that are in such a pair; None without another store.
        labelled: Rows whose label was judged.
        doubted: Of these, doubted.
        no_doubts: Why no label was judged; empty where some were.
        flip_test: What was found of labels flipped on purpose; None where that was not measured.
        missing: What the page had to leave out, and what to give for it.
        seconds: Wall-clock seconds.
    """

    out: Path
    files: tuple[Path, ...]
    rows: int
    exact: bool
    groups: int
    grouped: int
    spare: int
    leaks: int | None
    leaked: int | None
    labelled: int
    doubted: int
    no_doubts: str
    flip_test: FlipTest | None
    missing: tuple[str, ...]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON-able values."""
        test = self.flip_test
        rates = {} if test is None else {
            name: getattr(test, name) for name in ("recall", "precision", "false_positive_rate")
        }  # fmt: skip
        return vars(self) | {
            "out": str(self.out),
            "files": list(map(str, self.files)),
            "flip_test": None if test is None else asdict(test) | rates,
        }


def audit(
    store: LocationLike | EmbeddingStore,
    *,
    against: LocationLike | EmbeddingStore | None = None,
    out: str | Path = AUDIT_FOLDER,
    dataset: Any = None,
    against_dataset: Any = None,
    page: bool = True,
    replace: bool = False,
    engine: str = ENGINE,
    progress: Progress | bool | None = True,
    notify: Notify | None = None,
    **settings: Unpack[AuditSettings],
) -> AuditReport:
    """Look through a store: near-duplicates, labels in doubt, outliers and, with another store, leaks.

    Writes ``duplicates.parquet``, ``outliers.parquet``, ``labels.parquet`` and ``joint.parquet`` where rows have
    labels, ``leaks.parquet`` with ``against``, and ``audit.html``, a page of pictures, which needs
    ``pip install 'gstds-cache[report]'``. Nothing in the store changes.

    Args:
        store: The store, or its location.
        against: Another store of the same model, e.g. of the test set: pairs of near-duplicates in both are leaks.
        out: The folder for the files; it is made.
        dataset: Where the store's data set is now; None is where it was when the store was made.
        against_dataset: The same for ``against``.
        page: Whether to make the page.
        replace: Whether the folder may hold an earlier audit's files.
        engine: Where nearest rows are searched for, as for :func:`gstds_cache.select`; probes of labels run in this
            process in any case.
        progress: As for :func:`gstds_cache.embed`.
        notify: Told of a cluster's progress, a line each; by default it is logged.
        settings: As the fields of :class:`~gstds_cache.AuditConfig`.

    Returns:
        What was found.

    Raises:
        UsageError: A setting cannot be meant, files are in the way, or what the page needs is not installed.
        FingerprintMismatchError: The stores are of different models.
        IncompleteError: A store is not complete.
        SolverError: A row's embedding holds NaN or Inf.
    """
    begun = time.perf_counter()
    require_settings(audit, AuditConfig, settings)
    config = AuditConfig(**settings)
    folder = _folder(out, replace)
    if page:
        _require_page()
    where_run = Engine.parse(engine)
    device = resolve_device(_on_cpus(config).device if where_run.ray else config.device)
    opened = store if isinstance(store, EmbeddingStore) else EmbeddingStore(store)
    other = against if against is None or isinstance(against, EmbeddingStore) else EmbeddingStore(against)
    if other is None and against_dataset is not None:
        raise UsageError("`against_dataset` says where the images of `against` are: it needs `against`")
    with (
        limited_threads(config.threads),
        showing(progress, "rows", **_COUNTED) as show,
        where_run.opened(notify or log) as executor,
    ):
        findings = audit_store(opened, other, config, device, show, executor)
        make_folder(folder)
        for name in FILES:  # of an earlier audit, which may have found what this one does not look for
            (folder / name).unlink(missing_ok=True)
        write_tables(findings, folder)
        missing = _write_page(findings, config, other, dataset, against_dataset, folder) if page else []
    doubts, leaks = findings.doubts, findings.leaks
    return AuditReport(
        out=folder,
        files=tuple(findings.files),
        rows=len(findings.rows),
        exact=findings.found.exact,
        groups=findings.groups.count,
        grouped=len(findings.groups.row),
        spare=findings.groups.spare,
        leaks=None if leaks is None else len(leaks),
        leaked=None if leaks is None else len(set(leaks.one.tolist())),
        labelled=0 if doubts is None else len(doubts.row),
        doubted=0 if doubts is None else int(doubts.doubted.sum()),
        no_doubts=findings.no_doubts,
        flip_test=findings.test,
        missing=tuple(missing),
        seconds=round(time.perf_counter() - begun, 3),
    )


_COUNTED = {"probe": "passes", "probe of flipped labels": "passes"}


def _on_cpus(config: AuditConfig) -> AuditConfig:
    """``config`` for the workers of a cluster.

    Raises:
        UsageError: It asks for a GPU.
    """
    if config.device not in {DEVICE, "cpu"}:
        raise UsageError(
            f"`device`: got {config.device!r} with `engine='ray'`, which searches on CPUs",
            hint="leave `device` out, or search on the GPU of this machine: `engine='local'`",
        )
    return dataclasses.replace(config, device="cpu")


def _folder(out: str | Path, replace: bool) -> Path:
    """Where the files go.

    Raises:
        UsageError: Something else is there.
    """
    folder = local_file(out, "`out`")
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"`out` {folder}: a file is in the way, expected a folder, or nothing")
    there = [name for name in (*FILES, "audit.html") if (folder / name).exists()]
    if there and not replace:
        raise UsageError(
            f"`out` {folder}: holds {', '.join(there)} already", hint="give another folder, or `replace=True`"
        )
    return folder


def _require_page() -> None:
    """Make sure that the page can be made before anything is computed.

    Raises:
        UsageError: What it needs is not installed.
    """
    try:
        import gstds_cache.auditing.page  # noqa: F401
    except ModuleNotFoundError as error:
        raise UsageError(
            f"the page needs {error.name}, which is not installed",
            hint="pip install 'gstds-cache[report]', or pass `page=False` for the tables alone",
        ) from error


def _write_page(
    findings: Findings,
    config: AuditConfig,
    other: EmbeddingStore | None,
    dataset: Any,
    against_dataset: Any,
    folder: Path,
) -> list[str]:
    from gstds_cache.auditing.page import PAGE, make_page
    from gstds_cache.auditing.view import Pictures
    from gstds_cache.report.thumbnails import find_images

    hash_cache = HashCache(hashes_folder())

    def pictures(store: EmbeddingStore, where: Any, name: str) -> Pictures:
        source, why = find_images(store, where, lambda uri: open_source(uri, hash_cache=hash_cache), name)
        return Pictures(store, source, why, store.manifest().ids.__getitem__)

    mine = pictures(findings.rows.store, dataset, "dataset")
    theirs = None if other is None else pictures(other, against_dataset, "against_dataset")
    _, missing = make_page(findings, config, mine, theirs, folder / PAGE)
    findings.files.append(folder / PAGE)
    return missing
