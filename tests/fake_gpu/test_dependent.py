"""Kernels that begin while the kernel before them still runs, and wait for it themselves."""

import pytest
import torch
from triton.language.extra import cuda

import ecar_kernels
from ecar_kernels import _triton
from tools.compile_case import touches_memory_early
from tools.fake_gpu import FakeGPU, chip_of


def launches(architecture):
    with FakeGPU(chip_of(architecture), compile_kernels=False) as gpu, torch.no_grad():
        for rows in (16, 4096):
            x = torch.empty(1, rows, 128, dtype=torch.bfloat16, device="cuda")
            weight = x.new_empty(128, 128)
            ecar_kernels.adaln_linear(x, x, x, weight, None)
            heads = x.unflatten(2, (2, 64))
            ecar_kernels.stage_attention(heads, heads, heads, (rows,))
            ecar_kernels.linear_gated_residual(x, weight, None, x, x)
        odd = x.new_empty(1, 16, 129)[..., 1:].unflatten(2, (2, 64))
        ecar_kernels.stage_attention(odd, odd, odd, (16,))
        waits = _triton.dependent_launch()["DEPENDENT"]
    launched = [launch for launch in gpu.launches if launch.kind == "triton"]
    assert [launch.name for launch in launched] == [
        "adaln_linear",
        "forward_kernel",
        "linear_gated_residual",
        "normalise_and_multiply",
        "forward_kernel",
        "linear_gated_residual",
        "unaligned_forward_kernel",
    ]
    (dependent,) = {launch.dependent for launch in launched}
    return waits, dependent


@pytest.mark.parametrize(("architecture", "able"), [(80, False), (90, True), (120, True)])
def test_a_steps_kernels_begin_early_where_the_chip_can(architecture, able):
    assert launches(architecture) == (able, able)


def test_it_can_be_switched_off(monkeypatch):
    """The kernels are the same."""
    monkeypatch.setenv(_triton.DEPENDENT_VARIABLE, "0")
    assert launches(90) == (True, False)


def test_an_older_triton_cannot(monkeypatch):
    monkeypatch.delattr(cuda, "gdc_wait")
    assert launches(90) == (False, False)


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
