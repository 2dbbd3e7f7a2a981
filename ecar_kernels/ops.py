"""The record of an op: one declaration from which all that knows an op by name is derived.

A family's folder holds a `record.py` with `FAMILY = Family(name, ops=(Op(...), ...))`. The
registry finds it there. The table of backends, the public names of `ecar_kernels`, tests, fuzzing,
the smoke test, costs, benchmarks, the gates and the tables of the docs read it. A record is data:
what computes is named as "module:function" and imported on first use.
"""

import functools
import inspect
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from ecar_kernels.implementations import DTYPES as DTYPES
from ecar_kernels.implementations import KERNEL_DTYPES as KERNEL_DTYPES
from ecar_kernels.implementations import BoundOp as BoundOp
from ecar_kernels.implementations import Implementation as Implementation
from ecar_kernels.implementations import load as load

Sizes = dict[str, int]  # what the letters of shapes stand for


def is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < math.inf


def is_count(value: Any) -> bool:
    return type(value) is int and value >= 1


@dataclass(frozen=True)
class Argument:
    """One argument of an op, by the contract; made by the functions below.

    A tensor has `shapes`, each a list of dimensions: a number, a letter, or "2B" for twice one.
    Anything else has `values`, some that are valid (a function gives them for a draw's sizes), and
    `is_valid`.
    """

    name: str
    shapes: tuple[tuple[str, ...], ...] = ()
    values: tuple | Callable[[Any], tuple] = ()
    is_valid: Callable[[Any], bool] = is_number
    optional: bool = False  # has a default
    nullable: bool = False  # may be None
    number: bool = False
    dtype: torch.dtype | None = None  # of a tensor of another dtype than the leading one
    either: torch.dtype | None = None  # this dtype or the leading tensor's, whatever autocast says
    like: str = ""  # the argument whose dtype it has, where that may not be the leading one's
    needs: str = ""  # the argument without which it has its default
    part: bool = False  # of a projection that a model cuts its modulations from
    weight: bool = False
    contiguous: bool = False  # no views
    unguided: object = None  # the one valid value where there are no unconditional rows

    @property
    def is_tensor(self) -> bool:
        return bool(self.shapes)

    @property
    def floating(self) -> bool:
        return self.is_tensor and self.dtype is None


def tensor(name: str, shapes: str, **options: Any) -> Argument:
    """A tensor of one of the shapes, "[B, N, C] or [B, 1, C]"; of the leading tensor's dtype."""
    alternatives = tuple(tuple(part.split(", ")) for part in re.findall(r"\[([^]]*)\]", shapes))
    return Argument(name, alternatives, **options)


def modulation(*names: str, rows: str = "B") -> tuple[Argument, ...]:
    """The tokens' parts, [rows, N, C] or [rows, 1, C], and then the steps', which are optional."""
    tokens = (tensor(name, f"[{rows}, N, C] or [{rows}, 1, C]", part=True) for name in names)
    steps = (
        tensor(f"step_{name}", f"[1, 1, C] or [{rows}, 1, C]", optional=True, nullable=True)
        for name in names
    )
    return (*tokens, *steps)


def value(name: str, values: Any, is_valid: Callable[[Any], bool], **options: Any) -> Argument:
    """What is no tensor: values that are valid, the first what samples have, and all that are."""
    return Argument(name, values=values, is_valid=is_valid, **options)


def number(
    name: str, *values: float | None, within: Callable[[float], bool] | None = None, **options: Any
) -> Argument:
    """A finite number; `within`: of those, which."""

    def is_valid(value: Any) -> bool:
        return is_number(value) and (within is None or within(value))

    return value(name, values, is_valid, number=True, **options)


def history(shape: str, like: str = "") -> tuple[Argument, ...]:
    """What a solver of several steps adds to a step: the velocity of the step before, its ratio,
    and whether this one's is returned."""
    return (
        tensor("previous", shape, like=like, optional=True, nullable=True),
        number("ratio", 0.5, 0.0, 1.0, 3, within=lambda r: r >= 0, optional=True, needs="previous"),
        value("return_velocity", (True, False), lambda v: type(v) is bool, optional=True),
    )


DT = number("dt", 0.125, 1.0, 0.1, 1)
EPS = number("eps", 1e-6, 1e-3, within=lambda eps: eps > 0, optional=True)
GUIDANCE_SCALE = number("guidance_scale", 1.5, 0.0, optional=True, unguided=1.0)


def _split(dimension: str) -> tuple[int | None, str]:
    """Of "2B": 2 and "B"; of "B": none and "B"; of "3": 3 and ""."""
    found = re.fullmatch(r"(\d*)(\w*)", dimension)
    times, letter = cast("re.Match[str]", found).groups()
    return int(times) if times else None, letter


def size_of(dimension: str, sizes: Sizes) -> int:
    times, letter = _split(dimension)
    return (1 if times is None else times) * (sizes[letter] if letter else 1)


def matches(shape: tuple[str, ...], found: torch.Size, sizes: Sizes) -> bool:
    """Does a tensor's shape fit one that is given in letters? Letters seen first are added."""
    if len(shape) != len(found):
        return False
    new = dict(sizes)
    for dimension, size in zip(shape, found, strict=True):
        times, letter = _split(dimension)
        if times is None and letter not in new:
            new[letter] = size
        elif (letter and letter not in new) or size != size_of(dimension, new):
            return False
    sizes.update(new)
    return True


@dataclass(frozen=True)
class Invalid:
    """Changes to a sample's arguments, and the error that they raise. A function gives changes
    that hold tensors."""

    changes: dict[str, Any] | Callable[[], dict[str, Any]]
    error: type[Exception]
    message: str  # a part of it

    def arguments(self) -> dict[str, Any]:
        return self.changes if isinstance(self.changes, dict) else self.changes()


@dataclass(frozen=True)
class Cost:
    """What a call must move and multiply; see costs.py, which counts the bytes of arguments.

    multiply_adds: of a forward, from the sizes and the arguments. backward_reads: the arguments
    that gradients need, in addition to the gradients of the outputs; None for an op without a
    backward. reads_output: the first output, too. free: arguments whose gradient is an output's,
    unchanged, where their shapes are the same. backward_products: multiply-adds of a backward, as
    a multiple of its forward's.
    """

    multiply_adds: Callable[[Sizes, Mapping[str, Any]], int] = lambda sizes, given: 0
    backward_reads: tuple[str, ...] | None = None
    reads_output: bool = False
    free: tuple[str, ...] = ()
    backward_products: float = 0.0


@dataclass(frozen=True)
class Op:
    """One op, declared by its family.

    arguments: in the public function's order, the tensor first that sets dtype and device.
    `backends` need not have the reference, which every op has in its family's reference.py.
    width: the letter of the last dimension that backends limit; "" for none. rules: of arguments
    that are valid each on its own, those that must hold for all of them together. exclusive:
    arguments of which exactly one is given. gradients: "all" that are floating tensors, "refused"
    (for inference), or "none" to ask for. autocast: to its own dtype ("low"), to the arguments'
    widest ("widest"), or none ("").
    """

    name: str
    summary: str
    arguments: tuple[Argument, ...]
    backends: dict[str, Implementation] = field(default_factory=dict)
    width: str = "C"
    rules: tuple[Callable[[Sizes, Mapping[str, Any]], bool], ...] = ()
    exclusive: tuple[str, ...] = ()
    invalid: tuple[Invalid, ...] = ()
    gradients: str = "all"
    autocast: str = "low"
    cost: Cost = Cost()
    family: str = ""  # filled in by it

    @functools.cached_property
    def public(self) -> Callable:
        return load(f"ecar_kernels.{self.family}.api:{self.name}")

    @property
    def tensor_names(self) -> tuple[str, ...]:
        """The floating tensor arguments, the one that sets dtype and device first."""
        return tuple(argument.name for argument in self.arguments if argument.floating)

    @functools.cached_property
    def defaults(self) -> dict[str, Any]:
        """Of the public function's arguments, where they have one."""
        parameters = inspect.signature(self.public).parameters.values()
        return {p.name: p.default for p in parameters if p.default is not p.empty}

    def sizes(self, given: Mapping[str, Any]) -> Sizes:
        """What the letters of the shapes stand for in a call that is valid."""
        found: Sizes = {}
        for argument in self.arguments:
            tensor = given.get(argument.name)
            if isinstance(tensor, Tensor):
                any(matches(shape, tensor.shape, found) for shape in argument.shapes)
        return found

    def is_valid(self, given: Mapping[str, Any], device: str = "cpu") -> bool:
        """Is a call within the contract? By the record alone: the public function's own checks,
        which tests hold against this, are not asked."""
        sizes: Sizes = {}
        leading: Any = given.get(self.arguments[0].name)
        for argument in self.arguments:
            found = given.get(argument.name)
            if found is None and argument.nullable:
                continue
            if argument.optional and argument.name not in given:
                continue
            if not argument.is_tensor:
                if not argument.is_valid(found):
                    return False
                missing = argument.needs and given.get(argument.needs) is None
                if missing and found != self.defaults[argument.name]:
                    return False
                continue
            if not isinstance(found, Tensor) or found.device.type != device:
                return False
            set_by: Any = given[argument.like] if argument.like else leading
            dtypes = (argument.dtype,) if argument.dtype else (set_by.dtype, argument.either)
            if found.dtype not in dtypes or not (argument.dtype or found.dtype in DTYPES):
                return False
            lies = not found.ndim or found.shape[-1] <= 1 or found.stride(-1) == 1
            if argument.floating and not lies:
                return False
            if argument.contiguous and not found.is_contiguous():
                return False
            if not any(matches(shape, found.shape, sizes) for shape in argument.shapes):
                return False
        one = sum(given.get(name) is not None for name in self.exclusive)
        if self.exclusive and one != 1:
            return False
        return all(rule(sizes, given) for rule in self.rules)


def guided(rows: str, of: str) -> Callable[[Sizes, Mapping[str, Any]], bool]:
    """The rule of a guidance scale: 1 where `rows` are not twice those of `of`; letters, or the
    name of a tensor with as many rows."""

    def rule(sizes: Sizes, given: Mapping[str, Any]) -> bool:
        found, plain = (sizes[n] if n in sizes else len(given[n]) for n in (rows, of))
        return found == 2 * plain or given.get("guidance_scale", 1.0) == 1

    return rule


@dataclass(frozen=True)
class Family:
    """A folder's ops. compile_cases: "module:function" that gives the compile gate's cases for an
    architecture. tuning: a module with `runs` and `candidates` for `ecar tune` (tune.py)."""

    name: str
    ops: tuple[Op, ...]
    compile_cases: str | None = None
    tuning: str | None = None

    def __post_init__(self) -> None:
        for op in self.ops:
            object.__setattr__(op, "family", self.name)
            op.backends.setdefault(
                "reference",
                Implementation(f"ecar_kernels.{self.name}.reference:{op.name}", dtypes=DTYPES),
            )
            for name, implementation in op.backends.items():
                implementation.op, implementation.backend = op.name, name
