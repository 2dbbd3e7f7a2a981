"""The block of VAR's own code: over all its stages with their mask, or one by one with its cache.

The code is copied rather than installed, so the block, its attention, its MLP and its stochastic
depth are known by what their forwards compute.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ecar_kernels import recompute
from ecar_kernels._written import as_written
from ecar_kernels.acceleration import PUBLIC, Ops
from ecar_kernels.foreign import Foreign, serves
from ecar_kernels.fused import rows
from ecar_kernels.integrations.branches import add, add_mlp, attend, modulation
from ecar_kernels.integrations.checks import copied, differs, drops, has_parameters, unlike
from ecar_kernels.integrations.expression import same_forward
from ecar_kernels.stage_attention.reference import block_causal_mask


@serves("AdaLNSelfAttn")
class AdaLNSelfAttn(Foreign):
    """adaLN, attention over the stages, MLP: five launches, and cosine attention's norms."""

    uses = ("adaln_linear", "stage_attention", "linear_gated_residual")
    weights = (
        "ada_lin.1.weight",
        "attn.mat_qkv.weight",
        "attn.proj.weight",
        "ffn.fc1.weight",
        "ffn.fc2.weight",
    )

    @classmethod
    def sizes(cls, block: Any) -> tuple[int, int]:
        return block.C, block.attn.head_dim

    @classmethod
    def why_another_class(cls, kind: type[nn.Module]) -> str | None:
        return None if _is_block(kind.forward) else "its forward is not that of VAR's block"

    @staticmethod
    def why_not(block: Any) -> str | None:
        attn, ffn = block.attn, block.ffn
        return (
            has_parameters(block, "ln_wo_grad")
            or copied(block, "attn", _is_attention, "VAR's attention")
            or differs(attn, "attn", using_flash=False, using_xform=False)
            or (
                f"attn: it is training with a dropout of {attn.attn_drop}"
                if attn.training and attn.attn_drop
                else None
            )
            or drops(block, "attn.proj_drop")
            or copied(block, "ffn", _is_mlp, "VAR's MLP")
            or differs(ffn, "ffn", fused_mlp_func=None)
            or unlike(block, "ffn.act", nn.GELU)
            or differs(ffn.act, "ffn.act", approximate="tanh")
            or drops(block, "ffn.drop")
            or (
                copied(block, "drop_path", _is_drop_path, "stochastic depth")
                if unlike(block, "drop_path", nn.Identity)
                else None
            )
        )

    def run(self: Any, x, cond_BD, attn_bias):
        x = rows(x)
        ops, stages = self.ready(x), None
        if ops is not None and attn_bias is not None:
            stages = _stages(attn_bias, x)
        if ops is None or (attn_bias is not None and stages is None):
            return None
        if self.shared_aln:
            parts = (self.ada_gss + cond_BD).unbind(2)
        else:
            parts = modulation(ops, self.ada_lin, cond_BD).view(-1, 1, 6, self.C).unbind(2)
        if not self.fits(x, *parts) or len(parts[0]) != len(x):
            return None
        gate, mlp_gate, scale, mlp_scale, shift, mlp_shift = parts
        attn, mlp, eps = self.attn, self.ffn, self.ln_wo_grad.eps

        q, k, v = _queries_keys_values(ops, attn, x, shift, scale, eps)
        if attn.caching:  # kept as the block itself keeps them, heads first
            if attn.cached_k is not None:
                k = torch.cat((attn.cached_k.transpose(1, 2), k), dim=1)
                v = torch.cat((attn.cached_v.transpose(1, 2), v), dim=1)
            attn.cached_k, attn.cached_v = k.transpose(1, 2), v.transpose(1, 2)
        if stages is None:  # the newest stage sees all
            before = k.shape[1] - q.shape[1]
            stages = (before, q.shape[1]) if before else (q.shape[1],)
        attended = attend(ops, q, k, v, stages, scale=attn.scale)
        # What drops a branch of an image scales the branch's gate as well.
        x = add(ops, attn.proj, attended, self.drop_path(gate), x)
        mlp_gate = self.drop_path(mlp_gate)
        return add_mlp(ops, mlp.fc1, mlp.fc2, x, (mlp_shift, mlp_scale, mlp_gate), eps)


def _queries_keys_values(
    ops: Ops, attn: Any, x: Tensor, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, ...]:
    """[B, N, H, D] each. The layer's weight is read, whatever the layer is, as in VAR."""
    layer, bias = attn.mat_qkv, torch.cat((attn.q_bias, attn.zero_k_bias, attn.v_bias))
    if not as_written(layer, nn.Linear):
        qkv = F.linear(ops.adaln(x, shift, scale, eps=eps), layer.weight, bias)
    elif ops is PUBLIC:
        y = ops.adaln(x, shift, scale, eps=eps)
        made = recompute.adaln(y, x, shift, scale, None, None, eps)
        qkv = recompute.product(layer.weight, bias, *made)
    else:
        qkv = ops.adaln_linear(x, shift, scale, layer.weight, bias, eps=eps)
    q, k, v = qkv.unflatten(-1, (3, attn.num_heads, attn.head_dim)).unbind(2)
    if attn.attn_l2_norm:
        factor = attn.scale_mul_1H11.clamp_max(attn.max_scale_mul).exp().transpose(1, 2)
        q, k = F.normalize(q, dim=-1).mul(factor), F.normalize(k, dim=-1)
    return q, k, v


def _stages(bias: Any, x: Tensor) -> tuple[int, ...] | None:
    """The stages whose tokens a mask of zeros and minus infinity lets attend to no later stage.

    None for another mask, and while a CUDA graph is captured, which cannot wait for the answer.
    """
    tokens = x.shape[1]
    if (
        not isinstance(bias, Tensor)
        or bias.shape != (1, 1, tokens, tokens)
        or bias.dtype is not x.dtype
        or bias.device != x.device
        or bias.requires_grad
        or (bias.is_cuda and torch.cuda.is_current_stream_capturing())
    ):
        return None
    mask = bias[0, 0]
    stages, end, seen = [], 0, (mask == 0).sum(1).tolist()
    while end < tokens:
        if seen[end] <= end:
            return None
        stages.append(seen[end] - end)
        end = seen[end]
    found = tuple(stages)
    return found if mask.equal(_mask(found, bias.dtype, bias.device)) else None


@functools.lru_cache(maxsize=16)
def _mask(stages: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        seen = block_causal_mask(stages, sum(stages), device=device)
        return torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, -torch.inf)


# What the code is known to compute.


def _block(block: Any, x: Any, condition: Any, bias: Any) -> Any:
    if block.shared_aln:
        parts = (block.ada_gss + condition).unbind(2)
    else:
        parts = block.ada_lin(condition).view(-1, 1, 6, block.C).unbind(2)
    gate, mlp_gate, scale, mlp_scale, shift, mlp_shift = parts
    y = block.ln_wo_grad(x) * (1 + scale) + shift
    x = x + block.drop_path(block.attn(y, attn_bias=bias) * gate)
    y = block.ln_wo_grad(x) * (1 + mlp_scale) + mlp_shift
    return x + block.drop_path(block.ffn(y) * mlp_gate)


def _attention(attn: Any, x: Any, bias: Any) -> Any:
    batch, tokens, width = x.shape
    biases = torch.cat((attn.q_bias, attn.zero_k_bias, attn.v_bias))
    qkv = F.linear(input=x, weight=attn.mat_qkv.weight, bias=biases)
    qkv = qkv.view(batch, tokens, 3, attn.num_heads, attn.head_dim).permute(2, 0, 3, 1, 4)
    q, k, v = qkv.unbind(dim=0)
    if attn.attn_l2_norm:
        q = F.normalize(q, dim=-1) * attn.scale_mul_1H11.clamp_max(attn.max_scale_mul).exp()
        k = F.normalize(k, dim=-1)
    if attn.caching:
        if attn.cached_k is not None:
            k = torch.cat((attn.cached_k, k), dim=2)
            v = torch.cat((attn.cached_v, v), dim=2)
        attn.cached_k, attn.cached_v = k, v
    y = F.scaled_dot_product_attention(
        query=q, key=k, value=v, scale=attn.scale, attn_mask=bias, dropout_p=0.0
    )
    return attn.proj_drop(attn.proj(y.transpose(1, 2).view(batch, tokens, width)))


def _drop_path(module: Any, x: Any) -> Any:
    if not module.training:
        return x
    keep = 1 - module.drop_prob
    scaled = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep)
    return x * (scaled.div_(keep) if module.scale_by_keep else scaled)


def _mlp(mlp: Any, x: Any) -> Any:
    return mlp.drop(mlp.fc2(mlp.act(mlp.fc1(x))))


@functools.cache
def _is_block(forward: Callable) -> bool:
    parts = "ln_wo_grad", "attn", "ffn", "drop_path", "ada_lin"
    return all(
        same_forward(forward, _block, 3, parts, ("ada_gss",), (("shared_aln", shared), ("C", 7)))
        for shared in (False, True)
    )


@functools.cache
def _is_attention(forward: Callable) -> bool:
    parts, tensors = ("mat_qkv", "proj", "proj_drop"), ("q_bias", "zero_k_bias", "v_bias")
    sizes = {"num_heads": 5, "head_dim": 7, "scale": 0.5, "max_scale_mul": 11.0}
    served = {"attn_drop": 0.0, "using_flash": False, "using_xform": False}
    return all(
        same_forward(
            forward,
            _attention,
            2,
            parts,
            (*tensors, "scale_mul_1H11", *(("cached_k", "cached_v") if cached else ())),
            (
                *(sizes | served).items(),
                *(() if cached else (("cached_k", None), ("cached_v", None))),
                ("attn_l2_norm", cosine),
                ("caching", caching),
                ("training", training),
            ),
        )
        for cosine in (False, True)
        for caching, cached in ((False, False), (True, False), (True, True))
        for training in (False, True)
    )


@functools.cache
def _is_mlp(forward: Callable) -> bool:
    parts = "fc1", "act", "fc2", "drop"
    return same_forward(forward, _mlp, 1, parts, (), (("fused_mlp_func", None),))


@functools.cache
def _is_drop_path(forward: Callable) -> bool:
    return all(
        same_forward(
            forward,
            _drop_path,
            1,
            (),
            (),
            (("drop_prob", 0.25), ("scale_by_keep", scaled), ("training", training)),
        )
        for scaled in (False, True)
        for training in (False, True)
    )
