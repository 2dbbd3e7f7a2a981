"""A stage's Euler steps on the CPU as flat lists of C++ calls, bound before the first step.

At 16 tokens a step is a millisecond or two, of which Python's way from op to op would be a good
part. So a step is one call for each flow block and one for the boundary, and all of a stage are
laid out before the first, with their views, packed weights and outputs. Those are buffers of the
plan; none is allocated in the loop. The residual stream is written over in place, and the state,
which stays in the token layout; only a stage's end is an image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ecar import stages
from ecar.config import ECARConfig
from ecar.flow import NORM_EPS, FlowHead
from ecar_kernels import registry
from ecar_kernels.acceleration import PUBLIC
from ecar_kernels.modules import FlowBlock

if TYPE_CHECKING:
    from ecar.plan import Stage

__all__ = ["Buffers", "can_bind", "run_stage"]

Call = Callable[[], object]
BLOCK_OPS = ("adaln_linear", "stage_attention", "linear_gated_residual")


def can_bind(head: FlowHead, dtype: torch.dtype) -> bool:
    """Is every op of the head's steps served by C++ on the CPU, and every layer as written?"""
    if torch.is_autocast_enabled("cpu") or torch.is_grad_enabled() or not head.fusable():
        return False
    try:
        return all(registry.server(run) == "native" for run in _functions(head, dtype))
    except registry.BackendUnavailableError:
        return False


def _functions(head: FlowHead, dtype: torch.dtype) -> Iterator[Callable]:
    """Those that the head's steps would call."""
    yield registry.implementation("flow_boundary", "cpu", dtype, head.width)
    for block in head.blocks:
        for op in BLOCK_OPS:
            width = block.head_dim if op == "stage_attention" else block.width
            ops = block.ops(torch.empty(0, width, dtype=dtype))
            yield (
                registry.implementation(op, "cpu", dtype, width)
                if ops is PUBLIC
                else getattr(ops, op)
            )


def _layers(block: FlowBlock) -> tuple[nn.Linear, ...]:
    return block.qkv, block.proj, block.mlp.fc1, block.mlp.fc2


class Buffers:
    """What the steps of all stages write to: for the largest, allocated once for a plan.

    Args:
        config: the model's configuration.
        batch: images.
        rows: of the network at most, ``batch`` or twice as many.
        dtype: the network's.
    """

    def __init__(self, config: ECARConfig, batch: int, rows: int, dtype: torch.dtype) -> None:
        from ecar_kernels.flow_block import native

        def floats(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.float32, device="cpu")

        width, hidden, tokens = config.width, config.mlp_width, max(config.stage_tokens)
        self.stream = torch.empty(rows * tokens * width, dtype=dtype, device="cpu")
        # Queries, keys, values and what attention makes of them; later the MLP's hidden tokens.
        self.wide = torch.empty(rows * tokens * max(4 * width, hidden), dtype=dtype, device="cpu")
        self.state = floats(batch * tokens * config.channels * config.patch_size**2)
        self.workspace = floats(
            max(native.workspace_size(rows * tokens, depth) for depth in (width, hidden))
        )
        self.ends, self.starts = (
            [floats(batch, *config.stage_shape(stage)) for stage in which]
            for which in (range(1, config.num_stages + 1), range(2, config.num_stages + 1))
        )


class _Steps:
    """All steps of a stage, laid out on the buffers."""

    def __init__(self, run: Stage, buffers: Buffers) -> None:
        from ecar_kernels.flow_block import native

        self.run, self.head, self.patch = run, run.head, run.head.patch_size
        self.end = buffers.ends[run.stage - 1]
        self.start = buffers.starts[run.stage - 1] if run.stage <= len(buffers.starts) else None
        self.end_patches = patches(self.end, self.patch)
        self.spatial = self.head.spatial_modulation(run.token_map)
        rows, tokens, _ = self.spatial.shape
        batch, values, width = len(self.end), self.head.output.out_features, self.head.width
        self.state = buffers.state[: batch * tokens * values].view(batch, tokens, values)
        self.state_patches = self.state.view(self.end_patches.shape)
        self.stream = buffers.stream[: rows * tokens * width].view(rows, tokens, width)
        # A block's arguments after the modulations, its weights packed.
        self.blocks = [
            (
                *(
                    value
                    for layer in _layers(block)
                    for value in (native.packed_weight(layer.weight), layer.bias)
                ),
                block.heads,
                block.mlp.fc1.out_features,
                block.eps,
                buffers.wide,
                buffers.workspace,
            )
            for block in self.head.blocks
        ]
        self.flow_block = native.flow_block_
        times = self.head.step_modulation(run.plan.times[run.stage - 1]).split(1)
        self.calls = [self._step(step, time) for step, time in enumerate(times)]
        self.calls[-1] += self._last()

    def _step(self, step: int, time: Tensor) -> list[Call]:
        from ecar_kernels.flow_step.boundary import flow_boundary_out

        run, head, rows, calls = self.run, self.head, self.run.rows(step), []
        x, spatial = self.stream[:rows], self.spatial[:rows]
        if step > 0 and run.rows(step - 1) < rows:  # unconditional rows begin as the others
            half = rows // 2
            calls.append(partial(x[half:].copy_, x[:half]))
        calls += [
            partial(self.flow_block, x, spatial, time, 6 * index, *block)
            for index, block in enumerate(self.blocks)
        ]
        (shift, scale), (step_shift, step_scale) = (
            part[..., -2 * head.width :].chunk(2, dim=-1) for part in (spatial, time)
        )
        calls.append(
            partial(
                flow_boundary_out,
                x,
                self.state,
                shift,
                scale,
                head.output.weight,
                head.output.bias,
                head.embed.weight,
                head.embed.bias,
                head.positions,
                run.dt,
                step_shift,
                step_scale,
                float(run.scale(step)),
                NORM_EPS,
                self.state,
                x,
            )
        )
        return calls

    def _last(self) -> list[Call]:
        """The end as an image, and the jump from it, which is an Euler step of no length."""
        from ecar_kernels.flow_step.native import jump_out

        to_end, stage = partial(self.end_patches.copy_, self.state_patches), self.run.stage
        if self.start is None:
            return [to_end]
        time = stages.start_time(stage + 1, self.run.plan.config.num_stages)
        return [
            to_end,
            partial(
                jump_out,
                self.end,
                self.end,
                0.0,
                1.0,
                time,
                stage + 1,
                self.run.plan.seeds,
                self.end,
                self.start,
            ),
        ]

    def begin(self, x: Tensor, step: int) -> None:
        """From the state x [B, C, h, w] before ``step``."""
        self.state_patches.copy_(patches(x, self.patch))
        tokens = self.head.embed_tokens(self.run.network_input(x, step))
        self.stream[: len(tokens)].copy_(tokens)

    def image(self) -> Tensor:
        """The state [B, C, h, w], new memory."""
        image = torch.empty_like(self.end)
        patches(image, self.patch).copy_(self.state_patches)
        return image


def run_stage(run: Stage, buffers: Buffers, x: Tensor) -> tuple[Tensor, Tensor]:
    """(end_s, start_{s+1}) from start_s = x [B, C, h, w]; at the last stage, the end twice."""
    steps, last = _Steps(run, buffers), run.count - 1
    for op in (*BLOCK_OPS, "flow_boundary"):
        registry.note(op, "native")
    if steps.start is not None:
        registry.note("upsample_renoise_euler", "native")
    steps.begin(x, 0)
    for step, calls in enumerate(steps.calls):
        for call in calls:
            call()
        if run.watch is None:
            continue
        replaced = run.watch(run.stage, step, steps.image)
        if replaced is not None and step < last:
            steps.begin(replaced, step + 1)
        elif replaced is not None:
            steps.end.copy_(replaced)
    return steps.end, steps.end if steps.start is None else steps.start


def patches(x: Tensor, patch: int) -> Tensor:
    """``patchify``'s values as a view: [B, C, h, w] -> [B, h/p, w/p, C, p, p]."""
    split = x.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))
    return split.permute(0, 2, 4, 1, 3, 5)
