"""csrc's shared headers, compiled here, against the PyTorch oracle."""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from ecar_kernels.flow_step.reference import (
    block_details,
    haar_high_pass,
    initial_noise,
    philox4x32_10,
    uniforms,
)

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
INCLUDE = ROOT / "csrc" / "include"
WARNINGS = ["-Wall", "-Wextra", "-Wpedantic", "-Werror"]
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120")


def build(*command) -> None:
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def found(*names: str) -> str:
    for name in names:
        if name and (path := shutil.which(name)):
            return path
    pytest.skip(f"none of {', '.join(filter(None, names))} is on this machine")


@pytest.fixture(scope="module")
def compiler() -> str:
    return found(os.environ.get("CXX", ""), "c++", "g++", "clang++")


@pytest.fixture(scope="module")
def probe(compiler, tmp_path_factory) -> ctypes.CDLL:
    library = tmp_path_factory.mktemp("csrc") / "probe.so"
    build(
        compiler,
        "-std=c++17",
        "-O2",
        *WARNINGS,
        "-shared",
        "-fPIC",
        "-I",
        INCLUDE,
        HERE / "probe.cpp",
        "-o",
        library,
    )
    return ctypes.CDLL(library)


def words(*shape: int) -> np.ndarray:
    return torch.randint(2**32, shape).numpy().astype(np.uint32)


def pointer(array: np.ndarray) -> ctypes.c_void_p:
    assert array.flags.c_contiguous
    return ctypes.c_void_p(array.ctypes.data)


def tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array.astype(np.int64) if array.dtype == np.uint32 else array)


def drawn(probe: ctypes.CDLL, seed: int, stage: int, calls: int) -> torch.Tensor:
    out = np.empty((calls, 4), np.float32)
    probe.image_normals(
        ctypes.c_int64(seed), ctypes.c_uint32(stage), pointer(out), ctypes.c_int64(calls)
    )
    return tensor(out)


def test_known_answers(tmp_path, compiler):
    """The program that ctest runs, by CMake where it is here."""
    if shutil.which("cmake"):
        build("cmake", "-S", ROOT, "-B", tmp_path, f"-DCMAKE_CXX_COMPILER={compiler}")
        build("cmake", "--build", tmp_path)
        build("ctest", "--test-dir", tmp_path, "--output-on-failure", "--no-tests=error")
    else:
        program = tmp_path / "known_answers"
        build(
            compiler,
            "-std=c++17",
            *WARNINGS,
            "-I",
            INCLUDE,
            ROOT / "csrc" / "tests" / "known_answers.cpp",
            "-o",
            program,
        )
        build(program)


def test_philox_words_are_the_same_bits(probe):
    counters, keys, out = words(1000, 4), words(1000, 2), np.empty((1000, 4), np.uint32)
    counters[0], keys[0] = 0, 0
    counters[1], keys[1] = 2**32 - 1, 2**32 - 1
    probe.philox(pointer(counters), pointer(keys), pointer(out), ctypes.c_int64(1000))
    assert tensor(out).equal(philox4x32_10(tensor(counters), tensor(keys)))


def test_uniforms_are_the_same_bits(probe):
    values = words(100_000)
    edges = [
        0,
        1,
        2**23,
        2**23 + 1,
        2**24 + 1,
        2**31 + 128,
        2**31 + 384,
        2**32 - 129,
        2**32 - 128,
        2**32 - 1,
    ]
    values[: len(edges)] = edges
    out = np.empty(len(values), np.float32)
    probe.uniforms(pointer(values), pointer(out), ctypes.c_int64(len(values)))
    assert tensor(out).equal(uniforms(tensor(values)))


@pytest.mark.parametrize("image", [0, 7, -1, -(2**63), 2**63 - 1, 2**32, -(2**32) + 5])
def test_an_image_s_noise_is_the_oracle_s(probe, image):
    """To two ulp of the largest normal there is, 6.8."""
    shape, count = (3, 5, 7), 105
    close = {"rtol": 0, "atol": 2 * 6.8 * 2**-23}
    noise = initial_noise(torch.tensor([image]), shape, device="cpu", dtype=torch.float32)
    ours = drawn(probe, image, 1, (count + 3) // 4).flatten()[:count]
    torch.testing.assert_close(ours, noise.flatten(), **close)
    for stage in (2, 3):
        details = block_details(torch.tensor([image]), stage, shape)[0]
        ours = drawn(probe, image, stage, count)[:, :3]
        torch.testing.assert_close(ours, details.transpose(0, 1).reshape(3, count).T, **close)


def test_haar_blocks_are_the_oracle_s(probe):
    details = torch.randn(3, 2, 3, 4, 5)
    by_block = details.movedim(2, -1).contiguous().numpy()
    blocks = np.empty((3, 2, 4, 5, 2, 2), np.float32)
    probe.haar(pointer(by_block), pointer(blocks), ctypes.c_int64(3 * 2 * 4 * 5))
    ours = tensor(blocks).transpose(3, 4).reshape(3, 2, 8, 10)
    torch.testing.assert_close(ours, haar_high_pass(details), rtol=0, atol=2**-21)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_headers_compile_for_cuda(architecture, tmp_path):
    nvcc = found("nvcc", "/usr/local/cuda/bin/nvcc")
    listed = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True).stdout
    if architecture not in listed.split():
        pytest.skip(f"{nvcc} does not know {architecture}")
    build(
        nvcc,
        "-std=c++17",
        f"-arch={architecture}",
        "-Werror",
        "all-warnings",
        "-I",
        INCLUDE,
        "-c",
        HERE / "device_probe.cu",
        "-o",
        tmp_path / "probe.o",
    )


def test_the_headers_know_nothing_of_torch():
    for header in INCLUDE.rglob("*.h"):
        text = header.read_text("utf-8")
        assert "torch/" not in text and "ATen" not in text
