"""The MLP of MAR's own code, which denoises each token of an image by itself.

The code is copied rather than installed, so the MLP and its blocks are known by what their forwards
compute. Tokens are [N, C], each with a condition of its own.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ecar_kernels import fused, recompute
from ecar_kernels._written import as_written, has_affine
from ecar_kernels.acceleration import PUBLIC, Ops
from ecar_kernels.foreign import Foreign, serves
from ecar_kernels.fused import rows
from ecar_kernels.integrations.branches import add, modulation, project
from ecar_kernels.integrations.checks import copied, has_parameters, unlike
from ecar_kernels.integrations.expression import same_forward


@serves("SimpleMLPAdaLN")
class SimpleMLPAdaLN(Foreign):
    """Its linear layers but the first and the time's; a block's are one launch each."""

    uses = ("adaln_linear", "linear_gated_residual")
    weights = (
        "cond_embed.weight",
        "res_blocks.*.adaLN_modulation.1.weight",
        "res_blocks.*.mlp.0.weight",
        "res_blocks.*.mlp.2.weight",
        "final_layer.adaLN_modulation.1.weight",
        "final_layer.linear.weight",
    )
    norms = ("res_blocks.*.in_ln",)

    @classmethod
    def sizes(cls, block: Any) -> tuple[int, int]:
        return block.model_channels, 0

    @classmethod
    def why_another_class(cls, kind: type[nn.Module]) -> str | None:
        return None if _is_network(kind.forward) else "its forward is not that of MAR's MLP"

    @staticmethod
    def why_not(block: Any) -> str | None:
        reason = (
            ("it checkpoints its blocks" if getattr(block, "grad_checkpointing", False) else None)
            or unlike(block, "res_blocks", nn.ModuleList)
            or copied(block, "final_layer", _is_last, "MAR's last layer")
            or has_parameters(block, "final_layer.norm_final")
        )
        for index in block.res_blocks._modules if reason is None else ():
            name = f"res_blocks.{index}"
            reason = (
                copied(block, name, _is_block, "MAR's block")
                or unlike(block, f"{name}.mlp", nn.Sequential)
                or unlike(block, f"{name}.mlp.1", nn.SiLU)
            )
            if reason is not None:
                break
        return reason

    def run(self: Any, x, t, c):
        if not isinstance(x, Tensor) or x.ndim != 2:
            return None
        if (ops := self.ready(x.new_empty(()).expand(1, len(x), self.width))) is None:
            return None
        x = rows(self.input_proj(x))[None]
        condition = self.time_embed(t) + fused.linear(ops, self.cond_embed, c)
        for block in self.res_blocks:
            shift, scale, gate = _parts(ops, block, condition, 3)
            if not self.fits(x, shift, scale, gate):
                return None
            x = _residual(ops, block, x, shift, scale, gate)
        last = self.final_layer
        shift, scale = _parts(ops, last, condition, 2)
        (x,) = project(ops, x, (shift, scale), last.norm_final.eps, last.linear)
        return x[0].clone()  # no view, whose hooks an operation in place would drop


def _parts(ops: Ops, block: Any, condition: Tensor, count: int) -> Sequence[Tensor]:
    """[1, N, C] each."""
    return modulation(ops, block.adaLN_modulation, condition)[None].chunk(count, dim=-1)


def _residual(
    ops: Ops, block: Any, x: Tensor, shift: Tensor, scale: Tensor, gate: Tensor
) -> Tensor:
    """x + gate W2 SiLU(W1 (norm(x) (1 + scale) + shift)): the norm's own weight and bias go into
    the modulation."""
    norm, first, last, factor = block.in_ln, block.mlp[0], block.mlp[2], 1 + scale
    if not (has_affine(norm) and as_written(first, nn.Linear)):
        return add(ops, last, F.silu(first(norm(x) * factor + shift)), gate, x)
    shift, scale = torch.addcmul(shift, norm.bias, factor), norm.weight * factor
    if ops is not PUBLIC:
        hidden = ops.adaln_linear(
            x, shift, scale, first.weight, first.bias, eps=norm.eps, scale_offset=0.0
        )
        return add(ops, last, F.silu(hidden), gate, x)
    scale = scale - 1
    y = ops.adaln(x, shift, scale, eps=norm.eps)
    hidden = recompute.linear(first, *recompute.adaln(y, x, shift, scale, None, None, norm.eps))
    return ops.gated_residual(x, rows(recompute.linear(last, *recompute.silu(hidden))), gate)


# What the code is known to compute.


def _network(net: Any, x: Any, time: Any, condition: Any) -> Any:
    x, condition = net.input_proj(x), net.time_embed(time) + net.cond_embed(condition)
    for block in net.res_blocks:
        x = block(x, condition)
    return net.final_layer(x, condition)


def _block(block: Any, x: Any, condition: Any) -> Any:
    shift, scale, gate = block.adaLN_modulation(condition).chunk(3, dim=-1)
    return x + gate * block.mlp(block.in_ln(x) * (1 + scale) + shift)


def _last(layer: Any, x: Any, condition: Any) -> Any:
    shift, scale = layer.adaLN_modulation(condition).chunk(2, dim=-1)
    return layer.linear(layer.norm_final(x) * (1 + scale) + shift)


@functools.cache
def _is_network(forward: Callable) -> bool:
    parts = "input_proj", "time_embed", "cond_embed", "res_blocks", "final_layer"
    return same_forward(forward, _network, 3, parts, (), (("grad_checkpointing", False),))


@functools.cache
def _is_block(forward: Callable) -> bool:
    return same_forward(forward, _block, 2, ("in_ln", "mlp", "adaLN_modulation"))


@functools.cache
def _is_last(forward: Callable) -> bool:
    return same_forward(forward, _last, 2, ("norm_final", "linear", "adaLN_modulation"))
