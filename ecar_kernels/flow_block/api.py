"""The GEMMs of a flow block with what surrounds them fused in.

A block is adaln_linear (qkv), attention, linear_gated_residual, adaln_linear (fc1, GELU),
linear_gated_residual: five calls and no elementwise kernel between them.

Common to the family: tokens [B, N, C] in float32, bfloat16 or float16 (float64: by the reference);
every tensor of one type on one device, the last dimension contiguous, other strides free.
Statistics and accumulation are in float32, outputs in the input's type. Gradients flow to every
tensor argument; autograd.py says which products a forward with gradients shares with them. Under
torch.autocast, arguments are cast to its type. Raises ValueError for a shape, layout or value,
TypeError for a type, naming the argument; BackendUnavailableError where the backend in force
cannot serve.
"""

from torch import Tensor

from ecar_kernels import registry
from ecar_kernels._validation import (
    autocast_low,
    check_leading,
    check_like,
    check_number,
    check_positive,
    check_spatial,
    check_step,
    shape_error,
)

ACTIVATIONS = (None, "gelu_tanh")


@autocast_low
def adaln_linear(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    step_shift: Tensor | None = None,
    step_scale: Tensor | None = None,
    activation: str | None = None,
    eps: float = 1e-6,
    scale_offset: float = 1.0,
) -> Tensor:
    """act(adaln(x, shift, scale) weight^T + bias).

        adaln = LN(x) (scale_offset + scale + step_scale) + shift + step_shift

    x: [B, N, C]. shift, scale: [B, N, C] or [B, 1, C]. step_shift, step_scale: [1, 1, C] or
    [B, 1, C]. weight: [K, C]. bias: [K] or None. activation: None or "gelu_tanh". eps > 0 is
    added to the variance. scale_offset: a finite number; with 0, scale and shift are the weight
    and bias of a LayerNorm in front of the linear layer. Returns [B, N, K].
    """
    check_leading("x", x, "[B, N, C]")
    check_spatial("shift", shift, "x", x)
    check_spatial("scale", scale, "x", x)
    _check_linear(weight, bias, "x", x)
    check_step("step_shift", step_shift, "x", x)
    check_step("step_scale", step_scale, "x", x)
    if activation not in ACTIVATIONS:
        raise ValueError(f"argument 'activation': expected None or 'gelu_tanh', got {activation!r}")
    check_positive("eps", eps)
    check_number("scale_offset", scale_offset)
    run = registry.implementation("adaln_linear", x.device.type, x.dtype, x.shape[-1]).function
    return run(
        x,
        shift,
        scale,
        weight,
        bias,
        step_shift=step_shift,
        step_scale=step_scale,
        activation=activation,
        eps=eps,
        scale_offset=scale_offset,
    )


@autocast_low
def linear_gated_residual(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate: Tensor,
    residual: Tensor,
    *,
    step_gate: Tensor | None = None,
) -> Tensor:
    """residual + (gate + step_gate) (h weight^T + bias).

    h: [B, N, K]. weight: [C, K]. bias: [C] or None. residual: [B, N, C]. gate: [B, N, C] or
    [B, 1, C]. step_gate: [1, 1, C] or [B, 1, C]. Returns a new tensor [B, N, C].
    """
    check_leading("h", h, "[B, N, K]")
    _check_linear(weight, bias, "h", h, rows="C", columns="K")
    check_like("residual", residual, "h", h)
    batch, tokens, channels = h.shape[0], h.shape[1], weight.shape[0]
    if residual.shape != (batch, tokens, channels):
        raise shape_error("residual", residual, "[B, N, C]", B=batch, N=tokens, C=channels)
    check_spatial("gate", gate, "residual", residual)
    check_step("step_gate", step_gate, "residual", residual)
    run = registry.implementation(
        "linear_gated_residual", h.device.type, h.dtype, channels
    ).function
    return run(h, weight, bias, gate, residual, step_gate=step_gate)


def _check_linear(
    weight: Tensor, bias: Tensor | None, x_name: str, x: Tensor, rows: str = "K", columns: str = "C"
) -> None:
    check_like("weight", weight, x_name, x)
    if weight.ndim != 2 or weight.shape[1] != x.shape[-1]:
        raise shape_error("weight", weight, f"[{rows}, {columns}]", **{columns: x.shape[-1]})
    if bias is None:
        return
    check_like("bias", bias, x_name, x)
    if bias.shape != weight.shape[:1]:
        raise shape_error("bias", bias, f"[{rows}]", **{rows: weight.shape[0]})
