"""A compiled kernel, launched on torch's current stream without a copy or a wait.

A launch takes about as long as one of torch's own: arguments are packed into memory that each thread keeps, and what
the driver has to be told once about a kernel it is told once.
"""

from __future__ import annotations

import ctypes
import struct
import threading
from functools import cache
from typing import Any

import torch

from gstds_cache.errors import KernelError
from gstds_cache.runtime.devices import with_index

ALWAYS_ALLOWED = 48 << 10  # bytes of shared memory that a block may use without asking the driver
SLOT = 8  # bytes of each packed argument

KernelArgument = torch.Tensor | float | int | None


def succeeded(result: tuple[Any, ...], doing: str) -> Any:
    """The values of a call of the driver.

    Args:
        result: What it returned: a code, then the values.
        doing: What was being done, for the error.

    Returns:
        The value, or several as a tuple; None where there is none.

    Raises:
        KernelError: The code is an error's.
    """
    code, *values = result
    if int(code) == 0:
        return values[0] if len(values) == 1 else tuple(values) or None
    raise KernelError(f"{doing}: the CUDA driver answered {getattr(code, 'name', code)}")


@cache
def _packing(kinds: str) -> struct.Struct:
    """Arguments in slots of eight bytes: ``p`` pointers, ``d`` float64, ``i`` int32."""
    return struct.Struct("=" + "".join({"p": "Q", "d": "d", "i": "i4x"}[kind] for kind in kinds))


class _Arguments(threading.local):
    """Memory for a thread's packed arguments, and their addresses as ``cuLaunchKernel`` takes them."""

    def __init__(self, device: torch.device, most: int = 64) -> None:
        torch.cuda.current_stream(device).query()  # the device's context becomes this thread's, as launching takes it
        self.values = ctypes.create_string_buffer(most * SLOT)
        start = ctypes.addressof(self.values)
        self._addresses = (ctypes.c_void_p * most)(*(start + SLOT * n for n in range(most)))
        self.address = ctypes.addressof(self._addresses)


class Kernel:
    """One kernel on one device.

    Attributes:
        function: Its name.
        device: Where it runs.
        registers: Registers of a thread.
        local_bytes: Bytes of a thread that did not fit into registers.
    """

    def __init__(self, cubin: bytes, function: str, device: torch.device) -> None:
        """Load a kernel.

        Args:
            cubin: Compiled for the device's architecture.
            function: Name of the kernel in it.
            device: A CUDA device, with its number.

        Raises:
            KernelError: The driver does not take it: it is older than the compiler, or there is no memory left.
        """
        from cuda.bindings import driver

        self.function, self.device = function, device
        self._driver, self._lock, self._allowed = driver, threading.Lock(), 0
        self._arguments = _Arguments(device)
        attributes = driver.CUfunction_attribute
        with torch.cuda.device(device):
            torch.cuda.current_stream().synchronize()  # the device's context is there from here on
            self._module = succeeded(driver.cuModuleLoadData(cubin), f"loading the kernel {function}")
            self._function = succeeded(
                driver.cuModuleGetFunction(self._module, function.encode()), f"looking for the kernel {function}"
            )
            self.registers, self.local_bytes = (
                int(succeeded(driver.cuFuncGetAttribute(attribute, self._function), f"asking about {function}"))
                for attribute in (
                    attributes.CU_FUNC_ATTRIBUTE_NUM_REGS,
                    attributes.CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES,
                )
            )

    def __call__(self, grid: int, threads: int, shared_bytes: int, *arguments: KernelArgument) -> None:
        """Launch the kernel on the current stream of its device, and return before it has run.

        Args:
            grid: Blocks; none are no launch.
            threads: Threads of a block.
            shared_bytes: Shared memory of a block.
            *arguments: In the kernel's order. Tensors (contiguous, on the device) are passed as pointers, None as a
                null pointer, float as double, int as int32. Memory is not kept alive: as with torch's own kernels the
                allocator hands it out again in the order of the stream.

        Raises:
            KernelError: The driver refuses the launch.
            ValueError: A tensor is elsewhere or not contiguous.
        """
        if grid == 0:
            return
        if shared_bytes > self._allowed:
            self._allow(shared_bytes)
        index, kinds = self.device.index, ""
        values: list[float] = []
        for argument in arguments:
            if isinstance(argument, torch.Tensor):
                if argument.get_device() != index or not argument.is_contiguous():
                    raise ValueError(
                        f"{self.function}: got a tensor on {argument.device}, expected a contiguous one "
                        f"on {self.device}"
                    )
                kinds += "p"
                values.append(argument.data_ptr())
            elif argument is None:
                kinds += "p"
                values.append(0)
            else:
                kinds += "d" if isinstance(argument, float) else "i"
                values.append(argument)
        _packing(kinds).pack_into(self._arguments.values, 0, *values)
        if torch.cuda.current_device() == index:
            self._launch(grid, threads, shared_bytes)
        else:
            with torch.cuda.device(self.device):
                self._launch(grid, threads, shared_bytes)

    def _launch(self, grid: int, threads: int, shared_bytes: int) -> None:
        stream = torch.cuda.current_stream(self.device).cuda_stream
        (code,) = self._driver.cuLaunchKernel(
            self._function, grid, 1, 1, threads, 1, 1, shared_bytes, stream, self._arguments.address, 0
        )
        if int(code) != 0:
            succeeded((code,), f"launching {self.function}, {grid} blocks of {threads} threads, {shared_bytes} bytes")

    def _allow(self, shared_bytes: int) -> None:
        """Tell the driver how much shared memory a block may ask for, where it is more than it was told before."""
        with self._lock, torch.cuda.device(self.device):
            if shared_bytes <= self._allowed:
                return
            if shared_bytes > ALWAYS_ALLOWED:
                attribute = self._driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
                succeeded(
                    self._driver.cuFuncSetAttribute(self._function, attribute, shared_bytes),
                    f"allowing {self.function} {shared_bytes} bytes of shared memory",
                )
            self._allowed = shared_bytes


def shared_memory_limit(device: torch.device) -> int:
    """Bytes of shared memory that one block may have on a CUDA device."""
    return _shared_memory_limit(with_index(device).index)


@cache
def _shared_memory_limit(index: int) -> int:
    from cuda.bindings import driver

    what = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
    torch.cuda.current_stream(index)  # torch has called cuInit
    handle = succeeded(driver.cuDeviceGet(index), f"asking about GPU {index}")
    return int(succeeded(driver.cuDeviceGetAttribute(what, handle), f"asking about GPU {index}"))
