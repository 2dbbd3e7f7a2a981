"""The flow head of one stage: a DiT conditioned at each token, with separable adaLN.

modulation = W (SiLU(c) + SiLU(t)) + b = [W SiLU(c) + b] + [W SiLU(t)]: the first bracket
depends on the token and not on the step, the second on the step and not on the token (design,
section 3.5). Sampling computes the first once per stage and the second once for all steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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
    fused,
    recompute,
)
from ecar_kernels.acceleration import PUBLIC
from ecar_kernels.inspection import as_written, is_plain

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
    # In float64, whose rounding to float32 is the same on every device and in every runtime: one
    # unit in the last place of a frequency would turn 1000 t by as many as 1000 t are.
    exponents = torch.arange(half, dtype=torch.float64, device=time.device) / half
    frequencies = (10000**-exponents).float()
    angles = 1000 * time.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def _begun(
    spatial: Sequence[Tensor], step: Sequence[Tensor], at: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The shift and scale, then those of the step, that stand at a part and the next."""
    return spatial[at], spatial[at + 1], step[at], step[at + 1]


def replaced(module: nn.Module, *methods: str) -> bool:
    """Has somebody put another method of inference in the place of ours?"""
    return any(
        hasattr(module, name) and getattr(getattr(module, name), "__func__", None) not in _INFERENCE
        for name in methods
    )


def _called(block: nn.Module) -> bool:
    """Has a block hooks, say, or another forward, but our `infer`? Then it has to be called."""
    return not (replaced(block, "infer") or as_written(block, FlowBlock, compiled=True))


class FlowHead(OpsModule):
    """Velocity of one stage's flow, v(x_tau, t | M_s) (Eq. 3.14).

    Args:
        config: the model's configuration.
        stage: counted from 1.
    """

    positions: Tensor

    def __init__(self, config: ECARConfig, stage: int) -> None:
        super().__init__()
        width, patch_values = config.width, config.channels * config.patch_size**2
        self.width, self.patch_size = width, config.patch_size
        self.shape = config.stage_shape(stage)
        # Six modulations a block, and the final layer's shift and scale, in one projection.
        self.parts = 6 * config.flow_blocks + 2
        self.condition = MLP(width, 4 * width)
        self.time = nn.Sequential(Linear(TIME_CHANNELS, width), nn.SiLU(), Linear(width, width))
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
        for layer in self.time:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.02)
        # adaLN-zero: every block begins as the identity, and the velocity as zero.
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.output.weight)

    def spatial_modulation(self, token_map: Tensor) -> Tensor:
        """W SiLU(c_s) + b with c_s = MLP_s(M_s): [B, N, C] -> [B, N, parts C]."""
        return recompute.linear(self.modulation, *recompute.silu(self.condition(token_map)))

    def step_modulation(self, time: Tensor) -> Tensor:
        """W SiLU(t) for times [R] in [0, 1]: [R, 1, parts C]."""
        embedding = F.silu(self.time(time_frequencies(time).to(self.positions.dtype)))
        if as_written(self.modulation, Linear):
            return self.modulation.product(embedding).unsqueeze(1)
        # An adapter, say: the layer without its bias is what it makes of x less that of nothing.
        nothing = self.modulation(torch.zeros_like(embedding[:1]))
        return (self.modulation(embedding) - nothing).unsqueeze(1)

    def spatial_parts(self, token_map: Tensor) -> tuple[Tensor, ...]:
        """What sampling needs of the token map, once a stage: ``parts`` views [R, N, width].

        Part 6i .. 6i + 5 are block i's shift, scale, gate, then the MLP's; the last two are the
        final layer's shift and scale.
        """
        return self.spatial_modulation(token_map).chunk(self.parts, dim=-1)

    def step_parts(self, times: Tensor) -> list[tuple[Tensor, ...]]:
        """What sampling needs of the times [T]: for each, ``parts`` views [1, 1, width]."""
        return [row.chunk(self.parts, dim=-1) for row in self.step_modulation(times).split(1)]

    def callable_only(self) -> bool:
        """Has it hooks, say, or another forward, but our methods of inference? Then only calling
        it computes what it does."""
        return not (replaced(self, *METHODS) or as_written(self, FlowHead, compiled=True))

    def fuses_boundary(self) -> bool:
        """May a step's end be one op, which reads the output's and the embedding's parameters?"""
        return (
            not self.callable_only()
            and not replaced(self, *METHODS)
            and not _called(self.blocks[-1])
            and all(as_written(layer, nn.Linear) for layer in (self.output, self.embed))
            and is_plain(self.positions)
        )

    def fuses_steps(self) -> bool:
        """May a whole step be ops that read the parameters of its layers, where those are as
        written? ``ecar_kernels.BoundFlowStep.why_not`` asks that."""
        return self.fuses_boundary() and not any(
            replaced(block, "infer") or _called(block) for block in self.blocks
        )

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
        y = self._begin(x, spatial, step)
        for index, block in enumerate(self.blocks):
            own = slice(6 * index + 2, 6 * index + 8)
            if self.gradient_checkpointing and self.training:
                x, y = checkpoint(block, x, y, spatial[own], step[own], use_reentrant=False)
            else:
                x, y = block(x, y, spatial[own], step[own], _begun(spatial, step, 6 * index))
        made = recompute.adaln(y, x, *_begun(spatial, step, self.parts - 2), NORM_EPS)
        return unpatchify(recompute.linear(self.output, *made), self.patch_size, self.shape)

    def stream(
        self,
        x: Tensor,
        spatial: Sequence[Tensor],
        step: Sequence[Tensor],
        statistics: Tensor | None = None,
    ) -> Tensor:
        """The blocks' inference path.

        Args:
            x: embedded tokens [R, N, width].
            spatial: of ``spatial_parts``.
            step: one time's, of ``step_parts``.
            statistics: what an op left together with this x, or None.

        Returns:
            The residual stream behind the last block [R, N, width].
        """
        return self._stream(x, statistics, spatial, step)[0]

    def _stream(
        self,
        x: Tensor,
        statistics: Tensor | None,
        spatial: Sequence[Tensor],
        step: Sequence[Tensor],
        leaves: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """And its statistics, of `FlowBlock.infer_chained`, if it `leaves` them; and, where the
        last block was called, what it gives to the final layer. `statistics`: of x, or None."""
        y, last = None, len(self.blocks) - 1
        block: Any  # FlowBlocks, or what took their place
        for index, block in enumerate(self.blocks):
            own = slice(6 * index, 6 * index + 6)
            if replaced(block, "infer"):
                x, y, statistics = block.infer(x, spatial[own], step[own]), None, None
                continue
            if not _called(block):
                its = leaves or index < last
                x, statistics = block.infer_chained(x, statistics, spatial[own], step[own], its)
                y = None
                continue
            # The path of training, where a block is given its y.
            if y is None:
                y = self._begin(x, spatial[own], step[own])
            after = slice(6 * index + 2, 6 * index + 8)
            (x, y), statistics = block(x, y, spatial[after], step[after]), None
        return x, statistics, y

    def _begin(self, x: Tensor, spatial: Sequence[Tensor], step: Sequence[Tensor]) -> Tensor:
        """y, with which a block begins."""
        return adaln(
            x, spatial[0], spatial[1], step_shift=step[0], step_scale=step[1], eps=NORM_EPS
        )

    def velocity(self, x: Tensor, spatial: Sequence[Tensor], step: Sequence[Tensor]) -> Tensor:
        """The inference path, with modulations computed ahead.

        Args:
            x: state [R, C, h, w].
            spatial: of ``spatial_parts``.
            step: one time's, of ``step_parts``.

        Returns:
            The velocity [R, C, h, w].
        """
        x, statistics, y = self.embed_tokens(x), None, None
        if replaced(self, "stream"):
            x = self.stream(x, spatial, step)
        else:
            x, statistics, y = self._stream(x, None, spatial, step, leaves=True)
        tokens = (
            self.output(y)
            if y is not None
            else fused.adaln_linear(
                self.ops(x, *spatial[-2:], *step[-2:]),
                self.output,
                x,
                spatial[-2],
                spatial[-1],
                statistics=statistics,
                step_shift=step[-2],
                step_scale=step[-1],
                eps=NORM_EPS,
            )
        )
        return unpatchify(tokens, self.patch_size, self.shape)


@accelerates(FlowHead)
class AcceleratedFlowHead(Accelerated, FlowHead):
    # No weights are packed ahead: flow_boundary reads embed's and output's as they are.
    uses = ("adaln_linear", "linear_gated_residual")

    def embed_tokens(self, x: Tensor) -> Tensor:
        """One launch: the positions are the residual that the embedding is added to."""
        ops = self.ops(self.positions)
        if ops is PUBLIC:
            return super().embed_tokens(x)
        positions = self.positions.expand(len(x), -1, -1)
        return fused.linear_residual(ops, self.embed, patchify(x, self.patch_size), positions)[0]


METHODS = ("velocity", "stream", "embed_tokens")
_INFERENCE = (
    FlowBlock.infer,
    FlowHead.stream,
    FlowHead.velocity,
    FlowHead.embed_tokens,
    AcceleratedFlowHead.embed_tokens,
)
