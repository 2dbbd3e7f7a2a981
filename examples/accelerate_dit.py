"""A DiT as the diffusers package has it, its blocks served by ecar_kernels.

    python -m examples.accelerate_dit [--size B] [--output FILE.json]

The model is the package's own DiTTransformer2DModel, whose block `accelerate` knows
(ecar_kernels/integrations); a user writes two lines:

    from ecar_kernels import accelerate
    accelerate(pipeline.transformer)

Both models run on the same inputs, and their outputs and times are compared. The weights are
random: DiT's zero-initialised gates would hide every branch.
"""

import torch
from diffusers import DiTTransformer2DModel

from examples.compare import compare, options

# Layers and heads of 64 or, in XL, 72 dimensions (DiT, Table 1).
SIZES = {"S": (12, 6, 64), "B": (12, 12, 64), "L": (24, 16, 64), "XL": (28, 16, 72)}


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
