"""The blocks of a VAR model, served by ecar_kernels.

    python -m examples.accelerate_var [--size d16] [--output FILE.json]

VAR (Tian et al. 2024) attends block-causally over ten token maps, of side 1, 2, 3, 4, 5, 6, 8, 10,
13 and 16. `VARBlock` is its block in plain PyTorch, with the mask that keeps attention libraries
from their fast kernels: cosine attention with a learned temperature, adaLN from a condition that
all tokens of an image share. One class says how it is computed from the ops, without the mask. Both
run on the same inputs, over all stages at once as in training or scoring; outputs and times are
compared.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ecar_kernels import Accelerated, accelerates
from ecar_kernels.stage_attention.reference import block_causal_mask
from examples.compare import compare, options

SIDES = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
STAGES = tuple(side * side for side in SIDES)
DEPTHS = {"d12": 12, "d16": 16, "d20": 20}  # width 64 and one head for each layer
MAX_TEMPERATURE = math.log(100)


class VARBlock(nn.Module):
    """adaLN, masked cosine attention, MLP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.width, self.head_dim = heads, width, width // heads
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.modulation = nn.Linear(width, 6 * width)
        self.qkv = nn.Linear(width, 3 * width)
        self.temperature = nn.Parameter(torch.full((heads, 1), math.log(4)))
        self.proj = nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        mask = block_causal_mask(STAGES, sum(STAGES))
        self.register_buffer("mask", mask, persistent=False)

    def parts(self, condition: Tensor) -> tuple[Tensor, ...]:
        """gate, gate, scale, scale, shift, shift, each [B, 1, C], from [B, C]."""
        return self.modulation(F.silu(condition)).unsqueeze(1).chunk(6, dim=-1)

    def heads_of(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q and k of length one, q times the temperature; v: [B, N, H, D] each."""
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).unbind(2)
        q = F.normalize(q, dim=-1) * self.temperature.clamp_max(MAX_TEMPERATURE).exp()
        return q, F.normalize(k, dim=-1), v

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        gate1, gate2, scale1, scale2, shift1, shift2 = self.parts(condition)
        y = self.norm(x) * (1 + scale1) + shift1
        q, k, v = (part.transpose(1, 2) for part in self.heads_of(self.qkv(y)))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask, scale=1.0)
        x = x + gate1 * self.proj(y.transpose(1, 2).flatten(2))
        y = self.norm(x) * (1 + scale2) + shift2
        return x + gate2 * self.fc2(F.gelu(self.fc1(y), approximate="tanh"))


@accelerates(VARBlock)
class FastVARBlock(Accelerated, VARBlock):
    """The same in five launches and the normalisation of q and k."""

    uses = ("adaln_linear", "stage_attention", "linear_gated_residual")
    weights = ("qkv.weight", "proj.weight", "fc1.weight", "fc2.weight")

    def forward(self, x, condition):
        ops = self.ops(x)
        gate1, gate2, scale1, scale2, shift1, shift2 = self.parts(condition)
        qkv = ops.adaln_linear(x, shift1, scale1, self.qkv.weight, self.qkv.bias)
        y = ops.stage_attention(*self.heads_of(qkv), STAGES, scale=1.0).flatten(2)
        x = ops.linear_gated_residual(y, self.proj.weight, self.proj.bias, gate1, x)
        hidden = ops.adaln_linear(
            x, shift2, scale2, self.fc1.weight, self.fc1.bias, activation="gelu_tanh"
        )
        return ops.linear_gated_residual(hidden, self.fc2.weight, self.fc2.bias, gate2, x)


class Blocks(nn.Module):
    """The trunk of a VAR of the given depth."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(VARBlock(64 * depth, depth) for _ in range(depth))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, condition)
        return x


def main(argv: list[str] | None = None) -> dict:
    chosen = options(__doc__, DEPTHS, "d16").parse_args(argv)
    depth = DEPTHS[chosen.size]
    inputs = {
        "x": torch.randn(chosen.batch, sum(STAGES), 64 * depth),
        "condition": torch.randn(chosen.batch, 64 * depth),
    }
    return compare(
        f"VAR-{chosen.size}",
        Blocks(depth).eval(),
        lambda model, **inputs: model(**inputs),
        inputs,
        chosen,
    )


if __name__ == "__main__":
    main()
