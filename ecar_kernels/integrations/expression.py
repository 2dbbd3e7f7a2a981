"""What a forward computes, as an expression: to know code that is copied from project to project.

The forward is called with a stand-in for the module, whose submodules return what they were asked
for instead of computing it. So names, comments and the order of operands do not matter, and any
other step does.
"""

from collections.abc import Callable
from typing import Any

from torch import nn


class Term:
    """A tensor, by how it came about: an operator, and its operands."""

    def __init__(self, *made: Any) -> None:
        self.made = made

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Term) and self.made == other.made

    def __hash__(self) -> int:
        return hash(self.made)

    def __repr__(self) -> str:
        return repr(self.made)

    def __add__(self, other: Any) -> "Term":
        return Term("+", *sorted((self, other), key=repr))

    def __mul__(self, other: Any) -> "Term":
        return Term("*", *sorted((self, other), key=repr))

    __radd__, __rmul__ = __add__, __mul__

    def __getitem__(self, index: Any) -> "Term":
        return self.unsqueeze(1) if index == (slice(None), None) else Term("[]", repr(index), self)

    def unsqueeze(self, dim: int) -> "Term":
        return Term("unsqueeze", dim, self)

    def chunk(self, chunks: int, dim: int = 0) -> tuple["Term", ...]:
        dim %= 2  # of [B, C]; with what else is chunked, the ops are not called
        return tuple(Term("part", index, chunks, dim, self) for index in range(chunks))


class _Module:
    """Stands for a module with these submodules, and no other attributes."""

    def __init__(self, names: tuple[str, ...]) -> None:
        for name in names:
            setattr(self, name, lambda *inputs, name=name: Term(name, *inputs))


def expression(forward: Callable, submodules: tuple[str, ...], inputs: int) -> object:
    """What the forward of a module returns for so many inputs; None where it is anything but sums,
    products and parts of what its submodules return."""
    arguments = (Term("input", index) for index in range(inputs))
    try:
        return forward(_Module(submodules), *arguments)
    except Exception:  # whatever another's code raises where it is given no tensors
        return None


def same_forward(kind: type[nn.Module], submodules: tuple[str, ...], known: Callable) -> bool:
    """Does a class compute what the function `known` of (module, x, condition) computes?"""
    expected = expression(known, submodules, 2)
    return expected is not None and expression(kind.forward, submodules, 2) == expected
