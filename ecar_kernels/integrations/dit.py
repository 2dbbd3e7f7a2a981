"""The block of DiT's and of SiT's own code, over timm's attention.

Their code is copied rather than installed, so the block's class is known by its own name and by
what its forward computes.
"""

from typing import Any

from torch import nn

from ecar_kernels.foreign import Foreign, serves
from ecar_kernels.fused import rows
from ecar_kernels.integrations.branches import add, add_mlp, attend, modulation, project
from ecar_kernels.integrations.checks import differs, drops, has_parameters, part, unlike
from ecar_kernels.integrations.expression import same_forward

IDLE_IN_ATTENTION = "attn.q_norm", "attn.k_norm", "attn.norm", "attn.attn_drop", "attn.proj_drop"
IDLE_IN_MLP = "mlp.norm", "mlp.drop1", "mlp.drop2", "mlp.drop"
PARTS = ("norm1", "attn", "norm2", "mlp", "adaLN_modulation")


@serves("DiTBlock", "SiTBlock")
class DiTBlock(Foreign):
    """adaLN-zero, self-attention, MLP in five launches."""

    uses = ("adaln_linear", "stage_attention", "linear_gated_residual")
    weights = (
        "adaLN_modulation.1.weight",
        "attn.qkv.weight",
        "attn.proj.weight",
        "mlp.fc1.weight",
        "mlp.fc2.weight",
    )

    @classmethod
    def sizes(cls, block: Any) -> tuple[int, int]:
        width = block.norm1.normalized_shape[0]
        return width, width // block.attn.num_heads

    @classmethod
    def why_another_class(cls, kind: type[nn.Module]) -> str | None:
        if same_forward(kind.forward, _block, 2, PARTS):
            return None
        return "its forward is not that of DiT's block"

    @staticmethod
    def why_not(block: Any) -> str | None:
        return (
            (
                None
                if block._modules.keys() == set(PARTS)
                else f"its parts are not {', '.join(PARTS)}"
            )
            or has_parameters(block, "norm1")
            or has_parameters(block, "norm2")
            or _attention(block)
            or _mlp(block)
        )

    def run(self: Any, x, c):
        x = rows(x)
        if (ops := self.ready(x)) is None:
            return None
        parts = modulation(ops, self.adaLN_modulation, c).unsqueeze(1).chunk(6, dim=-1)
        if not self.fits(x, *parts):
            return None
        attention, mlp = self.attn, self.mlp
        (qkv,) = project(ops, x, parts[:2], self.norm1.eps, attention.qkv)
        q, k, v = qkv.unflatten(-1, (3, attention.num_heads, -1)).unbind(2)
        x = add(ops, attention.proj, attend(ops, q, k, v), parts[2], x)
        return add_mlp(ops, mlp.fc1, mlp.fc2, x, parts[3:], self.norm2.eps)


def _block(block: Any, x: Any, condition: Any) -> Any:
    """As a block is known to compute."""
    parts = [part.unsqueeze(1) for part in block.adaLN_modulation(condition).chunk(6, dim=1)]
    shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = parts
    x = x + gate * block.attn((1 + scale) * block.norm1(x) + shift)
    return x + mlp_gate * block.mlp((1 + mlp_scale) * block.norm2(x) + mlp_shift)


def _attention(block: Any) -> str | None:
    """timm's, without norms and dropout."""
    (width,) = block.norm1.normalized_shape
    return (
        unlike(
            block,
            "attn",
            "timm.layers.attention.Attention",
            "timm.models.vision_transformer.Attention",
        )
        or _do_nothing(block, *IDLE_IN_ATTENTION)
        or differs(block.attn, "attn", scale=(width // block.attn.num_heads) ** -0.5)
    )


def _mlp(block: Any) -> str | None:
    """timm's, with tanh's GELU."""
    return (
        unlike(block, "mlp", "timm.layers.mlp.Mlp", "timm.models.layers.mlp.Mlp")
        or unlike(block, "mlp.act", nn.GELU)
        or differs(block.mlp.act, "mlp.act", approximate="tanh")
        or _do_nothing(block, *IDLE_IN_MLP)
    )


def _do_nothing(block: Any, *names: str) -> str | None:
    """None where each part is absent, as in some versions of timm, or an idle dropout."""
    for name in names:
        if part(block, name) is not None and (reason := drops(block, name)) is not None:
            return reason
    return None
