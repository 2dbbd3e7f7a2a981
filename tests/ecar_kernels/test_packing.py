"""Packed weights, kept as well or held alone: made once, there and back, and no write is lost."""

import copy
import gc
import itertools
import sys
import threading
import time

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ecar_kernels
from ecar_kernels import adaln_linear, linear_gated_residual, use_backend
from ecar_kernels.flow_block import packing, reference
from ecar_kernels.flow_block.packing import PackedWeight
from ecar_kernels.registry import KERNEL_DTYPES
from tests.support.accuracy import assert_accurate
from tests.support.backends import kernel
from tests.support.flow_block import OPS, call_of
from tests.support.native import needs_native

pytestmark = needs_native


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 1), (16, 33), (48, 32), (48, 7), (70, 9), (96, 64), (112, 8)], ids=str
)
def test_a_weight_there_and_back(shape, dtype):
    weight = nn.Parameter(torch.randn(shape).to(dtype))
    values = weight.detach().clone()
    assert packing.pack_weight(weight) and type(weight) is PackedWeight
    assert (weight.shape, weight.dtype, weight.requires_grad) == (shape, dtype, True)
    packing.unpack_weight(weight)
    assert type(weight) is nn.Parameter and weight.equal(values)
    assert weight.is_contiguous() and packing.pack_weight(weight)  # and again


@pytest.mark.parametrize("width", [768, 1024, 1152])
def test_a_model_s_weights_take_no_more_packed(width):
    assert packing.packed_size(width, 4 * width) == 4 * width**2
    assert packing.packed_size(3 * width, width) == 3 * width**2


WRITES = {
    "detach": lambda w: w.detach().fill_(2),
    "data": lambda w: w.data.fill_(2),
    "data, one row of a view": lambda w: [row.fill_(2) for row in w.data],
    "data, an index": lambda w: w.data.__setitem__(slice(None), 2),
    "data.copy_": lambda w: w.data.copy_(torch.full_like(w, 2)),
    "set_": lambda w: w.set_(torch.full((50, 40), 2.0)),
    "view": lambda w: w.view(-1).fill_(2),
    "transposed": lambda w: w.T.fill_(2),
    "numpy": lambda w: w.numpy().fill(2),
    "dlpack": lambda w: torch.from_dlpack(w).fill_(2),
    "storage": lambda w: w.untyped_storage().copy_(torch.full((50, 40), 2.0).untyped_storage()),
    "copy_": lambda w: w.copy_(w.new_full((), 2)),
    "fill_": lambda w: w.fill_(2),
    "index": lambda w: w.__setitem__(slice(None), 2),
    "out=": lambda w: torch.full(w.shape, 2.0, out=w),
    "foreach": lambda w: torch._foreach_mul_([w.fill_(1)], 2),
    "init": lambda w: nn.init.constant_(w, 2),
    "another tensor": lambda w: setattr(w, "data", torch.full((50, 40), 2.0)),
    "part of another one": lambda w: setattr(w, "data", torch.full((50, 80), 2.0)[:, 40:]),
    "after a read": lambda w: (
        torch.stack([w], out=w.new_empty(1, 50, 40)) is not None and w.fill_(2)
    ),
    "an optimizer": lambda w: _step(w),
    "swa_utils": lambda w: torch.optim.swa_utils.get_ema_multi_avg_fn(0.0)(
        [w], [torch.full((50, 40), 2.0)], None
    ),
    "vector_to_parameters": lambda w: nn.utils.vector_to_parameters(torch.full((2000,), 2.0), [w]),
    "load_state_dict": lambda w: nn.ParameterList([w]).load_state_dict(
        {"0": torch.full((50, 40), 2.0)}
    ),
    "lerp to the other": lambda w: w.data.lerp_(torch.full((50, 40), 2.0), 1.0),
}


def _step(weight: nn.Parameter) -> None:
    weight.requires_grad_().grad = weight.detach() - 2
    torch.optim.SGD([weight], lr=1.0).step()
    weight.data.round_()


def _product(weight: torch.Tensor) -> torch.Tensor:
    x, zeros = torch.eye(40)[None] * 3, torch.zeros(1, 1, 40)
    return ecar_kernels.adaln_linear(x, zeros, zeros, weight, None)


@pytest.mark.parametrize("held", ["packed alone", "kept as well"])
@pytest.mark.parametrize("write", WRITES)
@torch.no_grad()
def test_no_write_is_lost(write, held):
    """However it is written to, or aliased and then written to."""
    weight = nn.Parameter(torch.randn(50, 40), requires_grad=False)
    if held == "packed alone":
        assert packing.pack_weight(weight)
    else:
        packed = packing.packed_weight(weight)
        assert packing.packed_weight(weight) is packed  # else nothing is tested
    WRITES[write](weight)
    assert weight.eq(2).all() and type(weight) is nn.Parameter
    got = _product(weight)
    with use_backend("reference"):
        assert (got - _product(weight)).abs().max() < 1e-4


MEMORY = {
    "a view": lambda values: torch.cat((values, values))[50:],
    "numpy's": lambda values: torch.from_numpy(values.numpy().copy()),
    "shared between processes": lambda values: values.clone().share_memory_(),
    "a buffer": lambda values: torch.frombuffer(
        bytearray(values.numpy().tobytes()), dtype=torch.float32
    ).view(50, 40),
    "rows of a wider one": lambda values: torch.cat((values, values), 1)[:, 40:],
    "an inference tensor": lambda values: _inference(values),
}


@torch.inference_mode()
def _inference(values: torch.Tensor) -> torch.Tensor:
    return values.clone()


@pytest.mark.parametrize("memory", MEMORY)
def test_memory_of_any_kind(memory):
    """Whoever else may write to it: another process, NumPy, a tensor it is a view of."""
    with torch.inference_mode(memory == "an inference tensor"), torch.no_grad():
        values = torch.randn(50, 40)
        tensor = MEMORY[memory](values)
        weight = nn.Parameter(tensor, requires_grad=False)
        for _ in range(2):
            assert (_product(weight) - _reference(weight)).abs().max() < 1e-4
            tensor.mul_(-2)
        del tensor  # so that nothing else is on its memory
        assert (_product(weight) - _reference(weight)).abs().max() < 1e-4
        assert weight.equal(4 * values)


def _reference(weight: torch.Tensor) -> torch.Tensor:
    with use_backend("reference"):
        return _product(weight)


def test_an_array_that_reads_the_weight_keeps_its_memory():
    """Writing to the weight must not take the memory from under a NumPy array."""
    weight = nn.Parameter(torch.randn(50, 40), requires_grad=False)
    array = weight.detach().numpy()
    packing.packed_weight(weight)
    weight.data.fill_(7)
    packing.packed_weight(weight)
    assert (array == 7).all() and array.ctypes.data == weight.data_ptr()


def test_threads_that_pack_read_and_turn_back():
    """A model that is saved and accelerated in one thread while another draws with it."""
    weights = [nn.Parameter(torch.randn(50, 40), requires_grad=False) for _ in range(4)]
    exact = [_reference(weight) for weight in weights]
    wrong, end = [], time.monotonic() + 1.0
    before = sys.getswitchinterval()

    def draw():
        while time.monotonic() < end and not wrong:
            for weight, right in zip(weights, exact, strict=True):
                try:
                    if not (_product(weight) - right).abs().max() < 1e-4:
                        wrong.append("another product")
                except RuntimeError as error:
                    wrong.append(error)

    def save():
        while time.monotonic() < end and not wrong:
            for weight in weights:
                nn.ParameterList([weight]).state_dict()["0"].clone()
                packing.pack_weight(weight)

    threads = [threading.Thread(target=run) for run in (draw, draw, save)]
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert not wrong


@pytest.mark.parametrize(
    "read",
    [
        lambda w: w.clone(),
        lambda w: w + 0,
        lambda w: 0 + w,
        lambda w: w.T.T,
        lambda w: w[:],
        lambda w: torch.cat([w]),
        lambda w: torch.stack((w,))[0],
        lambda w: w.data,
        lambda w: F.linear(torch.eye(40), w).T,
        lambda w: torch.tensor(w.tolist()),
        lambda w: torch.from_numpy(w.numpy()),
        lambda w: torch.nn.utils.parameters_to_vector([w]).view(50, 40),
        lambda w: w.to(torch.float64).float(),
        lambda w: copy.copy(w),
    ],
)
@torch.no_grad()
def test_every_read_gives_the_values(read):
    weight = nn.Parameter(torch.randn(50, 40), requires_grad=False)
    values = weight.clone()
    packing.pack_weight(weight)
    assert read(weight).equal(values)
    assert type(weight) is nn.Parameter and weight.equal(values)


def test_what_needs_no_values_leaves_it_packed():
    weight = nn.Parameter(torch.randn(50, 40))
    packing.pack_weight(weight)
    assert (weight.numel(), weight.dim(), len(weight), weight.ndim) == (2000, 2, 50, 2)
    assert (weight.device.type, weight.is_floating_point(), weight.is_leaf) == ("cpu", True, True)
    assert weight.requires_grad_(False).grad is None
    weight.grad = torch.ones(50, 40)
    assert weight.grad.sum() == 2000 and {weight: 1}[weight] == 1
    assert type(weight) is PackedWeight


def test_memory_that_others_use_is_not_taken():
    weight = nn.Parameter(torch.randn(50, 40))
    alias = weight.detach()
    assert not packing.pack_weight(weight)
    del alias
    assert packing.pack_weight(weight)
    tied = nn.Parameter(torch.randn(100, 40)[:50])
    assert not packing.pack_weight(tied)


def test_a_weight_is_packed_once():
    call = call_of("adaln_linear", 1, 3, 40, 50)
    packed = packing.packed_weight(call["weight"])
    adaln_linear(**call)
    assert packing.packed_weight(call["weight"]) is packed
    packing.forget_packed()
    again = packing.packed_weight(call["weight"])
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


def test_a_packed_weight_dies_with_its_weight():
    packing.forget_packed()
    layer = nn.Linear(64, 80)
    packing.packed_weight(layer.weight)
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
            assert_accurate(kernel(op, "cpp"), getattr(reference, op), call)
            call["weight"].add_(1)


def test_a_large_packed_weight_lies_on_large_pages():
    packed = packing.packed_weight(torch.randn(1000, 1000))
    assert packed.data_ptr() % 2**21 == 0
