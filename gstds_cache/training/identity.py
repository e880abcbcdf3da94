"""What decides a run's outcome: its identity, the settings that the data set decides, and its directory's name."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import torch

from gstds_cache.config import TrainConfig
from gstds_cache.data.source import ImageSource
from gstds_cache.files.digest import sha256_hex
from gstds_cache.runtime.devices import resolve_device
from gstds_cache.stream.schema import Header
from gstds_cache.training.batch_norm import has_running_norms
from gstds_cache.training.images import default_side

NOT_IDENTITY = frozenset({"device", "compile", "cuda_graphs", "images", "workers", "memory_budget", "threads", "draw"})

# How a run's default name spells the settings that are not the default ones; a setting that is not here is spelled out.
SPELLED = {
    "lr": "lr",
    "momentum": "m",
    "weight_decay": "wd",
    "image_size": "px",
    "augment": "",
    "label_smoothing": "ls",
    "precision": "",
    "repack": "b",
    "norm_samples": "norm",
    "importance_weights": "weights",
    "accumulate": "pieces",
}


def resolve_auto(config: TrainConfig, source: ImageSource) -> TrainConfig:
    """The configuration with what was left open: images' size, whether they may be mirrored, the device's precision.

    ``norm_samples`` becomes the rows that are drawn: 0 for a network without batch normalisation, and no more than
    there are, so that it makes another run only where it changes the outcome.
    """
    side = config.image_size or default_side(source)
    drawn = min(config.norm_samples, len(source)) if len(source) > 1 else 0  # one row has no variance
    return replace(
        config,
        image_size=side,
        precision=resolved_precision(config, resolve_device(config.device)),
        norm_samples=drawn if drawn and has_running_norms(config.arch, side) else 0,
        augment=("crop+flip" if source.mirror_safe else "crop") if config.augment == "auto" else config.augment,
    )


def resolved_precision(config: TrainConfig, device: torch.device) -> Literal["float32", "bfloat16"]:
    """The precision a run has; ``auto`` is the device's."""
    if config.precision == "auto":
        return "bfloat16" if device.type == "cuda" else "float32"
    return config.precision


def run_config(config: TrainConfig, header: Header, eval_root: str | None) -> dict[str, Any]:
    """What decides a run's outcome, as JSON-able values; kept in ``RUN_DIR/config.json``.

    Args:
        config: How to train, with nothing left to the data set.
        header: The selection's.
        eval_root: Merkle root of the evaluation set's items; None where there is no such set.
    """
    usual = {"max_pixels"} if config.max_pixels == TrainConfig.max_pixels else set()  # as before it could be set
    return {name: value for name, value in asdict(config).items() if name not in NOT_IDENTITY | usual} | {
        "selection_digest": header.selection_digest,
        "cache_fingerprint": header.cache_fingerprint,
        "items_root": header.items_root,
        "eval_root": eval_root,
    }


def default_run_dir(config: TrainConfig, source: ImageSource, header: Header, eval_root: str | None) -> Path:
    """``runs/ARCH-SELECTION-sSEED``, and each setting that differs from a default run of that network and seed."""
    usual = resolve_auto(TrainConfig(arch=config.arch, seed=config.seed, device=config.device), source)
    return Path("runs") / default_name(run_config(config, header, eval_root), run_config(usual, header, None))


def default_name(identity: dict[str, Any], defaults: dict[str, Any]) -> str:
    """The name of a run that was given none: all that decides its outcome, so that other settings are another run.

    Args:
        identity: What decides the outcome, from :func:`run_config`.
        defaults: The same of a run of the same network, seed, data set and selection, with no other setting given.

    Returns:
        ``ARCH-SELECTION-sSEED``, and each setting that is not the default.
    """
    arch, _, query = identity["arch"].partition("?")
    # A query may hold the path of a weights file.
    arch = arch.replace(":", "-").replace("/", "-") + (f"-{sha256_hex(query.encode())[:8]}" if query else "")
    name = f"{arch}-{identity['selection_digest'][:8]}-s{identity['seed']}"
    for field in sorted(identity, key=lambda field: (field != "repack", field)):
        value = identity[field]
        if value != defaults.get(field):
            text = str(value)[:8] if field == "eval_root" else "" if value is True else f"{value}"
            name += f"-{SPELLED.get(field, field.removesuffix('_root'))}{text.replace('/', '-')}"
    return name
