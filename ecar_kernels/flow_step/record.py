"""The flow step's ops, declared."""

import torch

from ecar_kernels import _native
from ecar_kernels.ops import (
    DT,
    DTYPES,
    GUIDANCE_SCALE,
    Cost,
    Family,
    Implementation,
    Invalid,
    Op,
    guided,
    history,
    is_count,
    number,
    tensor,
    value,
)


def _backends(op: str) -> dict[str, Implementation]:
    return {
        "cpp": Implementation(
            f"ecar_kernels.flow_step.cpp:{op}", devices=("cpu",), missing=_native.why_not
        ),
        "cuda": Implementation(
            f"ecar_kernels.flow_step.cuda:{op}", devices=("cuda",), missing=_native.why_not_cuda
        ),
    }


def _is_shape(shape: object) -> bool:
    return isinstance(shape, (tuple, list)) and len(shape) == 3 and all(map(is_count, shape))


def _is_device(device: object) -> bool:
    try:
        return isinstance(device, (str, torch.device)) and torch.device(device) is not None
    except RuntimeError:
        return False


_STEP = (
    tensor("x", "[B, C, h, w]"),
    tensor("velocity", "[2B, C, h, w] or [B, C, h, w]"),
    DT,
    GUIDANCE_SCALE,
)
_HISTORY = history("[B, C, h, w]")
_SEEDS = tensor("seeds", "[B]", dtype=torch.int64, nullable=True)


def _seeds(error: type[Exception], make, message: str) -> Invalid:
    return Invalid(lambda: {"details": None, "seeds": make()}, error, message)


# What an op with a history refuses, beyond what holds for every number.
HISTORY_INVALID = (
    Invalid({"ratio": -0.5}, ValueError, "argument 'ratio': expected at least 0, got -0.5"),
    Invalid(
        {"previous": None}, ValueError, "argument 'ratio': expected 0 without 'previous', got 0.5"
    ),
    Invalid(
        lambda: {"previous": None, "ratio": torch.tensor(0.5)},
        ValueError,
        "argument 'ratio': expected 0 without 'previous', got a tensor",
    ),
    Invalid(
        {"return_velocity": 1},
        TypeError,
        "argument 'return_velocity': expected True or False, got int",
    ),
)
_JUMP_INVALID = (
    *HISTORY_INVALID,
    Invalid({"time": 1.0}, ValueError, "argument 'time': expected a number in [0, 1), got 1.0"),
    Invalid({"time": -0.1}, ValueError, "argument 'time': expected a number in [0, 1), got -0.1"),
    Invalid(
        {"stage": 1},
        ValueError,
        "argument 'stage': expected at least 2, the stage that begins, got 1",
    ),
    Invalid({"stage": 0}, ValueError, "argument 'stage': expected at least 1, got 0"),
    Invalid({"stage": 2.0}, TypeError, "argument 'stage': expected an integer, got float"),
    Invalid(
        {"details": None},
        ValueError,
        "arguments 'seeds' and 'details': expected exactly one of them, got none",
    ),
    Invalid(
        lambda: {"seeds": torch.tensor([1, 2])},
        ValueError,
        "arguments 'seeds' and 'details': expected exactly one of them, got both",
    ),
    _seeds(TypeError, lambda: [1, 2], "argument 'seeds': expected a tensor, got list"),
    _seeds(
        TypeError,
        lambda: torch.ones(2),
        "argument 'seeds': expected torch.int64, got torch.float32",
    ),
    _seeds(
        ValueError,
        lambda: torch.tensor([1, 2, 3]),
        "argument 'seeds': expected a tensor of shape [B] with B=2, got [3]",
    ),
    _seeds(
        ValueError,
        lambda: torch.tensor([1, 2]).to("meta"),
        "argument 'seeds': expected a tensor on cpu like 'x', got meta",
    ),
)
_NOISE_INVALID = (
    Invalid({"seeds": [1]}, TypeError, "argument 'seeds': expected a tensor, got list"),
    Invalid(
        lambda: {"seeds": torch.tensor([1], dtype=torch.int32)},
        TypeError,
        "argument 'seeds': expected torch.int64, got torch.int32",
    ),
    Invalid(
        lambda: {"seeds": torch.tensor([[1]])},
        ValueError,
        "argument 'seeds': expected a tensor of shape [B], got [1, 1]",
    ),
    Invalid(
        {"shape": 4},
        TypeError,
        "argument 'shape': expected (C, h, w), a tuple or list of integers, got int",
    ),
    Invalid({"shape": (8, 8)}, ValueError, "argument 'shape': expected (C, h, w), got [8, 8]"),
    Invalid({"shape": (4, 0, 8)}, ValueError, "argument 'shape[1]': expected at least 1, got 0"),
    Invalid(
        {"shape": (4, 8, 8.0)}, TypeError, "argument 'shape[2]': expected an integer, got float"
    ),
    Invalid(
        {"dtype": torch.int64},
        TypeError,
        "argument 'dtype': expected torch.float32, torch.bfloat16, torch.float16 or",
    ),
)

FAMILY = Family(
    "flow_step",
    ops=(
        Op(
            "euler_step",
            "a flow step with classifier-free guidance",
            (*_STEP, *_HISTORY),
            _backends("euler_step"),
            width="",
            rules=(guided("velocity", "x"),),
            invalid=HISTORY_INVALID,
            autocast="widest",
            cost=Cost(backward_reads=(), free=("x",)),
        ),
        Op(
            "upsample_renoise_euler",
            "a stage's last step and the jump to the next stage",
            (
                *_STEP,
                number("time", 1 / 3, 0.0, within=lambda time: 0 <= time < 1),
                value("stage", (2, 3, 4), lambda stage: is_count(stage) and stage >= 2),
                tensor("details", "[B, C, 3, h, w]", nullable=True),
                _SEEDS,
                *_HISTORY,
            ),
            _backends("upsample_renoise_euler"),
            width="",
            rules=(guided("velocity", "x"),),
            exclusive=("details", "seeds"),
            invalid=_JUMP_INVALID,
            autocast="widest",
            cost=Cost(backward_reads=()),
        ),
        Op(
            "initial_noise",
            "an image's noise from its seed",
            (
                tensor("seeds", "[B]", dtype=torch.int64),
                value("shape", lambda draw: (draw.sizes.image,), _is_shape),
                value("device", lambda draw: (draw.device_type,), _is_device),
                value("dtype", lambda draw: (draw.dtype,), lambda dtype: dtype in DTYPES),
            ),
            _backends("initial_noise"),
            width="",
            invalid=_NOISE_INVALID,
            gradients="none",
            autocast="",
        ),
    ),
)
