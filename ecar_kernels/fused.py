"""Fused ops over layers: one launch where a layer is as written, else the layer is called.

Each takes `ops`, a module's (`OpsModule.ops`), and computes what the composition in its docstring
does. A product that ends in the residual stream may leave the statistics of its rows, which the
next one's normalisation takes with them: a tensor of the backend's own making, or None where it
leaves none. They are those of x as it was returned, and go on with that x alone.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ecar_kernels._written import as_written, has_affine
from ecar_kernels.acceleration import PUBLIC, Ops, unit_gate
from ecar_kernels.adaln.autograd import any_requires_grad

T = TypeVar("T", Tensor, Tensor | None)

__all__ = [
    "adaln_linear",
    "linear",
    "linear_gated_residual",
    "linear_residual",
    "mlp_gated_residual",
    "multiplies",
    "norm_linear",
    "norm_linear_cached",
    "norm_mlp_residual",
    "product",
    "rows",
]


def rows(x: T) -> T:
    """As the ops take it: the last dimension contiguous. A copy only where it is not; what is no
    tensor, or has no dimension, is left to the op."""
    if not isinstance(x, Tensor) or x.ndim == 0 or x.stride(-1) == 1 or x.shape[-1] <= 1:
        return x
    return x.contiguous()


def product(ops: Ops, weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """x W^T + b, x [.., N, C], where `multiplies` is true."""
    tokens, outputs = rows(x.reshape(-1, *x.shape[-2:])), len(weight)
    nothing = x.new_zeros(1, 1, outputs).expand(*tokens.shape[:2], -1)
    gate = unit_gate(tokens, outputs)
    return ops.linear_gated_residual(tokens, weight, bias, gate, nothing).view(*x.shape[:-1], -1)


def multiplies(ops: Ops, layer: Any, x: Tensor) -> bool:
    """Can `product` do what the layer does to x? Only where the ops' GEMMs read packed weights:
    elsewhere the libraries' own GEMM is the one to take."""
    return (
        ops is not PUBLIC
        and getattr(ops.linear_gated_residual, "prepare_weight", None) is not None
        and x.ndim >= 2
        and x.numel() > 0
        and as_written(layer, nn.Linear)
        and x.dtype is layer.weight.dtype
        and x.shape[-1] == layer.weight.shape[1]
    )


def linear(ops: Ops, layer: Any, x: Tensor) -> Tensor:
    """layer(x), x [.., N, C]."""
    if multiplies(ops, layer, x):
        return product(ops, layer.weight, layer.bias, x)
    return layer(x)


def adaln_linear(
    ops: Ops,
    layer: nn.Module,
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    *,
    gelu: bool = False,
    statistics: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """act(layer(adaln(x, shift, scale, **options)))."""
    if not as_written(layer, nn.Linear):
        return _act(layer(ops.adaln(x, shift, scale, **options)), gelu)
    given = x, shift, scale, layer.weight, layer.bias
    options["activation"] = "gelu_tanh" if gelu else None
    if statistics is not None:
        steps = options.get("step_shift"), options.get("step_scale")
        run = _chained(ops.adaln_linear, *given, *steps)
        if run is not None:
            return run(*given, statistics=statistics, **options)
    return ops.adaln_linear(*given, **options)


def norm_linear(
    ops: Ops,
    norm: nn.Module,
    layer: nn.Module,
    x: Tensor,
    *,
    gelu: bool = False,
    statistics: Tensor | None = None,
) -> Tensor:
    """act(layer(norm(x))): LayerNorm's bias is the shift and its weight all of the factor."""
    if has_affine(norm) and as_written(layer, nn.Linear) and norm.bias.shape == x.shape[-1:]:
        shift, scale = (p.expand(len(x), 1, -1) for p in (norm.bias, norm.weight))
        how: Any = {"gelu": gelu, "statistics": statistics}
        return adaln_linear(ops, layer, x, shift, scale, eps=norm.eps, scale_offset=0.0, **how)
    return _act(layer(norm(x)), gelu)


def _chained(op: Callable, *tensors: Tensor | None) -> Callable | None:
    """The op with what it leaves for the next (`Implementation.chained`); None where the backend
    has none, or gradients are asked for."""
    run = getattr(op, "chained", None)
    if run is None or (torch.is_grad_enabled() and any_requires_grad(*tensors)):
        return None
    return run


def norm_linear_cached(
    ops: Ops,
    norm: nn.Module,
    layer: nn.Module,
    x: Tensor,
    cache: Any,
    index: int,
    *,
    statistics: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """layer(norm(x)) in thirds: queries [B, n, H, D], and of all stages in the cache, as layer
    `index`, the keys and values [B, N, H, D], to which the product wrote the newest.

    None where that is not one launch: there is no cache, or none with a `room`; the backend writes
    to none; a layer is not as written; or gradients are asked for.
    """
    width = x.shape[-1]
    if (
        getattr(ops.adaln_linear, "chained", None) is None
        or not _has_room(cache)
        or not (has_affine(norm) and as_written(layer, nn.Linear))
        or norm.bias.shape != (width,)
        or layer.weight.shape != (3 * width, width)
    ):
        return None
    keys, values = cache.room(index, *x.shape[:2])
    run = _chained(ops.adaln_linear, x, keys, values)
    if run is None:
        return None
    newest = [kept[:, kept.shape[1] - x.shape[1] :] for kept in (keys, values)]
    if any(
        kept.shape[:2] != x.shape[:2]
        or kept.shape[2] * kept.shape[3] != width
        or kept.dtype is not x.dtype
        or kept.device != x.device
        or kept.stride(3) != 1
        or kept.stride(2) != kept.shape[3]
        for kept in newest
    ):
        return None
    shift, scale = (p.expand(len(x), 1, -1) for p in (norm.bias, norm.weight))
    options = dict(zip(("keys", "values"), (kept.flatten(2) for kept in newest), strict=True))
    options |= {"statistics": statistics, "eps": norm.eps, "scale_offset": 0.0}
    q = run(x, shift, scale, layer.weight, layer.bias, **options)
    return q.view(*q.shape[:2], *keys.shape[2:]), keys, values


def _has_room(cache: Any) -> bool:
    """Is its `write` that of the class which has its `room`?"""
    owners = (getattr(owner, "__dict__", {}) for owner in (cache, *type(cache).__mro__))
    return next(("room" in own for own in owners if "write" in own), False)


def linear_gated_residual(
    ops: Ops,
    layer: nn.Module,
    h: Tensor,
    gate: Tensor,
    residual: Tensor,
    *,
    step_gate: Tensor | None = None,
    leaves: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """residual + (gate + step_gate) layer(h), and where it `leaves` them its statistics."""
    if not as_written(layer, nn.Linear):
        return _gated_residual(ops, residual, layer(h), gate, step_gate), None
    given = h, layer.weight, layer.bias, gate, residual
    run = _chained(ops.linear_gated_residual, *given, step_gate) if leaves else None
    if run is not None:
        return run(*given, step_gate=step_gate)
    return ops.linear_gated_residual(*given, step_gate=step_gate), None


def linear_residual(
    ops: Ops, layer: nn.Module, h: Tensor, residual: Tensor, *, leaves: bool = False
) -> tuple[Tensor, Tensor | None]:
    """residual + layer(h), and where it `leaves` them its statistics."""
    if as_written(layer, nn.Linear):
        gate = unit_gate(residual, residual.shape[-1])
        return linear_gated_residual(ops, layer, h, gate, residual, leaves=leaves)
    return residual + layer(h), None


def mlp_gated_residual(
    ops: Ops,
    mlp: nn.Module,
    kind: type[Any],
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    gate: Tensor,
    *,
    step_gate: Tensor | None,
    statistics: Tensor | None = None,
    leaves: bool = False,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """x + (gate + step_gate) mlp(adaln(x, shift, scale, **options)), for an MLP of class `kind`
    with the layers fc1 and fc2 and a GELU between them; and where it `leaves` them its
    statistics. `statistics`: of x."""
    if not as_written(mlp, kind):
        branch = mlp(ops.adaln(x, shift, scale, **options))
        return _gated_residual(ops, x, branch, gate, step_gate), None
    options["statistics"] = statistics
    hidden = rows(adaln_linear(ops, mlp.fc1, x, shift, scale, gelu=True, **options))
    return linear_gated_residual(ops, mlp.fc2, hidden, gate, x, step_gate=step_gate, leaves=leaves)


def norm_mlp_residual(
    ops: Ops,
    norm: nn.Module,
    mlp: nn.Module,
    kind: type[Any],
    x: Tensor,
    *,
    statistics: Tensor | None = None,
    leaves: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """x + mlp(norm(x)), likewise."""
    if not as_written(mlp, kind):
        return x + mlp(norm(x)), None
    hidden = rows(norm_linear(ops, norm, mlp.fc1, x, gelu=True, statistics=statistics))
    return linear_residual(ops, mlp.fc2, hidden, x, leaves=leaves)


def _act(y: Tensor, gelu: bool) -> Tensor:
    return F.gelu(y, approximate="tanh") if gelu else y


def _gated_residual(
    ops: Ops, x: Tensor, branch: Tensor, gate: Tensor, step_gate: Tensor | None
) -> Tensor:
    """The branch is a foreign layer's: of another shape or dtype, the public op says so."""
    branch = rows(branch)
    if branch.shape != x.shape or branch.dtype is not x.dtype or branch.device != x.device:
        ops = PUBLIC
    return ops.gated_residual(x, branch, gate, step_gate=step_gate)
