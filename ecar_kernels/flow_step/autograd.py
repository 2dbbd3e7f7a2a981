"""The autograd of the family's ops, over any backend.

The gradients are plain PyTorch: the sampler asks for none, and training has no flow step.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ecar_kernels._precision import widen


def _keep(
    ctx: Any, x: Tensor, velocity: Tensor, previous: Tensor | None, *numbers: float | Tensor
) -> None:
    ctx.guided, ctx.history = velocity.shape[0] != x.shape[0], previous is not None
    ctx.numbers = numbers


def _gradients(
    ctx: Any, end: Tensor, v: tuple[Tensor, ...], dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Those of the velocity and of `previous`, the forward's second and third argument.

    end: the gradient of x + dt (v + ratio (v - previous) / 2). v: of v, where it was returned.
    """
    dt, guidance_scale, ratio = ctx.numbers
    found, previous = dt * end, None
    if ctx.history:
        part = ratio * found / 2
        found, previous = found + part, (-part).to(dtype)
    for gradient in v:
        found = found + widen(gradient)
    if ctx.guided:
        found = torch.cat((guidance_scale * found, (1 - guidance_scale) * found))
    return found.to(dtype), previous


def _asked(*tensors: Tensor | None) -> bool:
    return any([x is not None and x.requires_grad for x in tensors])


def euler_step(forward: Callable) -> Callable:
    """The op, from a backend's (x, velocity, previous, dt, guidance_scale, ratio, return_velocity)
    -> x, or (x, velocity)."""

    class EulerStep(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, velocity, previous, *rest):
            _keep(ctx, x, velocity, previous, *rest[:3])
            return forward(x, velocity, previous, *rest)

        @staticmethod
        def backward(ctx, gradient, *v):
            return (
                gradient,
                *_gradients(ctx, widen(gradient), v, gradient.dtype),
                None,
                None,
                None,
                None,
            )

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
        """x + dt ((1 + r/2) v - (r/2) previous), r = ratio; x + dt v without `previous`."""
        run = forward
        if torch.is_grad_enabled() and _asked(x, velocity, previous):
            run = EulerStep.apply
        return run(x, velocity, previous, dt, guidance_scale, ratio, return_velocity)

    return euler_step


def upsample_renoise_euler(forward: Callable) -> Callable:
    """The op, from a backend's (x, velocity, previous, details, seeds, dt, guidance_scale, ratio,
    time, stage, return_velocity) -> end, start, or end, start, velocity."""

    class UpsampleRenoiseEuler(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, velocity, previous, details, seeds, *rest):
            _keep(ctx, x, velocity, previous, *rest[:3])
            ctx.time = rest[3]
            return forward(x, velocity, previous, details, seeds, *rest)

        @staticmethod
        def backward(ctx, end, start, *v):
            dtype = end.dtype
            # The corners of each 2x2 block: [B, C, h, w].
            a, b, c, d = (widen(start[:, :, i::2, j::2]) for i in (0, 1) for j in (0, 1))
            x = widen(end) + (1 + ctx.time) / 2 * (a + b + c + d)
            details = None
            if ctx.needs_input_grad[3]:
                details = torch.stack((a + b - c - d, a - b + c - d, a - b - c + d), dim=2)
                details = ((1 - ctx.time) / 2 * details).to(dtype)
            return x.to(dtype), *_gradients(ctx, x, v, dtype), details, *[None] * 7

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
        """end = euler_step(x, ..);  start = (1 + t)/2 up(end) + (1 - t) h, with t = time."""
        numbers = dt, guidance_scale, ratio, time, stage, return_velocity
        call = x, velocity, previous, details, seeds, *numbers
        if torch.is_grad_enabled() and _asked(x, velocity, previous, details):
            return UpsampleRenoiseEuler.apply(*call)
        return forward(*call)

    return upsample_renoise_euler
