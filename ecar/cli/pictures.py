"""What `ecar sample` has drawn, as files: sheets, strips, and a folder that is filled bit by bit.

An image's ``states`` are the pictures in which its stages ended, coarse to fine; the last is the
image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL.Image import Image, Resampling
from PIL.Image import open as open_image

from ecar.images import make_sheet, save_image

__all__ = ["Grid", "ImageFolder", "write_sheets", "write_strip"]

PADDING = 2


Cell = tuple[int, int]  # an image's class and seed


@dataclass(frozen=True)
class Grid:
    """The images to draw: a row for each class, in which each image has its seed.

    Attributes:
        classes: numbers.
        seeds: of each class's images, equally many.
        names: of all the model's classes; their numbers where they have no names.
        text: what all images are drawn with: checkpoint and settings.
    """

    classes: list[int]
    seeds: list[list[int]]
    names: list[str]
    text: dict[str, str]

    @property
    def cells(self) -> list[Cell]:
        """Class and seed of each image, row by row."""
        rows = zip(self.classes, self.seeds, strict=True)
        return [(number, seed) for number, seeds in rows for seed in seeds]

    @property
    def size(self) -> tuple[int, int]:
        """Rows and columns."""
        return len(self.classes), len(self.seeds[0])

    def text_of(self, cells: Sequence[Cell]) -> dict[str, str]:
        """What a PNG of these images says of them."""
        return {
            **self.text,
            "class": ", ".join(str(number) for number, _ in cells),
            "class_name": ", ".join(self.names[number] for number, _ in cells),
            "seed": ", ".join(str(seed) for _, seed in cells),
        }


class ImageFolder:
    """A folder with a PNG for each image, named by class and seed.

    What the image depends on is in the PNG's text. So it is known again, and drawn once even if
    the process ends in between. Several processes may fill one folder.

    Args:
        path: the folder.
        grid: what is drawn.
        scale: factor by which the images are enlarged.
        stages: how many of each image's states to write; 1 is the image alone.
    """

    def __init__(self, path: Path, grid: Grid, scale: int, stages: int) -> None:
        self.path, self.grid, self.scale, self.stages = path, grid, scale, stages

    def has(self, cell: Cell) -> bool:
        """Whether the image is there, of the same weights and settings."""
        expected = self._text(cell)
        del expected["checkpoint"]  # it may have moved; "weights" tells which it is
        return all(expected.items() <= _text_in(file).items() for file in self._files(cell))

    def write(self, cell: Cell, states: Sequence[Image]) -> None:
        """The image last: where it is there, so are the others."""
        for file, state in zip(self._files(cell), states, strict=True):
            save_image(_enlarge(state, states[-1], self.scale), file, self._text(cell))

    def read(self, cell: Cell) -> list[Image]:
        """The states as they were written."""
        states = []
        for file in self._files(cell):
            with open_image(file) as image:
                states.append(image.copy())
        return states

    def _files(self, cell: Cell) -> list[Path]:
        digits = len(str(len(self.grid.names) - 1))
        stem = f"class{cell[0]:0{digits}}-seed{cell[1]:06}"
        return [self.path / f"{stem}{_suffix(k, self.stages)}.png" for k in range(self.stages)]

    def _text(self, cell: Cell) -> dict[str, str]:
        return {**self.grid.text_of([cell]), "scale": str(self.scale)}


def write_sheets(
    path: Path, grid: Grid, states: Sequence[Sequence[Image]], scale: int, *, named: bool
) -> None:
    """All images on one sheet, and their other states on one for each stage.

    Args:
        states: of each image those to write; a lone image gets no frame.
        scale: factor by which the images are enlarged.
        named: write the classes next to the rows.
    """
    stages, padding = len(states[0]), PADDING if len(states) > 1 else 0
    for stage in range(stages):
        images = [_enlarge(ends[stage], ends[-1], scale) for ends in states]
        sheet = make_sheet(images, *grid.size, padding, names=_row_names(grid, named))
        file = path.with_name(f"{path.stem}{_suffix(stage, stages)}{path.suffix}")
        save_image(sheet, file, grid.text_of(grid.cells))


def write_strip(
    path: Path, grid: Grid, states: Sequence[Sequence[Image]], scale: int, *, named: bool
) -> None:
    """Each row's first image, from left to right as stage after stage ended."""
    rows, columns = grid.size
    first = states[::columns]
    images = [_enlarge(state, ends[-1], scale) for ends in first for state in ends]
    sheet = make_sheet(images, rows, len(first[0]), PADDING, names=_row_names(grid, named))
    file = path.with_name(f"{path.stem}-strip{path.suffix}")
    save_image(sheet, file, grid.text_of(grid.cells[::columns]))


def _row_names(grid: Grid, named: bool) -> list[str] | None:
    return [grid.names[number] for number in grid.classes] if named else None


def _suffix(stage: int, stages: int) -> str:
    return "" if stage == stages - 1 else f"-stage{stage + 1}"


def _enlarge(state: Image, image: Image, scale: int) -> Image:
    """A state in the size of its image, which is enlarged ``scale`` times."""
    return state.resize((scale * image.width, scale * image.height), Resampling.NEAREST)


def _text_in(file: Path) -> dict[str, str]:
    """A PNG's text, without decoding it; nothing if there is no PNG."""
    try:
        with open_image(file, formats=["PNG"]) as image:
            return {key: value for key, value in image.info.items() if isinstance(value, str)}
    except (OSError, SyntaxError, ValueError):
        return {}
