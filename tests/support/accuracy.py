"""How right is right: the one rule by which an implementation of an op is judged.

The oracle is the op's reference in float64. An implementation passes if its error against the
oracle is at most twice that of the plain reference in the implementation's own dtype, plus one
ulp of the output's scale.

The error is the root mean square: the largest of a few hundred errors is itself so random that
a rule about it fails good code every few hundred runs. The largest one is bounded too, so that a
single wrong element cannot hide in the mean: twice the reference's plus a few ulp. A few,
because algorithms differ in their worst element: a flash backward recomputes a probability as
exp(score - logsumexp), which errs by |score| ulp where a plain softmax errs by one.
"""

from collections.abc import Callable

import torch
from torch import Tensor

WORST_ELEMENT_ULPS = {torch.float32: 16, torch.bfloat16: 4, torch.float16: 4}


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


def run(function: Callable, arguments: dict, dtype: torch.dtype | None = None,
        output_gradients: list[Tensor] | None = None) -> tuple[Tensor, ...]:
    """The outputs; with `output_gradients`, then the gradients of the floating arguments.

    `dtype` converts the floating arguments first.
    """
    def prepare(value):
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


def assert_accurate(candidate: Callable, reference: Callable, arguments: dict, *,
                    gradients: bool = False) -> None:
    """Applies the rule to each output and, with `gradients`, to each argument's gradient.

    candidate, reference: the op's signature. arguments: by name, in the candidate's dtype.
    """
    weights = None
    if gradients:
        weights = [torch.randn_like(y) for y in run(reference, arguments)]
    ours = run(candidate, arguments, None, weights)
    plain = run(reference, arguments, None, weights)
    oracle = run(reference, arguments, torch.float64, weights)
    for index, (value, usual, exact) in enumerate(zip(ours, plain, oracle, strict=True)):
        assert value.shape == exact.shape, f"result {index}: {value.shape}, not {exact.shape}"
        assert value.dtype == usual.dtype, f"result {index}: {value.dtype}, not {usual.dtype}"
        unit = ulp(exact, value.dtype)
        for kind, measure, ulps in (("error", error, 1), ("largest error", largest_error,
                                                          WORST_ELEMENT_ULPS[value.dtype])):
            found, allowed = measure(value, exact), 2 * measure(usual, exact) + ulps * unit
            assert found <= allowed, f"result {index}: {kind} {found:.3g}, allowed {allowed:.3g}"
