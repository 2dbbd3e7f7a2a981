"""The flow head of one stage: a DiT conditioned at each token, with separable adaLN.

modulation = W (SiLU(c) + SiLU(t)) + b = [W SiLU(c) + b] + [W SiLU(t)]: the first bracket
depends on the token and not on the step, the second on the step and not on the token (design,
section 3.5). Sampling computes the first once per stage and the second once for all steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ecar.config import ECARConfig
from ecar.transformer import patchify, unpatchify
from ecar_kernels import (
    MLP,
    Accelerated,
    FlowBlock,
    Linear,
    OpsModule,
    accelerates,
    adaln,
    recompute,
)
from ecar_kernels.acceleration import PUBLIC, served, server, unit_gate

__all__ = ["FlowHead", "sincos_positions", "time_frequencies"]

NORM_EPS = 1e-6
TIME_CHANNELS = 256


def sincos_positions(width: int, grid: int) -> Tensor:
    """Fixed 2-D sine and cosine positions, as in DiT: [grid * grid, width], float32."""
    frequencies = 1.0 / 10000 ** (torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.arange(grid, dtype=torch.float64)[:, None] * frequencies
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)
    columns = axis.repeat(grid, 1)
    rows = axis.repeat_interleave(grid, dim=0)
    return torch.cat([columns, rows], dim=1).float()


def time_frequencies(time: Tensor) -> Tensor:
    """Sinusoid of 1000 t, 256 channels, as in DiT: [R] -> [R, 256], float32."""
    half = TIME_CHANNELS // 2
    exponents = torch.arange(half, dtype=torch.float32, device=time.device) / half
    angles = 1000 * time.float()[:, None] * torch.exp(-math.log(10000) * exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def _begun(spatial: Sequence[Tensor], step: Sequence[Tensor], at: int) -> tuple[Tensor, ...]:
    """The shift and scale, then those of the step, that stand at a part and the next."""
    return *spatial[at : at + 2], *step[at : at + 2]


class FlowHead(OpsModule):
    """Velocity of one stage's flow, v(x_tau, t | M_s) (Eq. 3.14).

    Args:
        config: the model's configuration.
        stage: counted from 1.
    """

    def __init__(self, config: ECARConfig, stage: int) -> None:
        super().__init__()
        width, patch_values = config.width, config.channels * config.patch_size**2
        self.width, self.patch_size = width, config.patch_size
        self.shape = config.stage_shape(stage)
        # Six modulations a block, and the final layer's shift and scale, in one projection.
        self.parts = 6 * config.flow_blocks + 2
        self.condition = MLP(width, 4 * width)
        self.time = nn.Sequential(
            nn.Linear(TIME_CHANNELS, width), nn.SiLU(), nn.Linear(width, width)
        )
        self.modulation = Linear(width, self.parts * width)
        self.embed = nn.Linear(patch_values, width)
        self.register_buffer(
            "positions", sincos_positions(width, config.stage_grids[stage - 1]), persistent=False
        )
        self.blocks = nn.ModuleList(
            FlowBlock(width, config.heads, config.mlp_width, eps=NORM_EPS)
            for _ in range(config.flow_blocks)
        )
        self.output = nn.Linear(width, patch_values)
        self.gradient_checkpointing = False
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for layer in (self.time[0], self.time[2]):
            nn.init.normal_(layer.weight, std=0.02)
        # adaLN-zero: every block begins as the identity, and the velocity as zero.
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.output.weight)

    def spatial_modulation(self, token_map: Tensor) -> Tensor:
        """W SiLU(c_s) + b with c_s = MLP_s(M_s): [B, N, C] -> [B, N, parts C]."""
        return recompute.linear(self.modulation, *recompute.silu(self.condition(token_map)))

    def step_modulation(self, time: Tensor) -> Tensor:
        """W SiLU(t) for times [R] in [0, 1]: [R, 1, parts C]."""
        dtype = self.modulation.weight.dtype
        embedding = self.time(time_frequencies(time).to(dtype))
        return self.modulation.product(F.silu(embedding)).unsqueeze(1)

    def spatial_parts(self, token_map: Tensor) -> tuple[Tensor, ...]:
        """What sampling needs of the token map, once a stage: ``parts`` views [R, N, width].

        Part 6i .. 6i + 5 are block i's shift, scale, gate, then the MLP's; the last two are the
        final layer's shift and scale.
        """
        return self.spatial_modulation(token_map).chunk(self.parts, dim=-1)

    def step_parts(self, times: Tensor) -> list[tuple[Tensor, ...]]:
        """What sampling needs of the times [T]: for each, ``parts`` views [1, 1, width]."""
        return [row.chunk(self.parts, dim=-1) for row in self.step_modulation(times).split(1)]

    def embed_tokens(self, x: Tensor) -> Tensor:
        """[B, C, h, w] -> [B, N, width]."""
        return self.embed(patchify(x, self.patch_size)) + self.positions

    def forward(self, x: Tensor, time: Tensor, token_map: Tensor) -> Tensor:
        """The training path.

        Args:
            x: state x_tau [B, C, h, w].
            time: global time t [B].
            token_map: M_s [B, N, width].

        Returns:
            The velocity [B, C, h, w].
        """
        # Split, not sliced: the backward of a split is one concatenation.
        spatial = self.spatial_modulation(token_map).chunk(self.parts, dim=-1)
        step = self.step_modulation(time).chunk(self.parts, dim=-1)
        x = self.embed_tokens(x)
        y = adaln(x, spatial[0], spatial[1], step_shift=step[0], step_scale=step[1], eps=NORM_EPS)
        for index, block in enumerate(self.blocks):
            own = slice(6 * index + 2, 6 * index + 8)
            if self.gradient_checkpointing and self.training:
                x, y = checkpoint(block, x, y, spatial[own], step[own], use_reentrant=False)
            else:
                x, y = block(x, y, spatial[own], step[own], _begun(spatial, step, 6 * index))
        made = recompute.adaln(y, x, *_begun(spatial, step, self.parts - 2), NORM_EPS)
        return unpatchify(recompute.linear(self.output, *made), self.patch_size, self.shape)

    def stream(self, x: Tensor, spatial: Sequence[Tensor], step: Sequence[Tensor]) -> Tensor:
        """The blocks' inference path.

        Args:
            x: embedded tokens [R, N, width].
            spatial: of ``spatial_parts``.
            step: one time's, of ``step_parts``.

        Returns:
            The residual stream behind the last block [R, N, width].
        """
        for index, block in enumerate(self.blocks):
            own = slice(6 * index, 6 * index + 6)
            x = block.infer(x, spatial[own], step[own])
        return x

    def velocity(self, x: Tensor, spatial: Sequence[Tensor], step: Sequence[Tensor]) -> Tensor:
        """The inference path, with modulations computed ahead.

        Args:
            x: state [R, C, h, w].
            spatial: of ``spatial_parts``.
            step: one time's, of ``step_parts``.

        Returns:
            The velocity [R, C, h, w].
        """
        x = self.stream(self.embed_tokens(x), spatial, step)
        tokens = self.ops(x).adaln_linear(
            x, spatial[-2], spatial[-1], self.output.weight, self.output.bias,
            step_shift=step[-2], step_scale=step[-1], eps=NORM_EPS,
        )
        return unpatchify(tokens, self.patch_size, self.shape)

    def served(self, x: Tensor) -> Iterator[tuple[str, str]]:
        """As ``ecar_kernels.acceleration.served``, of a stage's conditions and velocities."""
        yield from self.served_once(x)
        for block in self.blocks:
            yield from served(block, x, "infer")
        yield "adaln_linear", server(self.ops(x), "adaln_linear", x, self.output.weight)

    def served_once(self, x: Tensor) -> Iterator[tuple[str, str]]:
        """Likewise of the conditions and the embedding of the state alone."""
        for layer in (self.condition.fc1, self.condition.fc2, self.modulation):
            yield from served(layer, x)


@accelerates(FlowHead)
class AcceleratedFlowHead(Accelerated, FlowHead):
    # No weights are packed ahead: flow_boundary reads embed's and output's as they are.
    uses = ("adaln_linear", "linear_gated_residual")

    def embed_tokens(self, x: Tensor) -> Tensor:
        """One launch: the positions are the residual that the embedding is added to."""
        ops = self.ops(self.positions)
        if ops is PUBLIC:
            return super().embed_tokens(x)
        tokens, rows = patchify(x, self.patch_size), len(x)
        positions = self.positions.expand(rows, -1, -1)
        return ops.linear_gated_residual(tokens, self.embed.weight, self.embed.bias,
                                         unit_gate(positions, self.width), positions)

    def served_once(self, x: Tensor) -> Iterator[tuple[str, str]]:
        yield from super().served_once(x)
        if (ops := self.ops(self.positions)) is not PUBLIC:
            yield "linear_gated_residual", server(ops, "linear_gated_residual", self.positions,
                                                  self.embed.weight)
