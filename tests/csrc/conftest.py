"""The CUDA sources on the host: built once for all tests that run them.

cuda_host.h is the GPU, cuda_host.cpp what torch's CUDA library would do. The sources between the
two are the real ones, csrc/bindings/cuda/flow_step.cpp and csrc/cuda/flow_step.cu.
"""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from ecar_kernels import _native
from tests.csrc.test_headers import HERE, INCLUDE, ROOT, build, found
from tests.support.cuda_host import Host

TORCH = Path(torch.__file__).parent
FLAGS = (
    "-O1",
    "-fPIC",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-I",
    ROOT / "csrc",
    "-I",
    INCLUDE,
)
KERNEL_FLAGS = (
    "-std=c++17",
    "-ffp-contract=off",
    "-fno-strict-aliasing",
    "-Wno-unknown-pragmas",
    "-include",
    HERE / "cuda_host.h",
    "-x",
    "c++",
)


@pytest.fixture(scope="session")
def library(tmp_path_factory) -> Path:
    if (reason := _native.why_not()) is not None:
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("cuda")
    for name in ("cuda_runtime.h", "cuda_fp16.h", "cuda_bf16.h"):
        (folder / name).touch()
    compiler = found("g++", "c++", "clang++")
    kernels, bindings = folder / "kernels.o", folder / "bindings.o"
    # C++20 for torch's own headers; those of the bindings take C++17.
    with ThreadPoolExecutor(2) as pool:
        list(
            pool.map(
                lambda command: build(compiler, *FLAGS, *command),
                (
                    (
                        *KERNEL_FLAGS,
                        "-I",
                        folder,
                        "-c",
                        ROOT / "csrc/cuda/flow_step.cu",
                        "-o",
                        kernels,
                    ),
                    (
                        "-std=c++20",
                        "-isystem",
                        TORCH / "include",
                        "-c",
                        HERE / "cuda_host.cpp",
                        "-o",
                        bindings,
                    ),
                ),
            )
        )
    build(
        compiler,
        "-shared",
        kernels,
        bindings,
        "-L",
        TORCH / "lib",
        "-ltorch_cpu",
        "-lc10",
        "-o",
        folder / "host.so",
    )
    return folder / "host.so"


@pytest.fixture(scope="session")
def loaded(library) -> Host:
    host = Host(library)
    host.set()
    host.library.host_streams(False)  # the bindings look for torch's once, until they are there
    with pytest.raises(RuntimeError) as raised:
        host.run("euler_step")
    host.without_streams = str(raised.value)
    host.library.host_streams(True)
    return host


@pytest.fixture
def host(loaded) -> Host:
    loaded.set()
    return loaded
