"""`python -m benchmarks.report`: one page of all results that there are, of all devices.

Markdown with the tables of `benchmarks.table` and the pictures of `benchmarks.pictures`, from files
of results alone: nothing is measured, and a device may have as few of them as it likes.
"""

import argparse
import importlib
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import instructions, launches, pictures, results, table

# Kinds of results in the order of the page, each with its heading.
HEADINGS = {
    "table3": "Beside diffusers' DiT",
    "end_to_end": "One image, end to end",
    "profile": "Where a step's time goes",
    "ablation": "What each design choice is worth",
    "scaling": "How it grows",
    "memory": "Memory",
    "backward": "What an elementwise op's backward is made of",
    "saved": "What a training step keeps",
    "example": "Other models, accelerated",
    "table2": "Sizes and multiply-adds",
    "gpu": "On this GPU",
    "micro": "Every op",
    "gemm": "The libraries' matrix products, and ours",
}
INTRODUCTION = """# Results

All that `benchmarks/results/` has of every device, as tables and pictures; each table names its
device, threads, versions and date. Figures of two devices, or of two dates, are not for
comparison: ratios within one table are."""


def page(folder: Path, output: Path) -> str:
    """The page's text. Writes the pictures below ``output``.

    Raises ValueError, naming the file, for one that is no result.
    """
    parts, contents = [], []
    for device in sorted(path for path in folder.iterdir() if path.is_dir()):
        files = sorted(device.glob("*.json"))
        records = {file: results.read(file) for file in files}
        if not records:
            continue
        name = _device(records)
        contents.append(f"- [{name}](#{_anchor(name)})")
        parts.append(f"## {name}")
        parts += [
            _section(file, records[file], output)
            for file in sorted(files, key=lambda file: (_place(records[file]["kind"]), file.stem))
        ]
    counts = folder / instructions.RESULTS.name
    if counts.is_file():
        contents.append("- [Instructions of the C++ kernels](#instructions-of-the-c-kernels)")
        parts.append(
            "## Instructions of the C++ kernels\n\nCounted by valgrind's callgrind: "
            "without noise, unlike times.\n\n"
            + instructions.render(json.loads(counts.read_text("utf-8")))
        )
    counts = folder / launches.RESULTS.name
    if counts.is_file():
        contents.append("- [Launches of a sampling step](#launches-of-a-sampling-step)")
        parts.append(
            "## Launches of a sampling step\n\nCounted without a GPU, as an H100 would "
            "be sent them.\n\n" + launches.render(json.loads(counts.read_text("utf-8")))
        )
    if not parts:
        contents = [f"There are none in {folder}."]
    return "\n\n".join([INTRODUCTION, "\n".join(contents), *parts]) + "\n"


def _section(file: Path, record: dict[str, Any], output: Path) -> str:
    kind = record["kind"]
    heading = HEADINGS.get(kind, kind)
    lines = [f"### {heading}" if file.stem == kind else f"### {heading}: {file.stem}"]
    command = " ".join(
        (
            (importlib.import_module(table.RENDERERS[kind]).__doc__ or "")
            if kind in table.RENDERERS
            else ""
        )
        .partition("\n\n")[0]
        .split()
    )
    if command.startswith("`python -m"):
        lines.append(command)
    for picture in pictures.of_file(file):
        picture.write(output / "pictures")
        lines.append(link(picture, "pictures"))
    if kind in table.RENDERERS:
        lines.append(below(table.render(record), 3))
    else:
        lines.append(f"There is no table for results of kind {kind!r}.")
    return "\n\n".join(lines)


def link(picture: pictures.Picture, folder: str) -> str:
    """Markdown: the PNG, which leads to the SVG. folder: of the pictures, from the page."""
    place = f"{folder}/{picture.name}"
    return f"[![{picture.alt}]({place}.png)]({place}.svg)"


def below(text: str, level: int) -> str:
    """The headings of a table's text put below those of a level; fenced blocks are left alone."""
    pieces = re.split(r"(^```.*?^```$)", text, flags=re.MULTILINE | re.DOTALL)
    return "".join(
        piece
        if piece.startswith("```")
        else re.sub(r"^#", "#" * (level + 1), piece, flags=re.MULTILINE)
        for piece in pieces
    )


def _device(records: dict[Path, dict[str, Any]]) -> str:
    """What most a folder is of: its GPU where a result has one."""
    facts = [record["environment"] for record in records.values()]
    gpus = [found["gpu"]["name"] for found in facts if "gpu" in found]
    return (gpus or [f"{facts[0]['device']}, {facts[0]['cores']} cores"])[0]


def _place(kind: str) -> int:
    return list(HEADINGS).index(kind) if kind in HEADINGS else len(HEADINGS)


def _anchor(heading: str) -> str:
    """What GitHub calls a heading in a link."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=results.ROOT / "build" / "report",
        help="folder of report.md and its pictures (default: build/report)",
    )
    parser.add_argument(
        "--results",
        type=Path,
        default=results.FOLDER,
        help="folder of <device>/*.json (default: %(default)s)",
    )
    options = parser.parse_args(arguments)
    try:
        options.output.mkdir(parents=True, exist_ok=True)
        text = page(options.results, options.output)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    file = options.output / "report.md"
    partial = file.with_name(f"{file.name}.partial")
    partial.write_text(text, "utf-8")
    partial.replace(file)
    print(f"wrote {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
