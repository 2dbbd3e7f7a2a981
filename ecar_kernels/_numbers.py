"""Numbers of an op that torch.compile leaves open: one graph for all values of eps, scale or dt.

A Python number that goes into an op of a library is a constant of the graph, and each new value
recompiles it, until torch.compile gives up. It traces the first value as a constant and, once a
second one has come, a symbol. A float that is a symbol goes into a 0-dim float64 CPU tensor
(`opening`), and the op that it is for is called by its twin, which takes tensors in the place of
floats and symbols in lists of integers (`twin`).
"""

import functools
import re
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

R = TypeVar("R")
_library = torch.library.Library("ecar_numbers", "FRAGMENT")


def opening(function: Callable[..., R]) -> Callable[..., R]:
    """`function` as a graph calls it: floats that are symbols are tensors for it."""

    @functools.wraps(function)
    def call(*args, **kwargs):
        return function(
            *[opened(value) for value in args],
            **{name: opened(value) for name, value in kwargs.items()},
        )

    return call


def opened(value: Any) -> Any:
    """In a graph that is traced: a tensor for a float that is a symbol; else the value."""
    if type(value) is not float or is_static(value):
        return value
    # An addition: torch.compile makes tensors of symbols in arithmetic with tensors alone.
    return torch.zeros((), dtype=torch.float64, device="cpu") + value


def is_static(value: float | Tensor) -> bool:
    """In a graph that is traced: is the number a constant of it, and no symbol or tensor?"""
    if isinstance(value, Tensor):
        return False
    # Imported where a graph is traced, by which it is loaded: it takes a second.
    from torch.fx.experimental.symbolic_shapes import has_static_value

    return has_static_value(value)


def twin(op: Any) -> Callable:
    """An op's overload; a graph may call it with a tensor for a float, and symbols for integers.

    op: torch.ops.<namespace>.<name>.<overload>, which has a fake.
    """
    schema = op._schema
    types = [str(argument.type) for argument in schema.arguments]
    floats = [i for i, kind in enumerate(types) if kind == "float"]
    lists = [i for i, kind in enumerate(types) if kind == "List[int]"]
    if not floats and not lists:
        return op
    name = schema.name.replace("::", "_")
    arguments = str(schema).removeprefix(schema.name)
    arguments = re.sub(r"\bfloat\b", "Tensor", arguments)
    _library.define(name + re.sub(r"\bint\[\]", "SymInt[]", arguments))

    def run(*args):
        return op(*[v.item() if i in floats else v for i, v in enumerate(args)])

    def fake(*args):
        """Results' shapes depend on no number: a symbol given to `op` would become a constant."""
        given: list[Any] = [1.0 if i in floats else v for i, v in enumerate(args)]
        return op(*[[1] * len(v) if i in lists else v for i, v in enumerate(given)])

    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"ecar_numbers::{name}", fake, lib=_library)
    twin_op = getattr(torch.ops.ecar_numbers, name).default

    @functools.wraps(op)
    def call(*args):
        if torch.compiler.is_compiling() and (
            any([isinstance(args[i], Tensor) for i in floats])
            or not all([is_static(value) for i in lists for value in args[i]])
        ):
            return twin_op(*[_closed(v) if i in floats else v for i, v in enumerate(args)])
        return op(*args)

    call.opened = twin_op  # type: ignore[attr-defined]  # for tests of it by itself
    return call


def _closed(value: float | Tensor) -> Tensor:
    if isinstance(value, Tensor):
        return value
    return torch.full((), value, dtype=torch.float64, device="cpu")
