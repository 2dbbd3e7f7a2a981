"""Committed results as Markdown: all on one page with pictures, or the tables of given files.

Nothing is measured. `--images` draws the pictures of docs/images/ instead.
"""

import argparse
import importlib
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import instructions, launches, results

# Kinds of results in the order of the page: heading, and the module that renders a record.
KINDS = {
    "end_to_end": ("One image, end to end", "benchmarks.end_to_end"),
    "table3": ("Table 3: E-CAR, DiT and MAR", "benchmarks.paper.table3"),
    "table2": ("Table 2: parameters and multiply-adds", "benchmarks.paper.table2"),
    "complexity": ("A.2: attention token by token and in stages", "benchmarks.paper.complexity"),
    "ablation": ("What each design choice is worth", "benchmarks.paper.ablation"),
    "training": ("What each choice in training is worth", "benchmarks.paper.training"),
    "memory": ("Memory", "benchmarks.memory"),
    "example": ("Other models, accelerated", "examples.compare"),
    "gpu": ("On this GPU", "benchmarks.gpu.report"),
    "quality": ("Quality by solver and calls", "benchmarks.quality"),
    "micro": ("Every op", "benchmarks.micro"),
}
COUNTS = {"Instructions of the C++ kernels": instructions, "Launches of a sampling step": launches}


def render(record: dict[str, Any]) -> str:
    """A record's tables, with its environment; ValueError for an unknown kind."""
    kind = record["kind"]
    if kind not in KINDS:
        raise ValueError(f"record 'kind': expected one of {', '.join(KINDS)}, got {kind!r}")
    text = importlib.import_module(KINDS[kind][1]).render(record)
    return f"{text}\n\n{results.where(record['environment'])}" if "environment" in record else text


def page(folder: Path, output: Path) -> str:
    """The page of all results below a folder; draws its pictures into `output`.

    Raises ValueError, naming the file, for one that is not a result.
    """
    from benchmarks import pictures

    parts = [
        "# Results",
        "Compare ratios within one table, not times of different devices or dates.",
    ]
    for device in sorted(path for path in folder.iterdir() if path.is_dir()):
        records = {file: results.read(file) for file in device.glob("*.json")}
        if not records:
            continue
        parts.append(f"## {device.name}")
        for file in sorted(records, key=lambda file: (_place(records[file]), file.stem)):
            record = records[file]
            heading = KINDS.get(record["kind"], (record["kind"], ""))[0]
            parts.append(f"### {heading} ({file.name})")
            if record["kind"] not in KINDS:
                parts.append(f"There is no table for results of kind {record['kind']!r}.")
                continue
            parts += [
                f"![{heading}]({picture.relative_to(output)})"
                for picture in pictures.draw(file, output / "pictures")
            ]
            parts.append(below(render(record), 3))
    for heading, module in COUNTS.items():
        counts = folder / module.RESULTS.name
        if counts.is_file():
            parts += [f"## {heading}", module.render(json.loads(counts.read_text("utf-8")))]
    if len(parts) == 2:
        parts.append(f"There are none in {folder}.")
    return "\n\n".join(parts) + "\n"


def _place(record: dict[str, Any]) -> int:
    return [*KINDS, record["kind"]].index(record["kind"])


def below(text: str, level: int) -> str:
    """The headings of a text put below those of a level; fenced blocks are left alone."""
    pieces = re.split(r"(^```.*?^```$)", text, flags=re.MULTILINE | re.DOTALL)
    return "".join(
        piece
        if piece.startswith("```")
        else re.sub(r"^#", "#" * (level + 1), piece, flags=re.MULTILINE)
        for piece in pieces
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report", description=__doc__.partition("\n\n")[0]
    )
    parser.add_argument("files", type=Path, nargs="*", metavar="FILE", help="print their tables")
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
        help="folder of <device>/*.json (default: benchmarks/results)",
    )
    parser.add_argument("--images", action="store_true", help="draw docs/images/ and exit")
    options = parser.parse_args(arguments)
    try:
        if options.files:
            print("\n\n".join(render(results.read(file)) for file in options.files))
            return 0
        if options.images:
            from benchmarks import pictures

            print(*pictures.draw_all(results.ROOT / "docs" / "images"), sep="\n")
            return 0
        options.output.mkdir(parents=True, exist_ok=True)
        text = page(options.results, options.output)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    (options.output / "report.md").write_text(text, "utf-8")
    print(f"wrote {options.output / 'report.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
