"""A DiT as the diffusers package has it, its blocks served by ecar_kernels.

    python -m examples.accelerate_dit [--size B] [--output FILE.json]

The model is the package's own DiTTransformer2DModel; its code is not touched. One class says how
a block is computed from the ops, and `accelerate` swaps it in. Both models run on the same inputs,
and their outputs and times are compared. The weights are random: DiT's zero-initialised gates would
hide every branch.
"""

import torch
from diffusers import DiTTransformer2DModel
from diffusers.models.attention import BasicTransformerBlock

from ecar_kernels import Accelerated, accelerates
from examples.compare import compare, options

# Layers and heads of 64 or, in XL, 72 dimensions (DiT, Table 1).
SIZES = {"S": (12, 6, 64), "B": (12, 12, 64), "L": (24, 16, 64), "XL": (28, 16, 72)}


@accelerates(BasicTransformerBlock)
class FastDiTBlock(Accelerated, BasicTransformerBlock):
    """adaLN-zero, self-attention, MLP: the fused GEMMs take everything between the products.

    diffusers projects to q, k and v by three layers: three calls, which normalise anew each. Only
    DiT's kind of block is served; a block of another kind goes its own way.
    """

    uses = ("adaln_linear", "stage_attention", "linear_gated_residual")
    weights = (
        "attn1.to_q.weight",
        "attn1.to_k.weight",
        "attn1.to_v.weight",
        "attn1.to_out.0.weight",
        "ff.net.0.proj.weight",
        "ff.net.2.weight",
    )

    def forward(
        self,
        hidden_states,
        attention_mask=None,
        encoder_hidden_states=None,
        encoder_attention_mask=None,
        timestep=None,
        cross_attention_kwargs=None,
        class_labels=None,
        added_cond_kwargs=None,
    ):
        if (
            torch.is_grad_enabled()
            or self.norm_type != "ada_norm_zero"
            or self.attn2 is not None
            or attention_mask is not None
            or cross_attention_kwargs
        ):
            return super().forward(
                hidden_states,
                attention_mask,
                encoder_hidden_states,
                encoder_attention_mask,
                timestep,
                cross_attention_kwargs,
                class_labels,
                added_cond_kwargs,
            )
        x = hidden_states.contiguous()  # the patch embedding's are transposed
        norm, attention, feed = self.norm1, self.attn1, self.ff.net
        ops = self.ops(x)
        embedding = norm.emb(timestep, class_labels, hidden_dtype=x.dtype)
        modulation = norm.linear(norm.silu(embedding)).unsqueeze(1).chunk(6, dim=-1)
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = modulation
        q, k, v = (
            ops.adaln_linear(
                x, shift, scale, layer.weight, layer.bias, eps=norm.norm.eps
            ).unflatten(-1, (attention.heads, -1))
            for layer in (attention.to_q, attention.to_k, attention.to_v)
        )
        y = ops.stage_attention(q, k, v, (x.shape[1],)).flatten(2)
        out = attention.to_out[0]
        x = ops.linear_gated_residual(y, out.weight, out.bias, gate, x)
        first, last = feed[0].proj, feed[2]
        hidden = ops.adaln_linear(
            x,
            mlp_shift,
            mlp_scale,
            first.weight,
            first.bias,
            activation="gelu_tanh",
            eps=self.norm3.eps,
        )
        return ops.linear_gated_residual(hidden, last.weight, last.bias, mlp_gate, x)


def dit(size: str) -> DiTTransformer2DModel:
    """A DiT with patches of 2 on latents of 32 x 32, random weights."""
    layers, heads, head_dim = SIZES[size]
    model = DiTTransformer2DModel(
        num_layers=layers,
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        sample_size=32,
        patch_size=2,
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return model.eval()


def main(argv: list[str] | None = None) -> dict:
    chosen = options(__doc__, SIZES, "B").parse_args(argv)
    inputs = {
        "hidden_states": torch.randn(chosen.batch, 4, 32, 32),
        "timestep": torch.full((chosen.batch,), 500),
        "class_labels": torch.randint(1000, (chosen.batch,)),
    }
    return compare(
        f"diffusers DiT-{chosen.size}/2",
        dit(chosen.size),
        lambda model, **inputs: model(**inputs).sample,
        inputs,
        chosen,
    )


if __name__ == "__main__":
    main()
