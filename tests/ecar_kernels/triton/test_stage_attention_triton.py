"""Stage attention's Triton kernels: interpreted on the CPU, or compiled where there is a GPU."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ecar_kernels import _triton
from ecar_kernels.registry import KERNEL_DTYPES
from ecar_kernels.stage_attention import launch, reference, tiles
from tests.support.ops import opcheck
from tests.support.triton_attention import DEVICE, check, packed

triton = pytest.importorskip("ecar_kernels.stage_attention.triton")

VAR_STAGES = (1, 4, 9, 16, 25, 36, 64, 100, 169, 256)
# One for each pair of parts: 16, 32, 32 + 16, 64, 64 + 16, 64 + 32, 128, 128 + 16 and so on.
HEAD_DIMS = (8, 24, 40, 64, 72, 96, 112, 136, 160, 192, 256)


@pytest.fixture
def small_tiles(monkeypatch):
    """So that a few tokens make whole and partial blocks on both sides."""
    monkeypatch.setattr(launch, "default", lambda *_: launch.Settings(16, 16, 4, 1))


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_class_of_head_dim(head_dim, dtype, small_tiles):
    check(packed((1, 20), head_dim=head_dim, dtype=dtype, heads=1))


@pytest.mark.parametrize("strip", [64, 128])
@pytest.mark.parametrize("head_dim", [200, 256])
def test_wide_exact_factors_go_in_strips(head_dim, strip, small_tiles, monkeypatch):
    """The gradients of keys; also where the last strip is not full."""
    usual = launch.reload
    monkeypatch.setattr(
        launch,
        "reload",
        lambda op, *rest: strip if op == "stage_attention_keys" else usual(op, *rest),
    )
    check(packed((1, 20), head_dim=head_dim, heads=1) | {"scale": -0.1})


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_settings_as_chosen(dtype):
    check(packed((1, 4, 70), queries=74, head_dim=72, dtype=dtype))


@pytest.mark.skipif(DEVICE == "cuda", reason="TF32 is no match for an oracle; interpreted it is")
def test_tf32_takes_the_path_of_matrix_instructions(monkeypatch):
    monkeypatch.setattr(_triton, "product_precision", lambda dtype: "tf32")
    check(packed((4, 9), head_dim=40))


@pytest.fixture
def products():
    """Torch's own setting of the products' precision, put back afterwards."""
    usual = torch.backends.cuda.matmul.fp32_precision
    yield torch.backends.cuda.matmul
    torch.backends.cuda.matmul.fp32_precision = usual


def test_tf32_only_where_torch_allows_it(products, monkeypatch):
    kinds = []
    monkeypatch.setattr(
        launch,
        "default",
        lambda op, head_dim, kind, *_: (kinds.append(kind), launch.Settings(16, 16, 4, 1))[1],
    )
    for setting in ("ieee", "tf32"):
        products.fp32_precision = setting
        for dtype in (torch.float32, torch.bfloat16):
            triton.stage_attention(**packed((1, 4), dtype=dtype))
    assert kinds == ["exact", "bfloat16", "tf32", "bfloat16"]


@st.composite
def calls(draw):
    stages = tuple(draw(st.lists(st.integers(1, 24), min_size=1, max_size=4)))
    newest = draw(st.integers(1, len(stages)))
    call = packed(
        stages,
        queries=sum(stages[-newest:]),
        batch=draw(st.integers(0, 2)),
        heads=draw(st.integers(1, 2)),
        head_dim=draw(st.sampled_from(HEAD_DIMS[:6])),
        dtype=draw(st.sampled_from(KERNEL_DTYPES)),
    )
    # About the usual one; 3 times it gives nearly all the weight to one key.
    scale = draw(st.sampled_from([None, 1.2, 3.0, -0.6, 0.0]))
    return call | {"scale": scale and scale * call["q"].shape[-1] ** -0.5}


@pytest.mark.usefixtures("products_sum_in_order")
@settings(max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_stages(data):
    with pytest.MonkeyPatch.context() as patch:
        blocks = data.draw(st.sampled_from([(16, 16), (16, 32), (32, 16)]))
        patch.setattr(launch, "default", lambda *_: launch.Settings(*blocks, 4, 1))
        call = data.draw(calls())
        # The rule is about a root mean square: of a few numbers it judges chance. Of one key the
        # reference has exactly 0, which a product in another order need not leave.
        judged = call["k"].shape[1] > 1 and not 0 < call["q"].numel() < 256
        check(call, gradients=judged)


@pytest.mark.parametrize("queries", [680, 425, 256, 1])
def test_var_s_ten_stages(queries):
    stages = VAR_STAGES if queries > 1 else (*VAR_STAGES[::-1][:4], 1)
    check(packed(stages, queries=queries, heads=1, head_dim=64), gradients=False)


def test_var_s_gradients(small_tiles):
    check(packed(VAR_STAGES[:7], heads=1))


def test_suffix_gradients_reach_the_cached_stages(small_tiles):
    call = packed((4, 20, 17), queries=17)
    check(call)
    leaves = {name: call[name].detach().requires_grad_() for name in "qkv"}
    triton.stage_attention(**call | leaves).sum().backward()
    assert (leaves["v"].grad[:, :24] != 0).all()


def test_one_token_stages(small_tiles):
    check(packed((1,) * 5, batch=2))
    check(packed((1, 3, 1), queries=1))


def test_any_order_of_dimensions(small_tiles):
    """And keys shared by heads and by images."""
    q = torch.randn(24, 3, 2, 8, device=DEVICE).permute(2, 0, 1, 3)
    shared = torch.randn(24, 8, device=DEVICE)[None, :, None].expand(2, -1, 3, -1)
    assert shared.stride()[::2] == (0, 0)
    check({"q": q, "k": shared, "v": shared, "stage_lengths": (4, 20)})


@pytest.mark.parametrize("layout", ["sum", "transposed", "last dimension strided"])
def test_any_gradient_layout(layout, small_tiles):
    call = packed((3, 20), head_dim=16)
    inputs = [call[name].requires_grad_() for name in "qkv"]
    out = triton.stage_attention(**call)
    if layout == "sum":
        grad = torch.ones(1, device=DEVICE).expand(out.shape)
    elif layout == "transposed":
        grad = torch.randn_like(out.transpose(1, 2).contiguous()).transpose(1, 2)
    else:
        grad = torch.randn_like(out.transpose(1, 3).contiguous()).transpose(1, 3)
    ours = torch.autograd.grad(out, inputs, grad)
    usual = torch.autograd.grad(reference.stage_attention(**call), inputs, grad)
    for mine, theirs in zip(ours, usual, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_gradients_of_some_arguments(small_tiles):
    call = packed((3, 20))
    call["v"].requires_grad_()
    out = triton.stage_attention(**call)
    (grad,) = torch.autograd.grad(out.square().sum(), [call["v"]])
    (wanted,) = torch.autograd.grad(reference.stage_attention(**call).square().sum(), [call["v"]])
    torch.testing.assert_close(grad, wanted, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        assert triton.stage_attention(**call).equal(out)


@pytest.mark.parametrize("scale", [0.0, -0.5, 1e-30, 2])
def test_any_scale(scale, small_tiles):
    check(packed((3, 20), heads=1) | {"scale": scale})


# Of rows past a tile's end, which are not stored.
@pytest.mark.filterwarnings(
    "ignore:overflow encountered:RuntimeWarning", "ignore:invalid value encountered:RuntimeWarning"
)
@pytest.mark.parametrize("scale", [0.5, -0.5])
def test_scores_far_from_zero(scale, small_tiles, fma_rounds_once):
    """Where neither 2^score nor 2^-logsumexp is a float. Whole numbers, so that the sum's order
    is of no account."""
    call = packed((3, 20), heads=1)
    call |= {name: (call[name].abs() * 20).round() for name in "qk"} | {"scale": scale}
    check(call, gradients=False)
    inputs = [call[name].requires_grad_() for name in "qkv"]
    out = triton.stage_attention(**call)
    grads = torch.autograd.grad(out, inputs, torch.randn_like(out))
    assert all(grad.isfinite().all() for grad in grads)


def test_same_bits_twice(small_tiles):
    call = packed((5, 20), head_dim=72, dtype=torch.bfloat16)
    inputs = [call[name].requires_grad_() for name in "qkv"]
    runs = []
    for _ in range(2):
        out = triton.stage_attention(**call)
        runs.append((out, *torch.autograd.grad(out, inputs, torch.ones_like(out))))
    for first, second in zip(*runs, strict=True):
        assert first.equal(second)


def test_an_empty_batch():
    check(packed((4, 9), batch=0))


def test_outputs_are_contiguous(small_tiles):
    call = packed((4, 9), queries=9)
    inputs = [call[name].requires_grad_() for name in "qkv"]
    out = triton.stage_attention(**call)
    for x in (out, *torch.autograd.grad(out.sum(), inputs)):
        assert x.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("permuted", [False, True])
def test_opcheck(permuted, dtype):
    q, k, v, stages = packed((4, 20), queries=20, dtype=dtype).values()
    if permuted:
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    for op in (triton._forward, triton._training):
        opcheck(op, (q, k, v, list(stages), -0.5))
    kept = triton._training(q, k, v, stages, -0.5)
    assert kept[0].equal(triton._forward(q, k, v, stages, -0.5))
    grad = torch.randn_like(kept[0])
    opcheck(triton._backward, (grad, q, k, v, *kept, list(stages), -0.5))


def test_fullgraph_equals_eager(small_tiles):
    torch._dynamo.reset()
    compiled = torch.compile(triton.stage_attention, fullgraph=True, backend="aot_eager")
    call = packed((4, 20), queries=20)
    with torch.no_grad():
        assert compiled(**call).equal(triton.stage_attention(**call))
    inputs = [call[name].requires_grad_() for name in "qkv"]
    runs = []
    for function in (compiled, triton.stage_attention):
        out = function(**call, scale=0.3)
        runs.append((out, *torch.autograd.grad(out.square().sum(), inputs)))
    for mine, theirs in zip(*runs, strict=True):
        assert mine.equal(theirs)


# Of E-CAR's models, VAR-d16, and 1024 pixels.
REAL_SIZES = [
    ((16, 64, 256), None, 8, 12, 64),
    ((16, 64, 256), 256, 2, 16, 72),
    (VAR_STAGES, None, 2, 16, 64),
    (VAR_STAGES, 256, 2, 16, 64),
    ((64, 256, 1024, 4096), None, 1, 2, 64),
    ((64, 256, 1024, 4096), 4096, 1, 2, 72),
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("stages, queries, batch, heads, head_dim", REAL_SIZES)
def test_real_sizes(stages, queries, batch, heads, head_dim, dtype):
    check(packed(stages, queries=queries, batch=batch, heads=heads, head_dim=head_dim, dtype=dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", range(8, 257, 8))
def test_every_head_dim(head_dim, dtype):
    check(packed((16, 64, 100), batch=2, head_dim=head_dim, dtype=dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("op", launch.OPS)
def test_every_candidate(op, monkeypatch):
    usual = launch.default
    arch = _triton.architecture()
    for its in launch.candidates(op, 64, "bfloat16", arch):
        monkeypatch.setattr(
            launch,
            "default",
            lambda asked, *rest, its=its: its if asked == op else usual(asked, *rest),
        )
        check(packed((16, 64, 100), batch=2, head_dim=64, dtype=torch.bfloat16))


@pytest.mark.gpu
@pytest.mark.parametrize("warm", [True, False])
def test_a_captured_graph_replays(warm, monkeypatch):
    """On other inputs too; also where the tables are first made under capture."""
    stages = (4, 12, 64, 256)
    call = packed(stages, batch=2, head_dim=64, dtype=torch.bfloat16)
    inputs = [call[name] for name in "qkv"]

    def results():
        leaves = [x.detach().requires_grad_() for x in inputs]
        out = triton.stage_attention(*leaves, stages)
        return out.detach(), *torch.autograd.grad(out, leaves, inputs[::-1][:1])

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        results()
    torch.cuda.current_stream().wait_stream(stream)
    if not warm:
        monkeypatch.setattr(tiles, "_tables", {})
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = results()
    for _ in range(2):
        for x in inputs:
            x.copy_(torch.randn_like(x))
        graph.replay()
        torch.cuda.synchronize()
        assert all(a.equal(b) for a, b in zip(captured, results(), strict=True))


@pytest.mark.gpu
def test_a_device_that_is_not_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    call = packed((4, 9), head_dim=64)
    there = {name: call[name].to("cuda:1") for name in "qkv"} | {"stage_lengths": (4, 9)}
    assert torch.cuda.current_device() == 0
    check(there)
    assert triton.stage_attention(**there).device == torch.device("cuda:1")
