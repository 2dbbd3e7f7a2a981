"""Write into the pages of docs/ what is made from files: pictures, figures and contracts.

    python -m tools.update_docs

First the pictures of docs/images/ are drawn that are missing or not of the present results
(`python -m benchmarks.pictures`). Then the pages, which have places for what is made:

    <!-- figures: NAME -->      figures of that name, from committed results
    <!-- end of figures -->
    <!-- pictures: NAME -->     pictures of that kind (bars) or name (micro-bars), of every device
    <!-- end of pictures -->
    <!-- contract: OP -->       an op's signature and docstring
    <!-- end of contract -->
"""

from __future__ import annotations

import functools
import inspect
import json
import os
import re
import textwrap
from pathlib import Path

import ecar_kernels
from benchmarks import instructions, pictures, report, results, targets
from benchmarks.pictures.__main__ import update as update_pictures
from benchmarks.table import RENDERERS, render
from ecar.files import atomic_path
from ecar_kernels.registry import OPS

ROOT = Path(__file__).resolve().parent.parent
PLACE = re.compile(
    r"<!-- (figures|pictures|contract): ([\w-]+) -->\n.*?<!-- end of \1 -->", re.DOTALL
)
STAGES, BATCH = (16, 64, 256), 8  # tokens of the rows of an op's table; the batch of its backward
OP_COLUMNS = ("E-CAR-S", "eager", "torch.compile", "ecar_kernels", "vs eager", "vs torch.compile")


def pages(root: Path = ROOT) -> list[Path]:
    """The pages that may have places."""
    return [
        root / "README.md",
        root / "benchmarks" / "README.md",
        *sorted((root / "docs").rglob("*.md")),
    ]


def contract(op: str) -> str:
    """The public function's signature, as PyTorch's docs have it, and its docstring."""
    function = getattr(ecar_kernels, op)
    signature = inspect.signature(function)
    names = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    wrapped = textwrap.fill(
        op + str(signature.replace(parameters=names)).replace("torch.Tensor", "Tensor"),
        100,
        subsequent_indent=" " * (len(op) + 1),
        break_long_words=False,
    )
    return f"```text\n{wrapped}\n\n{inspect.getdoc(function)}\n```"


def measured(kind: str, root: Path = ROOT) -> str:
    """The tables of this kind of every device that it was measured on."""
    records = map(results.read, sorted(root.glob(f"benchmarks/results/*/{kind}*.json")))
    # A GPU's record has headings of its own, one level below the page's.
    return (
        "\n\n".join(report.below(render(record), 2) for record in records if record["kind"] == kind)
        or NOT_MEASURED
    )


def counted(root: Path = ROOT) -> str:
    """The instructions of the C++ kernels."""
    file = root / "benchmarks" / "results" / "instructions.json"
    if not file.is_file():
        return NOT_MEASURED
    return instructions.render(json.loads(file.read_text("utf-8")))


def drawn(name: str, page: Path) -> str:
    """The pictures of this kind, or those with this name alone, linked from a page."""
    folder = os.path.relpath(pictures.FOLDER, page.parent)
    found = [
        report.link(picture, folder)
        for picture in pictures.committed()
        if name in (picture.kind, picture.name.rpartition("/")[2])
    ]
    return "\n\n".join(found) or NOT_MEASURED


def measured_op(op: str, root: Path = ROOT) -> str:
    """An op at the stages of E-CAR-S: forward of one image, backward of a batch of 8."""
    parts = []
    for device in sorted(root.glob("benchmarks/results/*/")):
        rows: dict[tuple[bool, int], tuple[dict, dict]] = {}
        records = [results.read(file) for file in device.glob("micro*.json")]
        for record in sorted(records, key=lambda record: record["environment"]["date"]):
            for row in record["rows"]:
                if (
                    row["op"] == op
                    and row["size"] in ("S", "-")
                    and not (row.get("overhead") or row.get("whole"))
                    and row["batch"] == (BATCH if row["backward"] else 1)
                    and row["tokens"] in STAGES
                ):
                    rows[row["backward"], row["tokens"]] = (row, record["environment"])
        if rows:
            facts = [facts for _, facts in rows.values()]
            dates = sorted({fact["date"][:10] for fact in facts})
            parts.append(
                results.markdown(OP_COLUMNS, [_op_cells(rows[key][0]) for key in sorted(rows)])
                + f"\n\n{facts[0]['device']}, {facts[0]['threads']} threads, float32, torch "
                f"{facts[0]['versions']['torch']}, {', '.join(dates)}. Forward: one image"
                + (f"; backward: a batch of {BATCH}." if any(back for back, _ in rows) else ".")
            )
    return "\n\n".join(parts) or NOT_MEASURED


def _op_cells(row: dict) -> tuple[str, ...]:
    times = {name: value["median"] for name, value in row["seconds"].items()}
    ratios = [
        f"{results.figures(times[name] / times['ours'])}x" if name in times else "-"
        for name in ("eager", "compiled")
    ]
    return (
        f"{'backward' if row['backward'] else 'forward'}, {row['tokens']} tokens",
        *(results.duration(times.get(name)) for name in ("eager", "compiled", "ours")),
        *ratios,
    )


def op_targets(root: Path = ROOT) -> str:
    """The microbenchmarks beside their targets."""
    return targets.of_devices(root / "benchmarks" / "results") or NOT_MEASURED


NOT_MEASURED = "Not measured yet."
FIGURES = (
    {"instructions": counted, "targets": op_targets}
    | {kind: functools.partial(measured, kind) for kind in RENDERERS}
    | {op: functools.partial(measured_op, op) for op in OPS}
)
PICTURES = {"stages", *(name for names in pictures.OF_KIND.values() for name in names)}


def updated(text: str, page: Path = ROOT / "README.md") -> str:
    """A page with everything in its places. Raises KeyError where no such thing is known."""

    def fill(place: re.Match) -> str:
        kind, name = place.groups()
        if kind == "pictures" and name.rpartition("-")[2] not in PICTURES:
            raise KeyError(name)
        made = (
            contract(name)
            if kind == "contract"
            else drawn(name, page)
            if kind == "pictures"
            else FIGURES[name]()
        )
        return f"<!-- {kind}: {name} -->\n{made}\n<!-- end of {kind} -->"

    return PLACE.sub(fill, text)


def main() -> None:
    for name in update_pictures():
        print(f"drew or removed {name.relative_to(ROOT)}")
    for page in pages():
        text = page.read_text("utf-8")
        if (new := updated(text, page)) != text:
            with atomic_path(page) as temporary:
                temporary.write_text(new, "utf-8")
            print(f"wrote {page.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
