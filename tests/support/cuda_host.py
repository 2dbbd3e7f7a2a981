"""The CUDA ops on this machine's memory: what tests/csrc builds, as Python calls it."""

import ctypes
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

EULER, NOISE, BOUNDARY = "euler_step", "initial_noise", "flow_boundary"
CHAINED = "flow_boundary_chained"
SEEDS, DETAILS = "upsample_renoise_euler_seeds", "upsample_renoise_euler_details"
STEPS = (
    EULER,
    SEEDS,
    DETAILS,
    BOUNDARY,
    CHAINED,
)  # which have a twin that returns the velocity, too
OPS = (*STEPS, NOISE)
LEAST_SHARED = 99 << 10  # what a block of sm_120 can have
STREAM = 0x5001  # of cuda:0; 16 more for the next device


@dataclass
class Launch:
    """What a launch was asked for; `kernel` with its template's arguments."""

    kernel: str
    blocks: int
    threads: int
    shared: int
    device: int
    stream: int
    early: int  # may it begin before the kernel before it has ended?


def launch_of(line: str) -> Launch:
    signature, *numbers = line.split("|")
    name = re.search(r"(\w+?)(?:_kernel|_block)?\(", signature)
    arguments = dict(re.findall(r"(\w+) = ([^;,\]]+)", signature))
    keys = ("T", "S", "kTokens", "kGuided", "kWide")
    kept = [arguments[key].rpartition("::")[2] for key in keys if key in arguments]
    return Launch(" ".join([name[1] if name else "dry", *kept]), *map(int, numbers))


class Host:
    """The ops of `ecar_host` on tensors of this machine that are said to be on a GPU."""

    def __init__(self, library: Path) -> None:
        self.library = ctypes.CDLL(str(library))
        self.library.host_launches.restype = ctypes.c_char_p
        self.namespace = torch.ops.ecar_host
        self.schemas = torch.library.Library("ecar_host", "FRAGMENT")
        for op in (*OPS, *(f"{step}_velocity" for step in STEPS)):
            schema = str(getattr(torch.ops.ecar, op).default._schema)
            self.schemas.define(schema.removeprefix("ecar::"))
        self.launched: list[Launch] = []

    def set(
        self, *, fail=0, shared=LEAST_SHARED, backwards=False, dry=False, compiled_for=90, current=0
    ):
        """For the calls to come. dry: launches are checked and recorded, not run. compiled_for: the
        chip of the kernels' code, 0 where CUDA does not say."""
        self.dry = dry
        self.library.host_set(fail, shared, backwards, dry, compiled_for)
        self.library.host_set_device(current)

    def current(self) -> int:
        device = self.library.host_set_device(0)
        self.library.host_set_device(device)
        return device

    def call(self, op: str, *arguments, device: int = 0, elsewhere: dict | None = None):
        """The results' copies. elsewhere: devices by the argument's position, -1 the CPU."""
        self.library.host_launches()
        given = []
        for i, value in enumerate(arguments):
            index = (elsewhere or {}).get(i, device)
            move = isinstance(value, Tensor) and index >= 0
            given.append(self.namespace.on_cuda(value, index) if move else value)
        results = getattr(self.namespace, op)(*given)
        self.launched = [launch_of(x) for x in self.library.host_launches().decode().splitlines()]
        results = results if isinstance(results, tuple) else (results,)
        assert all(x.device == torch.device("cuda", device) for x in results)
        if not self.dry:
            results = tuple(self.namespace.on_host(x).clone() for x in results)
        assert self.library.host_release() == 0, "written outside an output"
        return results[0] if len(results) == 1 else results

    def run(self, op: str, changes: dict | None = None, **where) -> tuple[Tensor, ...]:
        """`sample_calls()[op]` with some arguments changed."""
        name, call = sample_calls()[op]
        results = getattr(self, name)(**call | (changes or {}), **where)
        return results if isinstance(results, tuple) else (results,)

    # The references' signatures.

    def euler_step(self, x, velocity, dt, *, guidance_scale=1.0, previous=None, ratio=0.0, **more):
        numbers, data = divided(dt, guidance_scale, ratio)
        return self.step(EULER, x, velocity, *numbers, previous, *data, **more)

    def upsample_renoise_euler(
        self,
        x,
        velocity,
        dt,
        *,
        time,
        stage,
        seeds=None,
        details=None,
        guidance_scale=1.0,
        previous=None,
        ratio=0.0,
        **more,
    ):
        numbers, data = divided(dt, guidance_scale, ratio)
        op, noise = (SEEDS, (stage, seeds)) if details is None else (DETAILS, (details,))
        return self.step(op, x, velocity, *numbers, time, *noise, previous, *data, **more)

    def step(self, op, *arguments, return_velocity=False, **where):
        return self.call(f"{op}_velocity" if return_velocity else op, *arguments, **where)

    def initial_noise(self, seeds, shape, dtype, **where):
        return self.call(NOISE, seeds, *shape, dtype, **where)

    def flow_boundary(
        self,
        x,
        state,
        shift,
        scale_,
        weight,
        bias,
        embed_weight,
        embed_bias,
        positions,
        dt,
        *,
        step_shift=None,
        step_scale=None,
        guidance_scale=1.0,
        eps=1e-6,
        previous=None,
        ratio=0.0,
        op=BOUNDARY,
        **more,
    ):
        (dt, guidance_scale, ratio), data = divided(dt, guidance_scale, ratio)
        return self.step(
            op,
            x,
            state,
            shift,
            scale_,
            weight,
            bias,
            embed_weight,
            embed_bias,
            positions,
            dt,
            step_shift,
            step_scale,
            guidance_scale,
            ratio,
            eps,
            previous,
            *data,
            **more,
        )

    def flow_boundary_chained(self, **call):
        return self.flow_boundary(op=CHAINED, **call)


def divided(*numbers):
    """Those that are numbers, 0 in the place of others, and those in tensors."""
    data = [value if isinstance(value, Tensor) else None for value in numbers]
    return [0.0 if isinstance(value, Tensor) else value for value in numbers], data


def laid(shape, dtype, layout: str) -> Tensor:
    """Random; an inner dimension that is contiguous, as the ops want it."""
    *outer, inner = shape
    if layout == "padded":
        return torch.randn(*outer, inner + 3).to(dtype)[..., 2:-1]
    if layout == "ragged":  # the first row alone begins on 16 bytes
        return torch.randn(*outer, inner + 3).to(dtype)[..., :-3]
    if layout == "apart":  # images are whole, with something in between
        images = torch.randn(shape[0], torch.Size(shape[1:]).numel() + 3).to(dtype)
        return images[:, :-3].unflatten(1, shape[1:])
    if layout == "aligned":  # rows begin on 16 bytes, with something in between
        return torch.randn(*outer, inner + 16).to(dtype)[..., 8:-8]
    if layout == "offset":
        return torch.randn(torch.Size(shape).numel() + 1).to(dtype)[1:].view(shape)
    if layout == "swapped":
        return torch.randn(shape[1], shape[0], *shape[2:]).to(dtype).transpose(0, 1)
    if layout == "expanded":
        return torch.randn(1, *shape[1:]).to(dtype).expand(shape)
    return torch.randn(shape).to(dtype)


def boundary(
    dtype,
    *,
    guided,
    batch,
    tokens,
    channels,
    outputs,
    wide_state=False,
    offset=False,
    history=False,
):
    """Arguments as a model has them; offset: weights that begin between 16 bytes; history: of a
    solver of several steps."""
    rows = batch * (1 + guided)
    weights = "offset" if offset else "dense"
    packed = torch.randn(rows, tokens, 2 * channels + 1).to(dtype)
    state = torch.randn(batch, tokens, outputs + 3).to(dtype)[..., 1 : outputs + 1]
    state = state.float() if wide_state else state
    previous = laid((batch, tokens, outputs), state.dtype, "padded")
    more = {"previous": previous, "ratio": 0.75, "return_velocity": True}
    return {
        "x": laid((rows, tokens, channels), dtype, "padded"),
        "state": state,
        "shift": packed[..., :channels],
        "scale_": packed[..., 1 + channels :],
        "weight": laid((outputs, channels), dtype, weights).div_(8),
        "bias": laid((outputs,), dtype, weights),
        "embed_weight": laid((channels, outputs), dtype, weights).div_(4),
        "embed_bias": laid((channels,), dtype, weights),
        "positions": laid((tokens, channels), dtype, weights),
        "dt": 0.125,
        "step_shift": laid((1, 1, channels), dtype, weights),
        "step_scale": laid((rows, 1, channels), dtype, weights),
        "guidance_scale": 1.5 if guided else 1.0,
        **(more if history else {}),
    }


def sample_calls(dtype=torch.float32) -> dict:
    """For each op a method of `Host` and its arguments."""
    x, velocity = torch.randn(2, 3, 4, 8).to(dtype), torch.randn(4, 3, 4, 8).to(dtype)
    step = {"x": x, "velocity": velocity, "dt": 0.125, "guidance_scale": 1.5}
    step |= {"previous": torch.randn(2, 3, 4, 8).to(dtype), "ratio": 0.75, "return_velocity": True}
    jump = step | {"time": 0.5, "stage": 2}
    of_boundary = {"guided": True, "batch": 2, "tokens": 5, "channels": 72, "outputs": 16}
    of_boundary = boundary(dtype, **of_boundary, history=True)
    return {
        EULER: ("euler_step", step),
        SEEDS: ("upsample_renoise_euler", jump | {"seeds": torch.arange(2)}),
        DETAILS: (
            "upsample_renoise_euler",
            jump | {"details": torch.randn(2, 3, 3, 4, 8).to(dtype)},
        ),
        NOISE: ("initial_noise", {"seeds": torch.arange(2), "shape": (3, 4, 8), "dtype": dtype}),
        BOUNDARY: ("flow_boundary", of_boundary),
        CHAINED: ("flow_boundary_chained", of_boundary),
    }
