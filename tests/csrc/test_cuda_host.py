"""The CUDA kernels' bodies, compiled for the host and run over every block and thread."""

import ctypes

import pytest
import torch

from ecar_kernels.flow_step import reference
from ecar_kernels.registry import KERNEL_DTYPES
from tests.csrc.test_headers import HERE, INCLUDE, ROOT, build, found
from tests.support.accuracy import assert_accurate

CODES = {dtype: code for code, dtype in enumerate(KERNEL_DTYPES)}
F = ctypes.c_float


@pytest.fixture(scope="module")
def kernels(tmp_path_factory) -> ctypes.CDLL:
    library = tmp_path_factory.mktemp("cuda") / "host.so"
    build(found("c++", "g++", "clang++"), "-std=c++17", "-O2", "-ffp-contract=off", "-pthread",
          "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-shared", "-fPIC", "-I", ROOT / "csrc",
          "-I", INCLUDE, HERE / "cuda_host.cpp", "-o", library)
    return ctypes.CDLL(library)


def at(value: torch.Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if value is None else value.data_ptr())


def numbers(*values: int):
    return (ctypes.c_int64 * len(values))(*values)


def images(shape, dtype, layout):
    if layout == "padded":
        room = torch.randn(*shape[:-1], shape[-1] + 3).to(dtype)
        return room[..., 2:-1]
    return torch.randn(*shape).to(dtype)


def halves(x, velocity):
    return velocity[x.shape[0]:] if velocity.shape[0] != x.shape[0] else None


CASES = [((2, 3, 4, 16), "contiguous"), ((2, 3, 4, 8), "padded"), ((1, 1, 1, 21), "contiguous"),
         ((3, 2, 5, 7), "contiguous"), ((0, 2, 4, 8), "contiguous")]


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("shape, layout", CASES)
@pytest.mark.parametrize("guided", [False, True])
def test_flow_step(kernels, shape, layout, guided, dtype):
    x = images(shape, dtype, layout)
    velocity = images((shape[0] * (1 + guided), *shape[1:]), dtype, layout)
    strides = numbers(*x.stride()[:3], *velocity.stride()[:3])
    call = {"x": x, "velocity": velocity, "dt": 0.125, "guidance_scale": 1.5 if guided else 1.0}
    taken = []

    def euler(x, velocity, dt, *, guidance_scale):
        out = torch.full(x.shape, torch.nan).to(dtype)
        taken.append(kernels.euler(CODES[dtype], at(x), at(velocity), at(halves(x, velocity)),
                                   at(out), numbers(*x.shape), strides, F(dt), F(guidance_scale)))
        return out

    assert euler(**call).equal(reference.euler_step(**call))
    if shape[0]:
        aligned = all(value.data_ptr() % 16 == 0 for value in (x, velocity))
        expected = layout == "contiguous" and (
            shape[:3] == (1, 1, 1) or shape[3] * x.element_size() % 16 == 0) and aligned
        if shape != (1, 1, 1, 21) or not guided:
            assert taken[0] == expected
    for given in (True, False):
        noise = ({"details": torch.randn(*shape[:2], 3, *shape[2:]).to(dtype), "seeds": None}
                 if given else {"details": None,
                                "seeds": torch.randint(-2**63, 2**63 - 1, shape[:1])})

        def jump(x, velocity, dt, *, guidance_scale, time, stage, seeds, details):
            end = torch.full(x.shape, torch.nan).to(dtype)
            start = torch.full((*shape[:2], 2 * shape[2], 2 * shape[3]), torch.nan).to(dtype)
            kernels.jump(CODES[dtype], at(x), at(velocity), at(halves(x, velocity)), at(end),
                         at(start), numbers(*x.shape), strides, at(details), at(seeds), stage,
                         F(dt), F(guidance_scale), F((1 + time) / 2), F(1 - time))
            return end, start

        assert_accurate(jump, reference.upsample_renoise_euler,
                        call | noise | {"time": 1 / 3, "stage": 2})


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(4, 8, 8), (1, 1, 1), (3, 5, 7)])
def test_initial_noise(kernels, shape, dtype):
    seeds = torch.randint(-2**63, 2**63 - 1, (3,))
    plain = reference.initial_noise(seeds, shape, device="cpu", dtype=dtype)
    out = torch.full(plain.shape, torch.nan).to(dtype)
    kernels.noise(CODES[dtype], at(seeds), ctypes.c_int64(3),
                  ctypes.c_int64(plain[0].numel()), at(out))
    allowed = 2e-6 + torch.finfo(dtype).eps * plain.double().abs()
    assert ((out.double() - plain.double()).abs() <= allowed).all()


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("guided, group, wide_state", [(0, 1, 1), (1, 1, 0), (0, 4, 0), (1, 4, 1)])
@pytest.mark.parametrize("channels, outputs", [(520, 16), (72, 12), (70, 5)])
def test_flow_boundary(kernels, channels, outputs, guided, group, wide_state, dtype):
    """Weights whose rows are whole vectors of 16 bytes, those of one only, and none."""
    batch, tokens = 2, 5
    rows = batch * (1 + guided)

    def normal(*shape):
        return torch.randn(*shape).to(dtype)

    call = {
        "x": normal(rows, tokens, channels), "state": normal(batch, tokens, outputs),
        "shift": normal(rows, tokens, channels), "scale": normal(rows, tokens, channels),
        "weight": normal(outputs, channels) / 8, "bias": normal(outputs),
        "embed_weight": normal(channels, outputs) / 4, "embed_bias": normal(channels),
        "positions": normal(tokens, channels), "step_shift": normal(1, 1, channels),
        "step_scale": normal(1, 1, channels), "dt": 0.125,
        "guidance_scale": 1.5 if guided else 1.0, "eps": 1e-6,
    }
    if wide_state:
        call["state"] = call["state"].float()

    def boundary(dt, guidance_scale, eps, **tensors):
        state = torch.full_like(tensors["state"], torch.nan)
        embedded = torch.full_like(tensors["x"], torch.nan)
        order = ("x", "state", "shift", "scale", "weight", "bias", "embed_weight", "embed_bias",
                 "positions", "step_shift", "step_scale")
        pointers = (ctypes.c_void_p * len(order))(*(tensors[name].data_ptr() for name in order))
        kernels.flow_boundary(CODES[dtype], wide_state, group, guided, pointers, at(state),
                              at(embedded), numbers(batch, tokens, channels, outputs), F(dt),
                              F(guidance_scale), F(eps))
        return state, embedded

    assert_accurate(boundary, reference.flow_boundary, call)
