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

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ecar_kernels.ops import Argument, Op, size_of
from ecar_kernels.registry import RECORDS

WORST_ELEMENT_ULPS = {torch.float32: 16, torch.bfloat16: 4, torch.float16: 4}

INFERENCE_ONLY = tuple(name for name, op in RECORDS.items() if op.gradients == "refused")
DIFFERENTIABLE = tuple(name for name, op in RECORDS.items() if op.gradients == "all")


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


def middle(judgements: Iterable[Sequence[Verdict]]) -> list[Verdict]:
    """Of each result the median of several judgements, whose inputs differ. The error of a result
    of few values is itself so random that one judgement in a hundred is past the bound. NaN in any
    stays."""

    def ratio(verdict: Verdict) -> float:
        return verdict.found / (verdict.allowed or 1)

    return [
        next((v for v in row if math.isnan(v.found)), sorted(row, key=ratio)[len(row) // 2])
        for row in zip(*judgements, strict=True)
    ]


def judge_functions(
    candidate: Callable[..., Sequence[Tensor]],
    usual: Callable[..., Sequence[Tensor]],
    exact: Callable[..., Sequence[Tensor]],
    draw: Callable[[], Sequence[Tensor]],
    *,
    draws: int = 9,
    many: int = 4096,
) -> list[Verdict]:
    """The rule, applied to functions of tensors, of which `exact` is given float64.

    draw: makes inputs. They are drawn once where each result has `many` values, else `draws` times
    for the median. Raises AssertionError as `verdicts`.
    """
    found: list[list[Verdict]] = []
    for _ in range(draws):
        inputs = draw()
        wide = (x.double() if x.is_floating_point() else x for x in inputs)
        plain = usual(*inputs)
        found.append(verdicts(candidate(*inputs), plain, exact(*wide)))
        if min(x.numel() for x in plain) >= many:
            break
    return middle(found)


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


@dataclass(frozen=True)
class SampleSizes:
    """What the letters of an op's shapes are in a sample."""

    batch: int = 2
    stages: tuple[int, ...] = (1, 4, 16)  # their sum is the number of tokens
    queries: int | None = None  # of attention; None: all tokens
    heads: int = 3
    head_dim: int = 8
    channels: int = 24
    hidden: int = 40
    outputs: int = 12
    image: tuple[int, int, int] = (3, 4, 6)
    guided: bool = True  # conditional and unconditional rows

    @property
    def letters(self) -> dict[str, int]:
        tokens = sum(self.stages)
        return {
            "B": self.batch,
            "R": (1 + self.guided) * self.batch,
            "N": tokens,
            "Nq": tokens if self.queries is None else self.queries,
            "H": self.heads,
            "D": self.head_dim,
            "K": self.hidden,
            "P": self.outputs,
            "C": self.channels,
            "h": self.image[1],
            "w": self.image[2],
        }


SIZES = SampleSizes()


class Draw:
    """A way to draw the arguments of any op from its record; subclasses draw them in others.

    As a user has them: random normal tensors, modulations cut from one projection, a step's part
    for the whole batch. optional: with the optional arguments, too.
    """

    says_defaults = False  # else a value that is the argument's default is left out

    def __init__(
        self,
        sizes: SampleSizes = SIZES,
        dtype: torch.dtype = torch.float32,
        device: str | None = None,
        *,
        optional: bool = True,
    ) -> None:
        self.sizes, self.dtype, self.optional = sizes, dtype, optional
        self.device = device  # None: torch's default one

    @property
    def device_type(self) -> str:
        return torch.empty(0, device=self.device).device.type

    def __call__(self, op: Op) -> dict[str, Any]:
        """Valid arguments by name, the leading tensor first."""
        letters = self.letters(op)
        left_out = {name for name in op.exclusive if name != self.one_of(op.exclusive)}
        parts: dict[tuple[int, ...], list[Argument]] = {}
        found: dict[str, Any] = {}
        for argument in op.arguments:
            name = argument.name
            if name in left_out or not self.takes(argument):
                continue
            if argument.needs and found.get(argument.needs) is None:
                continue
            if argument.unguided is not None and not self.sizes.guided:
                found[name] = argument.unguided
            elif not argument.is_tensor:
                values = argument.values
                chosen = self.choose(values(self) if callable(values) else values)
                if self.says_defaults or name not in op.defaults or chosen != op.defaults[name]:
                    found[name] = chosen
            elif argument.nullable and name not in op.exclusive and self.is_none():
                found[name] = None
            else:
                shape = tuple(size_of(part, letters) for part in self.shape(argument))
                found[name] = None  # its place
                if argument.part:
                    parts.setdefault(shape, []).append(argument)
                else:
                    made = self.tensor(argument, shape)
                    found[name] = made.to(found[argument.like].dtype) if argument.like else made
        for shape, its in parts.items():
            for argument, part in zip(its, self.projection(its, shape), strict=True):
                found[argument.name] = part
        return found

    def letters(self, op: Op) -> dict[str, int]:
        letters = self.sizes.letters
        if op.width == "":  # images
            letters["C"] = self.sizes.image[0]
        return letters

    def one_of(self, names: tuple[str, ...]) -> str:
        return names[0] if self.optional else names[-1]

    def takes(self, argument: Argument) -> bool:
        """Is the argument given, where it has a default?"""
        return self.optional or not argument.optional or argument.unguided is not None

    def is_none(self) -> bool:
        """Of an argument that may be None."""
        return False

    def choose(self, values: tuple) -> Any:
        return values[0]

    def shapes(self, argument: Argument) -> list[tuple[str, ...]]:
        """Those that the argument may have; twice as many rows only where guided."""
        return [s for s in argument.shapes if self.sizes.guided or not s[0].startswith("2")]

    def shape(self, argument: Argument) -> tuple[str, ...]:
        return self.shapes(argument)[0]

    def tensor(self, argument: Argument, shape: tuple[int, ...]) -> Tensor:
        if argument.dtype is torch.int64:
            return torch.randint(-(2**63), 2**63 - 1, shape, device=self.device)
        return self.normal(*shape)

    def projection(self, arguments: Sequence[Argument], shape: tuple[int, ...]) -> list[Tensor]:
        """Parts of one tensor [B, N, ..], side by side."""
        count = len(arguments)
        whole = self.normal(*shape[:2], count * math.prod(shape[2:]))
        return [part.unflatten(-1, shape[2:]) for part in whole.chunk(count, -1)]

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.device).to(self.dtype)


def arguments(
    op: str,
    *,
    batch: int = 2,
    dtype: torch.dtype = torch.float32,
    optional: bool = True,
    sizes: SampleSizes = SIZES,
) -> dict:
    """Random valid arguments of an op on torch's default device, views where users have views.

    optional: include the optional ones.
    """
    draw = Draw(replace(sizes, batch=batch), dtype, optional=optional)
    return draw(RECORDS[op])


def tensor_names(op: str) -> list[str]:
    """The floating tensor arguments that a sample has, the one that sets type and device first."""
    left_out = RECORDS[op].exclusive[1:]
    return [name for name in RECORDS[op].tensor_names if name not in left_out]
