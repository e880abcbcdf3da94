"""How a graph's eigenproblem ended: a set of flags per graph, never an average over graphs."""

from __future__ import annotations

import enum


class Status(enum.IntFlag):
    """What is to be known about one graph's Fiedler vector. Several can hold at once; all fit an int8.

    ``CONVERGED`` is the absence of every flag. ``BRIDGED``, ``DEGENERATE``, ``DENSE_FALLBACK`` and ``TOO_SMALL``
    describe a result that is accurate; ``MAX_ITERATIONS`` says that it may not be; ``NOT_COMPUTED`` that there is none.
    """

    CONVERGED = 0
    MAX_ITERATIONS = 1
    BRIDGED = 2
    DEGENERATE = 4
    DENSE_FALLBACK = 8
    TOO_SMALL = 16
    NOT_COMPUTED = 32

    def describe(self) -> str:
        """Spell out the flags with what to do about each, joined by ``"; "``.

        Raises:
            ValueError: A bit is set that no flag has.
        """
        known = sum(int(flag) for flag in Status)
        if int(self) & ~known:
            raise ValueError(f"status: got {int(self)}, expected a combination of flags from 0 to {known}")
        return "; ".join(text for flag, text in REMEDY.items() if self & flag) or REMEDY[Status.CONVERGED]


REMEDY: dict[Status, str] = {
    Status.CONVERGED: "converged: nothing to do",
    Status.MAX_ITERATIONS: (
        "max_iterations: the residual is above the tolerance; raise `max_iterations` or `tolerance`, or look for edge"
        " weights that span more than ten orders of magnitude"
    ),
    Status.BRIDGED: (
        "bridged: the graph was disconnected, and its components were joined by their strongest similarities; raise"
        " `knn` if that should be rare"
    ),
    Status.DEGENERATE: (
        "degenerate: the second and third eigenvalue coincide, so the Fiedler vector is one of many; use a rule that"
        " reads several eigenvectors, or look for duplicate rows"
    ),
    Status.DENSE_FALLBACK: (
        "dense_fallback: LOBPCG did not converge and the graph was solved densely, which is accurate and slow; raise"
        " `max_iterations` if it is frequent"
    ),
    Status.TOO_SMALL: "too_small: fewer than 4 rows have no spectrum worth cutting; raise `batch_size`",
    Status.NOT_COMPUTED: "not_computed: the rule in use needs no spectrum",
}
