"""Calls of the Triton stage attention, and the accuracy rule for them."""

import importlib

import torch

from ecar_kernels.stage_attention import reference
from tests.support.accuracy import assert_accurate

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def packed(stages, *, queries=None, batch=1, heads=2, head_dim=8, dtype=torch.float32):
    """q, k, v as views of one packed projection; q of the newest `queries` tokens."""
    x = torch.randn(batch, sum(stages), 3, heads, head_dim, device=DEVICE).to(dtype)
    q, k, v = x.unbind(2)
    first = 0 if queries is None else sum(stages) - queries
    return {"q": q[:, first:], "k": k, "v": v, "stage_lengths": stages}


def check(call: dict, *, gradients: bool = True) -> None:
    triton = importlib.import_module("ecar_kernels.stage_attention.triton")
    assert_accurate(triton.stage_attention, reference.stage_attention, call, gradients=gradients)
