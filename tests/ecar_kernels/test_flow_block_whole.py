"""A block in one C++ call, in place: the bits of the five ops that it is made of."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import ecar_kernels
from ecar_kernels import FlowBlock, StageBlock
from ecar_kernels.registry import KERNEL_DTYPES
from tests.support.accuracy import assert_accurate
from tests.support.modules import Cache, accelerated
from tests.support.native import needs_native

pytestmark = needs_native

PARTS = 14  # of two blocks and a last layer


def made(batch=2, tokens=16, width=24, heads=2, hidden=40, dtype=torch.float32):
    """A block, and the arguments of one call: x, the modulations, and the block's place in them."""
    block = FlowBlock(width, heads, hidden)
    block.requires_grad_(False)
    for layer in (block.qkv, block.proj, block.mlp.fc1, block.mlp.fc2):
        layer.bias.normal_()
    x = torch.randn(batch, tokens, width).to(dtype)
    spatial = torch.randn(batch, tokens, PARTS * width).to(dtype)
    return block.to(dtype), (x, spatial, torch.randn(1, 1, PARTS * width).to(dtype), 6)


def arguments(block, x, spatial, step, part):
    """What the op takes, x a copy."""
    from ecar_kernels.flow_block import cpp

    batch, tokens, width = x.shape
    hidden = block.mlp.fc1.out_features
    layers = (block.qkv, block.proj, block.mlp.fc1, block.mlp.fc2)
    weights = [value for layer in layers for value in (cpp.packed_weight(layer.weight), layer.bias)]
    wide = torch.empty(batch * tokens * max(4 * width, hidden), dtype=x.dtype)
    workspace = torch.empty(
        max(cpp.workspace_size(batch * tokens, depth) for depth in (width, hidden))
    )
    return [
        x.clone(),
        spatial,
        step,
        part,
        *weights,
        block.heads,
        hidden,
        block.eps,
        wide,
        workspace,
    ]


def whole(block, *call):
    from ecar_kernels.flow_block import cpp

    given = arguments(block, *call)
    cpp.flow_block_(*given)
    return given[0]


def by_ops(block, x, spatial, step, part):
    own = slice(part, part + 6)
    return block.infer(x, spatial.chunk(PARTS, -1)[own], step.chunk(PARTS, -1)[own])


@given(
    st.integers(0, 3),
    st.integers(1, 70),
    st.sampled_from([(8, 1), (24, 3), (80, 2)]),
    st.sampled_from([5, 40, 400]),
    st.sampled_from(KERNEL_DTYPES),
    st.integers(0, 2**32),
)
def test_it_has_the_bits_of_the_five_ops(batch, tokens, size, hidden, dtype, seed):
    torch.manual_seed(seed)
    width, heads = size
    block, call = made(batch, tokens, width, heads, hidden, dtype)
    ecar_kernels.accelerate(block, backend="cpp")
    assert whole(block, *call).equal(by_ops(block, *call))


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("tokens, width, heads", [(16, 768, 6), (300, 144, 2)])
def test_accuracy(tokens, width, heads, dtype):
    """Against the reference of the whole block; of what it adds, for x itself is exact."""
    block, call = made(1, tokens, width, heads, 4 * width, dtype)
    wide = {name: value.double() for name, value in block.state_dict().items()}

    def ours(x, spatial, step):
        return whole(block, x, spatial, step, call[3]) - x

    def reference(x, spatial, step):
        plain = FlowBlock(width, heads).to(x.dtype).requires_grad_(False)
        plain.load_state_dict(wide)
        with ecar_kernels.use_backend("reference"):
            return by_ops(plain, x, spatial, step, call[3]) - x

    names = ("x", "spatial", "step")
    assert_accurate(ours, reference, dict(zip(names, call, strict=False)))


def test_an_image_is_the_same_bits_in_every_batch_and_on_any_number_of_threads():
    block, (x, spatial, step, part) = made(5, 67, 64, 2, 256)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(whole(block, x, spatial, step, part))
    finally:
        torch.set_num_threads(before)
    assert all(other.equal(results[0]) for other in results[1:])
    for image in range(5):
        alone = slice(image, image + 1)
        assert whole(block, x[alone], spatial[alone], step, part).equal(results[0][alone])


def test_fewer_rows_of_larger_modulations():
    """Conditional rows alone: a view of all rows."""
    block, (x, spatial, step, part) = made(4)
    assert whole(block, x[:2], spatial[:2], step, part).equal(
        whole(block, x, spatial, step, part)[:2]
    )


def test_opcheck():
    block, call = made()
    torch.library.opcheck(torch.ops.ecar.flow_block_.default, tuple(arguments(block, *call)))


@pytest.mark.parametrize(
    "index, wrong, message",
    [
        (0, lambda a: a[0].transpose(0, 1), "'x': expected a contiguous tensor"),
        (0, lambda a: a[0].double(), "'x': expected float32"),
        (1, lambda a: a[1][:1], "'spatial': expected"),
        (1, lambda a: a[1].half(), "'spatial': expected the first argument's type"),
        (2, lambda a: a[2][..., :200], "'step': expected six parts of 24 channels from part 6 on"),
        (3, lambda a: 9, "'spatial': expected six parts"),
        (3, lambda a: -1, "'spatial': expected six parts"),
        (4, lambda a: a[4][:-1], "'packed': expected"),
        (5, lambda a: a[5][:-1], "'bias': expected"),
        (12, lambda a: 5, "'heads': expected a divisor of 24, got 5"),
        (13, lambda a: 0, "'hidden': expected at least 1"),
        (13, lambda a: 400, "'packed': expected"),
        (15, lambda a: a[15][:-1], "'wide': expected 3072 elements or more, got 3071"),
        (16, lambda a: a[16][:-1], "'workspace': expected"),
        (15, lambda a: a[0].view(-1).repeat(4)[:3072].half(), "'wide': expected the first"),
    ],
)
def test_a_wrong_call_is_refused(index, wrong, message):
    block, call = made()
    given = arguments(block, *call)
    given[index] = wrong(given)
    with pytest.raises(RuntimeError, match=f"argument {message}"):
        torch.ops.ecar.flow_block_(*given)


def test_buffers_that_hold_x_are_refused():
    block, call = made()
    given = arguments(block, *call)
    room = torch.randn(3072)
    given[0], given[15] = room[:768].view(2, 16, 24), room
    with pytest.raises(RuntimeError, match="argument 'x': expected memory apart"):
        torch.ops.ecar.flow_block_(*given)


def stage_block(width=24, heads=2, hidden=40, dtype=torch.float32):
    block = StageBlock(width, heads, hidden).requires_grad_(False)
    for parameter in block.parameters():
        parameter.normal_(std=1.0 if parameter.ndim == 1 else width**-0.5)
    return block.to(dtype)


def stage_arguments(block, x, cache):
    """What the op takes: x a copy, the cache's keys and values themselves."""
    from ecar_kernels.flow_block import cpp

    rows, tokens, width = x.shape
    hidden = block.mlp.fc1.out_features
    groups = (block.norm1,), (block.qkv, block.proj), (block.norm2,), (block.mlp.fc1, block.mlp.fc2)
    layers = [layer for group in groups for layer in group]
    pairs = [
        (cpp.packed_weight(p.weight) if p.weight.ndim == 2 else p.weight, p.bias) for p in layers
    ]
    sizes = [cpp.workspace_size(rows * tokens, depth) for depth in (width, hidden)]
    return [
        x.clone(),
        *(value for pair in pairs for value in pair),
        block.heads,
        hidden,
        block.norm1.eps,
        block.norm2.eps,
        *(held[:rows] for held in cache.held),
        cache.begin,
        torch.empty(rows * tokens * max(2 * width, hidden), dtype=x.dtype),
        torch.empty(max(sizes)),
    ]


@given(
    st.integers(0, 3),
    st.lists(st.integers(1, 70), min_size=1, max_size=3),
    st.sampled_from([(8, 1), (24, 3), (80, 2)]),  # a panel of 48 outputs has q, k and v
    st.sampled_from([5, 40, 400]),
    st.sampled_from(KERNEL_DTYPES),
    st.integers(0, 2**32),
)
@example(3, [64], (24, 3), 40, torch.bfloat16, 0)  # a whole chunk's last row, a part's last columns
def test_stages_over_a_cache_have_the_bits_of_the_five_ops(rows, stages, size, hidden, dtype, seed):
    """Keys and values in the cache, too; the last stage has fewer rows than the cache."""
    torch.manual_seed(seed)
    width, heads = size
    block = accelerated(stage_block(width, heads, hidden, dtype), backend="cpp")
    shape = rows, sum(stages), heads, width // heads
    caches = Cache(*shape), Cache(*shape)
    for cache in caches:
        cache.held = cache.held.to(dtype)
    for index, tokens in enumerate(stages):
        now = max(rows - 1, 0) if index == len(stages) - 1 else rows
        x = torch.randn(now, tokens, width).to(dtype)
        given = stage_arguments(block, x, caches[0])
        torch.ops.ecar.stage_block_(*given)
        whole_cache, caches[1].held = caches[1].held, caches[1].held[:, :now]
        with torch.no_grad():
            assert given[0].equal(block(x, stages[: index + 1], caches[1]))
        caches[1].held = whole_cache
        for cache in caches:
            cache.begin += tokens
    assert caches[0].held.equal(caches[1].held)


def test_opcheck_of_a_stage():
    cache = Cache(2, 7, 2, 12)
    given = stage_arguments(stage_block(), torch.randn(2, 5, 24), cache)
    torch.library.opcheck(torch.ops.ecar.stage_block_.default, tuple(given))


@pytest.mark.parametrize(
    "index, wrong, message",
    [
        (0, lambda a: a[0].transpose(0, 1), "'x': expected a contiguous tensor"),
        (1, lambda a: a[1][:-1], "'norm': expected"),
        (2, lambda a: a[2].half(), "'norm': expected the first argument's type"),
        (3, lambda a: a[3][:-1], "'packed': expected"),
        (8, lambda a: a[8].repeat(2), "'norm': expected"),
        (13, lambda a: 5, "'heads': expected a divisor of 24, got 5"),
        (14, lambda a: 0, "'hidden': expected at least 1"),
        (17, lambda a: a[17][:1], "'keys': expected"),
        (17, lambda a: a[17].transpose(2, 3), "'keys': expected"),
        (18, lambda a: a[18].half(), "'values': expected the first argument's type"),
        (18, lambda a: a[18].repeat(1, 1, 2, 1)[:, :, ::2], "'values': expected heads one after"),
        (19, lambda a: 3, "'begin': expected 0 to 2, got 3"),
        (19, lambda a: -1, "'begin': expected 0 to 2, got -1"),
        (20, lambda a: a[20][:-1], "'wide': expected 480 elements or more, got 479"),
        (21, lambda a: a[21][:-1], "'workspace': expected"),
    ],
)
def test_a_wrong_stage_is_refused(index, wrong, message):
    given = stage_arguments(stage_block(), torch.randn(2, 5, 24), Cache(2, 7, 2, 12))
    given[index] = wrong(given)
    with pytest.raises(RuntimeError, match=f"argument {message}"):
        torch.ops.ecar.stage_block_(*given)
