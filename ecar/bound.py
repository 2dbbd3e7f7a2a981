"""A stage's Euler steps on the CPU as flat lists of C++ calls, bound before the first step.

At 16 tokens a step is a millisecond, of which Python's way from op to op would be a good part. So
what a step does is laid out once a stage: each call with its views, packed weights and output.
All outputs are buffers of the plan, none is allocated in the loop. The residual stream is written
over in place, and the state too, which stays in the token layout; only a stage's end is an image.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ecar import stages
from ecar.config import ECARConfig
from ecar.flow import NORM_EPS, AcceleratedFlowHead, FlowHead
from ecar_kernels import registry
from ecar_kernels.acceleration import PUBLIC
from ecar_kernels.modules import AcceleratedFlowBlock, FlowBlock

if TYPE_CHECKING:
    from ecar.plan import Stage

__all__ = ["Buffers", "can_bind", "run_stage"]

Call = Callable[[], object]
_OWN = FlowHead.velocity, FlowHead.stream, FlowBlock.infer


def overridden(head: FlowHead) -> bool:
    """Has somebody put another velocity in the head's place?"""
    return any(getattr(method, "__func__", None) not in _OWN
               for method in (head.velocity, head.stream, *(b.infer for b in head.blocks)))


def can_bind(head: FlowHead, dtype: torch.dtype) -> bool:
    """Is every op of the head's steps served by C++ on the CPU, and nothing of them overridden?"""
    if torch.is_autocast_enabled("cpu") or torch.is_grad_enabled() or overridden(head):
        return False
    if type(head) not in (FlowHead, AcceleratedFlowHead) or not all(
            type(block) in (FlowBlock, AcceleratedFlowBlock) for block in head.blocks):
        return False
    try:
        boundary = registry.implementation("flow_boundary", "cpu", dtype, head.width)
    except registry.BackendUnavailableError:
        return False
    if boundary.__module__ != "ecar_kernels.flow_step.boundary":
        return False
    from ecar_kernels.flow_block import native

    x = torch.empty(0, head.width, dtype=dtype)
    return all(
        _served(block, "adaln_linear", x) is native.adaln_linear
        and _served(block, "linear_gated_residual", x) is native.linear_gated_residual
        # An inference tensor has no version: a packed copy could go stale unseen.
        and not any(layer.weight.is_inference() for layer in _layers(block))
        for block in head.blocks
    )


def _served(block: FlowBlock, op: str, x: Tensor) -> Callable:
    """What the block would call for x [.., C] or [.., D]."""
    ops = block.ops(x)
    if ops is PUBLIC:
        return registry.implementation(op, x.device.type, x.dtype, x.shape[-1])
    return getattr(ops, op)


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

        self.rows, width, hidden = rows, config.width, config.mlp_width
        tokens = max(config.stage_tokens)
        self.heads, self.head_dim, self.width, self.hidden = (
            config.heads, config.head_dim, width, hidden)
        self.stream = torch.empty(rows * tokens * width, dtype=dtype)
        # Queries, keys, values and what attention makes of them; later the MLP's hidden tokens.
        self.wide = torch.empty(rows * tokens * max(4 * width, hidden), dtype=dtype)
        self.state = torch.empty(batch * tokens * config.channels * config.patch_size**2)
        self.workspace = torch.empty(max(native.workspace_size(rows * tokens, depth)
                                         for depth in (width, hidden)))
        self.ends, self.starts = (
            [torch.empty(batch, *config.stage_shape(stage)) for stage in which]
            for which in (range(1, config.num_stages + 1), range(2, config.num_stages + 1)))


class _Views:
    """The buffers as the calls of one stage take them, for ``rows`` rows of ``tokens`` tokens."""

    def __init__(self, buffers: Buffers, rows: int, tokens: int) -> None:
        def view(flat: Tensor, channels: int, skipped: int = 0) -> Tensor:
            begin, count = rows * tokens * skipped, rows * tokens * channels
            return flat[begin:begin + count].view(rows, tokens, channels)

        width, heads = buffers.width, (buffers.heads, buffers.head_dim)
        self.stream = view(buffers.stream, width)
        self.qkv = view(buffers.wide, 3 * width)
        self.q, self.k, self.v = self.qkv.view(rows, tokens, 3, *heads).unbind(2)
        self.attended = view(buffers.wide, width, skipped=3 * width)
        self.by_head = self.attended.view(rows, tokens, *heads)
        self.hidden = view(buffers.wide, buffers.hidden)
        self.workspace = buffers.workspace


class _BoundBlock:
    """A flow block's calls, with its weights packed."""

    def __init__(self, block: FlowBlock) -> None:
        from ecar_kernels.flow_block import native

        self.block, self.native = block, native
        # As adaln_linear takes a layer, then as linear_gated_residual does, without the outputs.
        self.weights = [(native.packed_weight(layer.weight), layer.out_features, layer.bias)
                        for layer in _layers(block)]

    def calls(self, views: _Views, spatial: tuple, step: tuple) -> list[Call]:
        """``FlowBlock.infer``, written over ``views.stream``."""
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = spatial
        t_shift, t_scale, t_gate, t_mlp_shift, t_mlp_scale, t_mlp_gate = step
        qkv, (proj, _, proj_bias), fc1, (fc2, _, fc2_bias) = self.weights
        adaln_linear = self.native.adaln_linear_out
        residual, x, eps = self.native.linear_gated_residual_out, views.stream, self.block.eps
        return [
            partial(adaln_linear, x, shift, scale, *qkv, t_shift, t_scale, False, eps,
                    views.workspace, views.qkv),
            self._attention(views),
            partial(residual, views.attended, proj, proj_bias, gate, x, t_gate, views.workspace,
                    x),
            partial(adaln_linear, x, mlp_shift, mlp_scale, *fc1, t_mlp_shift, t_mlp_scale, True,
                    eps, views.workspace, views.hidden),
            partial(residual, views.hidden, fc2, fc2_bias, mlp_gate, x, t_mlp_gate,
                    views.workspace, x),
        ]

    def _attention(self, views: _Views) -> Call:
        from ecar_kernels.stage_attention import native

        served, lengths = _served(self.block, "stage_attention", views.q), (views.q.shape[1],)
        in_place = getattr(native, "stage_attention_out", None)
        if served is native.stage_attention and in_place is not None:
            return partial(in_place, views.q, views.k, views.v, lengths, views.by_head)

        def attend() -> None:
            views.by_head.copy_(served(views.q, views.k, views.v, lengths))

        return attend


class _Steps:
    """All steps of a stage, laid out on the buffers."""

    def __init__(self, run: Stage, buffers: Buffers) -> None:
        self.run, self.buffers, self.head = run, buffers, run.head
        self.patch = run.head.patch_size
        self.end = buffers.ends[run.stage - 1]
        self.end_patches = patches(self.end, self.patch)
        batch, self.tokens = len(self.end), run.spatial[0][0].shape[1]
        values = run.head.output.out_features
        self.state = buffers.state[:batch * self.tokens * values].view(
            batch, self.tokens, values)
        self.state_patches = self.state.view(self.end_patches.shape)
        self.blocks = [_BoundBlock(block) for block in run.head.blocks]
        self.views = {rows: _Views(buffers, rows, self.tokens)
                      for rows in {run.rows(step) for step in range(run.count)}}
        self.calls = [self._step(step) for step in range(run.count)]
        self.start: Tensor | None = None
        if run.stage < run.plan.config.num_stages:
            self.start = buffers.starts[run.stage - 1]
        self.calls[-1] += self._last()

    def _step(self, step: int) -> list[Call]:
        from ecar_kernels.flow_step.boundary import flow_boundary_out

        run, head, rows = self.run, self.head, self.run.rows(step)
        views, spatial, own = self.views[rows], run.spatial[run.guided[step]], run.steps[step]
        x, calls = views.stream, []
        if step > 0 and run.rows(step - 1) < rows:  # unconditional rows begin as the others
            half = rows // 2
            calls.append(partial(x[half:].copy_, x[:half]))
        for index, block in enumerate(self.blocks):
            part = slice(6 * index, 6 * index + 6)
            calls += block.calls(views, spatial[part], own[part])
        calls.append(partial(
            flow_boundary_out, x, self.state, spatial[-2], spatial[-1], head.output.weight,
            head.output.bias, head.embed.weight, head.embed.bias, head.positions, run.dt,
            own[-2], own[-1], float(run.scale(step)), NORM_EPS, self.state, x,
        ))
        return calls

    def _last(self) -> list[Call]:
        """The end as an image, and the jump from it, which is an Euler step of no length."""
        from ecar_kernels.flow_step.native import jump_out

        to_end, stage = partial(self.end_patches.copy_, self.state_patches), self.run.stage
        if self.start is None:
            return [to_end]
        time = stages.start_time(stage + 1, self.run.plan.config.num_stages)
        return [to_end, partial(jump_out, self.end, self.end, 0.0, 1.0, time, stage + 1,
                                self.run.plan.seeds, self.end, self.start)]

    def begin(self, x: Tensor, step: int) -> None:
        """From the state x [B, C, h, w] before ``step``."""
        self.state_patches.copy_(patches(x, self.patch))
        self.views[self.run.rows(step)].stream.copy_(
            self.head.embed_tokens(self.run.network_input(x, step)))

    def image(self) -> Tensor:
        """The state [B, C, h, w], new memory."""
        image = torch.empty_like(self.end)
        patches(image, self.patch).copy_(self.state_patches)
        return image


def run_stage(run: Stage, buffers: Buffers, x: Tensor) -> tuple[Tensor, Tensor]:
    """(end_s, start_{s+1}) from start_s = x [B, C, h, w]; at the last stage, the end twice."""
    steps, last = _Steps(run, buffers), run.count - 1
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
