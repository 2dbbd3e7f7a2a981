"""Statistics that linear_gated_residual leaves for the adaln_linear that comes next."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ecar_kernels import FlowBlock, StageBlock, _triton, fused
from ecar_kernels._triton import SHARED_KIB
from ecar_kernels.acceleration import PUBLIC
from ecar_kernels.flow_block import launch, reference
from ecar_kernels.registry import KERNEL_DTYPES
from ecar_kernels.testing import ulp
from tests.support.accuracy import assert_accurate
from tests.support.flow_block import call_of, calls, positional
from tests.support.modules import (
    Cache,
    Calls,
    accelerated,
    arguments_of,
    calls_of_a_block,
    functional,
)

triton = pytest.importorskip("ecar_kernels.flow_block.triton")

pytestmark = pytest.mark.filterwarnings(
    "ignore:(overflow|invalid value) encountered:RuntimeWarning:triton"
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL, WIDE = launch.Settings(16, 16, 64, 4, 3), launch.Settings(64, 64, 32, 4, 3)
NORMALISING = launch.Settings(16, 64, 64, 4, 3)
TOGETHER = launch.Settings(64, 64, 64, 4, 2)


def left(x, its):
    """The statistics that a product leaves whose result is x: its gate is 0."""
    h, weight = x.new_ones(*x.shape[:2], 8), x.new_ones(x.shape[2], 8)
    statistics = triton.room_for_statistics(its, h, weight).fill_(torch.nan)
    none = x.new_zeros(1, 1, x.shape[2]).expand(len(x), -1, -1)
    made = triton.launch_linear_gated_residual(its, h, weight, None, none, x, None, statistics)
    assert made.equal(x) or not x.isfinite().all()
    return statistics


def after(its, prologue=True):
    """adaln_linear with the statistics that a product under the settings left."""

    def run(**arguments):
        how = replace(NORMALISING, prologue=prologue)
        given = positional("adaln_linear", arguments)
        return triton.launch_adaln_linear(how, *given, left(arguments["x"], its))

    return run


def check(arguments, its, prologue=True):
    assert_accurate(after(its, prologue), reference.adaln_linear, arguments)


@settings(max_examples=25)
@given(st.data())
def test_outputs(data):
    """Of every shape and layout, the last tile partial."""
    check(
        data.draw(calls("adaln_linear", DEVICE)),
        data.draw(st.sampled_from([SMALL, WIDE])),
        data.draw(st.booleans()),
    )


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("prologue", [True, False])
@pytest.mark.parametrize("its", [SMALL, WIDE], ids=["16", "64"])
@pytest.mark.parametrize("channels", [5, 200, 2100])
def test_a_mean_far_from_zero(channels, its, prologue, dtype):
    """Of 1000 deviations; in one part, in several with a tail, and in more than are read at once.
    In 16 bits, whose steps there are as large as the deviation, of what is left of it."""
    arguments = call_of("adaln_linear", 1, 5, channels, 30, dtype=dtype, device=DEVICE)
    arguments["x"] = (torch.randn(1, 5, channels, device=DEVICE) + 1000).to(dtype)
    check(arguments, its, prologue)


@pytest.mark.parametrize("its", [SMALL, WIDE], ids=["16", "64"])
def test_parts_far_from_each_other(its):
    """The first part is the odd one out, from which the others are counted; and each another."""
    for shift in (1000.0 * (torch.arange(1152) < 16), torch.arange(1152.0).div(16).floor() * 100):
        arguments = call_of("adaln_linear", 1, 5, 1152, 30, device=DEVICE)
        arguments["x"] += shift.to(DEVICE)
        check(arguments, its)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("its", [SMALL, WIDE], ids=["16", "64"])
def test_what_is_left(its, dtype):
    """Of each part's values as they are stored: mean and squared deviations, no part left out."""
    x = (3 * torch.randn(3, 7, 150, device=DEVICE) + 100).to(dtype)
    own, rest, square = left(x, its).double().unbind(2)
    parts = x.double().split(its.block_n, -1)
    assert own.shape == (3, 7, len(parts))
    for index, part in enumerate(parts):
        mean = part.mean(-1)
        exact = (part - mean[..., None]).square().sum(-1)
        assert (own[..., index] + rest[..., index] - mean).abs().max() < 1e-6 * 100 / 16
        assert (square[..., index] - exact).abs().max() < 8 * ulp(exact, torch.float32)
        assert launch.part_width(150, len(parts)) == its.block_n


@pytest.mark.parametrize("channels", [1, 16, 17, 100, 768, 1024, 1152, 8192])
def test_a_parts_width_follows_from_their_number(channels):
    for width in (16, 32, 64, 128, 256):
        count = -(-channels // width)
        found = launch.part_width(channels, count)
        assert found == width or (count == 1 and found >= channels)


def test_rows_of_some_images():
    """As a guided step's are: the first half of the rows, and the same twice. To rounding, for
    interpreted products are numpy's, whose order of summation depends on where a row lies."""
    arguments = call_of("adaln_linear", 4, 9, 100, 30, steps=(None, None), device=DEVICE)
    how, statistics = replace(NORMALISING, prologue=True), left(arguments["x"], SMALL)

    def run(choose):
        chosen = arguments | {name: choose(arguments[name]) for name in ("x", "shift", "scale")}
        given = positional("adaln_linear", chosen)
        return triton.launch_adaln_linear(how, *given, choose(statistics))

    for choose in (lambda x: x[:2], lambda x: torch.cat([x[:2], x[:2]])):
        assert (run(choose) - choose(run(lambda x: x))).abs().max() < 1e-5


def test_they_are_what_is_read():
    """Not made again of x: with those of other rows the result is another."""
    arguments = call_of("adaln_linear", 1, 9, 100, 30, device=DEVICE)
    for prologue in (True, False):
        how = replace(NORMALISING, prologue=prologue)
        given, other = positional("adaln_linear", arguments), left(3 * arguments["x"] + 1, SMALL)
        assert not triton.launch_adaln_linear(how, *given, other).allclose(
            triton.launch_adaln_linear(how, *given), rtol=0.1
        )


@pytest.mark.parametrize("prologue", [True, False])
def test_not_a_number_and_infinity_stay_in_their_row(prologue):
    arguments = call_of("adaln_linear", 1, 21, 70, 53, device=DEVICE)
    run = after(SMALL, prologue)
    clean = run(**arguments)
    for bad in (torch.nan, torch.inf, -torch.inf):
        broken = arguments["x"].clone()
        broken[0, 13, 69] = bad
        result = run(**arguments | {"x": broken})
        assert not result[0, 13].isfinite().any()
        assert result[0, :13].equal(clean[0, :13]) and result[0, 14:].equal(clean[0, 14:])


def test_same_inputs_same_bits_in_any_order_of_programs(programs_in_any_order):
    arguments = call_of("adaln_linear", 2, 10, 300, 200, dtype=torch.bfloat16, device=DEVICE)
    for prologue in (True, False):
        first, *others = (after(SMALL, prologue)(**arguments) for _ in range(5))
        assert all(other.equal(first) for other in others)
    assert DEVICE == "cuda" or len(programs_in_any_order) >= 20


@pytest.mark.parametrize("parts", [False, True])
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_programs_normalise_together(dtype, parts, programs_in_any_order, monkeypatch):
    """In one launch, with the same bits in any order of programs; with tails of rows, channels and
    outputs, and steps for each image. The counters are zeros after it. Without them, in two."""
    arguments = call_of(
        "adaln_linear", 3, 31, 528, 144, dtype=dtype, steps=("rows", "one"), device=DEVICE
    )
    arguments["x"] += 1000 * parts
    statistics = left(arguments["x"], WIDE) if parts else None
    kept = arguments["x"].new_zeros(2, 3, 31, 48).unbind()
    counters, launches = _triton.counters(arguments["x"].device, 2), []
    kernel = triton.row_kernels.normalise_and_multiply
    run_it = kernel.run

    def noting(*args, **options):
        launches.append(options["grid"])
        return run_it(*args, **options)

    def run(cache=(), **given):
        return triton.launch_adaln_linear(
            TOGETHER, *positional("adaln_linear", given), statistics, *cache
        )

    monkeypatch.setattr(kernel, "run", noting)
    first, again = run(**arguments), run(**arguments)
    assert first.equal(again)
    assert first.equal(torch.cat((run(kept, **arguments), *kept), -1))
    assert_accurate(run, reference.adaln_linear, arguments)
    assert launches == [(2 * 3,)] * 4
    assert not counters.any()
    monkeypatch.setattr(_triton, "counters", lambda *_: None)
    assert_accurate(run, reference.adaln_linear, arguments)
    assert len(launches) == 4


@pytest.mark.parametrize("architecture", sorted(SHARED_KIB))
def test_a_prologue_reads_a_models_parts_at_once(architecture):
    """Of 16 rows; of 64, which are many, in at most three turns."""
    for its in launch.tiles(2, "ieee", architecture, prologue=True):
        block, turns = launch.statistics_block(its.block_m, parts=True), its.block_m // 16
        assert turns * block >= 1152 // 16 and block * its.block_m <= 2048


def test_opcheck():
    call = call_of("linear_gated_residual", 2, 9, 32, 48, dtype=torch.bfloat16, device=DEVICE)
    given = positional("linear_gated_residual", call)
    ops = torch.ops.ecar_triton
    x, statistics = triton.linear_gated_residual_chained(*given[:5], step_gate=given[5])
    torch.library.opcheck(ops.linear_gated_residual_chained.default, (*given, statistics))
    with pytest.raises(ValueError, match=r"argument 'statistics': expected \[B, N, 3, \d+\], got"):
        ops.linear_gated_residual_chained(*given, statistics.repeat(1, 1, 1, 9))
    assert x.equal(triton.linear_gated_residual(*given[:5], step_gate=given[5]))
    call = call_of("adaln_linear", 2, 9, 48, 24, dtype=torch.bfloat16, device=DEVICE)
    given = positional("adaln_linear", call | {"x": x})
    torch.library.opcheck(ops.adaln_linear.default, (*given, statistics))
    kept = torch.zeros(2, 2, 9, 8, dtype=torch.bfloat16, device=DEVICE).unbind()
    torch.library.opcheck(ops.adaln_linear_cached.default, (*given, statistics, *kept))


class Blocks(nn.Module):
    """Flow blocks one after the other."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(FlowBlock(96, 3) for _ in range(2))

    def forward(self, x, spatial, step):
        statistics, self.left = None, []
        for block in self.blocks:
            given = x, statistics, spatial.unbind(), step.unbind()
            x, statistics = block.infer_chained(*given)
            self.left.append(statistics is not None)
        return x


SHAPES = {"x": (2, 9, 96), "spatial": (6, 2, 9, 96), "step": (6, 1, 1, 96)}
CHAIN = [
    "ecar_triton::adaln_linear",
    "ecar_triton::stage_attention",
    "ecar_triton::linear_gated_residual_chained",
    "ecar_triton::adaln_linear",
    "ecar_triton::linear_gated_residual_chained",
]


def run_blocks(module, x, spatial, step):
    return module(x, spatial, step)


def inputs(**options):
    return [torch.randn(shape, device=DEVICE, **options) for shape in SHAPES.values()]


@pytest.fixture
def fast():
    module = accelerated(Blocks().to(DEVICE), backend="triton").requires_grad_(False)
    module(*inputs())
    return module


def names(module, *given):
    """What is called but to allocate, and the result."""
    with Calls() as calls:
        result = module(*given)
    return [name for name in calls.names if name != "aten::new_empty"], result


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@torch.no_grad()
def test_a_row_of_blocks(dtype):
    plain = Blocks().to(DEVICE)
    arguments = arguments_of(plain, SHAPES, dtype)
    module = accelerated(Blocks().to(DEVICE), backend="triton")
    assert_accurate(functional(module, run_blocks), functional(plain, run_blocks), arguments)
    assert module.left == [True, True]


@torch.no_grad()
def test_every_block_takes_and_leaves_statistics(fast, monkeypatch):
    taken = []
    assert names(fast, *inputs())[0] == CHAIN * 2
    assert fast.left == [True, True]
    launch_it = triton.launch_adaln_linear

    def noting(*given):
        taken.append(len(given) > 11 and given[11] is not None)
        return launch_it(*given)

    monkeypatch.setattr(triton, "launch_adaln_linear", noting)
    fast(*inputs())
    assert taken == [False, True, True, True]


def hook(module):
    module.register_forward_hook(lambda module, args, output: 2 * output)


def wrap(module):
    forward = module.forward
    module.forward = lambda x: forward(x) + 1


@pytest.mark.parametrize(
    ("layer", "change"),
    [("qkv", hook), ("proj", wrap), ("mlp", hook), ("mlp.fc1", wrap), ("mlp.fc2", hook)],
)
@torch.no_grad()
def test_a_layer_that_is_not_as_written_is_called(layer, change, fast):
    """And takes and leaves none; the others do."""
    plain = Blocks().to(DEVICE)
    plain.load_state_dict(fast.state_dict())
    for module in (fast, plain):
        change(module.blocks[0].get_submodule(layer))
    given = inputs()
    found, result = names(fast, *given)
    assert (result - plain(*given)).abs().max() < 1e-4
    assert fast.left == [layer not in ("mlp", "mlp.fc2"), True]
    assert found[-5:] == CHAIN
    assert found[-10:-5] != CHAIN


def test_gradients_are_asked_for(fast):
    """Of a modulation, or of the tokens: by ops that have them."""
    for index in range(3):
        given = inputs()
        given[index].requires_grad_()
        found, result = names(fast, *given)
        assert not any(name.endswith("_chained") for name in found)
        assert fast.left == [False, False]
        (gradient,) = torch.autograd.grad(result.sum(), given[index])
        assert gradient.isfinite().all() and gradient.any()


@torch.no_grad()
def test_odd_sizes_leave_none():
    for width, heads in ((72, 3), (96, 3)):
        block = accelerated(FlowBlock(width, heads).to(DEVICE), backend="triton")
        given = (torch.randn(*shape[:-1], width, device=DEVICE) for shape in SHAPES.values())
        x, spatial, step = given
        _, statistics = block.infer_chained(x, None, spatial.unbind(), step.unbind())
        assert (statistics is None) == (width == 72)


@torch.no_grad()
def test_where_the_backend_leaves_none():
    for module in (Blocks(), accelerated(Blocks(), backend="reference")):
        module(*(torch.randn(shape) for shape in SHAPES.values()))
        assert module.left == [False, False]
    ops, linear = PUBLIC, nn.Linear(96, 96)
    x = torch.randn(2, 9, 96)
    assert fused.linear_residual(ops, linear, x, x, leaves=True)[1] is None


@torch.no_grad()
def test_an_accelerated_block_is_five_calls():
    """As test_modules.py has it of the C++ ones, without copies."""
    block = accelerated(StageBlock(64, 4).to(DEVICE), backend="triton")
    assert calls_of_a_block(block) == [
        "ecar_triton::adaln_linear_cached",
        "ecar_triton::stage_attention",
        "aten::new_empty",  # of statistics, for the next
        "ecar_triton::linear_gated_residual_chained",
        "ecar_triton::adaln_linear",
        "ecar_triton::linear_gated_residual",
    ]


@torch.no_grad()
def test_stage_blocks_over_a_cache():
    """Row by row and one after the other: within the rule of accuracy as alone."""
    blocks = nn.ModuleList(StageBlock(96, 3) for _ in range(2)).to(DEVICE)
    x, expected = torch.randn(2, 6, 96, device=DEVICE), None
    for statistics_go_on in (False, True):
        accelerated(blocks, backend="triton")
        caches = [Cache(2, 6, 3, 32) for _ in blocks]
        for cache in caches:
            cache.held = cache.held.to(DEVICE)
        found = []
        for tokens in x.split((2, 4), 1):
            statistics, lengths = None, (2, 4)[: len(found) + 1]
            for block, cache in zip(blocks, caches, strict=True):
                if statistics_go_on:
                    tokens, statistics = block.forward_chained(tokens, statistics, lengths, cache)
                    assert statistics is not None
                else:
                    tokens = block(tokens, lengths, cache)
                cache.begin = sum(lengths)
            found.append(tokens)
        result = torch.cat(found, 1)
        if expected is not None:
            assert 0 < (result - expected).abs().max() < 1e-5
        expected = result
