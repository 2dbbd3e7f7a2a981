"""What is particular to the fused GEMMs' Triton kernels: tiles, prologues.

Interpreted on the CPU, or compiled where there is a GPU. What holds for every backend's kernels is
in test_flow_block.py; how launch settings are chosen in test_flow_block_launch.py.
"""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ecar_kernels import StageBlock, fused
from ecar_kernels.acceleration import PUBLIC
from ecar_kernels.flow_block import launch, reference
from ecar_kernels.registry import KERNEL_DTYPES
from tests.support.accuracy import assert_accurate
from tests.support.flow_block import OPS, call_of, calls, positional
from tests.support.modules import Cache, Calls, CopyingCache, accelerated

triton = pytest.importorskip("ecar_kernels.flow_block.triton")

# Interpreted, kernels compute in numpy, which warns where a GPU does not: of exp2's infinity, say.
pytestmark = pytest.mark.filterwarnings(
    "ignore:(overflow|invalid value) encountered:RuntimeWarning:triton"
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL, MEDIUM = launch.Settings(16, 64, 64, 4, 3), launch.Settings(64, 64, 32, 4, 3)
H100 = {"itemsize": 2, "precision": "ieee", "sms": 132, "arch": 90}


def call(op, *shape, **kinds):
    return call_of(op, *shape, **kinds, device=DEVICE)


def under(op, its):
    """The op under settings of the test's."""
    launcher = getattr(triton, f"launch_{op}")
    return lambda **arguments: launcher(its, *positional(op, arguments))


def check(op, arguments, its=None):
    run = getattr(triton, op) if its is None else under(op, its)
    assert_accurate(run, getattr(reference, op), arguments)


@pytest.mark.parametrize("op", OPS)
@settings(max_examples=15)
@given(st.data())
def test_outputs(op, data):
    check(op, data.draw(calls(op, DEVICE)))


@pytest.mark.parametrize("op", OPS)
@settings(max_examples=10)
@given(st.data())
def test_outputs_under_other_settings(op, data):
    """Every tile against every shape, also those that the rules would not choose."""
    its = data.draw(st.sampled_from([SMALL, MEDIUM]))
    its = replace(its, prologue=data.draw(st.booleans()))
    check(op, data.draw(calls(op, DEVICE)), its)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("prologue", [True, False])
@torch.no_grad()
def test_keys_and_values_go_into_the_cache(prologue, dtype, monkeypatch):
    """With the bits that copies leave, of some images of a larger cache; the rest stays."""
    monkeypatch.setattr(launch, "default", lambda *_: replace(SMALL, prologue=prologue))
    block = accelerated(StageBlock(72, 3).to(DEVICE, dtype), backend="triton")
    stages, x = (1, 5, 9), torch.randn(2, 15, 72, device=DEVICE).to(dtype)
    found = []
    for kind in (Cache, CopyingCache):
        cache, outputs = kind(3, 16, 3, 24, dtype=dtype), []
        cache.held = cache.held.to(DEVICE)
        for count, tokens in enumerate(x.split(stages, 1), start=1):
            with Calls() as calls:
                outputs.append(block(tokens, stages[:count], cache))
            cache.begin += tokens.shape[1]
            assert ("aten::copy_" in calls.names) is (kind is CopyingCache)
        found.append((torch.cat(outputs, 1), cache.held))
    (y, held), (expected, expected_held) = found
    assert y.equal(expected) and held.equal(expected_held)
    assert held[:, :2, :15].all() and not held[:, 2:].any() and not held[:, :, 15:].any()


def test_where_a_product_does_not_write_to_the_cache():
    """Where gradients are asked for, the cache writes in a way of its own, has another type, shape
    or heads that are apart, and where a layer is not as written."""
    block = accelerated(StageBlock(64, 4).to(DEVICE), backend="triton").requires_grad_(False)
    x = torch.randn(2, 5, 64, device=DEVICE)

    def writes(x=x, kind=Cache, shape=(2, 5, 4, 16), width=16, dtype=torch.float32, **layers):
        cache = kind(*shape, dtype=dtype)
        cache.held = cache.held[..., :width].to(DEVICE)
        given = {"norm": block.norm1, "layer": block.qkv} | layers
        made = fused.norm_linear_cached(block.ops(x), *given.values(), x, cache, 0)
        return made is not None

    assert writes()
    assert not writes(x=x.clone().requires_grad_())
    assert not writes(kind=CopyingCache)
    assert not writes(dtype=torch.bfloat16)
    assert not writes(shape=(1, 5, 4, 16)) and not writes(shape=(2, 5, 4, 8))
    assert not writes(shape=(2, 5, 4, 32))
    assert not writes(norm=torch.nn.LayerNorm(64, elementwise_affine=False))
    assert not writes(layer=torch.nn.Linear(64, 128))
    hooked = torch.nn.Linear(64, 192)
    hooked.register_forward_hook(lambda *_: None)
    assert not writes(layer=hooked)
    assert (
        fused.norm_linear_cached(PUBLIC, block.norm1, block.qkv, x, Cache(2, 5, 4, 16), 0) is None
    )
    ops = block.ops(x)
    assert fused.norm_linear_cached(ops, block.norm1, block.qkv, x, None, 0) is None


@pytest.mark.parametrize("prologue", [False, True])
def test_what_is_added_to_scale(prologue):
    """scale_offset + scale is one number: the same bits for whichever part holds the 1."""
    run = under("adaln_linear", replace(SMALL, prologue=prologue))
    arguments = call("adaln_linear", 2, 9, 100, 70, steps=("one", None))
    given = {"scale": 1 + arguments["scale"], "scale_offset": 0.0}
    assert run(**arguments).equal(run(**arguments | given))


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 5, 16, 17, 33])
@pytest.mark.parametrize("op", OPS)
def test_rows(op, rows, dtype):
    """One image of them, and as many images of one token; inputs and outputs with tails."""
    for batch, count in ((1, rows), (rows, 1)):
        check(op, call(op, batch, count, 203, 77, dtype=dtype))


@pytest.mark.parametrize("its", launch.tiles(2, "ieee", 90), ids=str)
@pytest.mark.parametrize("op", OPS)
def test_tiles(op, its):
    """Two tiles of rows and two of outputs, the last of each with a tail, as of the inputs."""
    inputs = its.block_k + 16
    arguments = call(op, 1, its.block_m + 3, inputs, its.block_n + 16, dtype=torch.float16)
    check(op, arguments, its)


@pytest.mark.parametrize("its", launch.tiles(2, "ieee", 90, prologue=True), ids=str)
def test_tiles_that_normalise(its):
    test_tiles("adaln_linear", its)


@pytest.mark.parametrize("op", OPS)
def test_offsets_past_2_to_the_31(op):
    """An image 2^31 elements after the first, by its stride; the pages between stay untouched."""
    arguments = call(op, 2, 3, 32, 32, dtype=torch.bfloat16)
    storage = torch.empty(2**31 + 4096, dtype=torch.bfloat16, device=DEVICE)
    near = under(op, SMALL)(**arguments)
    for name in ("x", "shift", "weight") if op == "adaln_linear" else ("h", "gate", "residual"):
        far = arguments[name]
        if name == "weight":
            far = storage.as_strided((2, 32), (2**31, 1)).copy_(far[:2])
            expected = near[..., :2]
            more = {"bias": arguments["bias"][:2]}
        else:
            far = storage.as_strided((2, 3, 32), (2**31, 32, 1)).copy_(far)
            expected, more = near, {}
        assert under(op, SMALL)(**arguments | {name: far} | more).equal(expected)


@pytest.mark.parametrize("prologue", [True, False])
@pytest.mark.parametrize("op", OPS)
def test_depths(op, prologue):
    """One block of inputs, and several with a tail."""
    for depth, steps in ((64, (None, None)), (459, ("one", "rows"))):
        its = replace(SMALL, prologue=prologue)
        check(op, call(op, 2, 9, depth, 100, steps=steps, whole=(False, True)), its)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("prologue", [True, False])
@pytest.mark.parametrize("channels", [200, 1300])
def test_a_mean_far_from_zero(channels, prologue, dtype):
    """In one block of channels, and in several, the last with a tail."""
    arguments = call("adaln_linear", 1, 5, channels, 30, dtype=dtype)
    arguments["x"] = (torch.randn(1, 5, channels, device=DEVICE) + 3000).to(dtype)
    check("adaln_linear", arguments, replace(SMALL, prologue=prologue))


def test_inputs_past_the_end_stay_out_of_float16s_range():
    """Normalised, the padding's 0 would be -mean / deviation, beyond what float16 holds."""
    arguments = call("adaln_linear", 1, 5, 70, 30, dtype=torch.float16, steps=(None, None))
    arguments["x"] = torch.full((1, 5, 70), 3000.0, dtype=torch.float16, device=DEVICE)
    arguments["scale"] *= 100
    check("adaln_linear", arguments, replace(SMALL, prologue=True))


def test_channels_beyond_one_block():
    """Several blocks in each of the passes over a row."""
    for prologue in (True, False):
        check(
            "adaln_linear", call("adaln_linear", 1, 2, 5000, 20), replace(SMALL, prologue=prologue)
        )


@pytest.mark.parametrize("op", OPS)
def test_not_a_number_and_infinity_stay_in_their_row(op):
    arguments = call(op, 1, 21, 70, 53)
    first = next(iter(arguments))
    for its in (SMALL, replace(SMALL, prologue=True)):
        clean = under(op, its)(**arguments)
        for bad in (torch.nan, torch.inf, -torch.inf):
            broken = arguments[first].clone()
            broken[0, 13, 69] = bad
            result = under(op, its)(**arguments | {first: broken})
            assert not result[0, 13].isfinite().any()
            assert result[0, :13].equal(clean[0, :13]) and result[0, 14:].equal(clean[0, 14:])


@pytest.mark.parametrize("op", OPS)
def test_same_inputs_same_bits_in_any_order_of_programs(op, programs_in_any_order):
    arguments = call(op, 2, 10, 300, 200, dtype=torch.bfloat16)
    for prologue in (True, False):
        run = under(op, replace(SMALL, prologue=prologue))
        first, *others = (run(**arguments) for _ in range(5))
        assert all(other.equal(first) for other in others)
        check(op, arguments, replace(SMALL, prologue=prologue))
    assert DEVICE == "cuda" or len(programs_in_any_order) >= 12


def test_no_inputs():
    check("linear_gated_residual", call("linear_gated_residual", 2, 3, 0, 5), SMALL)


@pytest.fixture
def products():
    """Torch's own setting of the products' precision, put back afterwards."""
    usual = torch.backends.cuda.matmul.fp32_precision
    yield torch.backends.cuda.matmul
    torch.backends.cuda.matmul.fp32_precision = usual


def test_tf32_only_where_torch_allows_it(products, monkeypatch):
    given = []
    monkeypatch.setattr(triton.launch, "default", lambda *key: (given.append(key[4]), SMALL)[1])
    arguments = call("linear_gated_residual", 1, 3, 32, 32)
    for setting in ("ieee", "tf32"):
        products.fp32_precision = setting
        triton.linear_gated_residual(**arguments)
    assert given == ["ieee", "tf32"]


def test_odd_sizes_have_tiles_of_their_own():
    """For the aligned ones' large tiles they would need more registers than there are."""
    for outputs, inputs in ((770, 768), (768, 770)):
        for rows in (1, 32, 256, 8192):
            its = launch.default(rows, outputs, inputs, **H100)
            assert its in launch.odd_tiles()
            assert its in launch.candidates(rows, outputs, inputs, **H100)


def test_few_rows_of_a_long_product_have_many_programs():
    its = launch.default(16, 768, 3072, **H100)
    assert (its.block_m, its.block_n, its.block_k) == (16, 16, 256)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("width", [768, 1024, 1152])
@pytest.mark.parametrize("op", OPS)
def test_real_sizes(op, width, dtype):
    layers = (
        ((width, 3 * width), (width, 4 * width))
        if op == "adaln_linear"
        else ((width, width), (4 * width, width))
    )
    for (depth, outputs), (batch, count) in itertools.product(
        layers, ((1, 16), (2, 16), (1, 64), (1, 256), (2, 256), (32, 256))
    ):
        layouts = ("contiguous", *("chunk",) * 5)
        arguments = call(op, batch, count, depth, outputs, dtype=dtype, layouts=layouts)
        check(op, arguments)
        run = getattr(triton, op)
        assert run(**arguments).equal(run(**arguments))


@pytest.mark.gpu
@pytest.mark.parametrize("op", OPS)
def test_every_candidate(op):
    for rows in (16, 32, 256):
        arguments = call(op, 1, rows, 768, 1024, dtype=torch.bfloat16)
        for its in launch.candidates(rows, 1024, 768, **H100, normalised=op == "adaln_linear"):
            check(op, arguments, its)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [16, 256, 2048])
@pytest.mark.parametrize("op", OPS)
def test_graph_capture(op, rows):
    """Replayed on other inputs, a graph gives what a call on them gives."""
    run = getattr(triton, op)
    arguments, other = (call(op, 1, rows, 768, 768, dtype=torch.bfloat16) for _ in range(2))
    run(**arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(**arguments)
    for name, value in other.items():
        if isinstance(value, torch.Tensor):
            arguments[name].copy_(value)
    graph.replay()
    torch.cuda.synchronize()
    assert captured.equal(run(**other))


@pytest.mark.gpu
def test_programs_that_wait_for_each_other_next_to_others_that_do():
    """On two streams, and in a graph that is replayed on a third, all under way at once."""
    arguments = call("adaln_linear", 1, 2048, 1152, 1152, dtype=torch.bfloat16)
    run = triton.adaln_linear
    expected, graph = run(**arguments), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(**arguments)
    streams, results = [torch.cuda.Stream() for _ in range(3)], []
    torch.cuda.synchronize()
    for _ in range(50):
        for stream in streams[:2]:
            with torch.cuda.stream(stream):
                results.append(run(**arguments))
        with torch.cuda.stream(streams[2]):
            graph.replay()
    torch.cuda.synchronize()
    assert all(result.equal(expected) for result in (captured, *results))
