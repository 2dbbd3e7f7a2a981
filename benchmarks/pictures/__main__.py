"""`python -m benchmarks.pictures`: docs/images/ from benchmarks/results/ and the checkpoints.

Draws what is missing or not of the present results, and removes pictures of results that are gone.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks import pictures


def update(folder: Path = pictures.FOLDER, *, force: bool = False) -> list[Path]:
    """The pictures written and removed, each by its name without suffix."""
    wanted = list(pictures.committed())
    changed = []
    for picture in wanted:
        if force or not picture.is_in(folder):
            picture.write(folder)
            changed.append(folder / picture.name)
    for path in stray(folder):
        path.unlink()
        changed.append(path)
    return changed


def stray(folder: Path = pictures.FOLDER) -> list[Path]:
    """Files below the folders of devices that are pictures of no results."""
    names = {picture.name for picture in pictures.committed()}
    return [
        path
        for path in sorted(folder.glob("*/*"))
        if str(path.relative_to(folder).with_suffix("")) not in names
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.pictures", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--force", action="store_true", help="draw those too that are up to date")
    for path in update(force=parser.parse_args(arguments).force):
        print(
            f"drew {path.relative_to(pictures.results.ROOT)}"
            if not path.suffix
            else f"removed {path.relative_to(pictures.results.ROOT)}"
        )


if __name__ == "__main__":
    main()
