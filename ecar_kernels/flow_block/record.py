"""The fused GEMMs of a flow block, declared."""

from collections.abc import Mapping
from typing import Any

from ecar_kernels import _native, _triton
from ecar_kernels.ops import (
    EPS,
    Cost,
    Family,
    Implementation,
    Invalid,
    Op,
    Sizes,
    modulation,
    number,
    tensor,
    value,
)


def _backends(op: str) -> dict[str, Implementation]:
    return {
        "cpp": Implementation(
            f"ecar_kernels.flow_block.cpp:{op}",
            devices=("cpu",),
            missing=_native.why_not,
            prepare="ecar_kernels.flow_block.cpp:prepare_weight",
        ),
        "triton": Implementation(
            f"ecar_kernels.flow_block.triton:{op}",
            chained=f"ecar_kernels.flow_block.triton:{op}_chained",
            **_triton.serves(),
        ),
    }


def _products(sizes: Sizes, given: Mapping[str, Any]) -> int:
    return sizes["B"] * sizes["N"] * sizes["C"] * sizes["K"]


ACTIVATIONS = ("gelu_tanh", None)

FAMILY = Family(
    "flow_block",
    compile_cases="ecar_kernels.flow_block.compile_cases:compile_cases",
    tuning="ecar_kernels.flow_block.tuning_cases",
    ops=(
        Op(
            "adaln_linear",
            "adaLN, linear layer and GELU",
            (
                tensor("x", "[B, N, C]"),
                *modulation("shift", "scale"),
                tensor("weight", "[K, C]", weight=True),
                tensor("bias", "[K]", nullable=True),
                value("activation", ACTIVATIONS, lambda name: name in ACTIVATIONS, nullable=True),
                EPS,
                number("scale_offset", 1.0, 0.5, 1, 0.0, -2.5, optional=True),
            ),
            _backends("adaln_linear"),
            invalid=(
                Invalid(
                    {"activation": "relu"},
                    ValueError,
                    "argument 'activation': expected None or 'gelu_tanh', got 'relu'",
                ),
            ),
            cost=Cost(
                _products,
                backward_reads=("x", "shift", "scale", "weight", "step_shift", "step_scale"),
                backward_products=2.0,
            ),
        ),
        Op(
            "linear_gated_residual",
            "linear layer, gate and residual",
            (
                tensor("h", "[B, N, K]"),
                tensor("weight", "[C, K]", weight=True),
                tensor("bias", "[C]", nullable=True),
                tensor("residual", "[B, N, C]"),
                *modulation("gate"),
            ),
            _backends("linear_gated_residual"),
            cost=Cost(
                _products,
                backward_reads=("h", "weight", "gate", "step_gate"),
                free=("residual",),
                backward_products=2.0,
            ),
        ),
    ),
)
