"""Rules, draws and kinds of guidance by the names that a user types. Loads nothing: a command's help shows them."""

from __future__ import annotations

SPREAD = 8
"""Eigenvectors that rules of several look at."""

RULES = {
    "coverage": "evenly spaced along the Fiedler order",
    "extremes": "largest absolute Fiedler value",
    "boundary": "smallest absolute Fiedler value",
    "gap": "widest spacing to Fiedler neighbours",
    "strata": "one of each stretch of the Fiedler order, by guidance",
    "cells": f"one of each cell of {SPREAD} eigenvectors, by guidance",
    "cells-squared": "the same, by guidance squared",
    "spread": f"farthest points in {SPREAD} eigenvectors",
    "spread-guided": "farthest points, distances times guidance",
    "guided": "drawn by guidance; computes no graph",
    "random": "uniformly random; computes no graph",
}

DRAWS = {
    "loss-minus-reference": "last training loss minus reference loss, not below 0",
    "damped-loss": "last training loss, times 1 / (1 + exp(3 (reference loss - 2)))",
    "adaptive": "loss-minus-reference, and damped-loss once the network has passed the reference model",
    "largest-damped-loss": "the largest of damped-loss; damped-loss once the network has passed the reference model",
    "largest-loss-minus-reference": "the largest of loss-minus-reference",
    "loss": "last training loss",
    "loss-squared": "last training loss squared",
    "prior": "guidance alone",
    "uniform": "all rows alike",
}
"""What rows of a batch are drawn by while training: in proportion to it, or the largest."""

AUTO_DRAW = "auto"
"""The draw, or the rule, that probes on the embeddings learn most from."""

GUIDANCE = {
    "auto": "uncertainty where rows have labels and a probe learns no worse from rows drawn by it, else none",
    "probe": "held-out loss of a linear probe",
    "uncertainty": "entropy of that probe's prediction",
    "disagreement": "share of graph neighbours with another label",
    "file:SCORES.npy": "numbers of your own",
    "none": "uniform",
}

GUIDANCE_KINDS = tuple(kind for kind in GUIDANCE if not kind.startswith("file:"))
"""Those that need nothing but their name."""
