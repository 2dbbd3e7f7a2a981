"""diffusers' JointTransformerBlock: Stable Diffusion 3 and 3.5."""

from typing import Any

import torch

from ecar_kernels.foreign import serves
from ecar_kernels.fused import linear, rows
from ecar_kernels.integrations.branches import add, attend
from ecar_kernels.integrations.checks import differs, has_parameters
from ecar_kernels.integrations.diffusers import (
    JOINT_WEIGHTS,
    PROCESSORS,
    DiffusersBlock,
    adaptive_norm,
    attention,
    feed_forward,
    head_norms,
    mlp,
    modulations,
    queries_keys_values,
)

ZERO, CONTINUOUS = "AdaLayerNormZero", "AdaLayerNormContinuous"


@serves("diffusers.models.attention.JointTransformerBlock")
class JointTransformerBlock(DiffusersBlock):
    """Image and text, each with its modulations and layers, in one attention."""

    uses = ("adaln_linear", "stage_attention", "linear_gated_residual")
    weights = (
        *JOINT_WEIGHTS,
        "attn2.to_q.weight",
        "attn2.to_k.weight",
        "attn2.to_v.weight",
        "attn2.to_out.0.weight",
    )

    @classmethod
    def sizes(cls, block: Any) -> tuple[int, int]:
        return block.attn.query_dim, block.attn.inner_dim // block.attn.heads

    @staticmethod
    def why_not(block: Any) -> str | None:
        dual, last = block.use_dual_attention, block.context_pre_only
        return (
            differs(block, _chunk_size=None)
            or adaptive_norm(block, "norm1", "SD35AdaLayerNormZeroX" if dual else ZERO)
            or adaptive_norm(block, "norm1_context", CONTINUOUS if last else ZERO)
            or attention(block, "attn", f"{PROCESSORS}.JointAttnProcessor2_0")
            or head_norms(block, "attn", "norm_q", "norm_k", "norm_added_q", "norm_added_k")
            or has_parameters(block, "norm2")
            or feed_forward(block, "ff")
            or (_second_attention(block) if dual else None)
            or (None if last else has_parameters(block, "norm2_context"))
            or (None if last else feed_forward(block, "ff_context"))
        )

    def run(self: Any, hidden_states, encoder_hidden_states, temb, joint_attention_kwargs=None):
        x, context = rows(hidden_states), rows(encoder_hidden_states)
        ops = None if joint_attention_kwargs else self.ready(x, context)
        if ops is None:
            return None
        attn, norm, norm_context = self.attn, self.norm1, self.norm1_context
        parts = modulations(ops, norm, temb, 9 if self.use_dual_attention else 6)
        if self.context_pre_only:
            found = linear(ops, norm_context.linear, norm_context.silu(temb).to(context.dtype))
            context_scale, context_shift = found.unsqueeze(1).chunk(2, dim=-1)
            context_parts: tuple = (context_shift, context_scale)
        else:
            context_parts = modulations(ops, norm_context, temb, 6)
        if not (self.fits(x, *parts) and self.fits(context, *context_parts)):
            return None

        image = queries_keys_values(ops, attn, x, parts[:2], norm.norm.eps)
        text = queries_keys_values(
            ops, attn, context, context_parts[:2], norm_context.norm.eps, added=True
        )
        q, k, v = (torch.cat(pair, dim=1) for pair in zip(image, text, strict=True))
        attended, attended_text = attend(ops, q, k, v).split([x.shape[1], context.shape[1]], dim=1)
        added = add(ops, attn.to_out[0], attended, parts[2], x)
        if self.use_dual_attention:  # also of the x before the first
            q, k, v = queries_keys_values(ops, self.attn2, x, parts[6:8], norm.norm.eps)
            added = add(ops, self.attn2.to_out[0], attend(ops, q, k, v), parts[8], added)
        x = mlp(ops, self.ff, added, parts[3:6], self.norm2.eps)
        if self.context_pre_only:
            return None, x
        context = add(ops, attn.to_add_out, attended_text, context_parts[2], context)
        context = mlp(ops, self.ff_context, context, context_parts[3:], self.norm2_context.eps)
        return context, x


def _second_attention(block: Any) -> str | None:
    return attention(block, "attn2", f"{PROCESSORS}.JointAttnProcessor2_0") or head_norms(
        block, "attn2", "norm_q", "norm_k"
    )
