"""The flow step in C++, for CPU tensors: csrc/cpu/flow_step_isa.cpp."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ecar_kernels import _native
from ecar_kernels.flow_step import autograd

_native.require()

# Each without and with the guided velocity as a result, by `return_velocity`.
_euler_step, _from_seeds, _from_details = (
    (_native.op(name), _native.op(f"{name}_velocity"))
    for name in ("euler_step", "upsample_renoise_euler_seeds", "upsample_renoise_euler_details")
)
# upsample_renoise_euler from seeds into tensors that are there; `end` may be x.
jump_out = torch.ops.ecar.upsample_renoise_euler_seeds_out.default
_initial_noise = _native.op("initial_noise")


def numbers(
    dt: float | Tensor, guidance_scale: float | Tensor, ratio: float | Tensor
) -> tuple[tuple, tuple]:
    """Numbers as the ops take them: those that are numbers, and, if there are any, those in
    tensors, which are read when the op runs, or the CUDA graph that has it.

    Under torch.compile a float64 tensor is a number that the graph leaves open (_numbers.py).
    """
    values = dt, guidance_scale, ratio
    if not (
        isinstance(dt, Tensor) or isinstance(guidance_scale, Tensor) or isinstance(ratio, Tensor)
    ):
        return values, ()
    is_data = [isinstance(value, Tensor) and value.dtype == torch.float32 for value in values]
    return (
        tuple([0.0 if data else value for value, data in zip(values, is_data, strict=True)]),
        tuple([value if data else None for value, data in zip(values, is_data, strict=True)]),
    )


def _step(x, velocity, previous, dt, guidance_scale, ratio, return_velocity):
    given, data = numbers(dt, guidance_scale, ratio)
    return _euler_step[return_velocity](x, velocity, *given, previous, *data)


def _jump(
    x, velocity, previous, details, seeds, dt, guidance_scale, ratio, time, stage, return_velocity
):
    given, data = numbers(dt, guidance_scale, ratio)
    op, noise = (_from_seeds, (stage, seeds)) if details is None else (_from_details, (details,))
    return op[return_velocity](x, velocity, *given, time, *noise, previous, *data)


euler_step = autograd.euler_step(_step)
upsample_renoise_euler = autograd.upsample_renoise_euler(_jump)


def initial_noise(
    seeds: Tensor, shape: Sequence[int], *, device: torch.device | str, dtype: torch.dtype
) -> Tensor:
    """n_1: seeds int64 [B], shape (C, h, w) -> [B, C, h, w]. Call i yields elements 4i .. 4i+3."""
    return _initial_noise(seeds.to(device), *shape, dtype)


@torch.library.register_fake("ecar::euler_step")
def _fake_step(x, *arguments, **options):
    return x.new_empty(x.shape)


@torch.library.register_fake("ecar::euler_step_velocity")
def _(x, *arguments, **options):
    return _fake_step(x), _fake_step(x)


def _fake_jump(x, *arguments, **options):
    batch, channels, height, width = x.shape
    return _fake_step(x), x.new_empty((batch, channels, 2 * height, 2 * width))


def _fake_jump_velocity(x, *arguments, **options):
    return *_fake_jump(x), _fake_step(x)


for _source in ("seeds", "details"):
    _name = f"ecar::upsample_renoise_euler_{_source}"
    torch.library.register_fake(_name)(_fake_jump)
    torch.library.register_fake(f"{_name}_velocity")(_fake_jump_velocity)


@torch.library.register_fake("ecar::upsample_renoise_euler_seeds_out")
def _(x, velocity, dt, guidance_scale, time, stage, seeds, end, start):
    return None


@torch.library.register_fake("ecar::initial_noise")
def _(seeds, channels, height, width, dtype):
    return seeds.new_empty((seeds.shape[0], channels, height, width), dtype=dtype)
