"""What a launch hands to the driver, with a driver that takes notes in place of CUDA's."""

from __future__ import annotations

import ctypes
import enum
import sys
import threading
import types
from contextlib import nullcontext

import pytest
import torch

from gstds_cache.cuda import launch
from gstds_cache.errors import KernelError


class Code(enum.IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_IMAGE = 200
    CUDA_ERROR_INVALID_VALUE = 1


class Attribute(enum.IntEnum):
    CU_FUNC_ATTRIBUTE_NUM_REGS = 4
    CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES = 3
    CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8


class Driver(types.ModuleType):
    """The calls of cuda.bindings.driver that a kernel makes, with cuda.bindings' return values."""

    CUfunction_attribute = Attribute

    def __init__(self):
        super().__init__("driver")
        self.launches, self.allowed, self.most = [], [], 232_448
        self.load_code = Code.CUDA_SUCCESS
        self.kinds = ""

    def cuModuleLoadData(self, cubin):
        return (self.load_code, f"module of {cubin!r}") if self.load_code == 0 else (self.load_code, None)

    def cuModuleGetFunction(self, module, name):
        return Code.CUDA_SUCCESS, (module, name)

    def cuFuncGetAttribute(self, attribute, function):
        return Code.CUDA_SUCCESS, {4: 128, 3: 16}[attribute]

    def cuFuncSetAttribute(self, function, attribute, value):
        assert attribute == Attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        self.allowed.append(value)
        return (Code.CUDA_SUCCESS if value <= self.most else Code.CUDA_ERROR_INVALID_VALUE,)

    def cuLaunchKernel(self, function, gx, gy, gz, bx, by, bz, shared, stream, parameters, extra):
        assert (gy, gz, by, bz, extra) == (1, 1, 1, 1, 0)
        if bx > 1024:
            return (Code.CUDA_ERROR_INVALID_VALUE,)
        kinds = {"p": ctypes.c_uint64, "d": ctypes.c_double, "i": ctypes.c_int32}
        addresses = ctypes.cast(parameters, ctypes.POINTER(ctypes.c_void_p))
        values = [kinds[kind].from_address(addresses[n]).value for n, kind in enumerate(self.kinds)]
        self.launches.append((gx, bx, shared, stream, values))
        return (Code.CUDA_SUCCESS,)


class OnGpu(torch.Tensor):
    """A CPU tensor that says it is on GPU 1."""

    def get_device(self):
        return 1


@pytest.fixture
def driver(monkeypatch):
    made = Driver()
    queried = made.threads_with_a_context = []
    bindings = types.ModuleType("cuda.bindings")
    bindings.driver = made
    monkeypatch.setitem(sys.modules, "cuda", types.ModuleType("cuda"))
    monkeypatch.setitem(sys.modules, "cuda.bindings", bindings)
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", made)
    stream = types.SimpleNamespace(cuda_stream=77, synchronize=lambda: None, query=lambda: queried.append(1))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: stream)  # noqa: ARG005
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())  # noqa: ARG005
    return made


@pytest.fixture
def kernel(driver, no_type_checks):
    return launch.Kernel(b"cubin", "solve", torch.device("cuda", 1))


def test_arguments_arrive_as_the_kernel_declares_them(driver, kernel):
    driver.kinds = "pidpi"
    x = torch.arange(4.0).as_subclass(OnGpu)
    kernel(3, 256, 1024, x, -7, 0.25, None, 2**31 - 1)
    assert driver.launches == [(3, 256, 1024, 77, [x.data_ptr(), -7, 0.25, 0, 2**31 - 1])]
    assert (kernel.registers, kernel.local_bytes) == (128, 16)


def test_no_blocks_are_no_launch(driver, kernel):
    kernel(0, 256, 0)
    assert driver.launches == []


def test_the_driver_is_told_of_shared_memory_once(driver, kernel):
    for shared in (1024, 60_000, 50_000, 60_000, 90_000, 90_000):
        kernel(1, 32, shared)
    assert driver.allowed == [60_000, 90_000]
    with pytest.raises(KernelError, match="allowing solve 300000 bytes of shared memory: .*CUDA_ERROR_INVALID_VALUE"):
        kernel(1, 32, 300_000)


def test_each_thread_packs_its_own_arguments(driver, kernel):
    driver.kinds = "iiii"
    begin = threading.Barrier(4)

    def work(number):
        begin.wait()
        for _ in range(200):
            kernel(1, 32, 0, *[number] * 4)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(driver.threads_with_a_context) == 5  # four, and the one that loaded the kernel
    assert sorted(values for *_, values in driver.launches) == sorted(
        [number] * 4 for number in range(4) for _ in range(200)
    )


@pytest.mark.parametrize(
    "tensor", [torch.zeros(3), torch.zeros(4, 4).as_subclass(OnGpu)[:, ::2]], ids=["elsewhere", "strided"]
)
def test_a_tensor_that_cannot_be_a_pointer_is_refused(driver, kernel, tensor):
    with pytest.raises(ValueError, match="expected a contiguous one on cuda:1"):
        kernel(1, 32, 0, tensor)
    assert driver.launches == []


def test_a_launch_that_the_driver_refuses_names_the_kernel(kernel):
    with pytest.raises(KernelError, match="launching solve, 1 blocks of 2048 threads.*CUDA_ERROR_INVALID_VALUE"):
        kernel(1, 2048, 0)


def test_a_driver_that_does_not_take_the_code_says_so(driver, no_type_checks):
    driver.load_code = Code.CUDA_ERROR_INVALID_IMAGE
    with pytest.raises(
        KernelError, match="loading the kernel solve: the CUDA driver answered CUDA_ERROR_INVALID_IMAGE"
    ):
        launch.Kernel(b"cubin", "solve", torch.device("cuda", 1))
