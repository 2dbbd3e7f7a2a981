"""Stage attention in Triton where rows do not begin at multiples of 16 bytes."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ecar_kernels.registry import KERNEL_DTYPES
from ecar_kernels.stage_attention import launch
from tests.support import stage_attention
from tests.support.backends import DEVICES
from tests.support.ops import opcheck

triton = pytest.importorskip("ecar_kernels.stage_attention.triton")

DEVICE = DEVICES["triton"]


def call_of(*shape, **kinds):
    return stage_attention.call_of(*shape, **kinds, backend="triton")


def check(call, *, gradients=True):
    stage_attention.check("triton", call, gradients=gradients)


def odd(call: dict, padding: int = 3) -> dict:
    """The same call out of tensors whose rows are `padding` columns longer, from the second on."""
    views = {}
    for name in "qkv":
        x = call[name]
        wider = torch.full(
            (*x.shape[:-1], x.shape[-1] + padding), float("nan"), dtype=x.dtype, device=x.device
        )
        views[name] = wider[..., 1 : 1 + x.shape[-1]].copy_(x)
    return call | views


@pytest.fixture
def asked(monkeypatch):
    """The ops that asked for settings, and for which rows; a few tokens are several blocks."""
    found = []

    def aligned(op, *_):
        found.append(("aligned", op))
        return launch.Settings(16, 16, 4, 1)

    def unaligned(op, *_):
        found.append(("unaligned", op))
        return launch.StripSettings(16, 16, 16, 4, 1, columns=16)

    monkeypatch.setattr(launch, "default", aligned)
    monkeypatch.setattr(launch, "unaligned", unaligned)
    return found


@pytest.mark.parametrize("which", ["row", "head", "address", "gradient", "none"])
def test_which_rows_are_not_aligned(which, asked):
    width = {"row": 17, "head": 12}.get(which, 8)
    stride = (24 * 2 * width + (which == "row"), 2 * width + (which == "row"), width, 1)
    call = {
        name: torch.randn(2 * 25 * 40, device=DEVICE)
        .as_strided((2, 24, 2, 8), stride, 1 if which == "address" else 0)
        .requires_grad_()
        for name in "qkv"
    }
    out = triton.stage_attention(**call, stage_lengths=(4, 20))
    grad = torch.randn(2, 24, 2, 9, device=DEVICE)[..., :8]
    if which != "gradient":
        grad = grad.contiguous()
    torch.autograd.grad(out, list(call.values()), grad)
    forward = "aligned" if which in ("gradient", "none") else "unaligned"
    backward = "aligned" if which == "none" else "unaligned"
    assert asked == [
        (forward, "stage_attention"),
        (backward, "stage_attention_keys"),
        (backward, "stage_attention_queries"),
    ]


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [8, 40, 72, 256])
def test_heads_of_any_width(head_dim, dtype, asked):
    check(odd(call_of((1, 20), head_dim=head_dim, dtype=dtype, heads=1)))
    assert set(asked) == {("unaligned", op) for op in launch.OPS}


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_settings_as_chosen(dtype):
    check(odd(call_of((1, 4, 70), 74, head_dim=72, dtype=dtype)))


@pytest.mark.usefixtures("products_sum_in_order")
@settings(max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    stages=st.lists(st.integers(1, 24), min_size=1, max_size=4),
    newest=st.integers(1, 4),
    batch=st.integers(0, 2),
    heads=st.integers(1, 2),
    head_dim=st.sampled_from([8, 24, 40]),
    scale=st.sampled_from([None, 1.2, 3.0, -0.6, 0.0]),
    dtype=st.sampled_from(KERNEL_DTYPES),
)
def test_any_stages(asked, stages, newest, batch, heads, head_dim, scale, dtype):
    call = call_of(
        tuple(stages),
        sum(stages[-newest:]),
        batch=batch,
        heads=heads,
        head_dim=head_dim,
        dtype=dtype,
    )
    # Of a few numbers a root mean square judges chance, and one key's gradients are rounding.
    judged = sum(stages) > 1 and not 0 < call["q"].numel() < 256
    check(odd(call) | {"scale": scale and scale * head_dim**-0.5}, gradients=judged)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_rows_in_any_order(dtype, asked):
    call = odd(call_of((4, 20), 20, batch=2, dtype=dtype), padding=11)
    check(call | {"v": call["v"].flip(1)})
    rows = torch.randn(24, 9, device=DEVICE).to(dtype)[None, :, None, :8].expand(2, -1, 2, -1)
    check(call | {"k": rows, "v": rows})


@pytest.mark.parametrize("padding", [8, 3])
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_nothing_beyond_the_views_is_read(dtype, padding, asked):
    """A preallocated KV cache, and heads out of a wider projection: the rest is nan."""
    stages, head_dim = (4, 18), 40

    def view(tokens):
        whole = torch.full((2, 32, 3, head_dim + padding), float("nan"), dtype=dtype, device=DEVICE)
        part = whole[:, :tokens, :2, :head_dim]
        return part.copy_(torch.randn(part.shape))

    call = {"q": view(18), "k": view(22), "v": view(22), "stage_lengths": stages}
    check(call, gradients=False)
    inputs = [call[name].requires_grad_() for name in "qkv"]
    out = triton.stage_attention(**call)
    grads = torch.autograd.grad(out, inputs, torch.randn_like(out))
    assert all(grad.isfinite().all() for grad in grads)
    assert asked[0][0] == ("aligned" if padding == 8 else "unaligned")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype):
    q, k, v, stages = odd(call_of((4, 20), 20, dtype=dtype)).values()
    for op in (triton._forward, triton._training):
        opcheck(op, (q, k, v, list(stages), 0.5))
    kept = triton._training(q, k, v, stages, 0.5)
    assert kept[0].equal(triton._forward(q, k, v, stages, 0.5))
    grad = torch.randn_like(q)
    opcheck(triton._backward, (grad, q, k, v, *kept, list(stages), 0.5))


def test_the_aligned_kernels_agree(asked):
    call = call_of((4, 20), 20, head_dim=40)
    runs = []
    for which in (call, odd(call)):
        inputs = [which[name].detach().requires_grad_() for name in "qkv"]
        out = triton.stage_attention(*inputs, call["stage_lengths"])
        runs.append((out, *torch.autograd.grad(out, inputs, torch.ones_like(out))))
    assert [rows for rows, _ in asked] == ["aligned"] * 3 + ["unaligned"] * 3
    for one, other in zip(*runs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", range(8, 257, 8))
def test_every_head_dim(head_dim, dtype):
    check(odd(call_of((16, 64, 100), batch=2, head_dim=head_dim, dtype=dtype)))
