"""From ``auto``, ``cpu``, ``cuda`` or ``cuda:N`` to a device that is there."""

from __future__ import annotations

import threadpoolctl
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
        raise UsageError(f"--device: got {name!r}, expected auto, cpu, cuda or cuda:N") from error
    if device.type not in {"cpu", "cuda"}:
        raise UsageError(f"--device: got {name!r}, expected auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"--device: got {name!r}, but torch sees {torch.cuda.device_count()} CUDA devices",
            hint="use --device cpu, or check the driver with: nvidia-smi",
        )
    return device


def describe_device(device: torch.device) -> str:
    """A device's name for provenance: the GPU's, or ``cpu``."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def limit_threads(threads: int) -> None:
    """Let this process use at most ``threads`` CPU threads; 0 changes nothing.

    torch, faiss and SciPy's BLAS each keep a pool of their own; unbounded beside a training run, they slowed its steps
    threefold on two cores.
    """
    if threads:
        torch.set_num_threads(threads)
        threadpoolctl.threadpool_limits(threads)
