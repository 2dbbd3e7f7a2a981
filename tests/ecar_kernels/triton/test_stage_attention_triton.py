"""Stage attention's Triton kernels: interpreted on the CPU, or compiled where there is a GPU."""

import itertools

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ecar_kernels import _triton
from ecar_kernels.registry import KERNEL_DTYPES
from ecar_kernels.stage_attention import launch, reference, tiles
from tests.support.accuracy import assert_accurate

triton = pytest.importorskip("ecar_kernels.stage_attention.triton")

VAR_STAGES = (1, 4, 9, 16, 25, 36, 64, 100, 169, 256)
# One for each pair of parts: 16, 32, 32 + 16, 64, 64 + 16, 64 + 32, 128, 128 + 16 and so on.
HEAD_DIMS = (8, 24, 40, 64, 72, 96, 112, 136, 160, 192, 256)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def packed(stages, *, queries=None, batch=1, heads=2, head_dim=8, dtype=torch.float32):
    """q, k, v as views of one packed projection; q of the newest `queries` tokens."""
    x = torch.randn(batch, sum(stages), 3, heads, head_dim, device=DEVICE).to(dtype)
    q, k, v = x.unbind(2)
    first = 0 if queries is None else sum(stages) - queries
    return {"q": q[:, first:], "k": k, "v": v, "stage_lengths": stages}


def check(call: dict, *, gradients: bool = True) -> None:
    assert_accurate(triton.stage_attention, reference.stage_attention, call, gradients=gradients)


@pytest.fixture
def small_tiles(monkeypatch):
    """So that a few tokens make whole and partial blocks on both sides."""
    monkeypatch.setattr(launch, "default", lambda *_: launch.Settings(16, 16, 4, 1))


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_class_of_head_dim(head_dim, dtype, small_tiles):
    check(packed((1, 20), head_dim=head_dim, dtype=dtype, heads=1))


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_settings_as_chosen(dtype):
    check(packed((1, 4, 70), queries=74, head_dim=72, dtype=dtype))


@pytest.mark.skipif(DEVICE == "cuda", reason="TF32 is no match for an oracle; interpreted it is")
def test_tf32_takes_the_path_of_matrix_instructions(monkeypatch):
    monkeypatch.setattr(_triton, "product_precision", lambda dtype: "tf32")
    check(packed((4, 9), head_dim=40))


@st.composite
def calls(draw):
    stages = tuple(draw(st.lists(st.integers(1, 24), min_size=1, max_size=4)))
    newest = draw(st.integers(1, len(stages)))
    call = packed(stages, queries=sum(stages[-newest:]), batch=draw(st.integers(0, 2)),
                  heads=draw(st.integers(1, 2)), head_dim=draw(st.sampled_from(HEAD_DIMS[:6])),
                  dtype=draw(st.sampled_from(KERNEL_DTYPES)))
    return call | {"scale": draw(st.sampled_from([None, 0.3, -0.2, 0.0]))}


@settings(max_examples=6)
@given(st.data())
def test_any_stages(data):
    with pytest.MonkeyPatch.context() as patch:
        blocks = data.draw(st.sampled_from([(16, 16), (16, 32), (32, 16)]))
        patch.setattr(launch, "default", lambda *_: launch.Settings(*blocks, 4, 1))
        check(data.draw(calls()))


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


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_nothing_beyond_the_views_is_read(dtype, small_tiles):
    """A preallocated KV cache, and heads out of a wider projection: the rest is nan."""
    stages, head_dim = (4, 18), 40

    def view(tokens):
        whole = torch.full((2, 32, 3, head_dim + 8), float("nan"), dtype=dtype, device=DEVICE)
        part = whole[:, :tokens, :2, :head_dim]
        return part.copy_(torch.randn(part.shape))

    call = {"q": view(18), "k": view(22), "v": view(22), "stage_lengths": stages}
    check(call, gradients=False)
    inputs = [call[name].requires_grad_() for name in "qkv"]
    out = triton.stage_attention(**call)
    grads = torch.autograd.grad(out, inputs, torch.randn_like(out))
    assert all(grad.isfinite().all() for grad in grads)


def test_any_strides(small_tiles):
    """Rows at any address, dimensions in any order, keys shared by heads and by images."""
    odd = torch.randn(2, 24, 2, 8 + 3, device=DEVICE)[..., 2:10]
    check({"q": odd[:, 4:], "k": odd, "v": odd.flip(1), "stage_lengths": (4, 20)})
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
    grad, = torch.autograd.grad(out.square().sum(), [call["v"]])
    wanted, = torch.autograd.grad(reference.stage_attention(**call).square().sum(), [call["v"]])
    torch.testing.assert_close(grad, wanted, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        assert triton.stage_attention(**call).equal(out)


@pytest.mark.parametrize("scale", [0.0, -0.5, 1e-30, 2])
def test_any_scale(scale, small_tiles):
    check(packed((3, 20), heads=1) | {"scale": scale})


# Of rows past a tile's end, which are not stored.
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning",
                            "ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("scale", [0.5, -0.5])
def test_scores_far_from_zero(scale, small_tiles):
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


@pytest.mark.parametrize("permuted", [False, True])
def test_opcheck(permuted):
    q, k, v, stages = packed((4, 20), queries=20).values()
    if permuted:
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    torch.library.opcheck(triton._forward, (q, k, v, list(stages), -0.5))
    out, lse = triton._forward(q, k, v, stages, -0.5)
    grad = torch.randn_like(out)
    torch.library.opcheck(triton._backward, (grad, q, k, v, out, lse, list(stages), -0.5))


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


@given(st.lists(st.integers(1, 20), min_size=1, max_size=5), st.integers(1, 5),
       st.integers(1, 9), st.integers(1, 9))
@example([1], 1, 1, 1)
def test_tiles_cover_the_mask_once(lengths, newest, block_m, block_n):
    stages, newest = tuple(lengths), min(newest, len(lengths))
    queries = sum(stages[-newest:])
    mask = reference.block_causal_mask(stages, queries).int()
    seen = torch.zeros_like(mask)
    rows = tiles.query_tiles(stages, queries, block_m)
    for start, length, end in rows:
        assert 1 <= length <= block_m
        seen[start:start + length, :end] += 1
    assert seen.equal(mask)
    assert all(a[2] >= b[2] for a, b in itertools.pairwise(rows))
    seen = torch.zeros_like(mask)
    rows = tiles.key_tiles(stages, queries, block_n)
    for start, length, first in rows:
        assert 1 <= length <= block_n
        seen[first:, start:start + length] += 1
    assert seen.equal(mask)
    assert all(a[2] <= b[2] for a, b in itertools.pairwise(rows))


def test_a_table_is_made_once():
    device = torch.device(DEVICE)
    table = tiles.table("query", (3, 20), 20, 16, device)
    assert table is tiles.table("query", (3, 20), 20, 16, device)
    assert table.tolist() == [[0, 16, 23], [16, 4, 23]]
    assert table.dtype == torch.int32


def test_settings_hold_the_head_and_fit_the_chip():
    powers = (16, 32, 64, 128, 256)
    for op, head_dim, kind, arch in itertools.product(
            launch.OPS, range(8, 257, 8), launch.KINDS, (80, 86, 89, 90, 100, 103, 120)):
        part1, part2 = launch.parts(head_dim)
        assert part1 in powers and part2 in (0, *powers) and part1 + part2 >= head_dim
        found = launch.settings(op, head_dim, kind, arch)
        own = [its.block_n if op == "stage_attention_keys" else its.block_m for its in found]
        assert own == sorted(set(own))
        for its in (*found, launch.unaligned(op, head_dim, kind, arch)):
            assert its.block_m in powers and its.block_n in powers
            assert its.num_warps in (2, 4, 8) and its.num_stages in (1, 2, 3)
            limit = 1024 * launch.SHARED_KIB.get(arch, 99)
            assert launch._least_shared(op, head_dim, kind, its) <= limit
        assert set(found) <= set(launch.candidates(op, head_dim, kind, arch))
    assert launch.parts(72) == (64, 16) and launch.parts(56) == (64, 0)


@pytest.mark.parametrize("stages, queries, batch_heads, arch, rows", [
    ((1024, 4096), 4096, 1, 80, 64),
    ((1,) * 20, 20, 1000, 80, 32),  # a tile of 64 rows would do twice as much
    ((1,) * 20, 20, 1000, 90, 64),  # but at twice the rate
    ((256,), 256, 12, 80, 32),  # 48 programs of 64 rows, fewer than half of the chip's 108
    ((256,), 256, 12, 90, 64),  # but a warp group has 64
    ((256,), 256, 12, 100, 64),
    ((256,), 256, 12, 120, 32),
    ((256,), 256, 64, 120, 64),
    ((256,), 256, 512, 80, 128),  # 1024 programs of 128 rows
    ((256,), 256, 64, 80, 64),  # 128 of them, not two for each multiprocessor
    ((64, 64), 128, 2000, 80, 64),  # 128 rows would be half empty
])
def test_the_tile_follows_the_stages_and_the_chip(stages, queries, batch_heads, arch, rows):
    its = launch.default("stage_attention", 64, "bfloat16", stages, queries, batch_heads, arch, 108)
    assert its.block_m == rows


@pytest.mark.parametrize("odd", ["row", "head", "gradient"])
def test_rows_at_odd_addresses_have_settings_of_their_own(odd, monkeypatch):
    asked = []
    monkeypatch.setattr(launch, "default", lambda op, *_: (
        asked.append(("default", op)), launch.Settings(16, 16, 4, 1))[1])
    monkeypatch.setattr(launch, "unaligned", lambda op, *_: (
        asked.append(("unaligned", op)), launch.Settings(16, 16, 4, 1))[1])
    width = {"row": 17, "head": 12}.get(odd, 8)
    stride = (24 * 2 * width + (odd == "row"), 2 * width + (odd == "row"), width, 1)
    call = {name: torch.randn(2 * 25 * 40, device=DEVICE).as_strided((2, 24, 2, 8), stride)
            .requires_grad_() for name in "qkv"}
    out = triton.stage_attention(**call, stage_lengths=(4, 20))
    grad = torch.randn(2, 24, 2, 9, device=DEVICE)[..., :8]
    torch.autograd.grad(out, list(call.values()),
                        grad if odd == "gradient" else torch.randn_like(out).contiguous())
    first = "default" if odd == "gradient" else "unaligned"
    assert asked == [(first, "stage_attention"), ("unaligned", "stage_attention_keys"),
                     ("unaligned", "stage_attention_queries")]


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
    check(packed(stages, queries=queries, batch=batch, heads=heads, head_dim=head_dim,
                 dtype=dtype))


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
        monkeypatch.setattr(launch, "default", lambda asked, *rest, its=its: (
            its if asked == op else usual(asked, *rest)))
        check(packed((16, 64, 100), batch=2, head_dim=64, dtype=torch.bfloat16))


@pytest.mark.gpu
@pytest.mark.parametrize("warm", [True, False])
def test_a_captured_graph_replays(warm, monkeypatch):
    """On other inputs too; also where the tables are first made under capture."""
    call = packed((16, 64, 256), batch=2, head_dim=64, dtype=torch.bfloat16)
    inputs = [call[name] for name in "qkv"]

    def results():
        leaves = [x.detach().requires_grad_() for x in inputs]
        out = triton.stage_attention(*leaves, (16, 64, 256))
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
