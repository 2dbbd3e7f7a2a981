"""What diffusers' blocks share: their adaptive norms, attention modules and feed-forwards."""

import contextlib
import copy
import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ecar_kernels.acceleration import Ops
from ecar_kernels.foreign import Foreign, loaded, why_patched
from ecar_kernels.fused import linear
from ecar_kernels.integrations.branches import add_mlp, project
from ecar_kernels.integrations.checks import differs, drops, has_parameters, part, unlike

NORMS = "diffusers.models.normalization"
PROCESSORS = "diffusers.models.attention_processor"
# Of an attention over image and text, and of a block with layers for each.
JOINT_LAYERS = (
    "attn.to_q.weight",
    "attn.to_k.weight",
    "attn.to_v.weight",
    "attn.to_out.0.weight",
    "attn.add_q_proj.weight",
    "attn.add_k_proj.weight",
    "attn.add_v_proj.weight",
    "attn.to_add_out.weight",
)
JOINT_WEIGHTS = (
    "norm1.linear.weight",
    "norm1_context.linear.weight",
    *JOINT_LAYERS,
    "ff.net.0.proj.weight",
    "ff.net.2.weight",
    "ff_context.net.0.proj.weight",
    "ff_context.net.2.weight",
)


class DiffusersBlock(Foreign):
    """Base of the integrations for diffusers' blocks."""

    @classmethod
    def introduce(cls, joined: Any) -> None:
        # Its caches look a block up by its class, in a table that models need not have imported.
        with contextlib.suppress(ImportError):
            importlib.import_module("diffusers.hooks._helpers")
        table = loaded("diffusers.hooks._helpers.TransformerBlockRegistry")
        if table is not None:
            with contextlib.suppress(ValueError):  # the block's class is not in it
                table.register(joined, copy.copy(table.get(joined.original)))


def adaptive_norm(block: nn.Module, name: str, kind: str) -> str | None:
    """None where it is diffusers' norm of class `kind`, over a LayerNorm without parameters."""
    return unlike(block, name, f"{NORMS}.{kind}") or has_parameters(block, f"{name}.norm")


def attention(block: nn.Module, name: str, processor: str) -> str | None:
    """None where it is diffusers' Attention of tokens, served by this processor (its full name)."""
    return (
        unlike(block, name, f"{PROCESSORS}.Attention")
        or differs(
            part(block, name),
            name,
            spatial_norm=None,
            group_norm=None,
            residual_connection=False,
            rescale_output_factor=1.0,
        )
        or processed(part(block, name), name, processor)
        or drops(block, f"{name}.to_out.1")
    )


def processed(module: Any, name: str, kind: str) -> str | None:
    """None where an attention is computed by a processor of just that class, as it is written."""
    found, expected = module.processor, loaded(kind)
    if expected is None or type(found) is not expected:
        return f"{name}: its processor is a {type(found).__name__}"
    if (reason := why_patched(expected, "__call__")) is not None:
        return f"{name}: {reason}"
    for attribute in ("_attention_backend", "_parallel_config"):
        if (value := getattr(found, attribute, None)) is not None:
            return f"{name}: its processor's {attribute} is {value!r}"
    return None


def backend() -> str | None:
    """None where diffusers is to attend by PyTorch's own attention, as without being asked."""
    backends = loaded("diffusers.models.attention_dispatch._AttentionBackendRegistry")
    active = getattr(backends, "_active_backend", None)
    return None if active == "native" else f"diffusers' attention backend is {active!r}"


def head_norms(block: nn.Module, name: str, *norms: str) -> str | None:
    """None where the norms of queries and keys are absent, or diffusers' RMSNorm."""
    for norm in norms:
        if part(block, f"{name}.{norm}") is not None:
            reason = unlike(block, f"{name}.{norm}", f"{NORMS}.RMSNorm")
            if reason is not None:
                return reason
    return None


def feed_forward(block: nn.Module, name: str) -> str | None:
    """None where it is diffusers' FeedForward with tanh's GELU."""
    return (
        unlike(block, name, "diffusers.models.attention.FeedForward")
        or unlike(block, f"{name}.net.0", "diffusers.models.activations.GELU")
        or differs(part(block, f"{name}.net.0"), f"{name}.net.0", approximate="tanh")
        or drops(block, f"{name}.net.1")
        or (drops(block, f"{name}.net.3") if len(part(block, f"{name}.net")) > 3 else None)
    )


def modulations(ops: Ops, norm: Any, embedding: Tensor, count: int) -> tuple[Tensor, ...]:
    """An adaptive norm's parts, [B, 1, C] each, of its embedding [B, C]."""
    found = linear(ops, norm.linear, norm.silu(embedding))
    return found.unsqueeze(1).chunk(count, dim=-1)


def queries_keys_values(
    ops: Ops, module: Any, x: Tensor, parts: Sequence[Tensor], eps: float, *, added: bool = False
) -> list[Tensor]:
    """q, k and v of LN(x) (1 + scale) + shift, [B, N, H, D] each; parts: shift and scale.

    added: by the layers for text of an attention over image and text.
    """
    if added:
        layers = module.add_q_proj, module.add_k_proj, module.add_v_proj
        norms = module.norm_added_q, module.norm_added_k
    else:
        layers, norms = (module.to_q, module.to_k, module.to_v), (module.norm_q, module.norm_k)
    found = [
        y.unflatten(-1, (-1, module.inner_dim // module.heads))
        for y in project(ops, x, parts, eps, *layers)
    ]
    for index, norm in enumerate(norms):
        if norm is not None:
            found[index] = norm(found[index])
    return found


def mlp(ops: Ops, module: Any, x: Tensor, parts: Sequence[Tensor], eps: float) -> Tensor:
    """x + gate module(LN(x) (1 + scale) + shift), of a FeedForward; parts: shift, scale, gate."""
    return add_mlp(ops, module.net[0].proj, module.net[2], x, parts, eps)


def clipped(x: Tensor) -> Tensor:
    return x.clip(-65504, 65504) if x.dtype is torch.float16 else x
