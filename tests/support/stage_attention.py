"""Calls of stage attention, in every layout that a user may have, and the rule of accuracy for
them."""

import importlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ecar_kernels.stage_attention import reference
from tests.support.accuracy import assert_accurate
from tests.support.backends import DEVICES

VAR_STAGES = (1, 4, 9, 16, 25, 36, 64, 100, 169, 256)
E_CAR = (16, 64, 256)
# Of C++: whole vectors of each instruction set, parts of them, and one element. Of Triton, one for
# each pair of parts: 16, 32, 32 + 16, 64, 64 + 16, 64 + 32, 128, 128 + 16 and so on.
HEAD_DIMS = {
    "cpp": (1, 3, 8, 13, 16, 33, 40, 64, 72, 80, 100, 128, 200, 256),
    "triton": (8, 24, 40, 64, 72, 96, 112, 136, 160, 192, 256),
    "sdpa": (8, 40, 64, 72, 80, 128, 256),
}
LAYOUTS = ("contiguous", "packed", "heads first", "tokens first", "sliced", "one head", "one image")


def tensor(
    batch: int, tokens: int, heads: int, head_dim: int, dtype: torch.dtype, layout: str, device: str
) -> Tensor:
    """Random [batch, tokens, heads, head_dim] in memory as asked."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    if layout == "packed":
        return normal(batch, tokens, 3, heads, head_dim)[:, :, 1]
    if layout == "heads first":
        return normal(batch, heads, tokens, head_dim).transpose(1, 2)
    if layout == "tokens first":
        return normal(tokens, batch, heads, head_dim).transpose(0, 1)
    if layout == "sliced":
        return normal(batch + 1, 2 * tokens, heads + 1, head_dim + 3)[1:, ::2, 1:, 2:-1]
    if layout == "one head":
        return normal(batch, tokens, 1, head_dim).expand(-1, -1, heads, -1)
    if layout == "one image":
        return normal(1, tokens, heads, head_dim).expand(batch, -1, -1, -1)
    return normal(batch, tokens, heads, head_dim)


def call_of(
    stages: Sequence[int],
    queries: int | None = None,
    *,
    batch: int = 1,
    heads: int = 2,
    head_dim: int = 8,
    dtype: torch.dtype = torch.float32,
    layouts: Sequence[str] | None = None,
    backend: str = "reference",
) -> dict[str, object]:
    """Arguments where a backend's tests run; q of the newest `queries` tokens, by default of all.

    layouts: how q, k and v lie in memory; by default they are views of one packed projection.
    """
    tokens, device = sum(stages), DEVICES.get(backend, "cpu")
    queries = tokens if queries is None else queries
    if layouts is None:
        x = torch.randn(batch, tokens, 3, heads, head_dim, device=device).to(dtype)
        q, k, v = x.unbind(2)
        q = q[:, tokens - queries :]
    else:
        q, k, v = (
            tensor(batch, count, heads, head_dim, dtype, layout, device)
            for count, layout in zip((queries, tokens, tokens), layouts, strict=True)
        )
    return {"q": q, "k": k, "v": v, "stage_lengths": stages}


def attend(backend: str) -> Callable[..., Tensor]:
    """A backend's own function, whatever the registry holds of this machine."""
    return importlib.import_module(f"ecar_kernels.stage_attention.{backend}").stage_attention


def check(backend: str, call: dict[str, object], *, gradients: bool = True) -> None:
    assert_accurate(attend(backend), reference.stage_attention, call, gradients=gradients)


def backward(
    backend: str, call: dict[str, object], *, scale: float | None = None
) -> tuple[Tensor, ...]:
    """The outputs and the gradients of q, k and v, for random gradients of the outputs."""
    inputs = [call[name].detach().requires_grad_() for name in "qkv"]
    out = attend(backend)(*inputs, call["stage_lengths"], scale=scale)
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(out.shape, generator=generator).to(out.device, out.dtype)
    return (out.detach(), *torch.autograd.grad(out, inputs, grad))
