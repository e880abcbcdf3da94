"""A host that waits for its GPU is an error, while a test says so."""

from __future__ import annotations

import warnings

import torch


def forbid_waiting(forbid: bool) -> None:
    """Let what waits for the GPU raise RuntimeError, or no longer."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype", UserWarning)
        torch.cuda.set_sync_debug_mode("error" if forbid else "default")
