"""What a user asks guidance to be, parsed; and the digests by which it is found.

- ``probe``: held-out cross-entropy of a linear probe on the cached embeddings (selection/linear_probe.py).
- ``uncertainty``: entropy of the same probe's held-out prediction, which its own wrong label cannot raise.
- ``disagreement``: share of a row's neighbours in its batch's graph that have another label; nothing is trained.
- ``file:SCORES.npy``: numbers of one's own, one for each row of the store.
- ``none``: every row counts the same, for data without labels.

``probe?cutoff=0.1`` takes the hardest tenth of all samples for mislabelled and gives it difficulty 0.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from gstds_cache.errors import UsageError, unknown_name
from gstds_cache.files.digest import digest_of, sha256_file
from gstds_cache.files.given import require_file
from gstds_cache.files.location import expanded
from gstds_cache.selection import catalog
from gstds_cache.selection.difficulty import pieces
from gstds_cache.selection.linear_probe import ProbeSettings
from gstds_cache.selection.permutation import STORED
from gstds_cache.selection.trial import TrialSettings
from gstds_cache.store.reader import EmbeddingStore
from gstds_cache.uris import split_query

FORMAT = 1
SAVE_SCORES = "np.save('scores.npy', scores), one number >= 0 for each row of the store"
PROBED = {"probe": "loss", "uncertainty": "entropy"}
"""The kinds that take a probe, and the column of it that each reads."""
RENAMED = {"pace": "lr_scale"}


@dataclass(frozen=True)
class GuidanceSpec:
    """What a user asked for, parsed.

    Attributes:
        kind: ``auto``, ``probe``, ``uncertainty``, ``disagreement``, ``file`` or ``none``.
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


@dataclass(frozen=True)
class GuidanceKey:
    """A store's guidance by its digests: the labels are read for them once, here.

    Attributes:
        spec: What was asked for; its kind is never ``auto``.
        digest: Identity: the kind, every setting, the store's fingerprint and its labels (or the file's content);
            ``none`` for no guidance.
        probe: Identity of the probe that is looked at; empty where there is none.
    """

    spec: GuidanceSpec
    digest: str
    probe: str = ""


def parse_guidance(text: str) -> GuidanceSpec:
    """Parse ``probe``, ``probe?cutoff=0.1&folds=4``, ``disagreement``, ``file:SCORES.npy`` or ``none``.

    Raises:
        UsageError: The kind or a parameter is unknown, or a value out of range.
    """  # noqa: DOC501
    if text.startswith("file:"):
        return GuidanceSpec("file", path=expanded(text.removeprefix("file:"), "`guidance` file:"))
    kind, parameters = split_query("`guidance`", text)
    if kind not in catalog.GUIDANCE_KINDS:
        raise unknown_name("guidance", kind, catalog.GUIDANCE)
    known: dict[str, type] = {"cutoff": float} if kind in PROBED else {}
    known |= {f.name: type(f.default) for f in fields(ProbeSettings)} if kind in PROBED else {}
    values: dict[str, Any] = {}
    for given, value in parameters.items():
        name = RENAMED.get(given, given)
        if name not in known:
            raise unknown_name(f"parameter of guidance {kind}", name, known)
        if name != given:
            warnings.warn(f"guidance {text!r}: {given} is now called {name}", FutureWarning, stacklevel=2)
        try:
            values[name] = known[name](value)
        except ValueError as error:
            raise UsageError(
                f"`guidance={text!r}`: {name}: got {value!r}, expected a {known[name].__name__}"
            ) from error
    return _checked(text, kind, **values)


def _checked(text: str, kind: str, *, cutoff: float = 0.0, **settings: Any) -> GuidanceSpec:
    """A probe's parameters, each in its range.

    Raises:
        UsageError: One is not.
    """
    probe = ProbeSettings(**settings)
    for name, got, good, expected in (
        ("cutoff", cutoff, 0 <= cutoff < 1, "from 0 to below 1"),
        ("folds", probe.folds, 2 <= probe.folds <= 100, "from 2 to 100"),
        ("epochs", probe.epochs, probe.epochs >= 1, "at least 1"),
        ("steps", probe.steps, probe.steps >= 1, "at least 1"),
        ("batch_size", probe.batch_size, probe.batch_size >= 1, "at least 1"),
        ("lr_scale", probe.lr_scale, 0 < probe.lr_scale < 1000, "between 0 and 1000"),
        ("decay", probe.decay, 0 <= probe.decay < 1, "from 0 to below 1"),
        ("seed", probe.seed, probe.seed >= 0, "0 or more"),
    ):
        if not good:
            raise UsageError(f"`guidance={text!r}`: {name}: got {got}, expected {expected}")
    return GuidanceSpec(kind, cutoff, probe)


def key_of(store: EmbeddingStore, spec: GuidanceSpec, labels: str = "") -> GuidanceKey:
    """The digests of a guidance, without computing it.

    Args:
        store: Where embeddings and labels are.
        spec: What was asked for.
        labels: What :func:`labels_digest` gives, where it is known: it reads every label.

    Returns:
        The digests.

    Raises:
        UsageError: The file that was named cannot be read.
    """
    if spec.kind == "none":
        return GuidanceKey(spec, "none")
    if spec.path is not None:
        require_file(spec.path, "`guidance` file", hint=SAVE_SCORES)
        return GuidanceKey(spec, digest_of({"kind": "file", "sha256": sha256_file(spec.path)}))
    labels = labels or labels_digest(store)
    if spec.kind == "disagreement":
        return GuidanceKey(spec, digest_of({"kind": spec.kind, "labels": labels}))
    probe = digest_of(
        {
            "format": FORMAT,
            "settings": recorded_settings(spec.settings),
            "cache": store.fingerprint,
            "labels": labels,
            "valid": valid_digest(store),
            **({"hidden": store.hidden_digest} if store.hidden_digest else {}),
            # Folds of more rows are assigned by another permutation than they were.
            **({"folds": "computed"} if len(store) > STORED else {}),
        }
    )
    trial = {} if spec.trial is None else {"trial": asdict(spec.trial)}
    return GuidanceKey(spec, digest_of({"kind": spec.kind, "cutoff": spec.cutoff, "probe": probe, **trial}), probe)


def labels_digest(store: EmbeddingStore) -> str:
    """SHA-256 of a store's labels."""
    return _sha256_of(np.ascontiguousarray(part, "<i8") for part in pieces(store.labels))


def valid_digest(store: EmbeddingStore) -> str:
    """SHA-256 of which of a store's rows have an embedding: a repair changes it, but not the fingerprint."""
    return _sha256_of(map(store.valid_in, range(store.spec.shards)))


def recorded_settings(settings: ProbeSettings) -> dict[str, Any]:
    """A probe's settings by the names that digests and records of earlier versions have."""
    old = {new: old for old, new in RENAMED.items()}
    return {old.get(name, name): value for name, value in asdict(settings).items()}


def _sha256_of(parts: Iterable[np.ndarray]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.data)
    return digest.hexdigest()
