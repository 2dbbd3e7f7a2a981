"""diffusers' QwenImageTransformerBlock: Qwen-Image."""

import sys
from typing import Any

import torch
from torch import Tensor, nn

from ecar_kernels.foreign import serves, why_patched
from ecar_kernels.fused import rows
from ecar_kernels.integrations.branches import add, attend, modulation
from ecar_kernels.integrations.checks import differs, has_parameters
from ecar_kernels.integrations.diffusers import (
    JOINT_LAYERS,
    DiffusersBlock,
    attention,
    backend,
    clipped,
    feed_forward,
    head_norms,
    mlp,
    queries_keys_values,
)

QWEN = "diffusers.models.transformers.transformer_qwenimage"


@serves(f"{QWEN}.QwenImageTransformerBlock")
class QwenImageTransformerBlock(DiffusersBlock):
    """Image and text, each with its modulations and layers, in one attention; text comes first."""

    uses = ("adaln_linear", "stage_attention", "linear_gated_residual")
    weights = (
        "img_mod.1.weight",
        "txt_mod.1.weight",
        *JOINT_LAYERS,
        "img_mlp.net.0.proj.weight",
        "img_mlp.net.2.weight",
        "txt_mlp.net.0.proj.weight",
        "txt_mlp.net.2.weight",
    )

    @classmethod
    def sizes(cls, block: Any) -> tuple[int, int]:
        return block.dim, block.attention_head_dim

    @classmethod
    def why_another_class(cls, kind: type[nn.Module]) -> str | None:
        return super().why_another_class(kind) or why_patched(kind, "_modulate")

    @staticmethod
    def why_not(block: Any) -> str | None:
        return (
            differs(block, zero_cond_t=False)
            or has_parameters(block, "img_norm1")
            or has_parameters(block, "img_norm2")
            or has_parameters(block, "txt_norm1")
            or has_parameters(block, "txt_norm2")
            or attention(block, "attn", f"{QWEN}.QwenDoubleStreamAttnProcessor2_0")
            or head_norms(block, "attn", "norm_q", "norm_k", "norm_added_q", "norm_added_k")
            or backend()
            or feed_forward(block, "img_mlp")
            or feed_forward(block, "txt_mlp")
        )

    def run(
        self: Any,
        hidden_states,
        encoder_hidden_states,
        encoder_hidden_states_mask,
        temb,
        image_rotary_emb=None,
        joint_attention_kwargs=None,
        modulate_index=None,
    ):
        x, text = rows(hidden_states), rows(encoder_hidden_states)
        if (
            joint_attention_kwargs
            or encoder_hidden_states_mask is not None
            or modulate_index is not None
            or (ops := self.ready(x, text)) is None
        ):
            return None
        parts = modulation(ops, self.img_mod, temb).unsqueeze(1).chunk(6, dim=-1)
        text_parts = modulation(ops, self.txt_mod, temb).unsqueeze(1).chunk(6, dim=-1)
        if not (self.fits(x, *parts) and self.fits(text, *text_parts)):
            return None

        attn = self.attn
        image = queries_keys_values(ops, attn, x, parts[:2], self.img_norm1.eps)
        words = queries_keys_values(ops, attn, text, text_parts[:2], self.txt_norm1.eps, added=True)
        if image_rotary_emb is not None:
            image[:2], words[:2] = (
                [_rotated(part, angles) for part in parts[:2]]
                for parts, angles in zip((image, words), image_rotary_emb, strict=True)
            )
        q, k, v = (torch.cat(pair, dim=1) for pair in zip(words, image, strict=True))
        of_text, of_image = attend(ops, q, k, v).split([text.shape[1], x.shape[1]], dim=1)

        x = add(ops, attn.to_out[0], of_image, parts[2], x)
        x = mlp(ops, self.img_mlp, x, parts[3:], self.img_norm2.eps)
        text = add(ops, attn.to_add_out, of_text, text_parts[2], text)
        text = mlp(ops, self.txt_mlp, text, text_parts[3:], self.txt_norm2.eps)
        return clipped(text), clipped(x)


def _rotated(x: Tensor, angles: Tensor) -> Tensor:
    """By diffusers' own function."""
    return sys.modules[QWEN].apply_rotary_emb_qwen(x, angles, use_real=False)
