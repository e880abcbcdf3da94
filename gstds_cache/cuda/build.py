"""From a kernel's text to a kernel that runs: compiled by NVRTC, which torch brings, so that nobody needs a compiler.

What is compiled is kept in the user's cache folder under the SHA-256 of everything it was made from: the text and the
headers it includes, the architecture, the defines and NVRTC's version. A file that is damaged, or cannot be read or
written, costs compiling (2 to 10 seconds) and nothing else.
"""

from __future__ import annotations

import hashlib
import os
import re
import threading
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch

from gstds_cache.cuda.launch import Kernel
from gstds_cache.errors import KernelError, in_words
from gstds_cache.files import mapped
from gstds_cache.files.atomic import atomic_write
from gstds_cache.files.derived import WritablePath, find_cache_root, first_writable, is_private
from gstds_cache.runtime.devices import with_index
from gstds_cache.runtime.notify import log_once

FOLDER = Path(__file__).parent
OPTIONS = ("-std=c++17", "-lineinfo")
HASH_BYTES = 32

_INCLUDED = re.compile(r'^\s*#include "([^"]+\.cuh)"', re.MULTILINE)
_compiling = threading.Lock()
_kernels: dict[tuple[str, str, tuple[str, ...], int], Kernel | KernelError] = {}


def kernel(source: str, function: str, defines: tuple[str, ...] = (), *, device: torch.device) -> Kernel:
    """A kernel of this package for a device: compiled, or found, and loaded once in a process.

    Args:
        source: Name of the text beside this file, e.g. ``graph.cu``.
        function: The kernel in it.
        defines: Macros, e.g. ``KNN=10``.
        device: A CUDA device.

    Returns:
        The kernel.

    Raises:
        KernelError: It cannot be compiled or loaded here; the message says why, and ends with the compiler's log where
            there is one.
    """
    with _compiling:
        return _kernel(source, function, defines, with_index(device).index)


def _kernel(source: str, function: str, defines: tuple[str, ...], index: int) -> Kernel:
    key = (source, function, defines, index)
    if key not in _kernels:
        device = torch.device("cuda", index)
        try:
            major, minor = torch.cuda.get_device_capability(device)
            _kernels[key] = Kernel(cubin(source, f"sm_{major}{minor}", defines), function, device)
        except KernelError as error:  # kept as well: compiling again would take as long, and fail again
            _kernels[key] = error
    found = _kernels[key]
    if isinstance(found, KernelError):
        raise KernelError(found.message, hint=found.hint)
    return found


@cache
def why_not(device: torch.device) -> str:
    """Why no kernel can run on a device, in words; empty where they can.

    Args:
        device: Any device.
    """
    if device.type != "cuda":
        return f"{device} is no CUDA device"
    try:
        version, architectures = _compiler()
        major, minor = torch.cuda.get_device_capability(device)
        if f"sm_{major}{minor}" not in architectures:
            return (
                f"{torch.cuda.get_device_name(device)} is of architecture sm_{major}{minor}, which this compiler does "
                f"not know (NVRTC {version} has {', '.join(architectures)})"
            )
    except (KernelError, RuntimeError, AssertionError) as error:  # torch has no CUDA, or no driver is there
        return error.message if isinstance(error, KernelError) else in_words(error)
    return ""


def log_fallback(device: torch.device, reason: str) -> None:
    """Say once why a GPU is not used as well as it could be; nothing where there is no reason, or no GPU."""
    if reason and device.type == "cuda":
        log_once(f"CUDA kernels are not used ({reason}): other ways are taken, which are slower")


def cubin(source: str, architecture: str, defines: tuple[str, ...]) -> bytes:
    """The compiled text, from the cache folder or by compiling it.

    Args:
        source: Name of the text beside this file.
        architecture: E.g. ``sm_90``.
        defines: Macros.

    Returns:
        The cubin.
    """
    texts = source_texts(source)
    variant = f"{architecture} {' '.join(defines)}"
    key = digest_of_texts([variant, _compiler()[0], *OPTIONS, *(part for item in texts.items() for part in item)])
    name = f"{Path(source).stem}-{digest_of_texts([variant])[:8]}"
    place = place_of_cubins().path
    path = None if place is None else place / f"{name}-{key[:32]}.cubin"
    if path is not None:
        with suppress(OSError):
            held = path.read_bytes()
            if held[:HASH_BYTES] == hashlib.sha256(held[HASH_BYTES:]).digest():
                return held[HASH_BYTES:]
    made, _ = compile_cubin(source, architecture, defines)
    if path is not None:
        with suppress(OSError):
            with atomic_write(path, durable=False) as file:
                file.write(hashlib.sha256(made).digest() + made)
            for older in path.parent.glob(f"{name}-*.cubin"):
                if older != path:
                    older.unlink(missing_ok=True)
    return made


def compile_cubin(source: str, architecture: str, defines: Iterable[str] = ()) -> tuple[bytes, str]:
    """Compile a text; no GPU is needed.

    Args:
        source: Name of the text beside this file.
        architecture: E.g. ``sm_90``.
        defines: Macros.

    Returns:
        The cubin and the compiler's log, which tells each kernel's registers and spills.

    Raises:
        KernelError: There is no compiler, or the text does not compile for this architecture; the log is at the end.
    """
    _compiler()
    from cuda.bindings import nvrtc

    texts = source_texts(source)
    headers = [(text.encode(), name.encode()) for name, text in texts.items() if name != source]
    program = _nvrtc(
        nvrtc.nvrtcCreateProgram(
            texts[source].encode(),
            source.encode(),
            len(headers),
            [text for text, _ in headers],
            [n for _, n in headers],
        )
    )
    try:
        options = [f"-arch={architecture}", "-Xptxas=-v", *OPTIONS, *(f"-D{d}" for d in defines)]
        (code,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
        log = _filled(nvrtc.nvrtcGetProgramLogSize(program), lambda room: nvrtc.nvrtcGetProgramLog(program, room))
        text = log.decode(errors="replace").strip("\0\n")
        if int(code) != 0:
            raise KernelError(
                f"NVRTC {_compiler()[0]} does not compile {source} for {architecture} ({code.name}): please report "
                f"this with the log that follows\n{text}"
            )
        return _filled(nvrtc.nvrtcGetCUBINSize(program), lambda room: nvrtc.nvrtcGetCUBIN(program, room)), text
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def source_texts(source: str) -> dict[str, str]:
    """A text and all that it includes from this folder, by name, the text itself first."""
    texts: dict[str, str] = {}
    names = [source]
    while names:
        name = names.pop(0)
        if name not in texts:
            texts[name] = (FOLDER / name).read_text()
            names += _INCLUDED.findall(texts[name])
    return texts


def digest_of_texts(texts: Iterable[str]) -> str:
    """SHA-256 of texts, each with its length, in hexadecimal."""
    digest = hashlib.sha256()
    for text in texts:
        data = text.encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


@cache
def place_of_cubins() -> WritablePath:
    """The folder for compiled kernels, which is this user's alone, since what is found there is run."""
    root, temporary, user = find_cache_root(), mapped.folder(), os.geteuid()
    folders = [root / f"kernels-{user}"] if root is not None else []
    folders += [Path(temporary) / f"gstds-cache-kernels-{user}"] if temporary is not None else []
    return first_writable([folder for folder in folders if is_private(folder)])


@cache
def _compiler() -> tuple[str, tuple[str, ...]]:
    """NVRTC's version, and the architectures it knows.

    Raises:
        KernelError: There is none.
    """
    try:
        from cuda.bindings import nvrtc
    except ImportError as error:
        raise KernelError(
            f"cuda-bindings is not installed ({in_words(error)})", hint="pip install 'gstds-cache[cuda]'"
        ) from error
    try:
        major, minor = _nvrtc(nvrtc.nvrtcVersion())
        known = _nvrtc(nvrtc.nvrtcGetSupportedArchs())
    except (RuntimeError, OSError) as error:  # the library is not there
        raise KernelError(f"CUDA's run-time compiler NVRTC was not found ({in_words(error)})") from error
    return f"{major}.{minor}", tuple(f"sm_{number}" for number in known)


def _nvrtc(result: tuple[Any, ...]) -> Any:
    code, *values = result
    if int(code) != 0:
        raise KernelError(f"NVRTC answered {getattr(code, 'name', code)}")
    return values[0] if len(values) == 1 else tuple(values)


def _filled(size: tuple[Any, ...], fill: Any) -> bytes:
    room = bytes(_nvrtc(size))
    _nvrtc(fill(room))
    return room
