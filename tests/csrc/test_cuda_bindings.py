"""The CUDA bindings on the host: devices, streams, refusals, failed launches."""

import ctypes
import os
import re
import subprocess
import sys

import pytest
import torch

from ecar_kernels import _triton
from tests.csrc.conftest import FLAGS, KERNEL_FLAGS
from tests.csrc.test_headers import ROOT, build, found
from tests.support.cuda_host import (
    BOUNDARY,
    DETAILS,
    EULER,
    NOISE,
    OPS,
    SEEDS,
    STREAM,
    sample_calls,
)


def same(results, others) -> bool:
    return all(a.equal(b) for a, b in zip(results, others, strict=True))


@pytest.mark.parametrize("op", OPS)
def test_every_op_is_registered_for_cuda_alone(host, op):
    for key in ("CPU", "CUDA", "CompositeExplicitAutograd"):
        there = torch._C._dispatch_has_kernel_for_dispatch_key(f"ecar_host::{op}", key)
        assert there == (key == "CUDA")


@pytest.mark.parametrize("op", OPS)
def test_the_tensors_device_and_its_stream_are_taken(host, op):
    """And the device of before is back after the call, and after an error."""
    for device, current in ((1, 0), (0, 1), (1, 1)):
        host.set(current=current)
        host.run(op, device=device)
        (launch,) = host.launched
        assert (launch.device, launch.stream) == (device, STREAM + 16 * device)
        assert host.current() == current
        host.set(current=current, fail=2)
        with pytest.raises(RuntimeError, match=r"error 2$"):
            host.run(op, device=device)
        assert host.current() == current


def test_a_torch_without_streams(host):
    """Where torch's CUDA library is not in the process: said before anything is launched."""
    assert host.without_streams == "this torch has no CUDA streams"


@pytest.mark.parametrize("op", OPS)
def test_threads_in_another_order_give_the_same_bits(host, op):
    name, call = sample_calls()[op]
    forwards = getattr(host, name)(**call)
    host.set(backwards=True)
    backwards = getattr(host, name)(**call)
    assert same(forwards, backwards) if isinstance(forwards, tuple) else forwards.equal(backwards)


@pytest.mark.parametrize("op", [op for op in OPS if op != NOISE])
@pytest.mark.parametrize("number", ["dt", "guidance_scale", "ratio"])
def test_a_number_on_the_device_is_the_number(host, op, number):
    name, call = sample_calls()[op]
    results = [
        getattr(host, name)(**call | {number: value})
        for value in (1.5, torch.tensor(1.5), torch.full((1, 1), 1.5), torch.tensor(3.0))
    ]
    plain, *same_number, other = results
    assert all(same(plain, x) for x in same_number) and not same(plain, other)


@pytest.mark.parametrize("op", OPS)
def test_kernels_begin_early_where_their_code_waits(host, op):
    """And not where it is an older chip's, or CUDA does not say."""
    for chip, early in ((90, 1), (120, 1), (89, 0), (80, 0), (0, 0)):
        host.set(compiled_for=chip)
        host.run(op)
        assert [launch.early for launch in host.launched] == [early]


SWITCHED_OFF = """
import sys
from pathlib import Path
from ecar_kernels import _native
from tests.support.cuda_host import EULER, Host
_native.require()
host = Host(Path(sys.argv[1]))
host.library.host_streams(True)
host.set()
host.run(EULER)
assert [launch.early for launch in host.launched] == [0]
"""


def test_it_can_be_switched_off(library):
    """Once for all launches, so in a process of its own."""
    environment = os.environ | {_triton.DEPENDENT_VARIABLE: "0"}
    subprocess.run(
        [sys.executable, "-c", SWITCHED_OFF, library], env=environment, cwd=ROOT, check=True
    )


@pytest.mark.parametrize("op", OPS)
def test_a_launch_that_fails_is_an_error_of_that_call_alone(host, op):
    name = re.sub("_(seeds|details|chained)$", "", op)
    for error in (2, 98, 701):
        host.set(fail=error)
        with pytest.raises(RuntimeError, match=f"^{name}: the CUDA launch failed: error {error}$"):
            host.run(op)
        assert host.library.host_last_error() == 0
        host.run(op)
        assert len(host.launched) == 1


def t(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


# What is changed in sample_calls, or the devices by position; the argument and the message.
DEVICE = "the first argument's device, got another one"
CUDA = "a CUDA tensor, got one on another device"
TYPE = "the first argument's type, got another one"
LAST = "a contiguous last dimension"
FLOATS = "float32, bfloat16 or float16, got another type"
STEP = [
    ({"x": t(2, 3, 4)}, "x", "4 dimensions, got [2, 3, 4]"),
    ({"x": t(2, 3, 4, 8, dtype=torch.float64)}, "x", FLOATS),
    ({"x": t(2, 3, 8, 4).mT}, "x", LAST),
    ({"velocity": t(4, 3, 4)}, "velocity", "[2, 3, 4, 8], got [4, 3, 4]"),
    ({"velocity": t(3, 3, 4, 8)}, "velocity", "[2, 3, 4, 8], got [3, 3, 4, 8]"),
    ({"velocity": t(4, 3, 4, 7)}, "velocity", "[4, 3, 4, 8], got [4, 3, 4, 7]"),
    ({"velocity": t(4, 3, 8, 4).mT}, "velocity", LAST),
    ({"velocity": t(4, 3, 4, 8).half()}, "velocity", TYPE),
    ({"previous": t(2, 3, 4)}, "previous", "[2, 3, 4, 8], got [2, 3, 4]"),
    ({"previous": t(4, 3, 4, 8)}, "previous", "[2, 3, 4, 8], got [4, 3, 4, 8]"),
    ({"previous": t(2, 3, 8, 4).mT}, "previous", LAST),
    ({"previous": t(2, 3, 4, 8).half()}, "previous", TYPE),
    ({1: 1}, "velocity", DEVICE),
    ({1: -1}, "velocity", DEVICE),
    ({0: -1}, "x", CUDA),
]
# Where `previous` is among an op's arguments; after it come the numbers in tensors.
HISTORY = {EULER: 5, SEEDS: 8, DETAILS: 7, BOUNDARY: 15}
NUMBERS = {"dt": "dt_data", "guidance_scale": "guidance_data", "ratio": "ratio_data"}
GUIDANCE = {"guidance_scale": t(1)}
WRONG = [
    *((op, *row) for op in (EULER, SEEDS, DETAILS) for row in STEP),
    *((op, {at: where}, "previous", DEVICE) for op, at in HISTORY.items() for where in (1, -1)),
    *(
        (op, {number: t(1), at + place: where}, name, DEVICE)
        for op, at in HISTORY.items()
        for place, (number, name) in enumerate(NUMBERS.items(), 1)
        for where in (1, -1)
    ),
    *(
        (op, {number: value}, name, "one float32")
        for op in HISTORY
        for number, name in NUMBERS.items()
        for value in (t(2), t(1).double())
    ),
    (SEEDS, {"seeds": t(2, dtype=torch.int32)}, "seeds", "int64, got another type"),
    (SEEDS, {"seeds": t(2, 1, dtype=torch.int64)}, "seeds", "one dimension, got [2, 1]"),
    (SEEDS, {"seeds": t(3, dtype=torch.int64)}, "seeds", "one for each image, 2, got 3"),
    (SEEDS, {7: 1}, "seeds", DEVICE),
    (SEEDS, {7: -1}, "seeds", DEVICE),
    (DETAILS, {"details": t(2, 3, 4, 8)}, "details", "[2, 3, 3, 4, 8], got [2, 3, 4, 8]"),
    (DETAILS, {"details": t(2, 3, 3, 8, 4).mT}, "details", LAST),
    (DETAILS, {"details": t(2, 3, 3, 4, 8).half()}, "details", TYPE),
    (DETAILS, {6: 1}, "details", DEVICE),
    (DETAILS, {6: -1}, "details", DEVICE),
    (NOISE, {"seeds": t(2)}, "seeds", "int64, got another type"),
    (NOISE, {"seeds": t(2, 1, dtype=torch.int64)}, "seeds", "one dimension, got [2, 1]"),
    (NOISE, {"shape": (3, -1, 8)}, "shape", "sizes of at least 0, got -1"),
    (NOISE, {"dtype": torch.float64}, "dtype", FLOATS),
    (BOUNDARY, {"x": t(4, 72)}, "x", "3 dimensions, got [4, 72]"),
    (BOUNDARY, {"x": t(4, 5, 72).double()}, "x", FLOATS),
    (BOUNDARY, {"x": t(4, 72, 5).mT}, "x", LAST),
    (BOUNDARY, {"x": t(3, 5, 72)}, "x", "as many images as the state or twice as many, got 3"),
    (BOUNDARY, {"state": t(2, 5)}, "state", "3 dimensions, got [2, 5]"),
    (BOUNDARY, {"state": t(2, 5, 65)}, "state", "at most 64 outputs, got 65"),
    (BOUNDARY, {"state": t(2, 4, 16)}, "state", "5 tokens, got 4"),
    (BOUNDARY, {"state": t(2, 5, 16).half()}, "state", "float32 or the type of x, got another one"),
    (BOUNDARY, {"state": t(2, 16, 5).mT}, "state", LAST),
    (BOUNDARY, {"shift": t(4, 4, 72)}, "shift", "[4, 5, 72], got [4, 4, 72]"),
    (BOUNDARY, {"scale_": t(2, 1, 72)}, "scale", "[4, 1, 72], got [2, 1, 72]"),
    (BOUNDARY, {"scale_": t(4, 1, 72).half()}, "scale", TYPE),
    (BOUNDARY, {"step_shift": t(1, 5, 72)}, "step_shift", "[1, 1, 72], got [1, 5, 72]"),
    (BOUNDARY, {"step_scale": t(2, 1, 72)}, "step_scale", "[4, 1, 72], got [2, 1, 72]"),
    (BOUNDARY, {"weight": t(16, 71)}, "weight", "[16, 72], got [16, 71]"),
    (BOUNDARY, {"weight": t(16, 80)[:, :72]}, "weight", "a contiguous tensor"),
    (BOUNDARY, {"bias": t(15)}, "bias", "[16], got [15]"),
    (BOUNDARY, {"embed_weight": t(72, 15)}, "embed_weight", "[72, 16], got [72, 15]"),
    (BOUNDARY, {"embed_weight": t(72, 20)[:, :16]}, "embed_weight", "a contiguous tensor"),
    (BOUNDARY, {"embed_bias": t(71)}, "embed_bias", "[72], got [71]"),
    (BOUNDARY, {"positions": t(4, 72)}, "positions", "[5, 72], got [4, 72]"),
    (BOUNDARY, {"positions": t(5, 80)[:, :72]}, "positions", "a contiguous tensor"),
    *(
        (BOUNDARY, {at: where}, name, DEVICE)
        for where in (1, -1)
        for at, name in enumerate(
            (
                "x",
                "state",
                "shift",
                "scale",
                "weight",
                "bias",
                "embed_weight",
                "embed_bias",
                "positions",
                "",
                "step_shift",
                "step_scale",
            )
        )
        if at > 0 and name
    ),
    (BOUNDARY, {"previous": t(2, 5)}, "previous", "[2, 5, 16], got [2, 5]"),
    (BOUNDARY, {"previous": t(4, 5, 16)}, "previous", "[2, 5, 16], got [4, 5, 16]"),
    (BOUNDARY, {"previous": t(2, 16, 5).mT}, "previous", LAST),
    (BOUNDARY, {"previous": t(2, 5, 16).half()}, "previous", TYPE),
    (BOUNDARY, {"channels": 8193}, "x", "1 to 8192 channels, got 8193"),
    (BOUNDARY, {"channels": 0}, "x", "1 to 8192 channels, got 0"),
    (BOUNDARY, {0: -1}, "x", CUDA),
    (BOUNDARY, GUIDANCE | dict.fromkeys(range(12), -1), "x", CUDA),
]


@pytest.mark.parametrize(
    "op, changes, argument, message",
    WRONG,
    ids=[f"{i}-{op}-{name}" for i, (op, _, name, _) in enumerate(WRONG)],
)
def test_refusals(host, op, changes, argument, message):
    """Each before a launch, with the device of before in place."""
    elsewhere = {at: device for at, device in changes.items() if isinstance(at, int)}
    changes = {name: value for name, value in changes.items() if isinstance(name, str)}
    if "channels" in changes:
        changes = boundary_of(changes["channels"])
    host.run(op)  # a launch that must not be taken for this call's
    with pytest.raises(RuntimeError) as raised:
        host.run(op, changes, elsewhere=elsewhere)
    assert str(raised.value).startswith(f"argument '{argument}': expected {message}")
    assert host.library.host_launches() == b"" and host.current() == 0


def boundary_of(channels: int) -> dict:
    return {
        "x": t(4, 5, channels),
        "shift": t(4, 1, channels),
        "scale_": t(4, 1, channels),
        "weight": t(16, channels),
        "embed_weight": t(channels, 16),
        "embed_bias": t(channels),
        "positions": t(5, channels),
        "step_shift": None,
        "step_scale": None,
    }


def test_every_refusal_of_the_sources_is_in_the_table():
    for name, least in (("cuda/flow_step.cpp", 6), ("flow_boundary.h", 6), ("flow_step.h", 1)):
        source = (ROOT / "csrc" / "bindings" / name).read_text("utf-8")
        for argument, text in re.findall(r'refuse\((?:"(\w+)"|name), "([^"]*)"', source):
            assert any(argument in ("", row[2]) and row[3].startswith(text) for row in WRONG), text
        assert source.count("refuse(") >= least


CARELESS = r"""
namespace ecar::cuda { namespace {
void wait() { cudaGridDependencySynchronize(); }
struct alignas(16) Aligned { uint4 x; };
__global__ void fine(char*) { wait(); }
__global__ void stores_between(char* at) { wait(), *reinterpret_cast<uint4*>(at + 8) = uint4{}; }
__global__ void loads_between(char* at) {
  Aligned to;
  wait(), to.x = *reinterpret_cast<uint4*>(at + 4), at[0] = to.x.x;
}
__global__ void loads_four(char* at) {
  wait();
  float4 x = *reinterpret_cast<float4*>(at + 4);
  at[0] = x.x;
}
__global__ void ends_early(char*) { wait(); if (threadIdx.x > 3) __syncthreads(); }
__global__ void half_a_warp(char* at) {
  wait();
  if (threadIdx.x < 16) at[0] = __shfl_xor_sync(~0u, 1, 1);
}
__global__ void writes_behind(char*) { wait(); extern __shared__ float shared[]; shared[8] = 1; }
__global__ void waits_in_part(char*) { if (threadIdx.x > 0) wait(); }
} }
extern "C" HOST_EXPORT int careless(int kind, int blocks, int threads, int bytes, int stream) {
  using namespace ecar::cuda;
  alignas(16) static char memory[32];
  void (*kernels[])(char*) = {fine, stores_between, loads_between, loads_four, ends_early,
                              half_a_warp, writes_behind, waits_in_part};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks), config.blockDim = dim3(threads);
  config.dynamicSmemBytes = bytes;
  config.stream = reinterpret_cast<cudaStream_t>(std::intptr_t{stream});
  char* at = memory;
  return cudaLaunchKernelEx(&config, kernels[kind], at);
}
"""


def test_the_emulation_notices_what_a_gpu_would(tmp_path):
    """An error by its number in driver_types.h; and none where all is well."""
    (tmp_path / "careless.cu").write_text(CARELESS)
    build(
        found("g++", "c++", "clang++"),
        "-shared",
        *FLAGS,
        *KERNEL_FLAGS,
        tmp_path / "careless.cu",
        "-o",
        tmp_path / "careless.so",
    )
    careless = ctypes.CDLL(str(tmp_path / "careless.so")).careless
    usual = (2, 64, 32, STREAM)
    for kind, error in enumerate((0, 716, 716, 716, 719, 719, 700, 719)):
        assert careless(kind, *usual) == error, kind
        assert careless(0, *usual) == 0
    for blocks, threads, shared, stream, error in (
        (0, 64, 32, STREAM, 9),
        (-(2**31), 64, 32, STREAM, 9),
        (2, 1025, 32, STREAM, 9),
        (2, 0, 32, STREAM, 9),
        (2, 1024, 48 << 10, STREAM, 0),
        (2, 64, (48 << 10) + 4, STREAM, 1),
        (2, 64, 32, STREAM + 16, 400),
    ):
        assert careless(0, blocks, threads, shared, stream) == error
