"""A probe's columns and a trial's outcome in files beside the store, where the next run finds them."""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from jaxtyping import Int

from gstds_cache.errors import GstdsError
from gstds_cache.files import mapped
from gstds_cache.files.atomic import atomic_write
from gstds_cache.files.derived import GUIDANCE, derived_paths, first_writable, keep
from gstds_cache.files.digest import canonical_json, sealed, sha256_file, unsealed
from gstds_cache.selection.difficulty import Difficulty, pieces
from gstds_cache.selection.guidance_spec import GuidanceKey, recorded_settings
from gstds_cache.selection.linear_probe import COLUMNS, ProbeSettings, probe_columns
from gstds_cache.selection.trial import Trial, try_out
from gstds_cache.store.reader import EmbeddingStore


def load_or_try(
    store: EmbeddingStore, key: GuidanceKey, difficulty: Difficulty, threads: int, device: torch.device | None
) -> Trial:
    """The trial of a guidance: the outcome that is recorded, or a new one, recorded where that can be done."""
    records = [folder / f"{key.digest[:16]}.trial.json" for folder in derived_paths(store.location, GUIDANCE)]
    for record in records:
        with suppress(OSError, ValueError, KeyError, TypeError):  # no record, a damaged one, or one without a hash
            facts = unsealed(record.read_bytes())
            if facts.pop("digest") == key.digest:
                return Trial(**facts)
    assert key.spec.trial is not None
    trial = try_out(store, difficulty, run=key.spec.trial, settings=key.spec.settings, threads=threads, device=device)
    text = sealed({"digest": key.digest, **asdict(trial)})
    keep(lambda path: _put(path, lambda file: file.write(text)), records)  # where that fails each run tries
    return trial


def load_or_train(
    store: EmbeddingStore, key: GuidanceKey, threads: int, device: torch.device | None
) -> tuple[np.ndarray, float, str]:
    """A probe's columns: those that are kept, or of a probe that is trained now.

    Returns:
        The columns, mapped from their file; the seconds that training took, 0 where it was not needed; and a sentence
        on where they come from.
    """
    digest, settings = key.probe, key.spec.settings
    folders, why = derived_paths(store.location, GUIDANCE), ""
    for folder in folders:
        kept, problem = _kept(*_files(folder, digest), digest, len(store))
        if kept is not None:
            return kept, 0.0, f"found in {_files(folder, digest)[0]}"
        why = why or f"{problem}; " * bool(problem)
    begun = time.perf_counter()
    writable = first_writable(folders)
    columns, problem = None, writable.note
    if writable.path is not None:
        columns, problem = _train_into(writable.path, digest, store, settings, threads, device)
    if columns is None:
        columns = mapped.zeros((len(store),), COLUMNS)
        probe_columns(store, settings, threads=threads, device=device, out=columns)
    seconds = time.perf_counter() - begun
    parts = zip(pieces(columns), pieces(store.labels), strict=True)
    rows, loss, right = np.sum([_tally(part, labels) for part, labels in parts], axis=0).tolist()
    facts = {
        "digest": digest,
        "settings": recorded_settings(settings),
        "rows": int(rows),
        "loss": loss / rows,
        "accuracy": right / rows,
        "seconds": round(seconds, 3),
    }
    note = f"{why}probe: {facts['accuracy']:.1%} right on held-out rows, mean loss {facts['loss']:.3f}; "
    if writable.path is not None and not problem:
        path, record = _files(writable.path, digest)
        problem = _write_record(path, record, facts)
        note += f"kept in {path}" * (not problem)
    return columns, seconds, f"{note}not kept: {problem}" if problem else note


def _files(folder: Path, digest: str) -> tuple[Path, Path]:
    """The file of a probe's columns, and the record that makes them count."""
    return folder / f"{digest[:16]}.npy", folder / f"{digest[:16]}.json"


def _train_into(
    folder: Path,
    digest: str,
    store: EmbeddingStore,
    settings: ProbeSettings,
    threads: int,
    device: torch.device | None,
) -> tuple[np.ndarray | None, str]:
    """A probe's columns, computed into a file of ``folder``; or None and why they could not be written."""
    path, _ = _files(folder, digest)
    try:
        _put(path, lambda file: _fill(file, store, settings, threads, device))
        return _mapped(path), ""
    except BaseException as error:
        with suppress(OSError):  # others' probes are in it
            folder.rmdir()
        if not isinstance(error, OSError) or isinstance(error, GstdsError):
            raise
        return None, f"{path}: {error.strerror or error}"


def _write_record(path: Path, record: Path, facts: dict[str, Any]) -> str:
    """Write the record, which comes last, as it is what makes the file count; or say why that could not be done."""
    try:
        text = canonical_json(facts | {"sha256": sha256_file(path)})
        _put(record, lambda file: file.write(text))
    except OSError as error:
        with suppress(OSError):
            path.unlink()
        return f"{record}: {error.strerror or error}"
    return ""


def _fill(
    file: IO[bytes], store: EmbeddingStore, settings: ProbeSettings, threads: int, device: torch.device | None
) -> None:
    """Write a probe's columns as ``.npy``, straight into the file: they are not held."""
    header = {"descr": np.lib.format.dtype_to_descr(COLUMNS), "fortran_order": False, "shape": (len(store),)}
    np.lib.format.write_array_header_1_0(file, header)
    file.flush()
    # A disk that is full says so now, and not when a page is written.
    os.posix_fallocate(file.fileno(), file.tell(), len(store) * COLUMNS.itemsize)
    columns: np.ndarray = np.memmap(file, COLUMNS, "r+", file.tell(), len(store))
    probe_columns(store, settings, threads=threads, device=device, out=columns)
    columns.flush()  # type: ignore[attr-defined]


def _tally(columns: np.ndarray, labels: Int[np.ndarray, " P"]) -> tuple[int, float, int]:
    """Rows that were judged, the sum of their losses, and how many were predicted right."""
    known = np.isfinite(columns["loss"])
    right = (columns["predicted"] == labels) & known
    return int(known.sum()), float(columns["loss"][known].sum(dtype=np.float64)), int(right.sum())


def _kept(path: Path, record: Path, digest: str, items: int) -> tuple[np.ndarray | None, str]:
    """The kept columns, or None and what is wrong with them; no reason where there are none."""
    if not os.path.exists(record):  # noqa: PTH110 - Path's raises where the folder may not be searched
        return None, ""
    try:
        facts = json.loads(record.read_bytes())
        if facts["digest"] != digest or facts["sha256"] != sha256_file(path):
            return None, f"{path} is not what its record tells of and was made again"
        columns = _mapped(path)
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        return None, f"{path} or its record does not read ({error}) and was made again"
    if columns.dtype != COLUMNS or columns.shape != (items,):
        return None, f"{path} holds {columns.dtype} {list(columns.shape)} and was made again"
    return columns, ""


def _mapped(path: Path) -> np.ndarray:
    """A file of ours, which is replaced and never changed, as an array that takes no memory."""
    columns: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    return columns


def _put(path: Path, write: Any) -> None:
    """Write a file that appears under its name only when it is whole and on the disk."""
    with atomic_write(path, durable=True) as file:
        write(file)
