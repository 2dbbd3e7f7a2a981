"""The oracles of the flow step, and the noise of an image: plain PyTorch.

Noise belongs to the image. Philox4x32-10 (Salmon et al. 2011) is keyed by the image's seed and
counts (call, stage, 0, 0), so that the same seed gives the same noise in any batch and on any
device.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ecar_kernels import _numbers
from ecar_kernels._precision import accumulation_dtype, widen

_MASK32 = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)  # golden ratio, sqrt(3) - 1
_ROUNDS = 10


def _multiply_32x32(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a b. In 16-bit halves: a b itself could overflow int64."""
    upper, lower = (a >> 16) * b, (a & 0xFFFF) * b
    upper = upper + (lower >> 16)
    return upper >> 16, ((upper & 0xFFFF) << 16) | (lower & 0xFFFF)


def philox4x32_10(counter: Tensor, key: Tensor) -> Tensor:
    """Four random 32-bit words a call, as int64 in [0, 2^32).

    counter: int64 [..., 4], key: int64 [..., 2], both of 32-bit words; leading dimensions
    broadcast. Returns int64 [..., 4].
    """
    c0, c1, c2, c3 = counter.unbind(-1)
    k0, k1 = key.unbind(-1)
    for _ in range(_ROUNDS):
        high0, low0 = _multiply_32x32(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply_32x32(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 = (k0 + _KEY_INCREMENTS[0]) & _MASK32
        k1 = (k1 + _KEY_INCREMENTS[1]) & _MASK32
    return torch.stack((c0, c1, c2, c3), dim=-1)


def uniforms(words: Tensor) -> Tensor:
    """u = (word + 0.5) 2^-32 in float32, in (0, 1].

    The word is rounded to the nearest float32 (ties to even), 0.5 is added in float32, and 2^-32
    is an exact factor: every backend gets the same bits. u is never 0, and 1 (whose logarithm
    is a harmless 0) for the last 128 words.
    """
    return (words.to(torch.float32) + 0.5) * 2.0**-32


def normals(words: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Four standard normals from four words (Box-Muller): [..., 4] -> [..., 4] in `dtype`.

    From u on all is in float32, each function good to a few ulp, so that backends agree to
    float32 rounding. With dtype float64 it is in float64, from the same u: the oracle.
    """
    u0, u1, u2, u3 = uniforms(words).to(accumulation_dtype(dtype)).unbind(-1)
    radius0, radius1 = (-2 * u0.log()).sqrt(), (-2 * u2.log()).sqrt()
    angle0, angle1 = 2 * math.pi * u1, 2 * math.pi * u3
    return torch.stack(
        (
            radius0 * angle0.cos(),
            radius0 * angle0.sin(),
            radius1 * angle1.cos(),
            radius1 * angle1.sin(),
        ),
        dim=-1,
    ).to(dtype)


def _image_normals(seeds: Tensor, stage: int, calls: int, dtype: torch.dtype) -> Tensor:
    """The normals of calls 0 .. calls-1 of each image's stream: [B, calls, 4]."""
    call = torch.arange(calls, device=seeds.device)
    rest = torch.zeros_like(call)
    counter = torch.stack((call, torch.full_like(call, stage), rest, rest), dim=-1)
    key = torch.stack((seeds & _MASK32, (seeds >> 32) & _MASK32), dim=-1)
    return normals(philox4x32_10(counter, key[:, None]), dtype)


def initial_noise(
    seeds: Tensor, shape: Sequence[int], *, device: torch.device | str, dtype: torch.dtype
) -> Tensor:
    """n_1: seeds int64 [B], shape (C, h, w) -> [B, C, h, w]. Call i yields elements 4i .. 4i+3."""
    count = math.prod(shape)
    noise = _image_normals(seeds.to(device), 1, (count + 3) // 4, dtype)
    return noise.flatten(1)[:, :count].unflatten(1, tuple(shape)).contiguous()


def block_details(
    seeds: Tensor, stage: int, shape: Sequence[int], dtype: torch.dtype = torch.float32
) -> Tensor:
    """d1, d2, d3 of each element of a low-resolution image.

    seeds int64 [B], shape (C, h, w) -> [B, C, 3, h, w]. Call i yields those of element i of
    [C, h, w] flattened, in its first three normals.
    """
    channels, height, width = shape
    noise = _image_normals(seeds, stage, channels * height * width, dtype)[..., :3]
    noise = noise.unflatten(1, (channels, height, width))
    return noise.movedim(4, 2).contiguous()


def haar_high_pass(details: Tensor) -> Tensor:
    """h = n - up(down(n)) of a noise n, from its Haar details.

    details [B, C, 3, h, w], three independent N(0, 1) a block -> [B, C, 2h, 2w], whose blocks
    have the covariance I - J/4.
    """
    d1, d2, d3 = widen(details).unbind(2)
    top = torch.stack((d1 + d2 + d3, d1 - d2 - d3), dim=-1)
    bottom = torch.stack((-d1 + d2 - d3, -d1 - d2 + d3), dim=-1)
    blocks = torch.stack((top, bottom), dim=-3) / 2  # [B, C, h, 2, w, 2]
    return blocks.flatten(4, 5).flatten(2, 3).to(details.dtype)


def guided_step(
    x: Tensor,
    velocity: Tensor,
    dt: float | Tensor,
    guidance_scale: float | Tensor,
    previous: Tensor | None,
    ratio: float | Tensor,
) -> tuple[Tensor, Tensor]:
    """x + dt (v + ratio (v - previous) / 2) and v, in the wide type; v is guided where the velocity
    has both halves. Without `previous` an Euler step."""
    v = widen(velocity)
    batch = x.shape[0]
    if velocity.shape[0] != batch:
        conditional, unconditional = v[:batch], v[batch:]
        v = unconditional + guidance_scale * (conditional - unconditional)
    slope = v if previous is None else v + ratio * (v - widen(previous)) / 2
    return widen(x) + dt * slope, v


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
    """x + dt ((1 + r/2) v - (r/2) previous), r = ratio; x + dt v without `previous`.

    v = v_u + guidance_scale (v_c - v_u) for a velocity of 2B rows, v_c first.
    """
    moved, v = guided_step(x, velocity, dt, guidance_scale, previous, ratio)
    # A copy: v may be the velocity itself.
    return (moved.to(x.dtype), v.to(x.dtype, copy=True)) if return_velocity else moved.to(x.dtype)


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
    end, v = guided_step(x, velocity, dt, guidance_scale, previous, ratio)
    if details is None:
        # One of the two is given.
        details = block_details(seeds, stage, x.shape[1:], end.dtype)  # type: ignore[arg-type]
    if torch.compiler.is_compiling():  # before 2.11 sums of symbols are constants to it
        time = _numbers.opened(time)
    upsampled = end.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    start = (1 + time) / 2 * upsampled + (1 - time) * haar_high_pass(widen(details))
    results = end.to(x.dtype), start.to(x.dtype)
    return (*results, v.to(x.dtype, copy=True)) if return_velocity else results
