"""LayerNorm with separable modulation, the gated residual, and both in one pass.

The modulation has a part that depends on the token (`shift`, `scale`, `gate`: computed once per
stage) and one that depends on the step (`step_*`: computed once for all steps); they are added
here, in registers where the backend can.

Common to the family: tokens [B, N, C] in float32, bfloat16 or float16 (float64: by the reference);
every tensor of one type on one device, the last dimension contiguous, other strides free (a
`chunk(6, -1)` of a packed modulation is not copied). Statistics and arithmetic are in float32,
outputs in the input's type. Gradients flow to every tensor argument. Under torch.autocast,
arguments are cast to its type. Raises ValueError for a shape, layout or value, TypeError for a
type, naming the argument; BackendUnavailableError where the backend in force cannot serve.
"""

from torch import Tensor

from ecar_kernels import registry
from ecar_kernels._validation import (
    autocast_low,
    check_leading,
    check_like,
    check_positive,
    check_spatial,
    check_step,
    shape_error,
)


@autocast_low
def adaln(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    *,
    step_shift: Tensor | None = None,
    step_scale: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """y = LN(x) (1 + scale + step_scale) + shift + step_shift.

    x: [B, N, C]. shift, scale: [B, N, C] or [B, 1, C]. step_shift, step_scale: [1, 1, C] or
    [B, 1, C]. eps > 0 is added to the variance. Returns [B, N, C].
    """
    check_leading("x", x, "[B, N, C]")
    _check_modulation(x, shift, scale, step_shift, step_scale, eps)
    run = registry.implementation("adaln", x.device.type, x.dtype, x.shape[-1]).function
    return run(x, shift, scale, step_shift=step_shift, step_scale=step_scale, eps=eps)


@autocast_low
def gated_residual(
    x: Tensor, branch: Tensor, gate: Tensor, *, step_gate: Tensor | None = None
) -> Tensor:
    """x + (gate + step_gate) branch.

    x, branch: [B, N, C]. gate: [B, N, C] or [B, 1, C]. step_gate: [1, 1, C] or [B, 1, C].
    Returns a new tensor [B, N, C].
    """
    check_leading("x", x, "[B, N, C]")
    _check_gated(x, branch, gate, step_gate)
    run = registry.implementation("gated_residual", x.device.type, x.dtype, x.shape[-1]).function
    return run(x, branch, gate, step_gate=step_gate)


@autocast_low
def gated_residual_adaln(
    x: Tensor,
    branch: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    *,
    step_gate: Tensor | None = None,
    step_shift: Tensor | None = None,
    step_scale: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """x' = gated_residual(x, branch, gate) and y = adaln(x', shift, scale), in one pass.

    Shapes as in the two ops. Returns x' and y, each [B, N, C].
    """
    check_leading("x", x, "[B, N, C]")
    _check_gated(x, branch, gate, step_gate)
    _check_modulation(x, shift, scale, step_shift, step_scale, eps)
    run = registry.implementation(
        "gated_residual_adaln", x.device.type, x.dtype, x.shape[-1]
    ).function
    return run(
        x,
        branch,
        gate,
        shift,
        scale,
        step_gate=step_gate,
        step_shift=step_shift,
        step_scale=step_scale,
        eps=eps,
    )


def _check_gated(x: Tensor, branch: Tensor, gate: Tensor, step_gate: Tensor | None) -> None:
    check_like("branch", branch, "x", x)
    if branch.shape != x.shape:
        raise shape_error("branch", branch, f"{list(x.shape)} like 'x'")
    check_spatial("gate", gate, "x", x)
    check_step("step_gate", step_gate, "x", x)


def _check_modulation(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    step_shift: Tensor | None,
    step_scale: Tensor | None,
    eps: float,
) -> None:
    check_spatial("shift", shift, "x", x)
    check_spatial("scale", scale, "x", x)
    check_step("step_shift", step_shift, "x", x)
    check_step("step_scale", step_scale, "x", x)
    check_positive("eps", eps)
