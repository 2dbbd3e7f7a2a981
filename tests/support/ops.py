"""Valid arguments for every op, by name: what the tests that hold for all ops start from."""

import torch
from torch import Tensor

import ecar_kernels
from ecar_kernels.registry import FAMILIES, OPS

STAGES = (1, 4, 16)
TOKENS, HEADS, HEAD_DIM, CHANNELS, HIDDEN = 21, 3, 8, 24, 40
IMAGE, OUTPUTS = (3, 4, 6), 12
INFERENCE_ONLY = (*FAMILIES["flow_block"], "flow_boundary")
# Arguments that no backend takes as views.
CONTIGUOUS = {"flow_boundary": ("weight", "bias", "embed_weight", "embed_bias", "positions")}
DIFFERENTIABLE = tuple(op for op in OPS if op not in (*INFERENCE_ONLY, "initial_noise"))
FAMILY = {op: family for family, ops in FAMILIES.items() for op in ops}


def function(op: str):
    """The public op."""
    return getattr(ecar_kernels, op)


def arguments(op: str, *, batch: int = 2, dtype: torch.dtype = torch.float32,
              optional: bool = True) -> dict:
    """Random arguments, views where users have views; `optional` includes the optional ones."""
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape).to(dtype)

    def modulation(*names: str, rows: int = batch) -> dict:
        """Chunks of one packed projection, as a model has them."""
        packed = normal(rows, TOKENS, len(names) * CHANNELS).chunk(len(names), -1)
        return dict(zip(names, packed, strict=True))

    def steps(*names: str) -> dict:
        return {name: normal(1, 1, CHANNELS) for name in names} if optional else {}

    x = {"x": normal(batch, TOKENS, CHANNELS)}
    branch = {"branch": normal(batch, TOKENS, CHANNELS)}
    seeds = torch.randint(-2**63, 2**63 - 1, (batch,))
    image = {"x": normal(batch, *IMAGE), "velocity": normal(2 * batch, *IMAGE), "dt": 0.125,
             "guidance_scale": 1.5}
    if op == "stage_attention":
        packed = normal(batch, TOKENS, 3 * HEADS * HEAD_DIM).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (HEADS, HEAD_DIM)) for part in packed)
        return {"q": q, "k": k, "v": v, "stage_lengths": STAGES}
    if op == "adaln":
        return x | modulation("shift", "scale") | steps("step_shift", "step_scale")
    if op == "gated_residual":
        return x | branch | modulation("gate") | steps("step_gate")
    if op == "gated_residual_adaln":
        return (x | branch | modulation("gate", "shift", "scale")
                | steps("step_gate", "step_shift", "step_scale"))
    if op == "adaln_linear":
        return (x | modulation("shift", "scale")
                | {"weight": normal(HIDDEN, CHANNELS), "bias": normal(HIDDEN)}
                | steps("step_shift", "step_scale") | {"activation": "gelu_tanh"}
                | ({"scale_offset": 0.5} if optional else {}))
    if op == "linear_gated_residual":
        return ({"h": normal(batch, TOKENS, HIDDEN), "weight": normal(CHANNELS, HIDDEN),
                 "bias": normal(CHANNELS), "residual": normal(batch, TOKENS, CHANNELS)}
                | modulation("gate") | steps("step_gate"))
    if op == "flow_boundary":
        return ({"x": normal(2 * batch, TOKENS, CHANNELS), "state": normal(batch, TOKENS, OUTPUTS)}
                | modulation("shift", "scale", rows=2 * batch)
                | {"weight": normal(OUTPUTS, CHANNELS), "bias": normal(OUTPUTS),
                   "embed_weight": normal(CHANNELS, OUTPUTS), "embed_bias": normal(CHANNELS),
                   "positions": normal(TOKENS, CHANNELS), "dt": 0.125, "guidance_scale": 1.5}
                | steps("step_shift", "step_scale"))
    if op == "euler_step":
        return image
    if op == "upsample_renoise_euler":
        channels, height, width = IMAGE
        noise = ({"details": normal(batch, channels, 3, height, width)} if optional
                 else {"seeds": seeds})
        return image | {"time": 1 / 3, "stage": 2} | noise
    return {"seeds": seeds, "shape": IMAGE, "device": "cpu", "dtype": dtype}


def tensor_names(op: str) -> list[str]:
    """The floating tensor arguments, the one that sets type and device first."""
    return [name for name, value in arguments(op).items()
            if isinstance(value, Tensor) and value.is_floating_point()]


def small_arguments(op: str, *, dtype: torch.dtype = torch.float32, optional: bool = True) -> dict:
    """Few enough numbers for whole Jacobians; what backends ask of sizes still holds."""
    call = arguments(op, dtype=dtype, optional=optional)
    if op == "stage_attention":
        return {name: call[name][:, :5, :1].contiguous() for name in "qkv"} | {
            "stage_lengths": (1, 4)}
    for name in tensor_names(op):
        if name not in call:
            continue
        value = call[name]
        if op in FAMILIES["flow_step"] and op != "flow_boundary":
            value = value[:, :1, ..., :2, :3]
        elif value.ndim == 3:
            value = value[:, :3, :8]
        elif name == "positions":
            value = value[:3, :8]
        else:
            value = value[:8, :8] if value.ndim == 2 else value[:8]
        call[name] = value.contiguous()
    return call


def without_tokens(op: str) -> dict:
    """The arguments cut to no tokens; of attention to no heads, of an image to no rows."""
    def cut(name, value):
        if name == "positions":
            return value[:0]
        if isinstance(value, Tensor) and value.ndim >= 4:
            return value[..., :0, :]
        if isinstance(value, Tensor) and value.ndim == 3 and value.shape[1] == TOKENS:
            return value[:, :0]
        return value
    return {name: cut(name, value) for name, value in arguments(op).items()}
