"""Stage attention, declared."""

import importlib.util
import itertools

import torch

from ecar_kernels import _native, _triton
from ecar_kernels.ops import (
    Cost,
    Family,
    Implementation,
    Invalid,
    Op,
    is_count,
    number,
    tensor,
    value,
)

SIXTEEN_BITS = (torch.bfloat16, torch.float16)


def _is_stages(stages: object) -> bool:
    return isinstance(stages, (tuple, list)) and len(stages) > 0 and all(map(is_count, stages))


def _suffixes(stages) -> list[int]:
    return list(itertools.accumulate(reversed(stages)))


def _multiply_adds(sizes, given) -> int:
    """2 B H D for each visible pair of a query and a key."""
    stages = given["stage_lengths"]
    first = sizes["N"] - sizes["Nq"]
    pairs = sum(
        length * end
        for length, end in zip(stages, itertools.accumulate(stages), strict=True)
        if end > first
    )
    return 2 * sizes["B"] * sizes["H"] * sizes["D"] * pairs


def _invalid(stages: object, error: type[Exception], message: str) -> Invalid:
    return Invalid({"stage_lengths": stages}, error, message)


def _no_gpu() -> str | None:
    return _triton.too_old() if torch.cuda.is_available() else "torch sees no CUDA GPU"


def _no_flash() -> str | None:
    if torch.cuda.is_available() and not torch.backends.cuda.is_flash_attention_available():
        return "this torch is built without flash attention"
    return _no_gpu()


def _no_cudnn() -> str | None:
    if torch.cuda.is_available() and not torch.backends.cudnn.is_available():
        return "this torch is built without cuDNN"
    return _no_gpu()


def _no_package(package: str, module: str) -> str | None:
    try:
        if importlib.util.find_spec(module.partition(".")[0]) is None:
            return f"{package} is not installed"
        if (reason := _no_gpu()) is not None:
            return reason
        importlib.import_module(module)
    except ImportError as error:  # of another torch, or from a finder that blocks it
        return f"{package} does not load: {error}"
    return None


FAMILY = Family(
    "stage_attention",
    compile_cases="ecar_kernels.stage_attention.compile_cases:compile_cases",
    tuning="ecar_kernels.stage_attention.tuning_cases",
    ops=(
        Op(
            "stage_attention",
            "block-causal attention over stages, without a mask",
            (
                tensor("q", "[B, Nq, H, D]", part=True),
                tensor("k", "[B, N, H, D]", part=True),
                tensor("v", "[B, N, H, D]", part=True),
                value("stage_lengths", lambda draw: (draw.sizes.stages,), _is_stages),
                number("scale", None, 0.5, optional=True, nullable=True),
            ),
            {
                "cpp": Implementation(
                    "ecar_kernels.stage_attention.cpp:stage_attention",
                    devices=("cpu",),
                    missing=_native.why_not,
                ),
                "sdpa": Implementation(
                    "ecar_kernels.stage_attention.sdpa:stage_attention",
                    missing_on={"cpu": lambda: "the C++ backend serves its tensors"},
                    composed=True,
                    gradients_vary=True,
                ),
                "sdpa_flash": Implementation(
                    "ecar_kernels.stage_attention.sdpa_flash:stage_attention",
                    dtypes_on={"cuda": SIXTEEN_BITS},
                    devices=("cuda", "cpu"),
                    missing_on={"cuda": _no_flash},
                    max_width=256,
                    width_step=8,
                    gradients_vary=True,
                ),
                "sdpa_cudnn": Implementation(
                    "ecar_kernels.stage_attention.sdpa_cudnn:stage_attention",
                    dtypes=SIXTEEN_BITS,
                    devices=("cuda",),
                    missing=_no_cudnn,
                    max_width=128,
                    width_step=8,
                    gradients_vary=True,
                ),
                "flash_attn": Implementation(
                    "ecar_kernels.stage_attention.flash_attn:stage_attention",
                    dtypes=SIXTEEN_BITS,
                    devices=("cuda",),
                    missing=lambda: _no_package("flash-attn", "flash_attn.flash_attn_interface"),
                    max_width=256,
                    width_step=8,
                ),
                "xformers": Implementation(
                    "ecar_kernels.stage_attention.xformers:stage_attention",
                    dtypes=SIXTEEN_BITS,
                    devices=("cuda",),
                    missing=lambda: _no_package("xformers", "xformers.ops"),
                    max_width=256,
                    width_step=8,
                    gradients_vary=True,
                ),
                "triton": Implementation(
                    "ecar_kernels.stage_attention.triton:stage_attention",
                    max_width=256,
                    width_step=8,
                    auto="ecar_kernels.stage_attention.measured:stage_attention",
                    **_triton.serves(),
                ),
            },
            width="D",
            rules=(
                lambda sizes, given: sizes["D"] >= 1,
                lambda sizes, given: sizes["N"] == sum(given["stage_lengths"]),
                lambda sizes, given: sizes["Nq"] in _suffixes(given["stage_lengths"]),
            ),
            invalid=(
                _invalid(
                    21,
                    TypeError,
                    "argument 'stage_lengths': expected a tuple or list of integers, got int",
                ),
                _invalid(
                    (),
                    ValueError,
                    "argument 'stage_lengths': expected at least one stage, got none",
                ),
                _invalid(
                    (1, 0, 20),
                    ValueError,
                    "argument 'stage_lengths[1]': expected at least 1, got 0",
                ),
                _invalid(
                    (1, 4.0, 16),
                    TypeError,
                    "argument 'stage_lengths[1]': expected an integer, got float",
                ),
                _invalid(
                    (1, True, 19),
                    TypeError,
                    "argument 'stage_lengths[1]': expected an integer, got bool",
                ),
                _invalid(
                    (2, 3, 17),
                    ValueError,
                    "argument 'q': expected as many queries as a suffix of "
                    "stage_lengths=[2, 3, 17] has tokens, got 21",
                ),
                _invalid(
                    (2, 1, 4, 16),
                    ValueError,
                    "argument 'k': expected a tensor of shape [B, N, H, D] with B=2, N=23, H=3, "
                    "D=8, got [2, 21, 3, 8]",
                ),
            ),
            cost=Cost(
                _multiply_adds,
                backward_reads=("q", "k", "v"),
                reads_output=True,
                # q k^T again, and four products for dq, dk, dv and the scores' gradient
                backward_products=2.5,
            ),
        ),
    ),
)
