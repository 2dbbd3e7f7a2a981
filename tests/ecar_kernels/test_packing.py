"""Weights held packed alone: the values are there and back, and no write is lost."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ecar_kernels
from ecar_kernels import use_backend
from ecar_kernels.flow_block import packing
from ecar_kernels.flow_block.packing import PackedWeight
from ecar_kernels.registry import KERNEL_DTYPES
from tests.support.native import needs_native

pytestmark = needs_native


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (16, 33), (48, 32), (48, 7), (70, 9), (96, 64),
                                   (112, 8)], ids=str)
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


@pytest.mark.parametrize("touch", [
    lambda w: w.detach().fill_(2), lambda w: w.data.fill_(2), lambda w: w.view(-1).fill_(2),
    lambda w: w.T.fill_(2), lambda w: w.numpy().fill(2), lambda w: w.copy_(w.new_full((), 2)),
    lambda w: w.fill_(2), lambda w: w.__setitem__(slice(None), 2),
    lambda w: torch.full(w.shape, 2.0, out=w), lambda w: torch._foreach_mul_([w.fill_(1)], 2),
    lambda w: nn.init.constant_(w, 2),
    lambda w: setattr(w, "data", torch.full((50, 40), 2.0)),
    lambda w: torch.stack([w], out=w.new_empty(1, 50, 40)) is not None and w.fill_(2),
    lambda w: torch.from_dlpack(w).fill_(2)])
@torch.no_grad()
def test_no_write_is_lost(touch):
    """However it is written to, or aliased and then written to."""
    weight = nn.Parameter(torch.randn(50, 40), requires_grad=False)
    packing.pack_weight(weight)
    touch(weight)
    assert type(weight) is nn.Parameter and weight.eq(2).all()
    x, zeros = torch.randn(1, 3, 40), torch.zeros(1, 1, 40)
    ours = ecar_kernels.adaln_linear(x, zeros, zeros, weight, None)
    with use_backend("reference"):
        assert (ours - ecar_kernels.adaln_linear(x, zeros, zeros, weight, None)).abs().max(
            ) < 1e-4


@pytest.mark.parametrize("read", [
    lambda w: w.clone(), lambda w: w + 0, lambda w: 0 + w, lambda w: w.T.T, lambda w: w[:],
    lambda w: torch.cat([w]), lambda w: torch.stack((w,))[0], lambda w: w.data,
    lambda w: F.linear(torch.eye(40), w).T, lambda w: torch.tensor(w.tolist()),
    lambda w: torch.from_numpy(w.numpy()), lambda w: torch.nn.utils.parameters_to_vector(
        [w]).view(50, 40), lambda w: w.to(torch.float64).float(), lambda w: copy.copy(w)])
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
    assert (weight.device.type, weight.is_floating_point(), weight.is_leaf) == (
        "cpu", True, True)
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
