"""How right is right: the one rule by which an implementation of an op is judged, and its inputs.

The oracle is the op's reference in float64. An implementation passes if its error against the
oracle is at most twice that of the plain reference in the implementation's own dtype, plus one
ulp of the output's scale.

The error is the root mean square: the largest of a few hundred errors is itself so random that
a rule about it fails good code every few hundred runs. The largest one is bounded too, so that a
single wrong element cannot hide in the mean: twice the reference's plus a few ulp. A few,
because algorithms differ in their worst element: a flash backward recomputes a probability as
exp(score - logsumexp), which errs by |score| ulp where a plain softmax errs by one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ecar_kernels.registry import FAMILIES, OPS

WORST_ELEMENT_ULPS = {torch.float32: 16, torch.bfloat16: 4, torch.float16: 4}

# The sizes of `arguments`.
STAGES = (1, 4, 16)
TOKENS, HEADS, HEAD_DIM, CHANNELS, HIDDEN = 21, 3, 8, 24, 40
IMAGE, OUTPUTS = (3, 4, 6), 12
INFERENCE_ONLY = (*FAMILIES["flow_block"], "flow_boundary")
DIFFERENTIABLE = tuple(op for op in OPS if op not in (*INFERENCE_ONLY, "initial_noise"))
# Arguments that no backend takes as views.
CONTIGUOUS = {"flow_boundary": ("weight", "bias", "embed_weight", "embed_bias", "positions")}


def tensors(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else result


def error(value: Tensor, oracle: Tensor) -> float:
    """Root mean square of the difference."""
    return (value.double() - oracle).square().mean().sqrt().item() if value.numel() else 0.0


def largest_error(value: Tensor, oracle: Tensor) -> float:
    return (value.double() - oracle).abs().max().item() if value.numel() else 0.0


def ulp(oracle: Tensor, dtype: torch.dtype) -> float:
    """One unit in the last place of `dtype` at the oracle's largest magnitude."""
    return torch.finfo(dtype).eps * oracle.abs().max().item() if oracle.numel() else 0.0


def run(
    function: Callable,
    arguments: dict,
    dtype: torch.dtype | None = None,
    output_gradients: list[Tensor] | None = None,
) -> tuple[Tensor, ...]:
    """The outputs; with `output_gradients`, then the gradients of the floating arguments.

    `dtype` converts the floating arguments first, and is a dtype argument's value.
    """

    def prepare(value):
        if isinstance(value, torch.dtype):
            return value if dtype is None else dtype
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        value = value.detach() if dtype is None else value.detach().to(dtype)
        return value if output_gradients is None else value.requires_grad_()

    arguments = {name: prepare(value) for name, value in arguments.items()}
    outputs = tensors(function(**arguments))
    if output_gradients is None:
        return outputs
    inputs = [x for x in arguments.values() if isinstance(x, Tensor) and x.requires_grad]
    weights = [weight.to(y.dtype) for weight, y in zip(output_gradients, outputs, strict=True)]
    return (*(y.detach() for y in outputs), *torch.autograd.grad(outputs, inputs, weights))


@dataclass(frozen=True)
class Verdict:
    """One measure of one result: the error found, and the largest that passes."""

    what: str  # "result 1: largest error"
    found: float
    allowed: float

    @property
    def ok(self) -> bool:
        """NaN never passes."""
        return self.found <= self.allowed

    def __str__(self) -> str:
        return f"{self.what} {self.found:.3g}, allowed {self.allowed:.3g}"


def verdicts(
    values: Sequence[Tensor],
    usual: Sequence[Tensor],
    oracle: Sequence[Tensor],
    dtype: torch.dtype | None = None,
) -> list[Verdict]:
    """The rule, applied to results: the implementation's, the reference's in its dtype, and the
    reference's in float64. dtype: whose ulp counts, None for each result's own. Raises
    AssertionError where a result's shape or dtype is not the reference's.
    """
    found = []
    for index, (value, plain, exact) in enumerate(zip(values, usual, oracle, strict=True)):
        assert value.shape == exact.shape, f"result {index}: {value.shape}, not {exact.shape}"
        assert value.dtype == plain.dtype, f"result {index}: {value.dtype}, not {plain.dtype}"
        counted = dtype or value.dtype
        unit = ulp(exact, counted)
        for kind, measure, ulps in (
            ("error", error, 1),
            ("largest error", largest_error, WORST_ELEMENT_ULPS[counted]),
        ):
            found.append(
                Verdict(
                    f"result {index}: {kind}",
                    measure(value, exact),
                    2 * measure(plain, exact) + ulps * unit,
                )
            )
    return found


def judge(
    candidate: Callable, reference: Callable, arguments: dict, *, gradients: bool = False
) -> list[Verdict]:
    """The rule, applied to each output and, with `gradients`, to each argument's gradient.

    candidate, reference: the op's signature. arguments: by name, in the candidate's dtype. Raises
    AssertionError where a result's shape or dtype is not the reference's.
    """
    weights = None
    if gradients:
        weights = [torch.randn_like(y) for y in run(reference, arguments)]
    return verdicts(
        run(candidate, arguments, None, weights),
        run(reference, arguments, None, weights),
        run(reference, arguments, torch.float64, weights),
    )


def assert_accurate(
    candidate: Callable, reference: Callable, arguments: dict, *, gradients: bool = False
) -> None:
    """As `judge`; AssertionError names the first measure that does not pass."""
    for verdict in judge(candidate, reference, arguments, gradients=gradients):
        assert verdict.ok, str(verdict)


def arguments(
    op: str, *, batch: int = 2, dtype: torch.dtype = torch.float32, optional: bool = True
) -> dict:
    """Random valid arguments of an op on torch's default device, views where users have views.

    optional: include the optional ones.
    """

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
    seeds = torch.randint(-(2**63), 2**63 - 1, (batch,))
    image = {
        "x": normal(batch, *IMAGE),
        "velocity": normal(2 * batch, *IMAGE),
        "dt": 0.125,
        "guidance_scale": 1.5,
    }
    if op == "stage_attention":
        packed = normal(batch, TOKENS, 3 * HEADS * HEAD_DIM).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (HEADS, HEAD_DIM)) for part in packed)
        return {"q": q, "k": k, "v": v, "stage_lengths": STAGES}
    if op == "adaln":
        return x | modulation("shift", "scale") | steps("step_shift", "step_scale")
    if op == "gated_residual":
        return x | branch | modulation("gate") | steps("step_gate")
    if op == "gated_residual_adaln":
        return (
            x
            | branch
            | modulation("gate", "shift", "scale")
            | steps("step_gate", "step_shift", "step_scale")
        )
    if op == "adaln_linear":
        return (
            x
            | modulation("shift", "scale")
            | {"weight": normal(HIDDEN, CHANNELS), "bias": normal(HIDDEN)}
            | steps("step_shift", "step_scale")
            | {"activation": "gelu_tanh"}
            | ({"scale_offset": 0.5} if optional else {})
        )
    if op == "linear_gated_residual":
        return (
            {
                "h": normal(batch, TOKENS, HIDDEN),
                "weight": normal(CHANNELS, HIDDEN),
                "bias": normal(CHANNELS),
                "residual": normal(batch, TOKENS, CHANNELS),
            }
            | modulation("gate")
            | steps("step_gate")
        )
    if op == "flow_boundary":
        return (
            {"x": normal(2 * batch, TOKENS, CHANNELS), "state": normal(batch, TOKENS, OUTPUTS)}
            | modulation("shift", "scale", rows=2 * batch)
            | {
                "weight": normal(OUTPUTS, CHANNELS),
                "bias": normal(OUTPUTS),
                "embed_weight": normal(CHANNELS, OUTPUTS),
                "embed_bias": normal(CHANNELS),
                "positions": normal(TOKENS, CHANNELS),
                "dt": 0.125,
                "guidance_scale": 1.5,
            }
            | steps("step_shift", "step_scale")
        )
    if op == "euler_step":
        return image
    if op == "upsample_renoise_euler":
        channels, height, width = IMAGE
        noise = (
            {"details": normal(batch, channels, 3, height, width)} if optional else {"seeds": seeds}
        )
        return image | {"time": 1 / 3, "stage": 2} | noise
    return {"seeds": seeds, "shape": IMAGE, "device": seeds.device.type, "dtype": dtype}


def tensor_names(op: str) -> list[str]:
    """The floating tensor arguments, the one that sets type and device first."""
    return [
        name
        for name, value in arguments(op).items()
        if isinstance(value, Tensor) and value.is_floating_point()
    ]
