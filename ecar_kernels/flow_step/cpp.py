"""The flow step in C++, for CPU tensors: csrc/cpu/flow_step_isa.cpp."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ecar_kernels import _native
from ecar_kernels.flow_step import autograd

_native.require()

_euler_step = _native.op("euler_step")
_from_seeds = _native.op("upsample_renoise_euler_seeds")
# upsample_renoise_euler from seeds into tensors that are there; `end` may be x.
jump_out = torch.ops.ecar.upsample_renoise_euler_seeds_out.default
_from_details = _native.op("upsample_renoise_euler_details")
_initial_noise = _native.op("initial_noise")


def scale_as_number(scale: float | Tensor) -> tuple[float | Tensor, None]:
    """A guidance scale as the ops take it for CPU tensors; a graph reads it when it runs."""
    if not isinstance(scale, Tensor) or torch.compiler.is_compiling():
        return scale, None
    return float(scale), None


def step(scale_of=scale_as_number):
    """(x, velocity, dt, guidance_scale) -> x; scale_of: the scale as a device's ops take it."""

    def run(x, velocity, dt, guidance_scale):
        return _euler_step(x, velocity, dt, *scale_of(guidance_scale))

    return run


def jump(scale_of=scale_as_number):
    """Likewise (x, velocity, details, seeds, dt, guidance_scale, time, stage) -> end, start."""

    def run(x, velocity, details, seeds, dt, guidance_scale, time, stage):
        number, on_device = scale_of(guidance_scale)
        if details is None:
            return _from_seeds(x, velocity, dt, number, time, stage, seeds, on_device)
        return _from_details(x, velocity, dt, number, time, details, on_device)

    return run


euler_step = autograd.euler_step(step())
upsample_renoise_euler = autograd.upsample_renoise_euler(jump())


def initial_noise(
    seeds: Tensor, shape: Sequence[int], *, device: torch.device | str, dtype: torch.dtype
) -> Tensor:
    """n_1: seeds int64 [B], shape (C, h, w) -> [B, C, h, w]. Call i yields elements 4i .. 4i+3."""
    return _initial_noise(seeds.to(device), *shape, dtype)


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
