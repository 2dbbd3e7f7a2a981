"""The flow step in C++: csrc/cpu/flow_step_isa.cpp, and csrc/cuda/flow_step.cu for CUDA.

The ops have no autograd of their own: where a gradient is asked for, the Functions below call
them, and else the ops are called directly. These gradients are plain PyTorch: the sampler asks
for none, and training has no flow step.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ecar_kernels import _native
from ecar_kernels._precision import widen

_native.require()

_euler_step = _native.op("euler_step")
_from_seeds = _native.op("upsample_renoise_euler_seeds")
# upsample_renoise_euler from seeds on the CPU into tensors that are there; `end` may be x.
jump_out = torch.ops.ecar.upsample_renoise_euler_seeds_out.default
_from_details = _native.op("upsample_renoise_euler_details")
_initial_noise = _native.op("initial_noise")


def euler_step(
    x: Tensor, velocity: Tensor, dt: float, *, guidance_scale: float | Tensor = 1.0
) -> Tensor:
    """x + dt v, v = v_u + guidance_scale (v_c - v_u) for a velocity of 2B rows, v_c first."""
    if torch.is_grad_enabled() and (x.requires_grad or velocity.requires_grad):
        return _EulerStep.apply(x, velocity, dt, guidance_scale)
    return _euler_step(x, velocity, dt, *_scale(x, guidance_scale))


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
    if torch.is_grad_enabled() and (
        x.requires_grad or velocity.requires_grad or (details is not None and details.requires_grad)
    ):
        return _UpsampleRenoiseEuler.apply(
            x, velocity, details, seeds, dt, guidance_scale, time, stage
        )
    return _jump(x, velocity, details, seeds, dt, guidance_scale, time, stage)


def initial_noise(
    seeds: Tensor, shape: Sequence[int], *, device: torch.device | str, dtype: torch.dtype
) -> Tensor:
    """n_1: seeds int64 [B], shape (C, h, w) -> [B, C, h, w]. Call i yields elements 4i .. 4i+3."""
    return _initial_noise(seeds.to(device), *shape, dtype)


def _jump(x, velocity, details, seeds, dt, guidance_scale, time, stage):
    number, on_device = _scale(x, guidance_scale)
    if details is None:
        return _from_seeds(x, velocity, dt, number, time, stage, seeds, on_device)
    return _from_details(x, velocity, dt, number, time, details, on_device)


def _scale(x: Tensor, guidance_scale: float | Tensor) -> tuple[float, Tensor | None]:
    """As the ops take it: a number, or a tensor that stays on its GPU unread."""
    if not isinstance(guidance_scale, Tensor):
        return guidance_scale, None
    if torch.compiler.is_compiling() and not guidance_scale.is_cuda:
        return guidance_scale, None  # read when the graph runs
    return (1.0, guidance_scale) if x.is_cuda else (float(guidance_scale), None)


def _velocity_gradient(
    gradient: Tensor, guided: bool, dt: float, guidance_scale: float | Tensor
) -> Tensor:
    """Of x + dt v, the gradient for v: in the type of `gradient`."""
    if not guided:
        return dt * gradient
    return torch.cat((dt * guidance_scale * gradient, dt * (1 - guidance_scale) * gradient))


class _EulerStep(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, velocity, dt, guidance_scale):
        ctx.guided = velocity.shape[0] != x.shape[0]
        ctx.numbers = dt, guidance_scale
        return _euler_step(x, velocity, dt, *_scale(x, guidance_scale))

    @staticmethod
    def backward(ctx, gradient):
        velocity = _velocity_gradient(widen(gradient), ctx.guided, *ctx.numbers)
        return gradient, velocity.to(gradient.dtype), None, None


class _UpsampleRenoiseEuler(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, velocity, details, seeds, dt, guidance_scale, time, stage):
        ctx.guided = velocity.shape[0] != x.shape[0]
        ctx.numbers = dt, guidance_scale
        ctx.time = time
        return _jump(x, velocity, details, seeds, dt, guidance_scale, time, stage)

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


@torch.library.register_fake("ecar::euler_step")
def _(x, velocity, dt, guidance_scale, guidance=None):
    return x.new_empty(x.shape)


def _fake_jump(x: Tensor) -> tuple[Tensor, Tensor]:
    batch, channels, height, width = x.shape
    return x.new_empty(x.shape), x.new_empty((batch, channels, 2 * height, 2 * width))


@torch.library.register_fake("ecar::upsample_renoise_euler_seeds")
def _(x, velocity, dt, guidance_scale, time, stage, seeds, guidance=None):
    return _fake_jump(x)


@torch.library.register_fake("ecar::upsample_renoise_euler_seeds_out")
def _(x, velocity, dt, guidance_scale, time, stage, seeds, end, start):
    return None


@torch.library.register_fake("ecar::upsample_renoise_euler_details")
def _(x, velocity, dt, guidance_scale, time, details, guidance=None):
    return _fake_jump(x)


@torch.library.register_fake("ecar::initial_noise")
def _(seeds, channels, height, width, dtype):
    return seeds.new_empty((seeds.shape[0], channels, height, width), dtype=dtype)
