"""The fused GEMMs in C++: the accuracy rule in every layout, bits, packing, graphs."""

import gc
import itertools
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

from ecar_kernels import adaln_linear, linear_gated_residual, use_backend
from ecar_kernels.flow_block import packing, reference
from ecar_kernels.registry import KERNEL_DTYPES, resolve
from tests.support.accuracy import assert_accurate
from tests.support.flow_block import OFFSETS
from tests.support.native import needs_native

pytestmark = needs_native

OPS = ("adaln_linear", "linear_gated_residual")
LAYOUTS = ("contiguous", "chunk", "transposed", "expanded", "sliced")


@pytest.fixture
def cpp():
    from ecar_kernels.flow_block import cpp

    return cpp


def kernel(op):
    return resolve(op, device="cpu", dtype=torch.float32, backend="cpp")


def tokens(batch, count, channels, dtype=torch.float32, layout="contiguous"):
    """Random [batch, count, channels] in memory as asked."""

    def normal(*shape):
        return torch.randn(*shape).to(dtype)

    if layout == "chunk":
        return normal(batch, count, 6 * channels).chunk(6, -1)[4]
    if layout == "transposed":
        return normal(count, batch, channels).transpose(0, 1)
    if layout == "expanded":
        return normal(1, 1, channels).expand(batch, count, channels)
    if layout == "sliced":
        return normal(batch + 2, 2 * count + 1, channels + 3)[1:-1, 1::2, 1:-2]
    return normal(batch, count, channels)


def linear(outputs, depth, dtype=torch.float32, sliced=False, bias=True):
    """A weight of which the outputs keep the inputs' scale, and its bias."""
    rows = torch.randn(outputs, depth + 5) / max(depth, 1) ** 0.5
    weight = rows.to(dtype)[:, 2:-3]
    return {
        "weight": weight if sliced else weight.contiguous(),
        "bias": torch.randn(outputs).to(dtype) if bias else None,
    }


def call_of(
    op,
    batch,
    count,
    depth,
    outputs,
    *,
    dtype=torch.float32,
    layouts=("contiguous",) * 7,
    whole=(True, True),
    steps=("one", "one"),
    sliced=False,
    bias=True,
    gelu=True,
    scale_offset=1.0,
):
    layout = iter(layouts)
    first = {"x" if op == "adaln_linear" else "h": tokens(batch, count, depth, dtype, next(layout))}
    call = first | linear(outputs, depth, dtype, sliced, bias)
    names, width = (("shift", "scale"), depth) if op == "adaln_linear" else (("gate",), outputs)
    for name, every, step in zip(names, whole, steps, strict=False):
        call[name] = tokens(batch, count if every else 1, width, dtype, next(layout))
        if step is not None:
            rows = batch if step == "rows" else 1
            call[f"step_{name}"] = tokens(rows, 1, width, dtype, next(layout))
    if op == "adaln_linear":
        return call | {"activation": "gelu_tanh" if gelu else None, "scale_offset": scale_offset}
    return call | {"residual": tokens(batch, count, outputs, dtype, next(layout))}


@st.composite
def calls(draw, op):
    two = {"min_size": 2, "max_size": 2}
    shape = [
        draw(st.integers(0, 3)),
        draw(st.integers(0, 40)),
        draw(st.integers(1, 300)),
        draw(st.integers(1, 120)),
    ]
    kinds = {
        "dtype": draw(st.sampled_from(KERNEL_DTYPES)),
        "layouts": draw(st.lists(st.sampled_from(LAYOUTS), min_size=7, max_size=7)),
        "whole": draw(st.lists(st.booleans(), **two)),
        "steps": draw(st.lists(st.sampled_from([None, "one", "rows"]), **two)),
        "sliced": draw(st.booleans()),
        "bias": draw(st.booleans()),
        "gelu": draw(st.booleans()),
        "scale_offset": draw(st.sampled_from(OFFSETS)),
    }
    torch.manual_seed(draw(st.integers(0, 2**32)))
    return call_of(op, *shape, **kinds)


@pytest.mark.parametrize("op", OPS)
@given(st.data())
def test_outputs(op, data):
    call = data.draw(calls(op))
    # The rule is about a root mean square: of a few numbers it judges chance.
    rows = call["x" if op == "adaln_linear" else "h"]
    assume(not 0 < rows.shape[0] * rows.shape[1] * call["weight"].shape[0] < 64)
    assert_accurate(kernel(op), getattr(reference, op), call)


@pytest.mark.parametrize(
    "width, dtype",
    [
        (768, torch.float32),
        (1024, torch.float32),
        (1152, torch.float32),
        (768, torch.bfloat16),
        (768, torch.float16),
    ],
    ids=str,
)
def test_the_models_widths(width, dtype):
    for op, depth, outputs in (
        ("adaln_linear", width, 3 * width),
        ("adaln_linear", width, 4 * width),
        ("linear_gated_residual", width, width),
        ("linear_gated_residual", 4 * width, width),
    ):
        assert_accurate(
            kernel(op), getattr(reference, op), call_of(op, 1, 16, depth, outputs, dtype=dtype)
        )


@pytest.mark.parametrize("op", OPS)
def test_more_rows_than_a_slab(op):
    assert_accurate(kernel(op), getattr(reference, op), call_of(op, 3, 291, 131, 49))


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_a_mean_far_from_zero(dtype):
    call = call_of("adaln_linear", 1, 5, 200, 30, dtype=dtype)
    call["x"] = (torch.randn(1, 5, 200) + 3000).to(dtype)
    assert_accurate(kernel("adaln_linear"), reference.adaln_linear, call)


@pytest.mark.parametrize("op", OPS)
def test_not_a_number_and_infinity_stay_in_their_row(op):
    call = call_of(op, 1, 21, 70, 53)
    first = next(iter(call))
    clean = kernel(op)(**call)
    for bad in (torch.nan, torch.inf, -torch.inf):
        broken = call[first].clone()
        broken[0, 13, 69] = bad
        result = kernel(op)(**call | {first: broken})
        assert not result[0, 13].isfinite().any()
        assert result[0, :13].equal(clean[0, :13]) and result[0, 14:].equal(clean[0, 14:])


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_a_row_is_the_same_bits_in_every_batch(op, dtype):
    call = call_of(op, 1, 300, 200, 100, dtype=dtype, whole=(True, True))
    every = kernel(op)(**call)
    for begin, end in ((0, 1), (7, 9), (100, 103), (250, 257), (0, 16), (37, 290)):
        part = {
            name: value[:, begin:end]
            if isinstance(value, torch.Tensor) and value.ndim == 3 and value.shape[1] == 300
            else value
            for name, value in call.items()
        }
        assert kernel(op)(**part).equal(every[:, begin:end])


@pytest.mark.parametrize("op", OPS)
def test_the_same_bits_on_any_number_of_threads(op):
    call = call_of(op, 1, 270, 300, 700)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(kernel(op)(**call))
    finally:
        torch.set_num_threads(before)
    assert results[0].equal(results[1]) and results[0].equal(results[2])


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_lesser_instruction_sets(isa):
    """The accuracy rule again, in a process that is told to use the older one."""
    program = f"""
import torch
from ecar_kernels import _native
from ecar_kernels.flow_block import packing, reference
from ecar_kernels.registry import KERNEL_DTYPES
from tests.ecar_kernels.test_flow_block_cpp import OPS, call_of, kernel
from tests.support.accuracy import assert_accurate
print(_native.instruction_set())
torch.manual_seed({torch.initial_seed() % 2**32})
for dtype in KERNEL_DTYPES:
    for op in OPS:
        for shape in ((2, 40, 1, 1), (2, 19, 200, 53), (1, 64, 384, 96), (3, 50, 129, 200)):
            assert_accurate(kernel(op), getattr(reference, op), call_of(op, *shape, dtype=dtype))
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env=os.environ | {"ECAR_CPU_ISA": isa, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    if done.stdout.strip() != isa:
        pytest.skip(f"this CPU has no {isa}")


def test_a_weight_is_packed_once(cpp):
    call = call_of("adaln_linear", 1, 3, 40, 50)
    packed = cpp.packed_weight(call["weight"])
    adaln_linear(**call)
    assert cpp.packed_weight(call["weight"]) is packed
    cpp.forget_packed()
    again = cpp.packed_weight(call["weight"])
    assert again is not packed and again.equal(packed)


@pytest.mark.parametrize("op", OPS)
def test_a_changed_weight_is_packed_anew(op):
    call = call_of(op, 1, 3, 40, 50)
    layer = nn.Linear(40, 50)
    call |= {"weight": layer.weight, "bias": layer.bias}
    function = {"adaln_linear": adaln_linear, "linear_gated_residual": linear_gated_residual}[op]

    def check():
        found = function(**call)
        with use_backend("reference"):
            torch.testing.assert_close(found, function(**call), rtol=1e-5, atol=1e-5)
        return found

    with torch.no_grad():
        results = [check()]
        layer.weight.add_(1)
        results.append(check())
        layer.load_state_dict(nn.Linear(40, 50).state_dict())
        results.append(check())
        layer.weight.data = torch.randn(50, 40)
        results.append(check())
        layer.weight[3, 5] = 100
        results.append(check())
    layer.weight.grad = torch.ones(50, 40)
    torch.optim.SGD([layer.weight], 0.1).step()
    with torch.no_grad():
        results.append(check())
    assert all(not a.equal(b) for a, b in itertools.pairwise(results))


def test_a_packed_weight_dies_with_its_weight(cpp):
    cpp.forget_packed()
    layer = nn.Linear(64, 80)
    cpp.packed_weight(layer.weight)
    assert len(packing._packed) == 1
    del layer
    gc.collect()
    assert not packing._packed


@pytest.mark.parametrize("op", OPS)
def test_weights_made_in_inference_mode(op):
    """They have no version that would tell a change, so nothing of them is kept."""
    with torch.inference_mode():
        call = call_of(op, 1, 9, 40, 50)
        for _ in range(2):
            assert_accurate(kernel(op), getattr(reference, op), call)
            call["weight"].add_(1)


def test_a_large_packed_weight_lies_on_large_pages(cpp):
    packed = cpp.packed_weight(torch.randn(1000, 1000))
    assert packed.data_ptr() % 2**21 == 0


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("optional", [True, False])
@pytest.mark.parametrize("op", OPS)
def test_opcheck(op, optional, dtype, cpp):
    steps = ("one", "rows") if optional else (None, None)
    call = call_of(
        op,
        2,
        9,
        24,
        40,
        dtype=dtype,
        steps=steps,
        bias=optional,
        layouts=("transposed", "chunk", "sliced", "chunk", "expanded", "sliced", "sliced"),
    )
    packed = cpp.packed_weight(call["weight"])
    if op == "adaln_linear":
        first = [call["x"], call["shift"], call["scale"]]
        rest = [call["bias"], call.get("step_shift"), call.get("step_scale")]
        whole = (*first, call["weight"], *rest, True, 1e-6, 0.5)
        inner = (*first, packed, 40, *rest, True, 1e-6, 0.5)
    else:
        rest = [call["bias"], call["gate"], call["residual"], call.get("step_gate")]
        whole = (call["h"], call["weight"], *rest)
        inner = (call["h"], packed, *rest)
    torch.library.opcheck(getattr(torch.ops.ecar, op).default, whole)
    torch.library.opcheck(getattr(torch.ops.ecar, f"packed_{op}").default, inner)
    torch.library.opcheck(torch.ops.ecar.pack_linear_weight.default, (call["weight"],))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(24, 96), nn.Linear(96, 24)

    def forward(self, x, shift, scale, gate):
        hidden = adaln_linear(
            x, shift, scale, self.fc1.weight, self.fc1.bias, activation="gelu_tanh"
        )
        return linear_gated_residual(hidden, self.fc2.weight, self.fc2.bias, gate, x)


@torch.no_grad()
def test_a_compiled_graph_sees_a_changed_weight():
    torch._dynamo.reset()
    block, arguments = Block(), torch.randn(4, 2, 9, 24).unbind()
    compiled = torch.compile(block, fullgraph=True)
    for _ in range(3):
        assert compiled(*arguments).equal(block(*arguments))
        block.fc1.weight.mul_(0.5)
        block.load_state_dict(Block().state_dict())


@torch.no_grad()
def test_export():
    block, arguments = Block(), torch.randn(4, 2, 9, 24).unbind()
    exported = torch.export.export(block, arguments)
    assert exported.module()(*arguments).equal(block(*arguments))


def test_the_ops_refuse_what_would_leave_their_tensors(cpp):
    x, shift, scale = torch.randn(3, 2, 5, 24).unbind()
    packed = cpp.packed_weight(torch.randn(40, 24))
    op = torch.ops.ecar.packed_adaln_linear.default
    whole = [x, shift, scale, packed, 40, None, None, None, False, 1e-6, 1.0]
    op(*whole)
    for index, value, message in (
        (0, x.transpose(1, 2), "argument 'x'"),
        (1, shift[:, :3], "argument 'shift'"),
        (2, scale.double(), "argument 'scale'"),
        (3, packed[:-1], "argument 'packed'"),
        (3, packed.half(), "argument 'packed'"),
        (4, 60, "argument 'packed'"),
        (4, -1, "argument 'outputs'"),
        (5, torch.randn(39), "argument 'bias'"),
        (6, shift, "argument 'step_shift'"),
    ):
        with pytest.raises(RuntimeError, match=message):
            op(*whole[:index], value, *whole[index + 1 :])
