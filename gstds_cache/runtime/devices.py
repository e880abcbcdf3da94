"""Devices: from ``auto``, ``cpu``, ``cuda`` or ``cuda:N`` to what is there."""

from __future__ import annotations

import torch

from gstds_cache.errors import UsageError


def resolve_device(name: str) -> torch.device:
    """The device that ``name`` means on this machine.

    Args:
        name: ``auto`` (CUDA where there is one), ``cpu``, ``cuda`` or ``cuda:N``.

    Returns:
        The device.

    Raises:
        UsageError: The name is none of these, or there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"`device`: got {name!r}, expected auto, cpu, cuda or cuda:N") from error
    if device.type not in {"cpu", "cuda"}:
        raise UsageError(f"`device`: got {name!r}, expected auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"`device`: got {name!r}, but torch sees {torch.cuda.device_count()} CUDA devices",
            hint="use `device=cpu`, or check the driver with: nvidia-smi",
        )
    return device


def describe_device(device: torch.device) -> str:
    """A device's name for provenance: the GPU's, or ``cpu``."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def to_device(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """``values`` on ``device``; the host does not wait for a GPU, as it does for a copy from memory that may move."""
    if device.type != "cuda" or values.is_cuda:
        return values.to(device)
    return (values if values.is_pinned() else values.pin_memory()).to(device, non_blocking=True)
