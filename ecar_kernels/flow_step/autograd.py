"""The autograd of the family's ops, over any backend.

The gradients are plain PyTorch: the sampler asks for none, and training has no flow step.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ecar_kernels._precision import widen


def _velocity_gradient(
    gradient: Tensor, guided: bool, dt: float, guidance_scale: float | Tensor
) -> Tensor:
    """Of x + dt v, the gradient for v: in the type of `gradient`."""
    if not guided:
        return dt * gradient
    return torch.cat((dt * guidance_scale * gradient, dt * (1 - guidance_scale) * gradient))


def euler_step(forward: Callable) -> Callable:
    """The op, from a backend's (x, velocity, dt, guidance_scale) -> x."""

    class EulerStep(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, velocity, dt, guidance_scale):
            ctx.guided = velocity.shape[0] != x.shape[0]
            ctx.numbers = dt, guidance_scale
            return forward(x, velocity, dt, guidance_scale)

        @staticmethod
        def backward(ctx, gradient):
            velocity = _velocity_gradient(widen(gradient), ctx.guided, *ctx.numbers)
            return gradient, velocity.to(gradient.dtype), None, None

    def euler_step(
        x: Tensor, velocity: Tensor, dt: float, *, guidance_scale: float | Tensor = 1.0
    ) -> Tensor:
        """x + dt v, v = v_u + guidance_scale (v_c - v_u) for a velocity of 2B rows, v_c first."""
        if torch.is_grad_enabled() and (x.requires_grad or velocity.requires_grad):
            return EulerStep.apply(x, velocity, dt, guidance_scale)
        return forward(x, velocity, dt, guidance_scale)

    return euler_step


def upsample_renoise_euler(forward: Callable) -> Callable:
    """The op, from a backend's (x, velocity, details, seeds, dt, guidance_scale, time, stage) ->
    end, start."""

    class UpsampleRenoiseEuler(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, velocity, details, seeds, dt, guidance_scale, time, stage):
            ctx.guided = velocity.shape[0] != x.shape[0]
            ctx.numbers = dt, guidance_scale
            ctx.time = time
            return forward(x, velocity, details, seeds, dt, guidance_scale, time, stage)

        @staticmethod
        def backward(ctx, end, start):
            dtype = end.dtype
            # The corners of each 2x2 block: [B, C, h, w].
            a, b, c, d = (widen(start[:, :, i::2, j::2]) for i in (0, 1) for j in (0, 1))
            x = widen(end) + (1 + ctx.time) / 2 * (a + b + c + d)
            velocity = _velocity_gradient(x, ctx.guided, *ctx.numbers)
            details = None
            if ctx.needs_input_grad[2]:
                details = torch.stack((a + b - c - d, a - b + c - d, a - b - c + d), dim=2)
                details = ((1 - ctx.time) / 2 * details).to(dtype)
            return x.to(dtype), velocity.to(dtype), details, None, None, None, None, None

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
        """end = x + dt v;  start = (1 + t)/2 up(end) + (1 - t) h, with t = time."""
        call = x, velocity, details, seeds, dt, guidance_scale, time, stage
        if torch.is_grad_enabled() and (
            x.requires_grad
            or velocity.requires_grad
            or (details is not None and details.requires_grad)
        ):
            return UpsampleRenoiseEuler.apply(*call)
        return forward(*call)

    return upsample_renoise_euler
