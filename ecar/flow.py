"""The flow head of one stage: a DiT conditioned at each token, with separable adaLN.

modulation = W (SiLU(c) + SiLU(t)) + b = [W SiLU(c) + b] + [W SiLU(t)]: the first bracket
depends on the token and not on the step, the second on the step and not on the token (design,
section 3.5). Sampling computes the first once per stage and the second once for all steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ecar.config import ECARConfig
from ecar.transformer import MLP, patchify, unpatchify
from ecar_kernels import (
    adaln,
    adaln_linear,
    gated_residual_adaln,
    linear_gated_residual,
    stage_attention,
)

__all__ = ["FlowBlock", "FlowHead", "sincos_positions", "time_frequencies"]

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


class FlowBlock(nn.Module):
    """DiT's adaLN-zero block; its six modulations are given, not computed here."""

    def __init__(self, config: ECARConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.proj = nn.Linear(config.width, config.width)
        self.mlp = MLP(config.width, config.mlp_width)

    def attend(self, qkv: Tensor) -> Tensor:
        b, n, c = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
        q, k, v = qkv.view(b, n, 3, self.heads, c // self.heads).unbind(2)
        return stage_attention(q, k, v, (n,)).reshape(b, n, c)

    def forward(
        self, x: Tensor, y: Tensor, spatial: tuple[Tensor, ...], step: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor]:
        """The training path: the residual stream is touched twice.

        Args:
            x: residual stream [B, N, C].
            y: this block's normalised and modulated input [B, N, C].
            spatial, step: six parts each, [B, N, C] and [B, 1, C]: this block's gate, the MLP's
                shift and scale, its gate, then the shift and scale with which the next block
                (or the final layer) begins.

        Returns:
            The residual stream, and the next block's y.
        """
        gate, shift, scale, mlp_gate, next_shift, next_scale = spatial
        t_gate, t_shift, t_scale, t_mlp_gate, t_next_shift, t_next_scale = step
        x, y = gated_residual_adaln(
            x, self.proj(self.attend(self.qkv(y))), gate, shift, scale,
            step_gate=t_gate, step_shift=t_shift, step_scale=t_scale, eps=NORM_EPS,
        )
        return gated_residual_adaln(
            x, self.mlp(y), mlp_gate, next_shift, next_scale,
            step_gate=t_mlp_gate, step_shift=t_next_shift, step_scale=t_next_scale, eps=NORM_EPS,
        )

    def infer(self, x: Tensor, spatial: tuple[Tensor, ...], step: tuple[Tensor, ...]) -> Tensor:
        """The inference path: five launches, the normalised stream never reaches memory.

        ``spatial`` and ``step`` hold this block's shift, scale, gate for attention, then for
        the MLP.
        """
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = spatial
        t_shift, t_scale, t_gate, t_mlp_shift, t_mlp_scale, t_mlp_gate = step
        qkv = adaln_linear(x, shift, scale, self.qkv.weight, self.qkv.bias,
                           step_shift=t_shift, step_scale=t_scale, eps=NORM_EPS)
        x = linear_gated_residual(self.attend(qkv), self.proj.weight, self.proj.bias, gate, x,
                                  step_gate=t_gate)
        hidden = adaln_linear(x, mlp_shift, mlp_scale, self.mlp.fc1.weight, self.mlp.fc1.bias,
                              step_shift=t_mlp_shift, step_scale=t_mlp_scale,
                              activation="gelu_tanh", eps=NORM_EPS)
        return linear_gated_residual(hidden, self.mlp.fc2.weight, self.mlp.fc2.bias, mlp_gate, x,
                                     step_gate=t_mlp_gate)


class FlowHead(nn.Module):
    """Velocity of one stage's flow, v(x_tau, t | M_s) (Eq. 3.14).

    Args:
        config: the model's configuration.
        stage: counted from 1.
    """

    def __init__(self, config: ECARConfig, stage: int) -> None:
        super().__init__()
        width, patch_values = config.width, config.channels * config.patch_size**2
        self.patch_size = config.patch_size
        self.shape = config.stage_shape(stage)
        # Six modulations a block, and the final layer's shift and scale, in one projection.
        self.parts = 6 * config.flow_blocks + 2
        self.condition = MLP(width, 4 * width)
        self.time = nn.Sequential(
            nn.Linear(TIME_CHANNELS, width), nn.SiLU(), nn.Linear(width, width)
        )
        self.modulation = nn.Linear(width, self.parts * width)
        self.embed = nn.Linear(patch_values, width)
        self.register_buffer(
            "positions", sincos_positions(width, config.stage_grids[stage - 1]), persistent=False
        )
        self.blocks = nn.ModuleList(FlowBlock(config) for _ in range(config.flow_blocks))
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
        return self.modulation(F.silu(self.condition(token_map)))

    def step_modulation(self, time: Tensor) -> Tensor:
        """W SiLU(t) for times [R] in [0, 1]: [R, 1, parts C]."""
        dtype = self.modulation.weight.dtype
        embedding = self.time(time_frequencies(time).to(dtype))
        return F.linear(F.silu(embedding), self.modulation.weight).unsqueeze(1)

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
                x, y = block(x, y, spatial[own], step[own])
        return unpatchify(self.output(y), self.patch_size, self.shape)

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
        tokens = adaln_linear(x, spatial[-2], spatial[-1], self.output.weight, self.output.bias,
                              step_shift=step[-2], step_scale=step[-1], eps=NORM_EPS)
        return unpatchify(tokens, self.patch_size, self.shape)
