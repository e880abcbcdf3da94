"""Drawing rows of a batch of candidates by the losses that training computed anyway.

What is worth learning is what the network has not learned yet and the reference model has: RHO-LOSS (S. Mindermann et
al., ICML 2022) and JEST (T. Evans et al., NeurIPS 2024) subtract a reference model's loss from the learner's, and pay a
forward pass for the learner's. Here the learner's loss is the one that a row had when it was last trained on. Nothing
here loads torch, zarr or faiss: a trainer draws.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int64

from gstds_cache.config import STRATA
from gstds_cache.errors import UsageError, unknown_name
from gstds_cache.plugins import load_factory, own_code, source_digest
from gstds_cache.runtime.resources import out_of_memory
from gstds_cache.selection import catalog
from gstds_cache.selection.selected_batch import Candidates

FLOOR = 0.05  # of the batch's mean score: what the lowest row counts, so that none is impossible
DAMPED_AT, DAMPED_BY = 2.0, 3.0  # reference loss at which a loss counts half, and how steeply
CONFIDENT = math.log(2.0)  # reference loss below which a row's label is likelier than all others together
UNTIL_PASSED: Final = "until passed"
PASSED_AT = 0.3  # share of such rows that the network does better on, from which on it has passed the reference model
LARGEST_SCORE = 1e100  # of one's own: sums of larger ones may be infinite
APART = 4000.0  # more than logarithms of float64 and Gumbel numbers are apart
LARGEST_WEIGHT = 5.0  # of a row that was drawn although that was unlikely: above, its gradient outweighs the others'

Score = Callable[
    [Float64[np.ndarray, " b"], Float64[np.ndarray, " b"], Float64[np.ndarray, " b"]], Float64[np.ndarray, " b"]
]
"""From last losses, reference losses and priors of rows, float64 [b], to scores >= 0, float64 [b].

Rows that never were trained on come with the mean last loss of the batch's rows that were, or with that of a network
that knows nothing."""


def loss_minus_reference(
    last: Float64[np.ndarray, " b"], reference: Float64[np.ndarray, " b"], _prior: Float64[np.ndarray, " b"]
) -> Float64[np.ndarray, " b"]:
    """What the network has still to learn, and the reference model has learned from other rows."""
    learnable: Float64[np.ndarray, " b"] = np.maximum(last - reference, 0.0)
    return learnable


def damped_loss(
    last: Float64[np.ndarray, " b"], reference: Float64[np.ndarray, " b"], _prior: Float64[np.ndarray, " b"]
) -> Float64[np.ndarray, " b"]:
    """The last loss, less where the reference model finds a row so hard that its label may be wrong."""
    steepness = np.minimum(DAMPED_BY * (reference - DAMPED_AT), 60.0)  # exp of more overflows, for the same result
    damped: Float64[np.ndarray, " b"] = np.maximum(last, 0.0) / (1.0 + np.exp(steepness))
    return damped


def adaptive(
    last: Float64[np.ndarray, " b"], reference: Float64[np.ndarray, " b"], prior: Float64[np.ndarray, " b"]
) -> Float64[np.ndarray, " b"]:
    """:func:`loss_minus_reference` until the network has passed the reference model, :func:`damped_loss` once it has.

    It has in a batch in which its losses are lower on more than :data:`PASSED_AT` of the rows whose labels the
    reference model is sure of. Rows without a loss count by the one that they are taken to have, so that it takes
    about that share of all rows to be trained on and better.

    A reference loss is what a row's loss can come down to as long as the reference model is the better one. It is not
    once the network does better on many of the rows whose labels the reference model is sure of: then what is left of
    the difference are rows that the reference model happens to be good at, and its loss tells of doubtful labels alone.
    """
    return (damped_loss if has_passed(last, reference) else loss_minus_reference)(last, reference, prior)


def has_passed(last: Float64[np.ndarray, " b"], reference: Float64[np.ndarray, " b"]) -> bool:
    """Whether the network has lower losses on many of the rows whose labels the reference model is sure of."""
    sure = reference < CONFIDENT
    return bool(np.count_nonzero(last[sure] < reference[sure]) > PASSED_AT * np.count_nonzero(sure))


def last_loss(
    last: Float64[np.ndarray, " b"], _reference: Float64[np.ndarray, " b"], _prior: Float64[np.ndarray, " b"]
) -> Float64[np.ndarray, " b"]:
    """The last loss, whatever the reference model says."""
    losses: Float64[np.ndarray, " b"] = np.maximum(last, 0.0)  # some losses go below 0
    return losses


def loss_squared(
    last: Float64[np.ndarray, " b"], _reference: Float64[np.ndarray, " b"], _prior: Float64[np.ndarray, " b"]
) -> Float64[np.ndarray, " b"]:
    """The last loss squared: in the usual order ahead where labels were right and some rare; behind with wrong ones."""
    squared: Float64[np.ndarray, " b"] = np.maximum(last, 0.0) ** 2
    return squared


def prior_alone(
    _last: Float64[np.ndarray, " b"], _reference: Float64[np.ndarray, " b"], prior: Float64[np.ndarray, " b"]
) -> Float64[np.ndarray, " b"]:
    """What is known before training; no loss is looked at."""
    return prior


def uniform(
    last: Float64[np.ndarray, " b"], _reference: Float64[np.ndarray, " b"], _prior: Float64[np.ndarray, " b"]
) -> Float64[np.ndarray, " b"]:
    """All rows alike: random rows of each stratum, the baseline of the others."""
    return np.ones(len(last))


@dataclass(frozen=True)
class Draw:
    """A named way to score the rows of a batch; they are drawn in proportion to their scores, or the largest taken.

    Attributes:
        name: What a user calls it.
        summary: What it looks at, in a few words.
        score: A :data:`Score`.
        needs_losses: Whether it looks at last losses. Only then those that have none count by their prior.
        needs_reference: Whether it looks at reference losses: a linear probe on labelled embeddings.
        needs_prior: Whether the prior counts, for rows without a loss or for all.
        strata: Spectral strata that suit it. Each gives rows in proportion to its size, whatever they score: where a
            class is rare, and alike, that leaves its rows no more than their share.
        largest: Whether the rows of the largest scores of each stratum are taken, rather than drawn at random.
            ``until passed``: until the network has passed the reference model (:func:`adaptive`).
        source: SHA-256 of the file of a user's own function; empty for ours.
    """

    name: str
    summary: str
    score: Score
    needs_losses: bool = True
    needs_reference: bool = True
    needs_prior: bool = True
    strata: int = STRATA
    largest: bool | Literal["until passed"] = False
    source: str = ""

    def __call__(
        self,
        last: Float64[np.ndarray, " b"],
        reference: Float64[np.ndarray, " b"],
        prior: Float64[np.ndarray, " b"],
    ) -> Float64[np.ndarray, " b"]:
        """The scores of rows that were trained on."""
        return self.score(last, reference, prior)

    def takes_largest(
        self,
        candidates: Candidates,
        last: Float32[np.ndarray, " B"] | Float64[np.ndarray, " B"],
        chance: float | None = None,
    ) -> bool:
        """Whether of this batch the rows of the largest scores are taken; arguments as for :meth:`scores`."""
        if isinstance(self.largest, bool):
            return self.largest
        filled = _filled(np.asarray(last, np.float64), np.isfinite(last), chance or np.inf)
        return not has_passed(filled, np.asarray(candidates.reference, np.float64))

    def scores(
        self,
        candidates: Candidates,
        last: Float32[np.ndarray, " B"] | Float64[np.ndarray, " B"],
        chance: float | None = None,
    ) -> Float64[np.ndarray, " B"]:
        """Scores of a batch's rows.

        Args:
            candidates: The batch.
            last: Loss of each row when it was last trained on; NaN where it never was.
            chance: Loss of a network that knows nothing, which stands for that of all rows before any loss is known;
                None for selections that were made when rows without a loss were not told apart.

        Returns:
            float64 [B], >= 0. Rows that never were trained on are scored as if they had the mean loss of those that
            were, or ``chance`` before there is any, times their prior. Without ``chance`` they have the mean score of
            those that were, times their prior; before there is any, their prior.
        """
        last, prior = np.asarray(last, np.float64), np.asarray(candidates.prior, np.float64)
        reference = np.asarray(candidates.reference, np.float64)
        if not self.needs_losses:
            return self.score(last, reference, prior)
        seen = np.isfinite(last)
        if seen.all():
            return self.score(last, reference, prior)
        if chance is not None:
            filled = self.score(_filled(last, seen, chance), reference, prior)
            return np.where(seen, filled, filled * prior)
        if not seen.any():
            return prior
        found = self.score(last[seen], reference[seen], prior[seen])
        scores: Float64[np.ndarray, " B"] = found.mean() * prior
        scores[seen] = found
        return scores


def _filled(last: Float64[np.ndarray, " B"], seen: Bool[np.ndarray, " B"], chance: float) -> Float64[np.ndarray, " B"]:
    """Losses, with the mean of those that are known for those that are not; ``chance`` where none is."""
    return np.where(seen, last, float(last[seen].mean()) if seen.any() else chance)


DRAWS = {
    draw.name: draw
    for draw in (
        Draw("loss-minus-reference", catalog.DRAWS["loss-minus-reference"], loss_minus_reference),
        Draw("damped-loss", catalog.DRAWS["damped-loss"], damped_loss),
        Draw("largest-damped-loss", catalog.DRAWS["largest-damped-loss"], damped_loss, needs_prior=False,
             largest=UNTIL_PASSED),
        Draw("largest-loss-minus-reference", catalog.DRAWS["largest-loss-minus-reference"], loss_minus_reference,
             needs_prior=False, strata=1, largest=True),
        Draw("adaptive", catalog.DRAWS["adaptive"], adaptive),
        Draw("loss", catalog.DRAWS["loss"], last_loss, needs_reference=False),
        Draw("loss-squared", catalog.DRAWS["loss-squared"], loss_squared, needs_reference=False,
             strata=1),
        Draw("prior", catalog.DRAWS["prior"], prior_alone, needs_losses=False, needs_reference=False),
        Draw("uniform", catalog.DRAWS["uniform"], uniform, needs_losses=False, needs_reference=False,
             needs_prior=False),
    )
}  # fmt: skip


def is_own(name: str) -> bool:
    """Whether a draw is a user's own function, ``module:function``."""
    return ":" in name


def find_draw(name: str) -> Draw:
    """The draw of that name: one of ours, or ``module:function``.

    A function of one's own is a :data:`Score`. To do without reference losses name a :class:`Draw` instead of a
    function: ``mine = Draw("mine", "what it looks at", my_function, needs_reference=False)``.

    Args:
        name: The name.

    Returns:
        The draw; what one's own returns is checked batch by batch, and once here, on rows that are made up: an error
        should come before an epoch is trained.

    Raises:
        UsageError: There is none; the message lists what there is. Or one's own gives no scores.
    """  # noqa: DOC501
    if not is_own(name):
        if name == catalog.AUTO_DRAW:
            raise UsageError(
                "`draw='auto'` is settled where a selection is made", hint="name the draw that it settled on"
            )
        if name not in DRAWS:
            raise unknown_name("draw", name, [catalog.AUTO_DRAW, *DRAWS, "module:function"])
        return DRAWS[name]
    loaded: Any = load_factory(name, "draw", DRAWS)
    own = loaded if isinstance(loaded, Draw) else Draw(name, "your own", loaded)
    if own.largest not in (False, True, UNTIL_PASSED) or (own.largest == UNTIL_PASSED and not own.needs_reference):
        raise UsageError(
            f"`draw={name!r}`: got largest={own.largest!r}, expected False, True, or with reference losses "
            f"{UNTIL_PASSED!r}"
        )
    draw = replace(own, name=name, score=_checked(name, own.score), source=source_digest(own.score))
    _try_out(draw)
    return draw


def _try_out(draw: Draw) -> None:
    """Score rows as they may come: losses of one place before and behind the decimal point, NaN what is not known."""
    losses, unknown = np.array([0.01, 0.1, 0.5, 1.0, 2.0, 3.0, 5.0, 9.0]), np.full(8, np.nan)
    last = losses if draw.needs_losses else unknown
    draw.score(last.copy(), losses[::-1].copy() if draw.needs_reference else unknown, np.ones(8))


def _checked(name: str, score: Score) -> Score:
    again = "correct it there, and select again: a selection is drawn from by the function it was made with"

    def checked(
        last: Float64[np.ndarray, " b"], reference: Float64[np.ndarray, " b"], prior: Float64[np.ndarray, " b"]
    ) -> Float64[np.ndarray, " b"]:
        with own_code(f"`draw={name!r}`", hint=again, but=out_of_memory):
            scores = np.asarray(score(last, reference, prior))
        numbers = scores.dtype.kind in "fiu" and scores.shape == last.shape
        if not numbers or not ((scores >= 0) & (scores <= LARGEST_SCORE)).all():
            raise UsageError(
                f"`draw={name!r}`: got {scores.dtype} {list(scores.shape)} {scores.reshape(-1)[:4]}..., expected "
                f"{len(last)} finite numbers from 0 to {LARGEST_SCORE:g}, one for each row",
                hint=again,
            )
        return scores.astype(np.float64)

    return checked


def draw_rows(
    candidates: Candidates, scores: Float64[np.ndarray, " B"], rng: np.random.Generator, *, largest: bool = False
) -> Int64[np.ndarray, " M"]:
    """Draw rows without replacement: in proportion to size among strata, within them to score, or the largest scores.

    Args:
        candidates: The batch, of which ``candidates.keep`` rows are drawn.
        scores: Score of each row, >= 0.
        rng: Random numbers of this batch and epoch.
        largest: Take the rows of the largest scores of each stratum instead; of equal ones random ones.

    Returns:
        Positions in the batch, ascending.
    """
    if largest:
        order = np.lexsort((rng.random(len(scores)), -scores, candidates.stratum))
    else:
        # The Gumbel-max trick: of any set of rows, the largest number is a draw in proportion to weight.
        keys = np.log(_weights(scores)) + rng.gumbel(size=len(scores))
        order = np.argsort(candidates.stratum * APART - keys)  # one sort: by stratum, the largest numbers first
    shares, sizes = quotas(candidates, rng), np.bincount(candidates.stratum)
    first = np.cumsum(sizes) - sizes  # of each stratum in that order
    place = np.arange(candidates.keep) + np.repeat(first - (np.cumsum(shares) - shares), shares)
    return np.sort(order[place])


def quotas(candidates: Candidates, rng: np.random.Generator) -> Int64[np.ndarray, " S"]:
    """Rows that each stratum gives: in proportion to its size, by largest remainders; equal ones in random order."""
    sizes = np.bincount(candidates.stratum)
    given, remainders = np.divmod(candidates.keep * sizes, len(candidates.stratum))
    left = candidates.keep - int(given.sum())
    given[np.lexsort((rng.permutation(len(sizes)), -remainders))[:left]] += 1
    return given.astype(np.int64)


def importance_weights(
    candidates: Candidates, scores: Float64[np.ndarray, " B"], drawn: Int64[np.ndarray, " M"]
) -> Float32[np.ndarray, " M"]:
    """Weights that make up for how likely each row was to be drawn: 1 / inclusion probability, capped, of mean 1.

    Args:
        candidates: The batch.
        scores: Scores it was drawn by.
        drawn: Positions that were drawn.

    Returns:
        float32 [M]; at most ``LARGEST_WEIGHT`` times that of a row as likely as the average, before the mean is 1.
    """
    given = np.bincount(candidates.stratum[drawn], minlength=int(candidates.stratum.max()) + 1)
    chance = inclusion(_weights(scores), candidates.stratum, given)[drawn]
    weights: Float64[np.ndarray, " M"] = np.minimum(candidates.keep / len(scores) / chance, LARGEST_WEIGHT)
    weights /= weights.mean()
    return weights.astype(np.float32)


def inclusion(
    weights: Float64[np.ndarray, " B"], stratum: np.ndarray, given: Int64[np.ndarray, " S"]
) -> Float64[np.ndarray, " B"]:
    """How likely each row is to be among those that its stratum gives.

    Draws in proportion to weight without replacement are the first arrivals of Poisson processes of these rates: by the
    time t at which so many are expected to have arrived, a row has with probability 1 - exp(-w t) (B. Rosen,
    Asymptotic theory for order sampling, J. Statist. Plann. Inference 62, 1997). Off by a few percent in strata of few
    rows.

    Args:
        weights: > 0, float64 [B].
        stratum: Stratum of each row, [B].
        given: Rows that are drawn of each stratum.

    Returns:
        float64 [B], above 0 and up to 1.
    """
    sizes = np.bincount(stratum, minlength=len(given))
    open_ = (given > 0) & (given < sizes)
    total = np.bincount(stratum, weights, len(given))
    time = np.where(open_, given / np.maximum(total, np.finfo(np.float64).tiny), 0.0)
    # Newton's method: the expected arrivals are a concave function of t, and t begins below the solution, where
    # the tangent meets the target no later than the function. So t rises to it, and never passes it.
    for _ in range(50):
        stays = np.exp(-weights * time[stratum])
        missing = given - np.bincount(stratum, 1.0 - stays, len(given))
        if (np.abs(missing[open_]) <= 1e-3).all():
            break
        rate = np.bincount(stratum, weights * stays, len(given))
        time += np.where(open_, missing / np.maximum(rate, np.finfo(np.float64).tiny), 0.0)
    chance = -np.expm1(-weights * time[stratum])
    known: Float64[np.ndarray, " B"] = np.where(open_[stratum], np.maximum(chance, np.finfo(np.float32).tiny), 1.0)
    return known


def _weights(scores: Float64[np.ndarray, " B"]) -> Float64[np.ndarray, " B"]:
    mean = float(np.add.reduce(scores)) / len(scores)  # as mean() computes it, without the price of its call
    raised: Float64[np.ndarray, " B"] = scores + FLOOR * mean if mean > 0 else np.ones(len(scores))
    return raised
