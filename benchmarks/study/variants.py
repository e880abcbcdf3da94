"""Variants of drawing by training losses, tried on validation data: ``variant:form=ratio+strata=32`` and the like.

None of them is part of the library; what they gave is in docs/results.md, "What was tried on the draw". A variant's
stream is that of a draw of the library; its own are the reference losses, the scores, and in part the strata and the
losses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_type_hints

import numpy as np
from jaxtyping import Float32, Float64, Int16, Int64

from gstds_cache.config import as_type
from gstds_cache.errors import UsageError
from gstds_cache.seeding import rng_for
from gstds_cache.selection.draws import CONFIDENT, DRAWS, Draw, draw_rows
from gstds_cache.selection.rule import RuleBatch
from gstds_cache.selection.selected_batch import SelectedBatch
from gstds_cache.selection.strata import cells_of
from gstds_cache.stream.schema import Header
from gstds_cache.training.feedback import Feedback

PREFIX = "variant:"
BY_CLASS = ("class", "prior")
EIGENVECTORS = 8  # of a dense graph


@dataclass(frozen=True, kw_only=True)
class Variant:
    """What is drawn in proportion to, and how.

    Attributes:
        form: From last and reference losses to scores: ``subtract`` is max(last - c reference, 0), ``damped`` is
            last / (1 + exp(steep (reference - 2))), ``ratio`` is last / (c + reference); ``passed`` is
            ``subtract`` with c = 1, and ``damped`` once the network is better than the reference model on more than
            the share c of the rows that the latter is sure of; ``loss`` looks at no reference, ``uniform`` at nothing.
        c: Factor of the reference loss that is subtracted; what is added to it in a ratio; a share for ``passed``.
        steep: How steeply losses are damped.
        reference: Whose losses are the reference: the probe's, those of neighbours' labels, or a small network's.
        calibrate: ``mean`` scales reference losses in each epoch so that their mean is that of the last losses (of rows
            that have one), ``quantile`` replaces each by the last losses' quantile of the same rank; ``class`` and
            ``prior`` shift those of each class: to the mean of all, or by the logarithm of its share.
        power: To which scores are raised: the strength.
        strata: Spectral strata of a batch.
        graph: ``dense`` takes the strata from all cosines of a batch, L = D - S, instead of nearest neighbours;
            ``label`` makes one of each class.
        guidance: The prior.
        prior: Whether scores are multiplied by it for rows that have a loss, too.
        random_end: Share of the epochs, the last ones, in which rows are drawn uniformly.
        decay: Whether scores go over to uniform ones, in a straight line over the epochs.
        rotate: Factor of the scores of rows that were trained on in the epoch before.
        visits: A row's loss is the mean of its last so many, 1 or 2.
        aged: Whether losses are scaled by the means of the epochs they are from and of the last one.
        unseen: Factor of the scores of rows without a loss.
        impute: What stands for the loss of rows without one, so that they too are scored beside their reference loss:
            ``both`` is the mean of the batch's losses, before there is one log C, all classes alike; ``batch`` the
            mean of the batch's, before there is one the score is the prior; ``mean`` the mean of all losses, before
            there is one log C; ``chance`` always log C. ``none`` gives them the batch's mean score.
        step: Samples of a step; 0 for the setting's.
        rest: Side in pixels at which the rows that are not drawn are trained on as well, in the same step, each with
            the weight of a drawn one; 0 leaves them out.
        top: Whether the rows of the largest scores of each stratum are taken, rather than drawn.
        sharp: To which power scores are raised, and no row's is raised to a least one; 0 for draws as the library's.
        anew: Whether rows are divided into new batches in each epoch, with strata too.
        refresh: Whether every row has a new loss when an epoch ends, by a forward pass of the network as it is then.
    """

    form: Literal["subtract", "damped", "ratio", "passed", "loss", "uniform"] = "subtract"
    c: float = 1.0
    steep: float = 3.0
    reference: Literal["probe", "neighbours", "proxy"] = "probe"
    calibrate: Literal["none", "mean", "quantile", "class", "prior"] = "none"
    power: float = 1.0
    strata: int = 8
    graph: Literal["knn", "dense", "label"] = "knn"
    guidance: str = "auto"
    prior: bool = False
    random_end: float = 0.0
    decay: bool = False
    rotate: float = 1.0
    visits: int = 1
    aged: bool = False
    unseen: float = 1.0
    impute: Literal["both", "batch", "mean", "chance", "none"] = "both"
    step: int = 0
    rest: int = 0
    refresh: bool = False
    top: bool = False
    sharp: float = 0.0
    anew: bool = False

    @property
    def draw(self) -> str:
        """The draw of the library whose stream it needs."""
        return self.form if self.form in {"loss", "uniform"} else "loss-minus-reference"


def parse_variant(text: str) -> Variant:
    """The variant ``KEY=VALUE[+KEY=VALUE...]``.

    Raises:
        UsageError: There is no such key, or it does not take this value.
    """
    kinds, given = get_type_hints(Variant), {}
    for part in filter(None, text.split("+")):
        key, _, value = part.partition("=")
        if key not in kinds:
            raise UsageError(f"no key {key!r} of a variant: there is {', '.join(f.name for f in fields(Variant))}")
        number = {int: int, float: float, bool: lambda text: bool(int(text))}.get(kinds[key], str)
        given[key] = as_type(key, number(value), kinds[key])
    return Variant(**given)


def score(
    variant: Variant, last: Float64[np.ndarray, " b"], reference: Float64[np.ndarray, " b"]
) -> Float64[np.ndarray, " b"]:
    """Scores of rows that have a loss, before ``power``."""
    last = np.maximum(last, 0.0)
    known: dict[str, Callable[[], Float64[np.ndarray, " b"]]] = {
        "subtract": lambda: np.maximum(last - variant.c * reference, 0.0),
        "damped": lambda: last / (1.0 + np.exp(np.minimum(variant.steep * (reference - 2.0), 60.0))),
        "ratio": lambda: last / (variant.c + reference),
        "passed": lambda: passed(variant, last, reference),
        "loss": lambda: last,
    }
    return known[variant.form]()


def passed(
    variant: Variant, last: Float64[np.ndarray, " b"], reference: Float64[np.ndarray, " b"]
) -> Float64[np.ndarray, " b"]:
    """The library's ``adaptive`` with another share."""
    sure = reference < CONFIDENT
    better = np.count_nonzero(last[sure] < reference[sure]) > variant.c * np.count_nonzero(sure)
    return score(replace(variant, form="damped" if better else "subtract", c=1.0), last, reference)


def calibrated(
    how: str, reference: Float64[np.ndarray, " N"], last: Float64[np.ndarray, " N"]
) -> Float64[np.ndarray, " N"]:
    """Reference losses on the learner's scale, by the rows whose last loss is known; unchanged where there is none."""
    seen = np.isfinite(last)
    if how == "none" or not seen.any():
        return reference
    if how == "mean":
        scaled: Float64[np.ndarray, " N"] = reference * (last[seen].mean() / max(reference[seen].mean(), 1e-12))
        return scaled
    matched: Float64[np.ndarray, " N"] = np.interp(reference, np.sort(reference[seen]), np.sort(last[seen]))
    return matched


def by_class(
    how: str, reference: Float64[np.ndarray, " N"], labels: Int64[np.ndarray, " N"]
) -> Float64[np.ndarray, " N"]:
    """Reference losses less what classes differ by, or the logarithm of each class's share; their mean stays."""
    known = np.isfinite(reference)
    shifts = np.zeros(int(labels.max()) + 1)
    for label in np.unique(labels[known]):
        of = reference[known & (labels == label)]
        shifts[label] = -np.log(len(of) / known.sum()) if how == "prior" else of.mean()
    shifted: Float64[np.ndarray, " N"] = reference - shifts[labels]
    return shifted - shifted[known].mean() + reference[known].mean()


def dense_strata(rows: Float32[np.ndarray, "B D"], count: int) -> Int16[np.ndarray, " B"]:
    """Strata by the eigenvectors of L = D - S, where S holds all cosines of a batch's unit rows (SALN)."""
    cosines = rows.astype(np.float64) @ rows.T.astype(np.float64)
    np.fill_diagonal(cosines, 0.0)
    values, vectors = np.linalg.eigh(np.diag(cosines.sum(axis=1)) - cosines)
    basis = np.ascontiguousarray(vectors[:, 1 : 1 + EIGENVECTORS])
    seen = RuleBatch(basis[:, 0], len(rows), basis=basis, values=values[1 : 1 + EIGENVECTORS])
    order, bounds = cells_of(seen, count)
    strata = np.empty(len(rows), np.int16)
    strata[order] = np.repeat(np.arange(count), np.diff(bounds))
    return strata


class VariantFeedback(Feedback):
    """Draws by a variant; in a run of one process that is not resumed.

    Attributes:
        rest: Rows of the last batch that were not drawn.
        rest_side: Side in pixels at which they are trained on; 0 for not at all.
        refreshes: Whether a forward pass of all rows is due when an epoch ends; the trainer sets :attr:`losses`.
    """

    rest: Int64[np.ndarray, " m"]

    def __init__(
        self,
        header: Header,
        variant: Variant,
        *,
        reference: Float32[np.ndarray, " N"] | None = None,
        embeddings: Float32[np.ndarray, "N D"] | None = None,
        labels: Int64[np.ndarray, " N"] | None = None,
    ) -> None:
        """Begin without any loss.

        Args:
            header: The selection's.
            variant: The variant.
            reference: Reference losses instead of the stream's.
            embeddings: Unit rows, for a dense graph.
            labels: Of all rows, for strata that are classes.
        """
        self._variant, self._epochs, self._embeddings = variant, header.epochs, embeddings
        self._given, self.rest_side, self.refreshes = reference, variant.rest, variant.refresh
        self._labels = labels
        self._chance = float(header.settings.get("chance", np.log(10)))  # cross-entropy of all classes alike
        self._strata: dict[bytes, Int16[np.ndarray, " B"]] = {}
        super().__init__(header)

    def reset(self) -> None:
        super().reset()
        self._raw = self.losses.copy()  # as reported
        self._measured = np.full(self._items, np.nan)  # mean loss of the epoch that a row's loss is from
        self._lately = np.zeros(self._items, bool)
        self._reference = None if self._given is None else self._given.astype(np.float64)
        if self._variant.calibrate in BY_CLASS:
            assert self._reference is not None
            assert self._labels is not None
            self._reference = by_class(self._variant.calibrate, self._reference, self._labels)
        self._imputed = self._chance
        self._set_draw()

    def rows_of(self, batch: SelectedBatch) -> Int64[np.ndarray, " M"]:
        offered, rows = batch.candidates, batch.kept
        assert offered is not None
        assert batch.epoch == self.epoch
        if self._reference is not None:
            offered = replace(offered, reference=self._reference[rows].astype(np.float32))
        if self._embeddings is not None:
            key = np.sort(rows).tobytes()
            if key not in self._strata:
                self._strata[key] = dense_strata(self._embeddings[np.sort(rows)], self._variant.strata)
            offered = replace(offered, stratum=self._strata[key][np.argsort(np.argsort(rows))])
        if self._variant.graph == "label":
            assert self._labels is not None
            _, stratum = np.unique(self._labels[rows], return_inverse=True)
            offered = replace(offered, stratum=stratum.astype(np.int16))
        seen = np.isfinite(self.losses[rows])
        if not self._variant.prior:
            offered = replace(offered, prior=np.where(seen, np.float32(1), offered.prior))
        last = self.losses[rows]
        if self._variant.impute in {"batch", "both"} and seen.any():
            last = np.where(seen, last, last[seen].mean())
        elif self._variant.impute == "both":
            last = np.full(len(last), np.float32(self._chance))
        if self._variant.impute in {"chance", "mean"}:
            last = np.where(seen, last, np.float32(self._imputed))
        scores = self.draw.scores(offered, last)
        scores = scores * np.where(self._lately[rows], self._variant.rotate, 1.0)
        scores = scores * np.where(seen, 1.0, self._variant.unseen)
        rng = rng_for(self._seed, "draw", batch.epoch, batch.batch_id)
        if self._variant.sharp:
            scores = rng.gumbel(size=len(scores)) + self._variant.sharp * np.log(np.maximum(scores, 1e-9))
        drawn = draw_rows(offered, scores, rng, largest=self._variant.top or self._variant.sharp > 0)
        self.rest = np.delete(rows, drawn)
        chosen: Int64[np.ndarray, " M"] = rows[drawn]
        return chosen

    def end_epoch(self, epoch: int | None = None) -> None:
        reports = [*self._known, *self._collected()]
        super().end_epoch(epoch)
        if reports:
            rows, losses = (np.concatenate([report[part] for report in reports]) for part in (1, 2))
            self._take(rows, losses)
        self._set_draw()

    def _take(self, rows: Int64[np.ndarray, " n"], losses: Float32[np.ndarray, " n"]) -> None:
        """Change the losses that rows are drawn by, and the reference losses, as the variant says."""
        variant, before = self._variant, self._raw[rows]
        self._raw[rows], self._measured[rows] = losses, losses.mean()
        self._lately[:] = False
        self._lately[rows] = True
        if variant.visits == 2:
            self.losses[rows] = np.where(np.isfinite(before), (losses + before) / 2, losses)
        elif variant.aged:
            self.losses = (self._raw * (losses.mean() / self._measured)).astype(np.float32)
        if variant.impute == "mean":
            self._imputed = float(np.nanmean(self.losses))
        if self._given is not None and variant.calibrate not in BY_CLASS:
            self._reference = calibrated(
                variant.calibrate, self._given.astype(np.float64), self.losses.astype(np.float64)
            )

    def _set_draw(self) -> None:
        variant, done = self._variant, self.epoch / max(self._epochs - 1, 1)
        if variant.form == "uniform" or self._epochs - self.epoch <= round(variant.random_end * self._epochs):
            self.draw = DRAWS["uniform"]
            return

        def scored(
            last: Float64[np.ndarray, " b"], reference: Float64[np.ndarray, " b"], prior: Float64[np.ndarray, " b"]
        ) -> Float64[np.ndarray, " b"]:
            found = score(variant, last, reference)
            found = (found / max(found.mean(), 1e-12)) ** variant.power * prior
            return (1 - done) * found + done * found.mean() if variant.decay else found

        self.draw = Draw(variant.form, "a variant", scored)


def settings_of(variant: Variant) -> dict[str, Any]:
    """Fields of the study's ``Method`` that a variant sets."""
    own, probe = variant.graph != "knn", variant.draw != "uniform"
    return {
        "guidance": variant.guidance,
        "embeds": probe or variant.strata > 1,
        "needs": frozenset({"probe", variant.reference} if probe else ()),
        "draw": variant.draw,
        "strata": 1 if own else variant.strata,
        "batch_assignments": 0 if variant.anew else 1 if own else None,
    }
