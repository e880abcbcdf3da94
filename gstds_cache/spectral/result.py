"""What a spectral solve returns, and the sign that makes an eigenvector one thing instead of two."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float64, Int8, Int64
from torch import Tensor

from gstds_cache.spectral.status import Status

# Entries within this share of the largest count as equally large, so that rounding cannot pick another one.
SIGN_TIE = 1e-6
# Of the second nontrivial eigenvalue: where the first is closer than that, its eigenvector is any vector of a plane.
DEGENERATE_GAP = 1e-3
SMALLEST = 4  # fewer rows are flagged TOO_SMALL


@dataclass(frozen=True)
class Ritz:
    """Approximate eigenpairs, ascending, with what is known about them: what every solver returns.

    Attributes:
        values: Ritz values, ``[G, Q]`` float64.
        basis: Orthonormal Ritz vectors, ``[G, B, Q]`` float64.
        residual: ``||L v - value v|| / value``, ``[G, Q]`` float64; infinite where the value is not > 0.
        second: Second nontrivial Ritz value, ``[G]`` float64: if Q is 1 known only as well as it takes to tell whether
            there is a gap; +inf where there is no second.
        iterations: Iterations taken, ``[G]`` int64.
        converged: Whether all Q residuals reached the tolerance, ``[G]`` bool.
    """

    values: Float64[Tensor, "G Q"]
    basis: Float64[Tensor, "G B Q"]
    residual: Float64[Tensor, "G Q"]
    second: Float64[Tensor, " G"]
    iterations: Int64[Tensor, " G"]
    converged: Bool[Tensor, " G"]


@dataclass(frozen=True)
class FiedlerResult:
    """The lowest Q nontrivial eigenpairs of G Laplacians.

    A graph of B nodes has B - 1 of them. Where Q is larger, the missing pairs have value +inf (nothing more to find),
    a basis column of zeros and residual 0.

    Attributes:
        values: Eigenvalues, ascending, without the trivial 0, ``[G, Q]`` float64.
        basis: Eigenvectors of unit length, signs canonical, ``[G, B, Q]`` float64.
        residual: ``||L v - value v|| / value``, ``[G, Q]`` float64.
        iterations: LOBPCG iterations, 0 where the graph was solved densely by design, ``[G]`` int64.
        status: Combination of :class:`~gstds_cache.spectral.status.Status` flags, ``[G]`` int8.
        components: Connected components before bridging, ``[G]`` int64.
    """

    values: Float64[Tensor, "G Q"]
    basis: Float64[Tensor, "G B Q"]
    residual: Float64[Tensor, "G Q"]
    iterations: Int64[Tensor, " G"]
    status: Int8[Tensor, " G"]
    components: Int64[Tensor, " G"]

    @property
    def vector(self) -> Float64[Tensor, "G B"]:
        """The Fiedler vectors, ``[G, B]`` float64."""
        return self.basis[..., 0]


def canonical_sign(basis: Float64[Tensor, "G B Q"]) -> Float64[Tensor, "G B Q"]:
    """Turn every column so that its entry of largest magnitude is positive; the lowest index decides among equals.

    Args:
        basis: Columns, ``[G, B, Q]`` float64; a column of zeros stays as it is.

    Returns:
        The columns times +1 or -1.
    """
    size = basis.abs()
    candidate = size >= (1 - SIGN_TIE) * size.amax(dim=1, keepdim=True)
    first = candidate.to(torch.int8).argmax(dim=1, keepdim=True)
    return torch.where(basis.gather(1, first) < 0, -basis, basis)


def _pad(x: Float64[Tensor, "*head q"], q: int, value: float) -> Float64[Tensor, "*head Q"]:
    return torch.nn.functional.pad(x, (0, q - x.shape[-1]), value=value)


def status_of(
    ritz: Ritz, fallback: Bool[Tensor, " G"], components: Int64[Tensor, " G"], nodes: int
) -> Int8[Tensor, " G"]:
    """How solving each graph ended, as flags.

    Args:
        ritz: What was found; its vectors are not looked at.
        fallback: Which graphs were solved densely after an iteration, ``[G]`` bool.
        components: Components of each graph before bridging, ``[G]`` int64.
        nodes: Nodes of a graph.
    """
    gap = ritz.second - ritz.values[:, 0]
    degenerate = gap.isfinite() & (gap <= DEGENERATE_GAP * ritz.second)
    status = torch.zeros(len(fallback), dtype=torch.int8, device=fallback.device)
    for flag, holds in (
        (Status.MAX_ITERATIONS, ~ritz.converged),
        (Status.DENSE_FALLBACK, fallback),
        (Status.DEGENERATE, degenerate),
        (Status.BRIDGED, components > 1),
    ):
        status += holds.to(torch.int8) * int(flag)
    return status | int(Status.TOO_SMALL) if nodes < SMALLEST else status


def result_of(ritz: Ritz, q: int, fallback: Bool[Tensor, " G"], components: Int64[Tensor, " G"]) -> FiedlerResult:
    """A solver's pairs as a result.

    Args:
        ritz: Pairs, at most ``q``.
        q: Pairs that were asked for.
        fallback: Which graphs were solved densely after an iteration, ``[G]`` bool.
        components: Components of each graph before bridging, ``[G]`` int64.
    """
    return FiedlerResult(
        values=_pad(ritz.values, q, torch.inf),
        basis=_pad(canonical_sign(ritz.basis), q, 0.0),
        residual=_pad(ritz.residual, q, 0.0),
        iterations=ritz.iterations,
        status=status_of(ritz, fallback, components, ritz.basis.shape[1]),
        components=components,
    )
