"""What lies between two network calls of a stage, in one call; for inference."""

import functools
from typing import Literal, overload

import torch
from torch import Tensor

from ecar_kernels import _transforms, registry
from ecar_kernels._validation import (
    autocast_low,
    check_inference,
    check_last_dim,
    check_leading,
    check_like,
    check_number_or_data,
    check_positive,
    check_spatial,
    check_step,
    check_tensor,
    shape_error,
)
from ecar_kernels.flow_step.api import check_history

MAX_OUTPUTS = 64


@overload
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
    step_shift: Tensor | None = ...,
    step_scale: Tensor | None = ...,
    guidance_scale: float | Tensor = ...,
    eps: float = ...,
    previous: Tensor | None = ...,
    ratio: float | Tensor = ...,
    return_velocity: Literal[False] = ...,
) -> tuple[Tensor, Tensor]: ...
@overload
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
    step_shift: Tensor | None = ...,
    step_scale: Tensor | None = ...,
    guidance_scale: float | Tensor = ...,
    eps: float = ...,
    previous: Tensor | None = ...,
    ratio: float | Tensor = ...,
    return_velocity: Literal[True],
) -> tuple[Tensor, Tensor, Tensor]: ...
@functools.partial(autocast_low, kept=("state", "previous"))
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
    """The final adaLN and linear, guidance, a step, and the next step's embedding.

        v        = adaln(x, shift, scale) weight^T + bias      2B rows: v_u + g (v_c - v_u)
        state'   = state + dt v                                as euler_step, with its history
        embedded = state' embed_weight^T + embed_bias + positions

    x: [R, N, C], the residual stream behind the last block, R = B or 2B (conditional rows
    first), float32, bfloat16 or float16. state: [B, N, P], the latent in tokens, float32 or
    x's type, P at most 64. shift, scale: [R, N, C] or [R, 1, C]. step_shift, step_scale:
    [1, 1, C] or [R, 1, C]. weight: [P, C]. bias: [P]. embed_weight: [C, P]. embed_bias: [C].
    positions: [N, C]. dt: a finite number. guidance_scale: a finite number; 1 where R = B. eps > 0.
    Weights and positions are contiguous. previous: [B, N, P] in state's type, the guided velocity
    of the step before. ratio: dt over that step's, at least 0; 0 without `previous`. dt,
    guidance_scale and ratio may also be 0-dim float32 tensors on x's device, which a CUDA graph
    reads when it is replayed.

    Returns state' [B, N, P] in state's type and embedded [R, N, C] in x's, the same rows twice
    where R = 2B; with return_velocity also v [B, N, P] in state's type. No derivatives: ValueError
    where one is asked for. Under torch.autocast all but the state and `previous`, which keep their
    type, are cast to the autocast type. Raises ValueError or TypeError where an argument does not
    fit, BackendUnavailableError where the backend in force cannot serve.
    """
    check_leading("x", x, "[R, N, C]")
    rows, tokens, channels = x.shape
    check_like("weight", weight, "x", x)
    if weight.ndim != 2 or weight.shape[1] != channels or not 1 <= weight.shape[0] <= MAX_OUTPUTS:
        raise shape_error("weight", weight, f"[P, C], P at most {MAX_OUTPUTS},", C=channels)
    outputs = weight.shape[0]
    _check_state(state, x, outputs)
    batch = state.shape[0]
    check_spatial("shift", shift, "x", x)
    check_spatial("scale", scale, "x", x)
    check_step("step_shift", step_shift, "x", x)
    check_step("step_scale", step_scale, "x", x)
    for name, value, letters, shape in (
        ("weight", weight, "[P, C]", (outputs, channels)),
        ("bias", bias, "[P]", (outputs,)),
        ("embed_weight", embed_weight, "[C, P]", (channels, outputs)),
        ("embed_bias", embed_bias, "[C]", (channels,)),
        ("positions", positions, "[N, C]", (tokens, channels)),
    ):
        check_like(name, value, "x", x)
        if value.shape != shape:
            raise shape_error(name, value, letters, P=outputs, C=channels, N=tokens)
        if not value.is_contiguous() and not _transforms.active():  # as for layouts in general
            raise ValueError(
                f"argument '{name}': expected a contiguous tensor, got strides "
                f"{list(value.stride())}"
            )
    check_number_or_data("dt", dt, x, "x")
    check_number_or_data("guidance_scale", guidance_scale, x, "x")
    if rows != 2 * batch and (isinstance(guidance_scale, Tensor) or guidance_scale != 1):
        raise ValueError(
            "argument 'guidance_scale': expected 1.0 for x without unconditional "
            f"rows, got {guidance_scale}"
        )
    check_positive("eps", eps)
    check_history(previous, ratio, return_velocity, state, "state")
    check_inference(
        x=x,
        state=state,
        shift=shift,
        scale=scale,
        weight=weight,
        bias=bias,
        embed_weight=embed_weight,
        embed_bias=embed_bias,
        positions=positions,
        step_shift=step_shift,
        step_scale=step_scale,
        previous=previous,
    )
    run = registry.implementation("flow_boundary", x.device.type, x.dtype, channels).function
    return run(
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
        step_shift=step_shift,
        step_scale=step_scale,
        guidance_scale=guidance_scale,
        eps=eps,
        previous=previous,
        ratio=ratio,
        return_velocity=return_velocity,
    )


def _check_state(state: Tensor, x: Tensor, outputs: int) -> None:
    """[B, N, P] on x's device, in float32 or x's type."""
    check_tensor("state", state)
    rows, tokens, _ = x.shape
    if state.dtype not in (torch.float32, x.dtype):
        either = "" if x.dtype == torch.float32 else "torch.float32 or "
        raise TypeError(f"argument 'state': expected {either}{x.dtype} like 'x', got {state.dtype}")
    if state.device != x.device:
        raise ValueError(
            f"argument 'state': expected a tensor on {x.device} like 'x', got {state.device}"
        )
    if (
        state.ndim != 3
        or state.shape[1:] != (tokens, outputs)
        or rows not in (state.shape[0], 2 * state.shape[0])
    ):
        raise shape_error("state", state, "[B, N, P], R = B or 2B,", R=rows, N=tokens, P=outputs)
    check_last_dim("state", state)
