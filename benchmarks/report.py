"""Committed results as Markdown: all on one page with pictures, or the tables of given files.

Nothing is measured. `--images` draws the pictures of docs/images/ instead.
"""

import importlib
import json
import re
import sys
from pathlib import Path
from types import ModuleType
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
    "busy": ("Threads on a busy machine", "benchmarks.busy"),
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
        records = {file: results.read(file) for file in sorted(device.glob("*.json"))}
        parts += [f"## {device.name}"] if records else []
        kinds = [*KINDS, *(record["kind"] for record in records.values())]
        for file in sorted(records, key=lambda file: kinds.index(records[file]["kind"])):
            kind = records[file]["kind"]
            heading, module = KINDS.get(kind, (kind, None))
            parts.append(f"### {heading} ({file.name})")
            if module is None:
                parts.append(f"There is no table for results of kind {kind!r}.")
                continue
            drawn = pictures.draw(file, output / "pictures")
            parts += [f"![{heading}]({picture.relative_to(output)})" for picture in drawn]
            parts += [below(render(records[file]), 3), note(importlib.import_module(module))]
    for heading, module in COUNTS.items():
        counts = folder / module.RESULTS.name
        if counts.is_file():
            table = module.render(json.loads(counts.read_text("utf-8")))
            parts += [f"## {heading}", table, note(module)]
    if len(parts) == 2:
        parts.append(f"There are none in {folder}.")
    return "\n\n".join(filter(None, parts)) + "\n"


def note(module: ModuleType) -> str:
    """What a module's tables mean: its docstring without the first paragraph."""
    return module.__doc__.partition("\n\n")[2].strip()


def below(text: str, level: int) -> str:
    """The headings of a text put below those of a level; fenced blocks are left alone."""
    return re.sub(
        r"^```.*?^```$|^#",
        lambda found: "#" * (level + 1) if found[0] == "#" else found[0],
        text,
        flags=re.MULTILINE | re.DOTALL,
    )


def main() -> int:
    parser = results.parser("report", __doc__, writes=False)
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
