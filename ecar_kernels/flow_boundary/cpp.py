"""The boundary between two network calls in C++: csrc/cpu/flow_boundary_isa.cpp."""

from collections.abc import Callable

import torch
from torch import Tensor

from ecar_kernels import _native
from ecar_kernels.flow_step.cpp import scale_as_number

_native.require()

_flow_boundary = _native.op("flow_boundary")
# The arguments up to `eps`, then the outputs: the state's may be the state, the embedding's x.
flow_boundary_out = torch.ops.ecar.flow_boundary_out.default


def boundary(scale_of: Callable) -> Callable:
    """The op; scale_of: the guidance scale as a device's op takes it."""

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
        dt: float,
        *,
        step_shift: Tensor | None = None,
        step_scale: Tensor | None = None,
        guidance_scale: float | Tensor = 1.0,
        eps: float = 1e-6,
    ) -> tuple[Tensor, Tensor]:
        """v = adaln(x) weight^T + bias;  state' = state + dt v;  state' embed^T + bias +
        positions."""
        number, on_device = scale_of(guidance_scale)
        return _flow_boundary(
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
            number,
            eps,
            on_device,
        )

    return flow_boundary


flow_boundary = boundary(scale_as_number)


@torch.library.register_fake("ecar::flow_boundary")
def _(
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
    eps,
    guidance=None,
):
    return state.new_empty(state.shape), x.new_empty(x.shape)


@torch.library.register_fake("ecar::flow_boundary_out")
def _(
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
    eps,
    new_state,
    embedded,
):
    return None
