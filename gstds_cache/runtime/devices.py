"""Devices: from ``auto``, ``cpu``, ``cuda`` or ``cuda:N`` to what is there."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from gstds_cache.errors import UsageError
from gstds_cache.runtime.notify import log_once

DRIVER = ("/proc/driver/nvidia/version", "/dev/nvidiactl")
"""One of these is there where an NVIDIA driver is."""


def resolve_device(name: str) -> torch.device:
    """The device that ``name`` means on this machine.

    Args:
        name: ``auto`` (CUDA where there is one), ``cpu``, ``cuda`` or ``cuda:N``.

    Returns:
        The device.

    Raises:
        UsageError: The name is none of these, or there is no such device.
    """
    return _resolved(name, name, "auto, cpu, cuda or cuda:N")


def resolve_devices(name: str) -> tuple[torch.device, ...]:
    """The devices that ``name`` means on this machine.

    Args:
        name: As for :func:`resolve_device`, or several with commas between: ``cuda:0,1`` is ``cuda:0,cuda:1``.

    Returns:
        The devices, one at least.

    Raises:
        UsageError: There is no such device, or a GPU is named twice.
    """
    expected = "auto, cpu, cuda, cuda:N or cuda:N,M,..."
    parts = name.split(",")
    words = [f"cuda:{part}" if number and part.isdecimal() else part for number, part in enumerate(parts)]
    devices = tuple(_resolved(word, name, expected) for word in words)
    gpus = [device.index or 0 for device in devices if device.type == "cuda"]
    if len(set(gpus)) < len(gpus) or len({device.type for device in devices}) > 1:
        raise UsageError(f"`device`: got {name!r}, expected different GPUs")
    return devices


def _resolved(word: str, name: str, expected: str) -> torch.device:
    if word == "auto":
        if _is_available():
            return torch.device("cuda")
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "all").strip() in {"", "-1", "NoDevFiles"}
        if not hidden and any(Path(path).exists() for path in DRIVER):
            log_once(f"note: there is an NVIDIA driver, but torch cannot use CUDA: {why_no_cuda()}; the CPU computes")
        return torch.device("cpu")
    try:
        device = torch.device(word)
    except RuntimeError as error:
        raise UsageError(f"`device`: got {name!r}, expected {expected}") from error
    if device.type not in {"cpu", "cuda"}:
        raise UsageError(f"`device`: got {name!r}, expected {expected}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"`device`: got {name!r}, but torch sees {torch.cuda.device_count()} CUDA devices"
            + (f": {why}" if (why := why_no_cuda()) else ""),
            hint="use `device='cpu'`, or check the driver with: nvidia-smi",
        )
    return device


def why_no_cuda() -> str:
    """Why torch cannot use CUDA, in its own words: no driver, or one that is too old; empty where it can."""
    if _is_available():
        return ""
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except (RuntimeError, AssertionError) as error:  # the latter from a torch without CUDA
        return str(error).partition("\n")[0].partition(". ")[0].removesuffix(".")
    return "it sees no GPU"


def _is_available() -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a driver that is too old, which is asked for where it matters
        return torch.cuda.is_available()


@contextmanager
def callers_random_numbers(device: torch.device) -> Iterator[None]:
    """What is drawn meanwhile, on the CPU and on ``device``, leaves the caller's random numbers as they were.

    Yields:
        Nothing.

    Raises:
        BaseException: What is raised in the block: of a recording that failed, say, after which a GPU's random numbers
            cannot be put back, and their error would take its place.
    """
    raised: BaseException | None = None
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            try:
                yield
            except BaseException as error:
                raised = error
                raise
    except BaseException as error:
        if raised is None or error is raised:
            raise
        raise raised from None


def describe_device(device: torch.device) -> str:
    """A device's name for provenance: the GPU's, or ``cpu``."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def with_index(device: torch.device) -> torch.device:
    """A CUDA device with its number: ``cuda`` is the current one."""
    return (
        device if device.type != "cuda" or str(device) != "cuda" else torch.device("cuda", torch.cuda.current_device())
    )


def to_device(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """``values`` on ``device``; the host does not wait for a GPU, as it does for a copy from memory that may move."""
    if device.type != "cuda" or values.is_cuda:
        return values.to(device)
    return (values if values.is_pinned() else values.pin_memory()).to(device, non_blocking=True)


def free_memory(device: torch.device) -> int:
    """Bytes of a GPU's memory that torch can still hand out: what is free there, and what torch keeps for later."""
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


def own_stream(device: torch.device) -> torch.cuda.Stream:
    """A stream of a GPU's beside the current one, which goes first where both have something to do.

    PyTorch hands out a few dozen streams in turn: keep it, rather than make another.
    """
    return torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]
