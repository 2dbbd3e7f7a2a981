"""Committed results as Markdown: all on one page with pictures, or the tables of given files.

Nothing is measured. `--images` draws the pictures of docs/images/ instead.
"""

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from benchmarks import commands, instructions, launches, results
from ecar.files import read_json

# Kinds of results in the order of the page, and the module that renders a record.
KINDS = {
    "end_to_end": "benchmarks.end_to_end",
    "runtimes": "benchmarks.runtimes",
    "gemm": "benchmarks.gemm",
    "table3": "benchmarks.paper.table3",
    "table2": "benchmarks.paper.table2",
    "complexity": "benchmarks.paper.complexity",
    "ablation": "benchmarks.paper.ablation",
    "training": "benchmarks.paper.training",
    "memory": "benchmarks.memory",
    "busy": "benchmarks.busy",
    "integrations": "benchmarks.integrations",
    "example": "examples.compare",
    "gpu": "benchmarks.gpu.work",
    "quality": "benchmarks.quality",
    "int8": "benchmarks.int8",
    "micro": "benchmarks.micro",
}
BRIEF = ("integrations", "training")  # of which one line says all runs


def module_of(record: dict[str, Any]) -> ModuleType:
    """Raises ValueError for an unknown kind."""
    if (kind := record["kind"]) not in KINDS:
        raise ValueError(f"record 'kind': expected one of {', '.join(KINDS)}, got {kind!r}")
    return importlib.import_module(KINDS[kind])


def render(record: dict[str, Any]) -> str:
    """A record's tables, with its environments; ValueError for an unknown kind."""
    text = module_of(record).render(record)
    return text if record["kind"] in BRIEF else f"{text}\n\n{results.environments(record)}"


def page(folder: Path, output: Path) -> str:
    """The page of all results below a folder; draws its pictures into `output`.

    Raises ValueError, naming the file, for one that is not a result.
    """
    from benchmarks import pictures

    parts = [
        "# Results",
        "Compare ratios within one table, not times of different devices or dates.",
    ]
    kinds = list(KINDS)
    for device in sorted(path for path in folder.iterdir() if path.is_dir()):
        records = {file: results.read(file) for file in sorted(device.glob("*.json"))}
        parts += [f"## {device.name}"] if records else []
        tables = {file: render(record) for file, record in records.items()}
        for file in sorted(tables, key=lambda file: kinds.index(records[file]["kind"])):
            parts.append(f"### {file.stem}")
            drawn = pictures.draw(file, output / "pictures")
            parts += [f"![{file.stem}]({picture.relative_to(output)})" for picture in drawn]
            parts += [tables[file], module_of(records[file]).__doc__.strip()]
    for module in (instructions, launches):
        if (file := folder / module.RESULTS.name).is_file():
            table = module.render(read_json(file))
            parts += [f"## {file.stem}", table, module.__doc__.strip()]
    if len(parts) == 2:
        parts.append(f"There are none in {folder}.")
    return "\n\n".join(parts) + "\n"


def main() -> int:
    parser = commands.parser("report", __doc__, writes=False)
    add, root = parser.add_argument, results.ROOT
    add("files", type=Path, nargs="*", metavar="FILE", help="print their tables")
    add("--output", type=Path, default=root / "build" / "report",
        help="folder of report.md and its pictures (default: build/report)")  # fmt: skip
    add("--results", type=Path, default=results.FOLDER,
        help="folder of <device>/*.json (default: benchmarks/results)")  # fmt: skip
    add("--images", action="store_true", help="draw docs/images/ and exit")
    options = parser.parse_args()
    try:
        if options.files:
            print("\n\n".join(render(results.read(file)) for file in options.files))
        elif options.images:
            from benchmarks import pictures

            print(*pictures.draw_all(root / "docs" / "images"), sep="\n")
        else:
            options.output.mkdir(parents=True, exist_ok=True)
            written = options.output / "report.md"
            written.write_text(page(options.results, options.output), "utf-8")
            print(f"wrote {written}")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
