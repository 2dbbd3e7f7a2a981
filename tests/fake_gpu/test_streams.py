"""What the fused GEMMs share with kernels that run before them, after them and at the same time."""

import pytest
import torch

import ecar_kernels
from ecar_kernels import _triton
from tools.compile_case import touches_memory_early
from tools.fake_gpu import FakeGPU, chip_of


def test_counters_are_a_streams_and_a_graphs(gpus):
    """What may run at the same time shares none; what runs in turn has them zeroed once."""
    device, stream = torch.device("cuda", 0), torch.cuda.Stream()
    usual = _triton.counters(device, 5)
    with torch.cuda.stream(stream):
        found = [usual, _triton.counters(device, 5)]
        for _ in range(2):
            with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream):
                found.append(_triton.counters(device, 5))
                assert _triton.counters(device, 7) is found[-1]
        assert _triton.counters(device, 5) is found[1]
    with torch.cuda.device(1):
        found.append(_triton.counters(torch.device("cuda", 1), 5))
    assert len({id(zeros) for zeros in found}) == len(found) == 5
    assert [launch.captured for launch in gpus.launches] == [False, False, True, True, False]
    assert _triton.counters(device, 5) is usual
    assert len(_triton.counters(device, 5000)) == 5000


@pytest.mark.parametrize(
    ("architecture", "asked", "expected"),
    [(90, None, True), (120, None, True), (80, None, False), (90, "0", False)],
)
def test_products_begin_before_the_kernel_before_has_ended(
    monkeypatch, architecture, asked, expected
):
    """Where the chip can, and nobody switched it off."""
    if asked is not None:
        monkeypatch.setenv(_triton.DEPENDENT_VARIABLE, asked)
    with FakeGPU(chip_of(architecture), compile_kernels=False) as gpu, torch.no_grad():
        for rows in (16, 4096):
            x = torch.empty(1, rows, 128, dtype=torch.bfloat16, device="cuda")
            weight = x.new_empty(128, 128)
            ecar_kernels.adaln_linear(x, x, x, weight, None)
            ecar_kernels.linear_gated_residual(x, weight, None, x, x)
    assert [(launch.name, launch.dependent) for launch in gpu.launches] == [
        ("adaln_linear", expected),
        ("linear_gated_residual", expected),
        ("normalise_rows", expected),
        ("adaln_linear", expected),
        ("linear_gated_residual", expected),
    ]


def test_an_access_before_the_wait_is_seen():
    """By the compile gate, in what the compiler makes of such a kernel."""
    waits, prefetch = "griddepcontrol.wait;", "prefetch.global.L2 [%rd1];"
    for access in (
        "@%p3 ld.global.v4.b32 { %r1 }, [ %rd4 + 0 ];",
        "cp.async.cg.shared.global [ %r1 + 0 ], [ %rd4 + 0 ], 0x10;",
        "st.global.b32 [ %rd4 + 0 ], { %r1 };",
        "atom.global.gpu.acq_rel.add.u32 %r1, [ %rd4 + 0 ], %r2;",
    ):
        assert touches_memory_early(f"{prefetch} {access} {waits}")
        assert not touches_memory_early(f"{prefetch} {waits} {access}")
        assert not touches_memory_early(access)  # it depends on nothing
