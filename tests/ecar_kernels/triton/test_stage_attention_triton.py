"""What is particular to stage attention's Triton kernels: tiles, launch settings, products, graphs.

Interpreted on the CPU, or compiled where there is a GPU. That their results are accurate is tested
with those of the other backends, and rows at odd addresses in test_stage_attention_unaligned.py.
"""

import itertools

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from ecar_kernels import _triton
from ecar_kernels.registry import KERNEL_DTYPES
from ecar_kernels.stage_attention import launch, reference, tiles
from tests.support import stage_attention
from tests.support.accuracy import assert_accurate
from tests.support.backends import DEVICES
from tests.support.stage_attention import HEAD_DIMS, VAR_STAGES

triton = pytest.importorskip("ecar_kernels.stage_attention.triton")

DEVICE = DEVICES["triton"]


def call_of(*shape, **kinds):
    return stage_attention.call_of(*shape, **kinds, backend="triton")


def check(call, *, gradients=True):
    stage_attention.check("triton", call, gradients=gradients)


@given(
    st.lists(st.integers(1, 20), min_size=1, max_size=5),
    st.integers(1, 5),
    st.integers(1, 9),
    st.integers(1, 9),
)
@example([1], 1, 1, 1)
def test_tiles_cover_the_mask_once(lengths, newest, block_m, block_n):
    stages, newest = tuple(lengths), min(newest, len(lengths))
    queries = sum(stages[-newest:])
    mask = reference.block_causal_mask(stages, queries).int()
    seen = torch.zeros_like(mask)
    rows = tiles.query_tiles(stages, queries, block_m)
    for start, length, end in rows:
        assert 1 <= length <= block_m
        seen[start : start + length, :end] += 1
    assert seen.equal(mask)
    assert all(a[2] >= b[2] for a, b in itertools.pairwise(rows))
    few = tiles.query_tiles_of_few_keys(stages, queries, block_m)
    assert few == [row for row in rows if row[2] < 16]
    assert tiles.any_of_few_keys(stages, queries) == bool(few)
    seen = torch.zeros_like(mask)
    rows = tiles.key_tiles(stages, queries, block_n)
    for start, length, first in rows:
        assert 1 <= length <= block_n
        seen[first:, start : start + length] += 1
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
        launch.OPS, range(8, 257, 8), launch.KINDS, (80, 86, 89, 90, 100, 103, 120)
    ):
        part1, part2 = launch.parts(head_dim)
        assert part1 in powers and part2 in (0, *powers) and part1 + part2 >= head_dim
        found = launch.settings(op, head_dim, kind, arch)
        own = [its.block_n if op == "stage_attention_keys" else its.block_m for its in found]
        assert own == sorted(set(own))
        for its in found:
            assert its.block_m in powers and its.block_n in powers
            assert its.num_warps in (1, 2, 4, 8) and its.num_stages in (1, 2, 3)
            limit = 1024 * launch.SHARED_KIB.get(arch, 99)
            assert launch._least_shared(op, head_dim, kind, its) <= limit
        strips = launch.unaligned(op, kind)
        assert {strips.block_m, strips.block_n, strips.strip, strips.columns} <= set(powers)
        correction = launch.correction(kind)
        assert kind in ("tf32", "exact") or correction.block_n >= tiles.FEW_KEYS
        strip = launch.reload(op, head_dim, kind)
        assert (strip > 0) == (kind == "exact")
        whole = launch.parts(head_dim, op, kind)
        assert strip in (0, whole[0]) or (strip in powers and whole == (256, 0))
        assert set(found) <= set(launch.candidates(op, head_dim, kind, arch))
    assert launch.parts(72) == (64, 16) and launch.parts(56) == (64, 0)


@pytest.mark.parametrize(
    "stages, queries, batch_heads, arch, rows",
    [
        ((1024, 4096), 4096, 1, 80, 64),
        ((1,) * 20, 20, 1000, 80, 16),  # of one row each, the least
        ((30,) * 20, 600, 1000, 80, 32),  # a tile of 64 rows would do twice as much
        ((30,) * 20, 600, 1000, 90, 64),  # but at twice the rate
        ((16,), 16, 6, 90, 16),  # four times as much is too much
        ((16,), 16, 6, 100, 16),
        ((1, 4, 9, 16), 16, 16, 120, 16),
        ((16, 64), 64, 6, 90, 64),
        ((256,), 256, 12, 80, 32),  # 48 programs of 64 rows, fewer than half of the chip's 108
        ((256,), 256, 12, 90, 64),  # but a warp group has 64
        ((256,), 256, 12, 100, 64),
        ((256,), 256, 12, 120, 32),
        ((256,), 256, 64, 120, 64),
        ((256,), 256, 512, 80, 128),  # 1024 programs of 128 rows
        ((256,), 256, 64, 80, 64),  # 128 of them: 2 for some, where none has 4 of 64 rows
        ((64, 256, 1024, 4096), 4096, 6, 80, 128),  # E-CAR-S at 1024 pixels: 2 for some, or 4
        ((64, 64), 128, 2000, 80, 64),  # 128 rows would be half empty
    ],
)
def test_the_tile_follows_the_stages_and_the_chip(stages, queries, batch_heads, arch, rows):
    its = launch.default("stage_attention", 64, "bfloat16", stages, queries, batch_heads, arch, 108)
    assert its.block_m == rows


@pytest.mark.parametrize("sms, images, rows", [(108, 1, 128), (132, 1, 64), (132, 2, 128)])
@pytest.mark.parametrize("queries", [4096, 5440])
def test_no_multiprocessor_waits_long_for_a_larger_tile(queries, sms, images, rows):
    """E-CAR-S at 1024 pixels."""
    sizes = (64, 256, 1024, 4096), queries, 6 * images
    its = launch.default("stage_attention", 64, "bfloat16", *sizes, 90, sms)
    assert its.block_m == rows


@pytest.mark.parametrize("arch", [80, 90, 100, 120])
@pytest.mark.parametrize("precision", ["tf32", "ieee"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_last_block_is_pipelined_but_on_sm_90(monkeypatch, arch, precision, dtype):
    """There wgmma would be serialised; exact products have none, and 64 rows of D = 64 do."""
    started = []
    monkeypatch.setattr(triton, "_start", lambda kernel, *_, **constants: started.append(constants))
    monkeypatch.setattr(_triton, "architecture", lambda index=None: arch)
    monkeypatch.setattr(_triton, "product_precision", lambda dtype: precision)
    q, k, v = torch.randn(3, 1, 64, 2, 64, dtype=dtype)
    out, lse = triton._results(q)
    triton._launch_forward(q, k, v, out, out, lse, [64], 1.0, leave_rest=False)
    read = (q, k, v, out, lse, lse)
    for op in ("stage_attention_queries", "stage_attention_keys"):
        triton._launch(
            op, q, k, [64], strided=read[:4], tensors=read, counts=(64,), scales=(1.0, 1.0)
        )
    forward, queries, keys = (constants.get("PIPELINE_TAIL") for constants in started)
    wgmma = arch == 90 and (dtype is torch.bfloat16 or precision == "tf32")
    assert forward == queries == (not wgmma)
    assert keys is None


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
    check(call_of((1, 20), head_dim=head_dim, heads=1) | {"scale": -0.1})


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_settings_as_chosen(dtype):
    check(call_of((1, 4, 70), 74, head_dim=72, dtype=dtype))


@pytest.mark.skipif(DEVICE == "cuda", reason="TF32 is no match for an oracle; interpreted it is")
def test_tf32_takes_the_path_of_matrix_instructions(monkeypatch):
    monkeypatch.setattr(_triton, "product_precision", lambda dtype: "tf32")
    check(call_of((4, 9), head_dim=40))


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
            triton.stage_attention(**call_of((1, 4), dtype=dtype))
    assert kinds == ["exact", "bfloat16", "tf32", "bfloat16"]


@st.composite
def calls(draw):
    stages = tuple(draw(st.lists(st.integers(1, 24), min_size=1, max_size=4)))
    newest = draw(st.integers(1, len(stages)))
    call = call_of(
        stages,
        queries=sum(stages[-newest:]),
        batch=draw(st.integers(0, 2)),
        heads=draw(st.integers(1, 2)),
        head_dim=draw(st.sampled_from(HEAD_DIMS["triton"][:6])),
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


# Interpreted, kernels compute in numpy, which warns of rows past a tile's end.
@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
@pytest.mark.parametrize("scale", [0.5, -0.5])
def test_scores_far_from_zero(scale, small_tiles, fma_rounds_once):
    """Where neither 2^score nor 2^-logsumexp is a float. Whole numbers, so that the sum's order
    is of no account."""
    call = call_of((3, 20), heads=1)
    call |= {name: (call[name].abs() * 20).round() for name in "qk"} | {"scale": scale}
    check(call, gradients=False)
    inputs = [call[name].requires_grad_() for name in "qkv"]
    out = triton.stage_attention(**call)
    grads = torch.autograd.grad(out, inputs, torch.randn_like(out))
    assert all(grad.isfinite().all() for grad in grads)


def test_weights_that_sum_to_nearly_one(products_sum_in_order):
    """As where a score is rounded once on its way into the logsumexp, and not in a weight."""

    def ours(q, k, v, grad):
        out, lse, rest = triton._training(q, k, v, (1, 1), 0.3)
        lse = lse + torch.empty_like(lse).uniform_(-5e-7, 5e-7)
        return triton._backward(grad, q, k, v, out, lse, rest, (1, 1), 0.3)[:2]

    def exact(q, k, v, grad):
        q, k = (x.detach().requires_grad_() for x in (q, k))
        out = reference.stage_attention(q, k, v, (1, 1), scale=0.3)
        return torch.autograd.grad(out, (q, k), grad)

    for _ in range(10):
        call = call_of((1, 1), batch=4, head_dim=96)
        del call["stage_lengths"]
        assert_accurate(ours, exact, call | {"grad": torch.randn_like(call["q"])})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_what_rounding_took_from_the_output_is_kept(dtype, products_sum_in_order):
    q, k, v, stages = call_of((4, 20), head_dim=72, dtype=dtype).values()
    out, _, rest = triton._training(q, k, v, stages, 0.0)  # equal weights, which are not rounded
    exact = reference.stage_attention(q.double(), k.double(), v.double(), stages, scale=0.0)
    assert out.dtype == rest.dtype == dtype
    left = (out.double() + rest.double() - exact).abs().max()
    assert left <= (torch.finfo(dtype).eps ** 2 + 1e-6) * exact.abs().max()


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
    check(call_of(stages, queries, batch=batch, heads=heads, head_dim=head_dim, dtype=dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", range(8, 257, 8))
def test_every_head_dim(head_dim, dtype):
    check(call_of((16, 64, 100), batch=2, head_dim=head_dim, dtype=dtype))


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
        check(call_of((16, 64, 100), batch=2, head_dim=64, dtype=torch.bfloat16))


@pytest.mark.gpu
@pytest.mark.parametrize("warm", [True, False])
def test_a_captured_graph_replays(warm, monkeypatch):
    """On other inputs too; also where the tables are first made under capture."""
    stages = (4, 12, 64, 256)
    call = call_of(stages, batch=2, head_dim=64, dtype=torch.bfloat16)
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
    call = call_of((4, 9), head_dim=64)
    there = {name: call[name].to("cuda:1") for name in "qkv"} | {"stage_lengths": (4, 9)}
    assert torch.cuda.current_device() == 0
    check(there)
    assert triton.stage_attention(**there).device == torch.device("cuda:1")
