"""diffusers' Flux: blocks of image and text, and blocks of both in one stream."""

import sys
from typing import Any

import torch
from torch import Tensor, nn

from ecar_kernels.foreign import serves
from ecar_kernels.fused import rows
from ecar_kernels.integrations.branches import add, attend, project
from ecar_kernels.integrations.checks import differs, drops, has_parameters, unlike
from ecar_kernels.integrations.diffusers import (
    JOINT_WEIGHTS,
    DiffusersBlock,
    adaptive_norm,
    backend,
    clipped,
    feed_forward,
    mlp,
    modulations,
    processed,
    queries_keys_values,
)

FLUX = "diffusers.models.transformers.transformer_flux"


@serves(f"{FLUX}.FluxTransformerBlock")
class FluxTransformerBlock(DiffusersBlock):
    """Image and text, each with its modulations and layers, in one attention; text comes first."""

    uses = ("adaln_linear", "stage_attention", "linear_gated_residual")
    weights = JOINT_WEIGHTS

    @classmethod
    def sizes(cls, block: Any) -> tuple[int, int]:
        return block.attn.query_dim, block.attn.head_dim

    @staticmethod
    def why_not(block: Any) -> str | None:
        return (
            adaptive_norm(block, "norm1", "AdaLayerNormZero")
            or adaptive_norm(block, "norm1_context", "AdaLayerNormZero")
            or _attention(block)
            or drops(block, "attn.to_out.1")
            or has_parameters(block, "norm2")
            or has_parameters(block, "norm2_context")
            or feed_forward(block, "ff")
            or feed_forward(block, "ff_context")
        )

    def run(
        self: Any,
        hidden_states,
        encoder_hidden_states,
        temb,
        image_rotary_emb=None,
        joint_attention_kwargs=None,
    ):
        x, context = rows(hidden_states), rows(encoder_hidden_states)
        ops = None if joint_attention_kwargs else self.ready(x, context)
        if ops is None:
            return None
        attn, norm, norm_context = self.attn, self.norm1, self.norm1_context
        parts = modulations(ops, norm, temb, 6)
        context_parts = modulations(ops, norm_context, temb, 6)
        if not (self.fits(x, *parts) and self.fits(context, *context_parts)):
            return None

        image = queries_keys_values(ops, attn, x, parts[:2], norm.norm.eps)
        text = queries_keys_values(
            ops, attn, context, context_parts[:2], norm_context.norm.eps, added=True
        )
        q, k, v = (torch.cat(pair, dim=1) for pair in zip(text, image, strict=True))
        attended = attend(ops, _rotated(q, image_rotary_emb), _rotated(k, image_rotary_emb), v)
        attended_text, attended = attended.split([context.shape[1], x.shape[1]], dim=1)

        x = add(ops, attn.to_out[0], attended, parts[2], x)
        x = mlp(ops, self.ff, x, parts[3:], self.norm2.eps)
        context = add(ops, attn.to_add_out, attended_text, context_parts[2], context)
        context = mlp(ops, self.ff_context, context, context_parts[3:], self.norm2_context.eps)
        return clipped(context), x


@serves(f"{FLUX}.FluxSingleTransformerBlock")
class FluxSingleTransformerBlock(DiffusersBlock):
    """Attention and MLP side by side, with one projection at their end."""

    uses = ("adaln_linear", "stage_attention", "linear_gated_residual")
    weights = (
        "norm.linear.weight",
        "attn.to_q.weight",
        "attn.to_k.weight",
        "attn.to_v.weight",
        "proj_mlp.weight",
        "proj_out.weight",
    )

    @classmethod
    def sizes(cls, block: Any) -> tuple[int, int]:
        return block.attn.query_dim, block.attn.head_dim

    @staticmethod
    def why_not(block: Any) -> str | None:
        return (
            adaptive_norm(block, "norm", "AdaLayerNormZeroSingle")
            or _attention(block)
            or unlike(block, "act_mlp", nn.GELU)
            or differs(block.act_mlp, "act_mlp", approximate="tanh")
        )

    def run(
        self: Any,
        hidden_states,
        encoder_hidden_states,
        temb,
        image_rotary_emb=None,
        joint_attention_kwargs=None,
    ):
        ops = None if joint_attention_kwargs else self.ready(hidden_states, encoder_hidden_states)
        if ops is None:
            return None
        x = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        attn, norm = self.attn, self.norm
        parts = modulations(ops, norm, temb, 3)
        if not self.fits(x, *parts):
            return None
        eps = norm.norm.eps
        q, k, v = queries_keys_values(ops, attn, x, parts[:2], eps)
        attended = attend(ops, _rotated(q, image_rotary_emb), _rotated(k, image_rotary_emb), v)
        hidden = project(ops, x, parts[:2], eps, self.proj_mlp, gelu=True)
        x = add(ops, self.proj_out, torch.cat([attended, *hidden], dim=2), parts[2], x)
        return clipped(x).split([encoder_hidden_states.shape[1], hidden_states.shape[1]], dim=1)


def _attention(block: Any) -> str | None:
    return (
        unlike(block, "attn", f"{FLUX}.FluxAttention")
        or differs(block.attn, "attn", fused_projections=False)
        or processed(block.attn, "attn", f"{FLUX}.FluxAttnProcessor")
        or backend()
    )


def _rotated(x: Tensor, rotary: Any) -> Tensor:
    """By diffusers' own function."""
    return x if rotary is None else sys.modules[FLUX].apply_rotary_emb(x, rotary, sequence_dim=1)
