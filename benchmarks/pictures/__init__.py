"""Pictures of committed results, each as SVG and PNG; `python -m benchmarks.pictures` draws them.

A module of this package makes one kind of picture:

    ALT                     what is to be seen, for those who do not see it
    data(record) -> dict    the numbers and words that are drawn, from a record of results; None
                            where the record has nothing to draw
    draw(data) -> Figure    the picture, from those alone

What `data` returns and the sources that draw it are hashed into the metadata of both files, so
that a test can say whether a picture is that of the results beside it, whatever version of
matplotlib drew it.
"""

import hashlib
import importlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from PIL import Image

from benchmarks import results
from benchmarks.pictures import style

__all__ = ["FOLDER", "Picture", "committed", "of_file", "of_results"]

FOLDER = results.ROOT / "docs" / "images"
SUFFIXES = (".png", ".svg")
# The pictures of a kind of record, by module.
OF_KIND = {
    "micro": ("bars", "roofline"),
    "gpu": ("bars", "roofline"),
    "end_to_end": ("end_to_end",),
    "table3": ("table3", "mar"),
    "ablation": ("ablation",),
    "scaling": ("scaling", "attention"),
}


@dataclass(frozen=True)
class Picture:
    """One picture. name: its path below a folder of pictures, without suffix."""

    name: str
    module: ModuleType
    data: dict[str, Any]

    @property
    def kind(self) -> str:
        """The name of its module."""
        return self.module.__name__.rpartition(".")[2]

    @property
    def alt(self) -> str:
        """What is to be seen, and of which device."""
        return (
            f"{self.module.ALT}: {self.data['device']}"
            if "device" in self.data
            else (self.module.ALT)
        )

    @property
    def stamp(self) -> str:
        """A hash of what is drawn and of the sources that draw it."""
        found = hashlib.sha256(json.dumps(self.data, sort_keys=True).encode())
        for module in (self.module, style):
            found.update(Path(module.__file__).read_bytes())
        return found.hexdigest()

    def is_in(self, folder: Path) -> bool:
        """Whether both files are there and of these data."""
        return all(stamp_of(folder / f"{self.name}{suffix}") == self.stamp for suffix in SUFFIXES)

    def write(self, folder: Path) -> None:
        """Writes both files."""
        (folder / self.name).parent.mkdir(parents=True, exist_ok=True)
        with style.applied():
            figure = self.module.draw(self.data)
            for suffix in SUFFIXES:
                style.write(figure, folder / f"{self.name}{suffix}", self.stamp)


def stamp_of(path: Path) -> str | None:
    """The stamp that a picture's file was written with; None where there is none."""
    if not path.is_file():
        return None
    if path.suffix == ".png":
        with Image.open(path) as image:
            return image.info.get(style.STAMP)
    _, found, rest = path.read_text("utf-8").partition("<dc:identifier>")
    return rest.partition("</dc:identifier>")[0] if found else None


def of_file(file: Path) -> Iterator[Picture]:
    """The pictures of one file of results, <device>/<name>.json."""
    record = results.read(file)
    for name in OF_KIND.get(record["kind"], ()):
        module = importlib.import_module(f"benchmarks.pictures.{name}")
        data = module.data(record)
        if data is not None:
            stem = file.stem if file.stem == name else f"{file.stem}-{name}"
            # By way of JSON, as it is hashed: what is drawn has no more figures than that.
            yield Picture(f"{file.parent.name}/{stem}", module, json.loads(json.dumps(data)))


def of_results(folder: Path = results.FOLDER) -> Iterator[Picture]:
    """The pictures of all results of all devices."""
    for file in sorted(folder.glob("*/*.json")):
        yield from of_file(file)


def committed() -> Iterator[Picture]:
    """Every picture that docs/images/ has: of all results, and of the checkpoints."""
    stages = importlib.import_module("benchmarks.pictures.stages")
    yield Picture("stages", stages, stages.data())
    yield from of_results()
