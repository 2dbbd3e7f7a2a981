"""The model's configuration: a frozen dataclass, its presets, and JSON in and out."""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ecar.files import read_json, write_json

__all__ = ["PRESETS", "ECARConfig"]


@dataclass(frozen=True)
class ECARConfig:
    """Sizes of an E-CAR model (paper, Table 1 and section 4.1).

    Args:
        stage_sides: side of the square latent at each stage, coarse to fine; each twice the
            one before it. One stage is allowed.
        channels: latent channels (4 for the SDXL VAE, 1 or 3 for pixels).
        patch_size: side of the square patch that one token stands for; divides every side and
            is 1 or even, so that a token of stage s covers whole pixels of stage s - 1.
        num_classes: classes of the data. Class ``num_classes`` is the null class of
            classifier-free guidance.
        width: channels of a token, in the AR transformer and the flow heads alike.
        heads: attention heads; divides ``width``.
        ar_layers: layers of the AR transformer. With 0 there is none (paper, Figure 5): a token's
            condition is its position, the class and, from the second stage on, its part of the
            end state of the stage before.
        flow_blocks: adaLN-zero blocks of each stage's flow head.
        mlp_ratio: hidden width of an MLP over ``width``.
        class_dropout: share of the training labels replaced by the null class.

    Raises:
        TypeError, ValueError: for an impossible value, named.
    """

    stage_sides: tuple[int, ...] = (8, 16, 32)
    channels: int = 4
    patch_size: int = 2
    num_classes: int = 1000
    width: int = 768
    heads: int = 6
    ar_layers: int = 10
    flow_blocks: int = 2
    mlp_ratio: float = 4.0
    class_dropout: float = 0.1

    def __post_init__(self) -> None:
        sides = self.stage_sides
        if isinstance(sides, (str, bytes)) or not hasattr(sides, "__iter__"):
            raise TypeError(f"config 'stage_sides': expected a sequence of integers, got {sides!r}")
        object.__setattr__(self, "stage_sides", tuple(sides))  # JSON has lists only
        for index, side in enumerate(self.stage_sides):
            _require_integer(f"stage_sides[{index}]", side)
        for name in ("channels", "patch_size", "num_classes", "width", "heads", "flow_blocks"):
            _require_integer(name, getattr(self, name))
        _require_integer("ar_layers", self.ar_layers, least=0)
        if not self.stage_sides:
            raise ValueError("config 'stage_sides': expected at least one stage, got none")
        for before, after in zip(self.stage_sides, self.stage_sides[1:], strict=False):
            if after != 2 * before:
                raise ValueError(
                    "config 'stage_sides': expected each side to be twice the one before it, got "
                    f"{list(self.stage_sides)}"
                )
        if self.patch_size != 1 and self.patch_size % 2:
            raise ValueError(
                f"config 'patch_size': expected 1 or an even number, got {self.patch_size}"
            )
        if self.stage_sides[0] % self.patch_size:
            raise ValueError(
                f"config 'patch_size': expected a divisor of the first side {self.stage_sides[0]}, "
                f"got {self.patch_size}"
            )
        if self.width % self.heads:
            raise ValueError(
                f"config 'heads': expected a divisor of width {self.width}, got {self.heads}"
            )
        if self.width % 4:
            raise ValueError(
                "config 'width': expected a multiple of 4 (2-D sine and cosine positions), got "
                f"{self.width}"
            )
        _require_number("mlp_ratio", self.mlp_ratio)
        if self.mlp_ratio <= 0 or self.mlp_width < 1:
            raise ValueError(
                f"config 'mlp_ratio': expected a positive number, got {self.mlp_ratio}"
            )
        _require_number("class_dropout", self.class_dropout)
        if not 0 <= self.class_dropout < 1:
            raise ValueError(
                f"config 'class_dropout': expected a number in [0, 1), got {self.class_dropout}"
            )

    @property
    def num_stages(self) -> int:
        return len(self.stage_sides)

    @property
    def stage_grids(self) -> tuple[int, ...]:
        """Tokens along one side, for each stage."""
        return tuple(side // self.patch_size for side in self.stage_sides)

    @property
    def stage_tokens(self) -> tuple[int, ...]:
        """Tokens of each stage."""
        return tuple(grid * grid for grid in self.stage_grids)

    @property
    def num_tokens(self) -> int:
        """Tokens of all stages."""
        return sum(self.stage_tokens)

    @property
    def null_class(self) -> int:
        """The label that stands for no class."""
        return self.num_classes

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def mlp_width(self) -> int:
        return int(self.width * self.mlp_ratio)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Shape [C, H, W] of one full-resolution latent."""
        return (self.channels, self.stage_sides[-1], self.stage_sides[-1])

    def stage_shape(self, stage: int) -> tuple[int, int, int]:
        """Shape [C, h, w] of one latent of ``stage``, counted from 1."""
        side = self.stage_sides[stage - 1]
        return (self.channels, side, side)

    @classmethod
    def preset(cls, name: str, **changes: Any) -> ECARConfig:
        """The preset ``name`` (a key of ``PRESETS``), with fields replaced by ``changes``."""
        if name not in PRESETS:
            raise ValueError(f"preset: expected one of {', '.join(PRESETS)}, got {name!r}")
        return cls.from_dict({**PRESETS[name].to_dict(), **changes})

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "stage_sides": list(self.stage_sides)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ECARConfig:
        """The configuration with these fields; an unknown field is refused by name."""
        if not isinstance(values, dict):
            raise TypeError(f"config: expected an object of fields, got {type(values).__name__}")
        known = [field.name for field in dataclasses.fields(cls)]
        for name in values:
            if name not in known:
                raise ValueError(f"config {name!r}: no such field; {near(name, known)}")
        return cls(**values)

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Write the fields to ``path``, whole or not at all."""
        write_json(path, self.to_dict())

    @classmethod
    def from_json(cls, path: str | os.PathLike[str]) -> ECARConfig:
        """Read a file that ``to_json`` wrote."""
        return cls.from_dict(read_json(path))


def near(name: str, known: Sequence[str]) -> str:
    """What may have been meant by a name that is not known, or all that are."""
    close = difflib.get_close_matches(name, known, n=3)
    return f"near it: {', '.join(close)}" if close else f"known are {', '.join(known)}"


def _require_integer(name: str, value: object, least: int = 1) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"config {name!r}: expected an integer, got {value!r}")
    if value < least:
        raise ValueError(f"config {name!r}: expected an integer of at least {least}, got {value}")


def _require_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"config {name!r}: expected a number, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"config {name!r}: expected a finite number, got {value}")


PRESETS: dict[str, ECARConfig] = {
    # Table 1 of the paper, with the heads' depths that meet Table 2's parameters and FLOPs.
    "S": ECARConfig(width=768, heads=6, ar_layers=10, flow_blocks=2),
    "B": ECARConfig(width=1024, heads=16, ar_layers=20, flow_blocks=4),
    "L": ECARConfig(width=1152, heads=16, ar_layers=24, flow_blocks=6),
    # Small ones for the data at hand: scikit-learn's digits, MNIST and emoji, as pixels.
    "digits": ECARConfig(
        stage_sides=(4, 8),
        channels=1,
        num_classes=10,
        width=128,
        heads=4,
        ar_layers=4,
        flow_blocks=2,
    ),
    "mnist": ECARConfig(
        stage_sides=(8, 16, 32),
        channels=1,
        patch_size=4,
        num_classes=10,
        width=128,
        heads=4,
        ar_layers=4,
        flow_blocks=4,
    ),
    "emoji": ECARConfig(
        stage_sides=(8, 16, 32),
        channels=3,
        patch_size=4,
        num_classes=28,
        width=192,
        heads=6,
        ar_layers=6,
        flow_blocks=2,
    ),
}
