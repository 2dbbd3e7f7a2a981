"""Class labels and seeds as a user gives them, to lists of integers of one length."""

from __future__ import annotations

import difflib
import operator
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["ClassNames", "draw_seeds", "pair", "repeat"]


class ClassNames:
    """The classes of a model, with or without names.

    Args:
        names: one for each class; synonyms are separated by commas.
        count: number of classes.

    Raises:
        TypeError, ValueError: naming the argument.
    """

    def __init__(self, names: Sequence[str] | None, count: int) -> None:
        if names is not None:
            if isinstance(names, str) or not all(isinstance(name, str) for name in names):
                raise TypeError(f"argument 'class_names': expected strings, got {names!r}")
            if len(names) != count:
                raise ValueError(
                    f"argument 'class_names': expected {count} names, got {len(names)}"
                )
        self.names = None if names is None else list(names)
        self.count = count
        self._by_name: dict[str, list[int]] = {}
        for number, name in enumerate(self.names or []):
            for synonym in {name, *(part.strip() for part in name.split(","))}:
                self._by_name.setdefault(synonym, []).append(number)

    def numbers(self, class_labels: Any) -> list[int]:
        """Class numbers of an integer, a class name, or a sequence of either.

        Raises:
            TypeError, ValueError: naming what is no class.
        """
        return [
            self._named(label) if isinstance(label, str) else self._numbered(label)
            for label in _as_list(class_labels)
        ]

    def _numbered(self, label: Any) -> int:
        number = _as_integer("class_labels", label, "class numbers or names")
        if not 0 <= number < self.count:
            raise ValueError(
                f"argument 'class_labels': expected classes from 0 to {self.count - 1}, got "
                f"{number}"
            )
        return number

    def _named(self, label: str) -> int:
        if self.names is None:
            raise ValueError(
                "argument 'class_labels': expected class numbers, this model's classes have no "
                f"names; got {label!r}"
            )
        numbers = self._by_name.get(label, [])
        if len(numbers) == 1:
            return numbers[0]
        if numbers:
            raise ValueError(f"argument 'class_labels': {label!r} names the classes {numbers}")
        near = difflib.get_close_matches(label, self._by_name, n=3)
        hint = f"; near it: {', '.join(near)}" if near else ""
        raise ValueError(f"argument 'class_labels': no class is named {label!r}{hint}")


def draw_seeds(
    seeds: Any, generator: torch.Generator | None, count: int, *, name: str = "seeds"
) -> list[int]:
    """The seeds given, as a list; where there are none, ``count`` drawn by ``generator``.

    Args:
        name: of the argument ``seeds``, for errors.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    if seeds is None:
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(
                f"argument 'generator': expected a torch.Generator, got {type(generator).__name__}"
            )
        device = "cpu" if generator is None else generator.device
        highest = torch.iinfo(torch.int64).max
        return torch.randint(0, highest, (count,), generator=generator, device=device).tolist()
    if generator is not None:
        raise ValueError("argument 'generator': expected seeds or a generator, got both")
    numbers = [_as_integer(name, seed, "integers") for seed in _as_list(seeds)]
    for number in numbers:
        if not -(2**63) <= number < 2**63:
            raise ValueError(f"argument {name!r}: expected int64 numbers, got {number}")
    return numbers


def pair(
    labels: list[int], seeds: list[int], given_labels: Any, given_seeds: Any
) -> tuple[list[int], list[int]]:
    """As many labels as seeds: what was given alone, not in a list, goes with all of the other.

    Raises:
        ValueError: for lists of different lengths.
    """
    if _is_lone(given_labels):
        labels = labels * len(seeds)
    elif _is_lone(given_seeds):
        seeds = seeds * len(labels)
    if len(seeds) != len(labels):
        raise ValueError(
            f"argument 'seeds': expected {len(labels)} seeds, one for each image, got {len(seeds)}"
        )
    return labels, seeds


def repeat(labels: list[int], times: Any) -> list[int]:
    """Each label so many times, next to each other.

    Raises:
        TypeError, ValueError: no positive integer, naming the pipeline's argument.
    """
    count = _as_integer("num_images_per_prompt", times, "an integer")
    if count < 1:
        raise ValueError(
            f"argument 'num_images_per_prompt': expected a positive integer, got {count}"
        )
    return [label for label in labels for _ in range(count)]


def _is_lone(value: Any) -> bool:
    if isinstance(value, (Tensor, np.ndarray)):
        return value.ndim == 0
    return value is not None and (isinstance(value, str) or not isinstance(value, Iterable))


def _as_list(values: Any) -> list[Any]:
    """A lone value as a list of one; tensors and arrays as lists of numbers."""
    if isinstance(values, (Tensor, np.ndarray)):
        values = values.tolist()
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
        return [values]
    return list(values)


def _as_integer(name: str, value: Any, expected: str) -> int:
    if not isinstance(value, bool):
        try:
            return operator.index(value)
        except TypeError:
            pass  # raised below, by name
    raise TypeError(f"argument {name!r}: expected {expected}, got {value!r}")
