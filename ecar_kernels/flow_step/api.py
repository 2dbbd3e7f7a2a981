"""The Euler step with guidance, the jump between stages, and the noise of an image.

Common to the family: images [B, C, h, w] in float32, bfloat16 or float16 (float64: by the
reference); every floating tensor of one type on one device, the last dimension contiguous, other
strides free. Arithmetic is in float32, outputs in the input's type. Under torch.autocast,
arguments are promoted to their widest type: casting the state down would round away small steps.
Raises ValueError for a shape, layout or value, TypeError for a type, naming the argument;
BackendUnavailableError where the backend in force cannot serve.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ecar_kernels import registry
from ecar_kernels._validation import (
    autocast_widest,
    check_count,
    check_device,
    check_dtype,
    check_leading,
    check_like,
    check_number,
    check_tensor,
    shape_error,
)


@autocast_widest
def euler_step(
    x: Tensor, velocity: Tensor, dt: float, *, guidance_scale: float | Tensor = 1.0
) -> Tensor:
    """x + dt v.

    x: [B, C, h, w]. velocity: as x (v itself), or [2B, C, h, w], the conditional rows first,
    then v = v_u + guidance_scale (v_c - v_u). dt: a finite Python number. guidance_scale: one,
    or a 0-dim float32 tensor on x's device, which a CUDA graph reads when it is replayed; the
    number 1 where the velocity has B rows. Returns a new tensor [B, C, h, w]. Gradients flow
    to x and velocity.
    """
    check_leading("x", x, "[B, C, h, w]")
    _check_step(x, velocity, dt, guidance_scale)
    run = registry.implementation("euler_step", x.device.type, x.dtype).function
    return run(x, velocity, dt, guidance_scale=guidance_scale)


@autocast_widest
def upsample_renoise_euler(
    x: Tensor,
    velocity: Tensor,
    dt: float,
    *,
    time: float,
    stage: int,
    seeds: Tensor | None = None,
    details: Tensor | None = None,
    guidance_scale: float | Tensor = 1.0,
) -> tuple[Tensor, Tensor]:
    """A stage's last Euler step and the jump to the next stage, in one pass.

        end   = x + dt v                              as euler_step
        start = (1 + time)/2 up(end) + (1 - time) h   up: nearest neighbour, x2

    x: [B, C, h, w]. time: a_{s+1} in [0, 1), a Python float. stage: s+1 >= 2, the stage that
    begins, counted from 1. h is the Haar high-pass noise of that stage: either drawn from
    `seeds`, int64 [B], the images' own, or made of `details`, [B, C, 3, h, w], independent
    N(0, 1); exactly one of the two. Returns end [B, C, h, w] and start [B, C, 2h, 2w].
    Gradients flow to x, velocity and details.
    """
    check_leading("x", x, "[B, C, h, w]")
    _check_step(x, velocity, dt, guidance_scale)
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


def _check_step(x: Tensor, velocity: Tensor, dt: float, guidance_scale: float | Tensor) -> None:
    check_like("velocity", velocity, "x", x)
    batch = x.shape[0]
    if velocity.shape[1:] != x.shape[1:] or velocity.shape[0] not in (batch, 2 * batch):
        raise ValueError(
            f"argument 'velocity': expected a tensor of shape {list(x.shape)} or "
            f"{[2 * batch, *x.shape[1:]]}, got {list(velocity.shape)}"
        )
    check_number("dt", dt)
    check_guidance(guidance_scale, x)
    if velocity.shape[0] != 2 * batch and (
        isinstance(guidance_scale, Tensor) or guidance_scale != 1
    ):
        raise ValueError(
            "argument 'guidance_scale': expected 1.0 for a velocity without "
            f"unconditional rows, got {guidance_scale}"
        )


def check_guidance(scale: float | Tensor, x: Tensor) -> None:
    """A Python number, or one float32 on x's device."""
    if not isinstance(scale, Tensor) or scale.ndim != 0:
        check_number("guidance_scale", scale)
    elif scale.dtype != torch.float32:
        raise TypeError(
            "argument 'guidance_scale': expected a float or a 0-dim torch.float32 "
            f"tensor, got {scale.dtype}"
        )
    elif scale.device != x.device:
        raise ValueError(
            f"argument 'guidance_scale': expected a tensor on {x.device} like 'x', "
            f"got {scale.device}"
        )
    elif scale.requires_grad:
        raise ValueError(
            "argument 'guidance_scale': expected a tensor without a gradient, got "
            "one that requires grad"
        )


def _check_seeds(seeds: Tensor) -> None:
    check_tensor("seeds", seeds)
    if seeds.dtype != torch.int64:
        raise TypeError(f"argument 'seeds': expected torch.int64, got {seeds.dtype}")
    if seeds.ndim != 1:
        raise shape_error("seeds", seeds, "[B]")
