"""The Euler step with guidance, the jump between stages, and the noise of an image.

Common to the family: images [B, C, h, w] in float32, bfloat16 or float16 (float64: by the
reference); every floating tensor of one type on one device, the last dimension contiguous, other
strides free. Arithmetic is in float32, outputs in the input's type. Under torch.autocast,
arguments are promoted to their widest type: casting the state down would round away small steps.
Raises ValueError for a shape, layout or value, TypeError for a type, naming the argument;
BackendUnavailableError where the backend in force cannot serve.

A step's numbers (dt, guidance_scale, ratio) are Python numbers or 0-dim float32 tensors on the
images' device, which a CUDA graph reads when it is replayed.
"""

from collections.abc import Sequence
from typing import Literal, overload

import torch
from torch import Tensor

from ecar_kernels import registry
from ecar_kernels._validation import (
    autocast_widest,
    check_bool,
    check_count,
    check_device,
    check_dtype,
    check_leading,
    check_like,
    check_number,
    check_number_or_data,
    check_tensor,
    shape_error,
)


@overload
def euler_step(
    x: Tensor,
    velocity: Tensor,
    dt: float | Tensor,
    *,
    guidance_scale: float | Tensor = ...,
    previous: Tensor | None = ...,
    ratio: float | Tensor = ...,
    return_velocity: Literal[False] = ...,
) -> Tensor: ...
@overload
def euler_step(
    x: Tensor,
    velocity: Tensor,
    dt: float | Tensor,
    *,
    guidance_scale: float | Tensor = ...,
    previous: Tensor | None = ...,
    ratio: float | Tensor = ...,
    return_velocity: Literal[True],
) -> tuple[Tensor, Tensor]: ...
@autocast_widest
def euler_step(
    x: Tensor,
    velocity: Tensor,
    dt: float | Tensor,
    *,
    guidance_scale: float | Tensor = 1.0,
    previous: Tensor | None = None,
    ratio: float | Tensor = 0.0,
    return_velocity: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """x + dt v, or with a history x + dt ((1 + ratio/2) v - (ratio/2) previous).

    x: [B, C, h, w]. velocity: as x (v itself), or [2B, C, h, w], the conditional rows first,
    then v = v_u + guidance_scale (v_c - v_u). dt: a finite number. guidance_scale: a finite
    number; 1 where the velocity has B rows. Each number may also be a 0-dim float32 tensor on x's
    device, which a CUDA graph reads when it is replayed.

    previous: [B, C, h, w], the guided velocity of the step before, which makes this one of the
    second order: Adams-Bashforth's method with variable steps. ratio: dt over that step's, at
    least 0; 0 without `previous`. return_velocity: return v, too, of the same pass.

    Returns a new tensor [B, C, h, w]; with return_velocity, it and v [B, C, h, w] in x's type.
    Gradients flow to x, velocity and previous, also through v.
    """
    check_leading("x", x, "[B, C, h, w]")
    _check_step(x, velocity, dt, guidance_scale, previous, ratio, return_velocity)
    run = registry.implementation("euler_step", x.device.type, x.dtype).function
    return run(
        x,
        velocity,
        dt,
        guidance_scale=guidance_scale,
        previous=previous,
        ratio=ratio,
        return_velocity=return_velocity,
    )


@overload
def upsample_renoise_euler(
    x: Tensor,
    velocity: Tensor,
    dt: float | Tensor,
    *,
    time: float,
    stage: int,
    seeds: Tensor | None = ...,
    details: Tensor | None = ...,
    guidance_scale: float | Tensor = ...,
    previous: Tensor | None = ...,
    ratio: float | Tensor = ...,
    return_velocity: Literal[False] = ...,
) -> tuple[Tensor, Tensor]: ...
@overload
def upsample_renoise_euler(
    x: Tensor,
    velocity: Tensor,
    dt: float | Tensor,
    *,
    time: float,
    stage: int,
    seeds: Tensor | None = ...,
    details: Tensor | None = ...,
    guidance_scale: float | Tensor = ...,
    previous: Tensor | None = ...,
    ratio: float | Tensor = ...,
    return_velocity: Literal[True],
) -> tuple[Tensor, Tensor, Tensor]: ...
@autocast_widest
def upsample_renoise_euler(
    x: Tensor,
    velocity: Tensor,
    dt: float | Tensor,
    *,
    time: float,
    stage: int,
    seeds: Tensor | None = None,
    details: Tensor | None = None,
    guidance_scale: float | Tensor = 1.0,
    previous: Tensor | None = None,
    ratio: float | Tensor = 0.0,
    return_velocity: bool = False,
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]:
    """A stage's last step and the jump to the next stage, in one pass.

        end   = x + dt v                              as euler_step, with its history
        start = (1 + time)/2 up(end) + (1 - time) h   up: nearest neighbour, x2

    x: [B, C, h, w]. velocity, dt, guidance_scale, previous, ratio, return_velocity: of euler_step.
    time: a_{s+1} in [0, 1), a Python float. stage: s+1 >= 2, the stage that begins, counted from
    1. h is the Haar high-pass noise of that stage: either drawn from `seeds`, int64 [B], the
    images' own, or made of `details`, [B, C, 3, h, w], independent N(0, 1); exactly one of the
    two. Returns end [B, C, h, w] and start [B, C, 2h, 2w]; with return_velocity also v
    [B, C, h, w]. Gradients flow to x, velocity, previous and details.
    """
    check_leading("x", x, "[B, C, h, w]")
    _check_step(x, velocity, dt, guidance_scale, previous, ratio, return_velocity)
    check_number("time", time)
    if not 0 <= time < 1:
        raise ValueError(f"argument 'time': expected a number in [0, 1), got {time}")
    check_count("stage", stage)
    if stage < 2:
        raise ValueError(
            f"argument 'stage': expected at least 2, the stage that begins, got {stage}"
        )
    if (seeds is None) == (details is None):
        raise ValueError(
            "arguments 'seeds' and 'details': expected exactly one of them, got "
            f"{'none' if seeds is None else 'both'}"
        )
    if seeds is not None:
        _check_seeds(seeds)
        if seeds.shape != x.shape[:1]:
            raise shape_error("seeds", seeds, "[B]", B=x.shape[0])
        if seeds.device != x.device:
            raise ValueError(
                f"argument 'seeds': expected a tensor on {x.device} like 'x', got {seeds.device}"
            )
    elif details is not None:
        check_like("details", details, "x", x)
        batch, channels, height, width = x.shape
        if details.shape != (batch, channels, 3, height, width):
            raise shape_error(
                "details", details, "[B, C, 3, h, w]", B=batch, C=channels, h=height, w=width
            )
    run = registry.implementation("upsample_renoise_euler", x.device.type, x.dtype).function
    return run(
        x,
        velocity,
        dt,
        time=time,
        stage=stage,
        seeds=seeds,
        details=details,
        guidance_scale=guidance_scale,
        previous=previous,
        ratio=ratio,
        return_velocity=return_velocity,
    )


def initial_noise(
    seeds: Tensor, shape: Sequence[int], *, device: torch.device | str, dtype: torch.dtype
) -> Tensor:
    """n_1 ~ N(0, I), each image's from its own seed alone: [B, C, h, w].

    seeds: int64 [B], on any device. shape: (C, h, w) of one image. The same seed gives the same
    noise in any batch and, to float32 rounding, on any device. Not affected by torch.autocast.
    """
    _check_seeds(seeds)
    if not isinstance(shape, (tuple, list)):
        raise TypeError(
            "argument 'shape': expected (C, h, w), a tuple or list of integers, "
            f"got {type(shape).__name__}"
        )
    if len(shape) != 3:
        raise ValueError(f"argument 'shape': expected (C, h, w), got {list(shape)}")
    for index, size in enumerate(shape):
        check_count(f"shape[{index}]", size)
    check_dtype("dtype", dtype)
    where = check_device("device", device).type
    if seeds.is_meta and where != "meta":
        raise ValueError("argument 'seeds': expected a tensor with data, got one on meta")
    run = registry.implementation("initial_noise", where, dtype).function
    return run(seeds, shape, device=device, dtype=dtype)


def _check_step(
    x: Tensor,
    velocity: Tensor,
    dt: float | Tensor,
    guidance_scale: float | Tensor,
    previous: Tensor | None,
    ratio: float | Tensor,
    return_velocity: bool,
) -> None:
    check_like("velocity", velocity, "x", x)
    batch = x.shape[0]
    if velocity.shape[1:] != x.shape[1:] or velocity.shape[0] not in (batch, 2 * batch):
        raise ValueError(
            f"argument 'velocity': expected a tensor of shape {list(x.shape)} or "
            f"{[2 * batch, *x.shape[1:]]}, got {list(velocity.shape)}"
        )
    check_number_or_data("dt", dt, x, "x")
    check_number_or_data("guidance_scale", guidance_scale, x, "x")
    if velocity.shape[0] != 2 * batch and (
        isinstance(guidance_scale, Tensor) or guidance_scale != 1
    ):
        raise ValueError(
            "argument 'guidance_scale': expected 1.0 for a velocity without "
            f"unconditional rows, got {guidance_scale}"
        )
    check_history(previous, ratio, return_velocity, x, "x")


def check_history(
    previous: Tensor | None,
    ratio: float | Tensor,
    return_velocity: bool,
    state: Tensor,
    state_name: str,
) -> None:
    """What a solver of several steps adds to a step of the state."""
    if previous is None and return_velocity is False and type(ratio) is float and ratio == 0:
        return  # the defaults, at once
    check_number_or_data("ratio", ratio, state, state_name)
    if not isinstance(ratio, Tensor) and ratio < 0:
        raise ValueError(f"argument 'ratio': expected at least 0, got {ratio}")
    if previous is not None:
        check_like("previous", previous, state_name, state)
        if previous.shape != state.shape:
            raise ValueError(
                f"argument 'previous': expected a tensor of shape {list(state.shape)} like "
                f"'{state_name}', got {list(previous.shape)}"
            )
    elif isinstance(ratio, Tensor) or ratio != 0:
        came = "a tensor" if isinstance(ratio, Tensor) else ratio
        raise ValueError(f"argument 'ratio': expected 0 without 'previous', got {came}")
    check_bool("return_velocity", return_velocity)


def _check_seeds(seeds: Tensor) -> None:
    check_tensor("seeds", seeds)
    if seeds.dtype != torch.int64:
        raise TypeError(f"argument 'seeds': expected torch.int64, got {seeds.dtype}")
    if seeds.ndim != 1:
        raise shape_error("seeds", seeds, "[B]")
