"""The boundary between two network calls in C++: csrc/cpu/flow_boundary_isa.cpp."""

from collections.abc import Callable

import torch
from torch import Tensor

from ecar_kernels import _native
from ecar_kernels.flow_step.cpp import numbers

_native.require()

# The numbers, then the outputs: the state's may be the state, the embedding's x. Then the history:
# the velocity that is left may be that of the step before.
flow_boundary_out = torch.ops.ecar.flow_boundary_out.default


def bound(name: str) -> Callable[..., tuple[Tensor, ...]]:
    """flow_boundary by the op of that name, of which there is one that leaves the guided velocity,
    too, for `return_velocity`. Its annotation is the public op's; another may return more."""
    ops = _native.op(name), _native.op(f"{name}_velocity")

    def flow_boundary(
        x: Tensor,
        state: Tensor,
        shift: Tensor,
        scale: Tensor,
        weight: Tensor,
        bias: Tensor,
        embed_weight: Tensor,
        embed_bias: Tensor,
        positions: Tensor,
        dt: float | Tensor,
        *,
        step_shift: Tensor | None = None,
        step_scale: Tensor | None = None,
        guidance_scale: float | Tensor = 1.0,
        eps: float = 1e-6,
        previous: Tensor | None = None,
        ratio: float | Tensor = 0.0,
        return_velocity: bool = False,
    ) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]:
        """v = adaln(x) weight^T + bias;  state' = euler_step(state, v, ..);
        state' embed^T + bias + positions."""
        (dt, guidance_scale, ratio), data = numbers(dt, guidance_scale, ratio)
        return ops[return_velocity](
            x,
            state,
            shift,
            scale,
            weight,
            bias,
            embed_weight,
            embed_bias,
            positions,
            dt,
            step_shift,
            step_scale,
            guidance_scale,
            ratio,
            eps,
            previous,
            *data,
        )

    return flow_boundary


flow_boundary = bound("flow_boundary")


@torch.library.register_fake("ecar::flow_boundary")
def _fake(x, state, *arguments, **options):
    return state.new_empty(state.shape), x.new_empty(x.shape)


@torch.library.register_fake("ecar::flow_boundary_velocity")
def _(x, state, *arguments, **options):
    return *_fake(x, state), state.new_empty(state.shape)


@torch.library.register_fake("ecar::flow_boundary_out")
def _(*arguments, **options):
    return None
