"""NVRTC compiles every kernel without a GPU; what is compiled is kept; and what hinders it is said in words.

All variants for the H100 here; for the other architectures, their registers and spills:

    python -m pytest -m faults tests/cuda/test_build.py
"""

from __future__ import annotations

import re
import sys
import types

import pytest
import torch

from gstds_cache.cuda import build
from gstds_cache.embedding.device_resizing import REACH
from gstds_cache.errors import KernelError
from gstds_cache.graph.cuda import PLACES
from gstds_cache.spectral.block import LARGEST_Q
from gstds_cache.spectral.compiled import block_size

GPU = torch.device("cuda", 0)
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120")
# Source, defines, registers of a thread and bytes of spills at most: two blocks of 512 or 256 threads fit into a
# multiprocessor with 64 and 128, one of 256 with 255.
VARIANTS = [
    ("graph.cu", ("KNN=10",), 64, 96),
    ("graph.cu", ("KNN=10", "SPILL"), 64, 96),
    ("graph.cu", ("KNN=16",), 64, 320),
    ("graph.cu", ("KNN=32",), 128, 128),
    ("graph.cu", ("KNN=16", "SPILL"), 64, 400),
    ("graph.cu", ("KNN=32", "SPILL"), 128, 128),
    ("solve.cu", ("M=2",), 128, 64),
    ("solve.cu", ("M=2", "SPILL"), 128, 64),
    ("solve.cu", ("M=4",), 128, 256),
    ("solve.cu", ("M=4", "SPILL"), 128, 256),
    *(("solve.cu", (f"M={m}", *spill), 255, 512) for m in range(6, block_size(LARGEST_Q) + 1, 2)
      for spill in ((), ("SPILL",))),
    ("rule.cu", (), 80, 0),
    *(("resize.cu", (f"REACH={reach}",), 64, 0) for reach in REACH.values()),
]  # fmt: skip


def compiler() -> str:
    """Why NVRTC cannot be used here; empty where it can."""
    try:
        build._compiler()
    except KernelError as error:
        return str(error)
    return ""


needs_nvrtc = pytest.mark.skipif(bool(compiler()), reason=f"needs NVRTC: {compiler()}")


def assert_small(source, defines, registers, spills, architecture):
    cubin, log = build.compile_cubin(source, architecture, defines)
    assert cubin.startswith(b"\x7fELF")
    assert "warning" not in log
    used, spilled = re.search(r"Used (\d+) registers", log), re.search(r"(\d+) bytes spill stores", log)
    assert used, log
    assert spilled, log
    assert int(used[1]) <= registers, log
    assert int(spilled[1]) <= spills, log


def test_every_variant_that_is_asked_for_is_in_the_list():
    asked = {
        ("solve.cu", (f"M={block_size(q)}", *spill)) for q in range(1, LARGEST_Q + 1) for spill in ((), ("SPILL",))
    }
    asked |= {("graph.cu", (f"KNN={places}", *spill)) for places in PLACES for spill in ((), ("SPILL",))}
    asked |= {("rule.cu", ()), *(("resize.cu", (f"REACH={reach}",)) for reach in REACH.values())}
    assert asked == {(source, defines) for source, defines, *_ in VARIANTS}


@needs_nvrtc
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: " ".join((variant[0], *variant[1])))
def test_every_variant_compiles_without_a_gpu(variant):
    assert_small(*variant, "sm_90")


@needs_nvrtc
@pytest.mark.faults  # a quarter of an hour
@pytest.mark.parametrize("architecture", [other for other in ARCHITECTURES if other != "sm_90"])
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: " ".join((variant[0], *variant[1])))
def test_every_variant_compiles_for_every_architecture(variant, architecture):
    assert_small(*variant, architecture)


@pytest.fixture
def texts(tmp_path, monkeypatch):
    """A folder of texts, a cache of its own, and how often something was compiled."""
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "half.cuh").write_text("#pragma once\n#define HALF 0.5f\n")
    (folder / "scale.cu").write_text(
        '#include "half.cuh"\nextern "C" __global__ void scale(float *x) { x[threadIdx.x] *= HALF; }\n'
    )
    monkeypatch.setenv("GSTDS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "FOLDER", folder)
    build.place_of_cubins.cache_clear()
    yield folder
    build.place_of_cubins.cache_clear()


@pytest.fixture
def compiled(monkeypatch):
    made = []
    compile_cubin = build.compile_cubin

    def counted(source, architecture, defines=()):
        made.append((source, architecture, *defines))
        return compile_cubin(source, architecture, defines)

    monkeypatch.setattr(build, "compile_cubin", counted)
    return made


@needs_nvrtc
def test_what_is_compiled_is_kept_until_its_text_changes(texts, compiled):
    first = build.cubin("scale.cu", "sm_90", ())
    assert build.cubin("scale.cu", "sm_90", ()) == first
    assert len(compiled) == 1
    build.cubin("scale.cu", "sm_80", ())
    build.cubin("scale.cu", "sm_90", ("A=1",))
    assert len(compiled) == 3
    (texts / "half.cuh").write_text("#pragma once\n#define HALF 0.25f\n")
    assert build.cubin("scale.cu", "sm_90", ()) != first
    folder = build.place_of_cubins().path
    assert folder.stat().st_mode & 0o777 == 0o700
    assert len(list(folder.iterdir())) == 3, "what was compiled from the older text is gone, other variants are not"


@needs_nvrtc
@pytest.mark.parametrize("damage", [lambda whole: whole[:100], lambda whole: whole[:-1] + b"\0\1", lambda _: b""])
def test_a_damaged_file_costs_compiling_and_nothing_else(texts, compiled, damage):
    first = build.cubin("scale.cu", "sm_90", ())
    (path,) = build.place_of_cubins().path.iterdir()
    path.write_bytes(damage(path.read_bytes()))
    assert build.cubin("scale.cu", "sm_90", ()) == first
    assert build.cubin("scale.cu", "sm_90", ()) == first
    assert len(compiled) == 2


@needs_nvrtc
def test_without_a_place_to_keep_it_a_kernel_is_compiled_all_the_same(texts, monkeypatch):
    monkeypatch.setattr(build, "is_private", lambda folder: False)  # noqa: ARG005
    assert build.place_of_cubins().path is None
    assert build.cubin("scale.cu", "sm_90", ()).startswith(b"\x7fELF")


@needs_nvrtc
def test_a_text_that_does_not_compile_ends_with_its_log(texts):
    (texts / "scale.cu").write_text("__global__ void scale(float *x) { y = 1; }\n")
    with pytest.raises(KernelError, match=r'NVRTC .* does not compile scale.cu(.|\n)*identifier "y" is undefined'):
        build.compile_cubin("scale.cu", "sm_90")


@needs_nvrtc
def test_an_architecture_that_nvrtc_does_not_know(texts):
    with pytest.raises(KernelError, match="NVRTC .* does not compile scale.cu for sm_20"):
        build.compile_cubin("scale.cu", "sm_20")


@pytest.fixture
def a_gpu(monkeypatch):
    """What torch says of a GPU, where there is none."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 9))  # noqa: ARG005
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "GeForce 9999")  # noqa: ARG005
    build.why_not.cache_clear()
    build._compiler.cache_clear()
    build._kernels.clear()
    yield
    build.why_not.cache_clear()
    build._compiler.cache_clear()
    build._kernels.clear()


def test_no_kernel_runs_on_a_cpu():
    assert build.why_not(torch.device("cpu")) == "cpu is no CUDA device"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_driver_the_reason_is_torchs():
    assert re.search("driver|not compiled with CUDA", build.why_not(GPU), re.IGNORECASE)


@needs_nvrtc
def test_a_gpu_newer_than_the_compiler_is_named(a_gpu):
    assert re.match("GeForce 9999 is of architecture sm_99, which this compiler does not know", build.why_not(GPU))


def test_without_cuda_bindings_the_extra_is_named(a_gpu, monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    assert "cuda-bindings is not installed" in build.why_not(GPU)
    with pytest.raises(KernelError) as error:
        build._compiler()
    assert error.value.hint == "pip install 'gstds-cache[cuda]'"


def test_without_the_compilers_library_the_reason_is_said(a_gpu, monkeypatch):
    def missing():
        raise RuntimeError("Failure finding libnvrtc.so")

    bindings = types.ModuleType("cuda.bindings")
    bindings.nvrtc = types.SimpleNamespace(nvrtcVersion=missing)
    monkeypatch.setitem(sys.modules, "cuda.bindings", bindings)
    assert "NVRTC was not found (RuntimeError: Failure finding libnvrtc.so)" in build.why_not(GPU)


def test_a_kernel_that_failed_is_not_tried_again(a_gpu, monkeypatch):
    tried = []

    def fails(source, architecture, defines):
        tried.append((source, architecture, defines))
        raise KernelError("does not compile\nits log")

    monkeypatch.setattr(build, "cubin", fails)
    for _ in range(3):
        with pytest.raises(KernelError, match="does not compile\nits log"):
            build.kernel("graph.cu", "graph_block", ("KNN=10",), device=GPU)
    assert tried == [("graph.cu", "sm_99", ("KNN=10",))]
