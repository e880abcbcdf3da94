"""What several tests need: small real data, a small real encoder, and commands as a user runs them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import jaxtyping
import pytest
import torch
from emulated import H100_SHARED_MEMORY, WHY_NOT, EmulatedKernels
from forked import FORKS, Forked, Forks
from hypothesis import settings
from images import TINY_ENCODER, ArraySource, make_images
from s3_api import BUCKET, FaultProxy, S3Server, s3_environment

from gstds_cache.cuda import build, launch

# CI judges a change by the same examples every time; a run by hand looks for new ones.
settings.register_profile("gstds", deadline=None, print_blob=True, derandomize="CI" in os.environ)
settings.load_profile("gstds")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # two would fight over two busy cores: seven times slower, measured


@pytest.fixture(autouse=True)
def _interruptible() -> Iterator[None]:
    """A command that was interrupted ignores Ctrl-C until its process ends, which here is that of the tests."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def _compiled_kernels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # all processes of the session use the same ones
        folder = folder.parent
    (folder / "kernels").mkdir(exist_ok=True)
    return folder / "kernels"


@pytest.fixture
def emulated_kernels(_compiled_kernels: Path, monkeypatch: pytest.MonkeyPatch) -> EmulatedKernels:
    """CUDA kernels run on CPU tensors, compiled by g++; for tests of the code that launches them."""
    if WHY_NOT:
        pytest.skip(WHY_NOT)
    kernels = EmulatedKernels(_compiled_kernels)
    monkeypatch.setattr(build, "kernel", kernels)
    monkeypatch.setattr(build, "why_not", lambda device: "")  # noqa: ARG005
    monkeypatch.setattr(launch, "shared_memory_limit", lambda device: H100_SHARED_MEMORY)  # noqa: ARG005
    return kernels


@pytest.fixture
def no_type_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a user has it: beartype, by which tests check the package's types, would be first to refuse a wrong one."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.fixture
def array_source() -> type[ArraySource]:
    return ArraySource


@pytest.fixture
def tiny_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """URI of a small real encoder in a module of the user's own."""
    name = f"tiny_encoder_{abs(hash(tmp_path)) % 10**9}"
    (tmp_path / f"{name}.py").write_text(TINY_ENCODER)
    monkeypatch.syspath_prepend(tmp_path)
    return f"{name}:build"


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """60 real PNGs in three class folders, two of which do not decode."""
    return make_images(tmp_path / "photos")


Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    """Starts commands in processes of their own without loading torch anew for each."""
    yield FORKS
    FORKS.close()


@pytest.fixture
def start(tmp_path: Path, tiny_model: str, forks: Forks) -> Callable[..., Forked]:
    """Starts one of our commands as a process of its own, in ``tmp_path``."""

    def begin(*words: str, **options: Any) -> Forked:
        environment = os.environ | {"GSTDS_CACHE": str(tmp_path / "stores")}
        return forks.start(words, cwd=tmp_path, env=environment, **options)

    return begin


@pytest.fixture
def command(start: Callable[..., Forked]) -> Run:
    """Runs one of our commands as a process of its own, in ``tmp_path``."""

    def run(*words: str, code: int = 0, **options: Any) -> subprocess.CompletedProcess[str]:
        process = start(*words, **options)
        out, err = process.communicate(300)
        done = subprocess.CompletedProcess(process.args, process.wait(), out, err)
        assert done.returncode == code, f"exit code {done.returncode}, expected {code}\n{done.stdout}\n{done.stderr}"
        return done

    return run


def last_json(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """The JSON object a command ends its stdout with."""
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


@pytest.fixture
def result_of() -> Callable[[subprocess.CompletedProcess[str]], dict[str, Any]]:
    return last_json


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """A real S3 API on loopback, with one bucket."""
    server = S3Server()
    yield server
    server.stop()


@pytest.fixture
def s3_prefix(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """A place in the bucket with nothing in it, and the environment that a user would have."""
    s3_environment(monkeypatch, s3_server.endpoint)
    return f"s3://{BUCKET}/{uuid4().hex}/store"


@pytest.fixture
def faulty_s3(s3_server: S3Server, s3_prefix: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, FaultProxy]]:
    """A place in the bucket behind a proxy that breaks requests, and the proxy."""
    proxy = FaultProxy(s3_server.port)
    s3_environment(monkeypatch, proxy.endpoint)
    yield s3_prefix, proxy
    proxy.stop()
