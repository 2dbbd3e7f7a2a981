"""The adaLN family's ops, declared."""

from ecar_kernels import _native, _triton
from ecar_kernels.ops import EPS, Cost, Family, Implementation, Invalid, Op, modulation, tensor


def _backends(op: str) -> dict[str, Implementation]:
    return {
        "cpp": Implementation(
            f"ecar_kernels.adaln.cpp:{op}", devices=("cpu",), missing=_native.why_not
        ),
        "triton": Implementation(
            f"ecar_kernels.adaln.triton:{op}", max_width=8192, **_triton.serves()
        ),
    }


_X, _BRANCH = tensor("x", "[B, N, C]"), tensor("branch", "[B, N, C]")
_EPS = tuple(
    Invalid({"eps": eps}, ValueError, f"argument 'eps': expected a positive number, got {eps}")
    for eps in (0.0, -1.0)
)

FAMILY = Family(
    "adaln",
    compile_cases="ecar_kernels.adaln.compile_cases:compile_cases",
    tuning="ecar_kernels.adaln.tuning_cases",
    ops=(
        Op(
            "adaln",
            "LayerNorm modulated per token and per step",
            (_X, *modulation("shift", "scale"), EPS),
            _backends("adaln"),
            invalid=_EPS,
            cost=Cost(backward_reads=("x", "scale", "step_scale"), free=("shift",)),
        ),
        Op(
            "gated_residual",
            "residual stream plus a gated branch",
            (_X, _BRANCH, *modulation("gate")),
            _backends("gated_residual"),
            cost=Cost(backward_reads=("branch", "gate", "step_gate"), free=("x",)),
        ),
        Op(
            "gated_residual_adaln",
            "gated residual and adaLN in one pass",
            (_X, _BRANCH, *modulation("gate", "shift", "scale"), EPS),
            _backends("gated_residual_adaln"),
            invalid=_EPS,
            cost=Cost(
                backward_reads=("branch", "gate", "scale", "step_gate", "step_scale"),
                reads_output=True,  # the stream that the LayerNorm is of
                free=("shift",),
            ),
        ),
    ),
)
