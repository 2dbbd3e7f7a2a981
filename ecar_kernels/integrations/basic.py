"""diffusers' BasicTransformerBlock: DiT's (ada_norm_zero) and PixArt's (ada_norm_single)."""

from typing import Any

from ecar_kernels.foreign import serves
from ecar_kernels.fused import rows
from ecar_kernels.integrations.branches import add, attend
from ecar_kernels.integrations.checks import differs, has_parameters
from ecar_kernels.integrations.diffusers import (
    PROCESSORS,
    DiffusersBlock,
    adaptive_norm,
    attention,
    feed_forward,
    mlp,
    modulations,
    queries_keys_values,
)


@serves("diffusers.models.attention.BasicTransformerBlock")
class BasicTransformerBlock(DiffusersBlock):
    """Self-attention and MLP in five launches; a cross-attention between them is called."""

    uses = ("adaln_linear", "stage_attention", "linear_gated_residual")
    weights = (
        "norm1.linear.weight",
        "attn1.to_q.weight",
        "attn1.to_k.weight",
        "attn1.to_v.weight",
        "attn1.to_out.0.weight",
        "ff.net.0.proj.weight",
        "ff.net.2.weight",
    )

    @classmethod
    def sizes(cls, block: Any) -> tuple[int, int]:
        return block.dim, block.attention_head_dim

    @staticmethod
    def why_not(block: Any) -> str | None:
        return (
            _norms(block)
            or differs(block, pos_embed=None, _chunk_size=None, only_cross_attention=False)
            or attention(block, "attn1", f"{PROCESSORS}.AttnProcessor2_0")
            or differs(block.attn1, "attn1", norm_q=None, norm_k=None)
            or feed_forward(block, "ff")
        )

    def run(
        self: Any,
        hidden_states,
        attention_mask=None,
        encoder_hidden_states=None,
        encoder_attention_mask=None,
        timestep=None,
        cross_attention_kwargs=None,
        class_labels=None,
        added_cond_kwargs=None,
    ):
        x = rows(hidden_states)  # the patch embedding's are transposed
        if attention_mask is not None or cross_attention_kwargs:
            return None
        if (ops := self.ready(x)) is None:
            return None
        if self.norm_type == "ada_norm_zero":
            norm, last = self.norm1, self.norm3
            embedding = norm.emb(timestep, class_labels, hidden_dtype=x.dtype)
            parts, norm = modulations(ops, norm, embedding, 6), norm.norm
        else:
            norm, last = self.norm1, self.norm2
            parts = (self.scale_shift_table[None] + timestep.reshape(len(x), 6, -1)).chunk(6, dim=1)
        if not self.fits(x, *parts):
            return None
        q, k, v = queries_keys_values(ops, self.attn1, x, parts[:2], norm.eps)
        x = add(ops, self.attn1.to_out[0], attend(ops, q, k, v), parts[2], x)
        if self.attn2 is not None:
            crossed = self.attn2(
                x,
                encoder_hidden_states=encoder_hidden_states,
                attention_mask=encoder_attention_mask,
            )
            x = rows(crossed + x)
        return mlp(ops, self.ff, x, parts[3:], last.eps)


def _norms(block: Any) -> str | None:
    if block.norm_type == "ada_norm_zero":
        return (
            adaptive_norm(block, "norm1", "AdaLayerNormZero")
            or has_parameters(block, "norm3")
            or differs(block, attn2=None)
            or ("norm1: it has no embedding" if block.norm1.emb is None else None)
        )
    if block.norm_type == "ada_norm_single":
        return has_parameters(block, "norm1") or has_parameters(block, "norm2")
    return f"its norm_type is {block.norm_type!r}, not 'ada_norm_zero' or 'ada_norm_single'"
