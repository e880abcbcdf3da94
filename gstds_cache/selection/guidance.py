"""Guidance: a difficulty for every sample, without another forward pass; kept beside the store.

- ``probe``: held-out cross-entropy of a linear probe on the cached embeddings
(:mod:`gstds_cache.selection.linear_probe`).
- ``uncertainty``: entropy of the same probe's held-out prediction, which its own wrong label cannot raise.
- ``disagreement``: share of a row's neighbours in its batch's graph that have another label; nothing is trained.
- ``file:SCORES.npy``: numbers of one's own, one for each row of the store.
- ``none``: every row counts the same, for data without labels.

``probe?cutoff=0.1`` takes the hardest tenth of all samples for mislabelled and gives it difficulty 0.

What nobody asked for by name (``auto``) is tried out first, and left out where it does not help
(:mod:`gstds_cache.selection.trial`).
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from jaxtyping import Float32, Float64, Int, Int64

from gstds_cache.errors import GstdsError, UsageError, unknown_name
from gstds_cache.files import mapped
from gstds_cache.files.atomic import atomic_write
from gstds_cache.files.derived import derived_paths, first_writable, keep
from gstds_cache.files.digest import canonical_json, digest_of, sha256_file
from gstds_cache.files.given import reading, require_file
from gstds_cache.files.location import expanded
from gstds_cache.selection.difficulty import Difficulty, pieces
from gstds_cache.selection.linear_probe import COLUMNS, ProbeSettings, probe_columns
from gstds_cache.selection.permutation import STORED
from gstds_cache.selection.trial import Trial, TrialSettings, try_out
from gstds_cache.store.layout import OK
from gstds_cache.store.reader import EmbeddingStore
from gstds_cache.uris import split_query

FORMAT = 1
KINDS = {
    "auto": "uncertainty where rows have labels and a probe learns no worse from rows drawn by it, else none",
    "probe": "held-out loss of a linear probe",
    "uncertainty": "entropy of that probe's prediction",
    "disagreement": "share of graph neighbours with another label",
    "file:SCORES.npy": "numbers of your own",
    "none": "all rows alike",
}
DEFAULT = "uncertainty"  # as good as the probe's loss, and blind to a row's own wrong label (docs/method.md)
SAVE_SCORES = "np.save('scores.npy', scores), one number >= 0 for each row of the store"
PROBED = {"probe": "loss", "uncertainty": "entropy"}


@dataclass(frozen=True)
class GuidanceSpec:
    """What a user asked for, parsed.

    Attributes:
        kind: ``probe``, ``uncertainty``, ``disagreement``, ``file`` or ``none``.
        cutoff: Share of all samples, the hardest, that get difficulty 0; from 0 to below 1.
        settings: How the probe is trained.
        path: Where the numbers are, for ``file``.
        trial: Difficulty counts only where a trial for such a run does not speak against it; None where it counts
            anyway.
    """

    kind: str
    cutoff: float = 0.0
    settings: ProbeSettings = field(default_factory=ProbeSettings)
    path: Path | None = None
    trial: TrialSettings | None = None


@dataclass(frozen=True, eq=False)
class Guidance:
    """A difficulty for every row of a store.

    Attributes:
        kind: As in :class:`GuidanceSpec`.
        digest: Identity: the kind, every setting, the store's fingerprint and its labels (or the file's content).
        of_rows: Of every row, >= 0, rows without a label at the median; None where it is found batch by batch
            (``disagreement``) or all rows are alike (``none``, or a trial said that it does not help).
        columns: What the probe found, [N] of :data:`~gstds_cache.selection.linear_probe.COLUMNS`, mapped from its file;
            its ``loss`` is the reference loss of RHO-LOSS and JEST. None for other kinds.
        seconds: What making it took; 0 where it was found.
        note: A sentence on where it came from.
    """

    kind: str
    digest: str
    of_rows: Difficulty | None = None
    columns: np.ndarray | None = None
    seconds: float = 0.0
    note: str = ""

    def of(
        self,
        rows: Int64[np.ndarray, " B"],
        labels: Int64[np.ndarray, " B"],
        neighbors: Int64[np.ndarray, "B K"] | None,
    ) -> Float64[np.ndarray, " B"]:
        """The difficulty of a batch's rows, float64 [B]."""
        if self.of_rows is not None:
            return self.of_rows.of(rows)
        if self.kind == "disagreement" and neighbors is not None:
            return disagreement(labels, neighbors)
        return np.ones(len(rows))


def disagreement(labels: Int64[np.ndarray, " B"], neighbors: Int64[np.ndarray, "B K"]) -> Float64[np.ndarray, " B"]:
    """Share of each row's labelled neighbours whose label is another one; 0 where there is nothing to compare."""
    theirs = np.where(neighbors >= 0, labels[neighbors], -1)
    comparable = (theirs >= 0) & (labels[:, None] >= 0)
    differ = (comparable & (theirs != labels[:, None])).sum(axis=1)
    return np.asarray(differ / np.maximum(comparable.sum(axis=1), 1), np.float64)


def parse_guidance(text: str) -> GuidanceSpec:
    """Parse ``probe``, ``probe?cutoff=0.1&folds=4``, ``disagreement``, ``file:SCORES.npy`` or ``none``.

    Raises:
        UsageError: The kind or a parameter is unknown, or a value out of range.
    """  # noqa: DOC501
    if text.startswith("file:"):
        return GuidanceSpec("file", path=expanded(text.removeprefix("file:"), "--guidance file:"))
    kind, parameters = split_query("--guidance", text)
    if kind not in KINDS or kind == "file:SCORES.npy":
        raise unknown_name("guidance", kind, KINDS)
    known: dict[str, type] = {"cutoff": float} if kind in PROBED else {}
    known |= {f.name: type(f.default) for f in fields(ProbeSettings)} if kind in PROBED else {}
    values: dict[str, Any] = {}
    for name, value in parameters.items():
        if name not in known:
            raise unknown_name(f"parameter of --guidance {kind}", name, known)
        try:
            values[name] = known[name](value)
        except ValueError as error:
            raise UsageError(
                f"--guidance {text!r}: {name}: got {value!r}, expected a {known[name].__name__}"
            ) from error
    cutoff = values.pop("cutoff", 0.0)
    made = ProbeSettings(**values)
    for name, good, expected in (
        ("cutoff", 0 <= cutoff < 1, "from 0 to below 1"),
        ("folds", 2 <= made.folds <= 100, "from 2 to 100"),
        ("epochs", made.epochs >= 1, "at least 1"),
        ("steps", made.steps >= 1, "at least 1"),
        ("batch_size", made.batch_size >= 1, "at least 1"),
        ("pace", 0 < made.pace < 1000, "between 0 and 1000"),
        ("decay", 0 <= made.decay < 1, "from 0 to below 1"),
        ("seed", made.seed >= 0, "0 or more"),
    ):
        if not good:
            raise UsageError(f"--guidance {text!r}: {name}: got {parameters[name]}, expected {expected}")
    return GuidanceSpec(kind, cutoff, made)


def guidance_digest(store: EmbeddingStore, spec: GuidanceSpec) -> str:
    """Identity of a guidance, without making it.

    Raises:
        UsageError: The file that was named cannot be read.
    """
    if spec.kind == "none":
        return "none"
    if spec.path is not None:
        require_file(spec.path, "--guidance file", hint=SAVE_SCORES)
        return digest_of({"kind": "file", "sha256": sha256_file(spec.path)})
    if spec.kind == "disagreement":
        return digest_of({"kind": spec.kind, "labels": _labels_digest(store)})
    trial = {} if spec.trial is None else {"trial": asdict(spec.trial)}
    return digest_of({"kind": spec.kind, "cutoff": spec.cutoff, "probe": _probe_digest(store, spec.settings), **trial})


def load_or_make_guidance(
    store: EmbeddingStore,
    guidance: str | GuidanceSpec,
    *,
    threads: int = 1,
    device: torch.device | None = None,
) -> Guidance:
    """A store's guidance: the one kept beside it, or made now and kept.

    Args:
        store: Where embeddings and labels are.
        guidance: As on the command line, or parsed; ``auto`` is :data:`DEFAULT`.
        threads: CPU threads.
        device: Where a probe is trained.

    Returns:
        The guidance.

    Raises:
        UsageError: The store has no labels to learn from, or a file does not fit the store.
    """
    spec = parse_guidance(guidance) if isinstance(guidance, str) else guidance
    spec = replace(spec, kind=DEFAULT) if spec.kind == "auto" else spec
    digest = guidance_digest(store, spec)
    if spec.path is not None:
        return Guidance("file", digest, Difficulty(_own_scores(store, spec.path)), note=f"read from {spec.path}")
    if spec.kind == "none":
        return Guidance("none", digest)
    if spec.kind == "disagreement":
        if store.labels.max(initial=-1) < 0:
            raise UsageError(f"--guidance disagreement: {store.location} has no labels", hint="use --guidance none")
        return Guidance("disagreement", digest)
    columns, seconds, note = _load_or_make_columns(store, spec.settings, threads, device)
    difficulty = columns[PROBED.get(spec.kind, "loss")]
    if spec.cutoff:
        difficulty = np.array(difficulty)
        known = np.isfinite(difficulty)
        hardest = np.argsort(-difficulty[known], kind="stable")[: int(spec.cutoff * known.sum())]
        difficulty[np.flatnonzero(known)[hardest]] = 0.0
    of_rows = Difficulty(difficulty)
    if spec.trial is None:
        return Guidance(spec.kind, digest, of_rows, columns, seconds, note)
    begun = time.perf_counter()
    trial = _load_or_try(store, digest, of_rows, spec, threads, device)
    seconds += time.perf_counter() - begun
    return Guidance(spec.kind, digest, of_rows if trial.helps else None, columns, seconds, f"{trial}; {note}")


def _load_or_try(
    store: EmbeddingStore,
    digest: str,
    difficulty: Difficulty,
    spec: GuidanceSpec,
    threads: int,
    device: torch.device | None,
) -> Trial:
    records = [folder / f"{digest[:16]}.trial.json" for folder in derived_paths(store.location, ".guidance")]
    for record in records:
        with suppress(OSError, ValueError, KeyError, TypeError):  # not there, or not whole: made again
            facts = json.loads(record.read_bytes())
            if facts["digest"] == digest:
                return Trial(**{f.name: int(facts[f.name]) for f in fields(Trial)})
    assert spec.trial is not None
    made = try_out(store, difficulty, run=spec.trial, settings=spec.settings, threads=threads, device=device)
    # Where it can be kept nowhere, each run tries.
    text = canonical_json({"digest": digest, **asdict(made)})
    keep(lambda path: _put(path, lambda file: file.write(text)), records)
    return made


def _labels_digest(store: EmbeddingStore) -> str:
    return _sha256_of(np.ascontiguousarray(part, "<i8") for part in pieces(store.labels))


def _sha256_of(parts: Iterable[np.ndarray]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.data)
    return digest.hexdigest()


def _probe_digest(store: EmbeddingStore, settings: ProbeSettings) -> str:
    return digest_of(
        {
            "format": FORMAT,
            "settings": asdict(settings),
            "cache": store.fingerprint,
            "labels": _labels_digest(store),
            "valid": _sha256_of(map(store.valid_in, range(store.spec.shards))),
            # Folds of more rows are dealt by another permutation than they were.
            **({"folds": "computed"} if len(store) > STORED else {}),
        }
    )


def _load_or_make_columns(
    store: EmbeddingStore, settings: ProbeSettings, threads: int, device: torch.device | None
) -> tuple[np.ndarray, float, str]:
    digest = _probe_digest(store, settings)
    folders, why = derived_paths(store.location, ".guidance"), ""
    for folder in folders:
        found, problem = _kept(*_files(folder, digest), digest, len(store))
        if found is not None:
            return found, 0.0, f"found in {_files(folder, digest)[0]}"
        why = why or f"{problem}; " * bool(problem)
    begun = time.perf_counter()
    place = first_writable(folders)
    columns, problem = None, place.note
    if place.path is not None:
        columns, problem = _make_in(place.path, digest, store, settings, threads, device)
    if columns is None:
        columns = mapped.zeros((len(store),), COLUMNS)
        probe_columns(store, settings, threads=threads, device=device, out=columns)
    seconds = time.perf_counter() - begun
    parts = zip(pieces(columns), pieces(store.labels), strict=True)
    rows, loss, right = np.sum([_tally(part, labels) for part, labels in parts], axis=0).tolist()
    facts = {
        "digest": digest,
        "settings": asdict(settings),
        "rows": int(rows),
        "loss": loss / rows,
        "accuracy": right / rows,
        "seconds": round(seconds, 3),
    }
    said = f"{why}probe: {facts['accuracy']:.1%} right on held-out rows, mean loss {facts['loss']:.3f}; "
    if place.path is not None and not problem:
        path, record = _files(place.path, digest)
        problem = _write_record(path, record, facts)
        said += f"kept in {path}" * (not problem)
    return columns, seconds, f"{said}not kept: {problem}" if problem else said


def _files(folder: Path, digest: str) -> tuple[Path, Path]:
    """Where a probe's columns are, and the record that makes them count."""
    return folder / f"{digest[:16]}.npy", folder / f"{digest[:16]}.json"


def _make_in(
    folder: Path,
    digest: str,
    store: EmbeddingStore,
    settings: ProbeSettings,
    threads: int,
    device: torch.device | None,
) -> tuple[np.ndarray | None, str]:
    """A probe's columns, made in a file of ``folder``; or None and why they could not be written."""
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


def _own_scores(store: EmbeddingStore, path: Path) -> Float32[np.ndarray, " N"]:
    """The numbers of a user's file as difficulty.

    Raises:
        UsageError: They are not one finite number >= 0 for each row, or float32 cannot hold them.
    """
    option = f"--guidance file:{path}"
    scores = _array(path)
    if scores.shape != (len(store),) or scores.dtype.kind not in "fiu":
        raise UsageError(
            f"{option}: got {scores.dtype!s:.80} {list(scores.shape)}, expected {len(store)} numbers, one for "
            "each row of the store",
            hint=SAVE_SCORES,
        )
    ok = store.valid == OK
    bad = np.flatnonzero(ok & ~(np.isfinite(scores) & (scores >= 0)))
    if bad.size:
        raise UsageError(f"{option}: row {bad[0]}: got {scores[bad[0]]}, expected a finite number >= 0")
    known = np.where(ok, scores, 0)
    largest, limits = known.max(initial=0), np.finfo(np.float32)
    if largest > limits.max or 0 < largest < limits.tiny:
        raise UsageError(
            f"{option}: the largest is {largest}, expected {limits.tiny:.1e} to {limits.max:.1e} (float32)",
            hint="only their relation counts: divide them all by the largest",
        )
    return known.astype(np.float32)


def _array(path: Path) -> np.ndarray:
    with path.open("rb") as file:
        magic = file.read(6)
    if magic != np.lib.format.MAGIC_PREFIX:
        got = "an archive, as of np.savez," if magic.startswith(b"PK") else "something else,"
        raise UsageError(
            f"--guidance file:{path}: does not read as .npy: got {got} expected one array, as of np.save",
            hint=SAVE_SCORES,
        )
    with reading(path, "one array of numbers (.npy)", hint=SAVE_SCORES):
        found: np.ndarray = np.load(path, allow_pickle=False)
    return found
