"""Write into the pages of docs/ what is made from files: figures and contracts.

    python -m tools.update_docs

A page has places for them:

    <!-- figures: NAME -->      figures of that name, from committed results
    <!-- end of figures -->
    <!-- contract: OP -->       an op's signature and docstring
    <!-- end of contract -->

NAME is an op (one small table), a kind of `benchmarks.report.KINDS`, "steps": the checkpoints'
sweeps by `ecar steps`, which draws their pictures, too, or "bfloat16": what `ecar evaluate --dtype
bfloat16` has measured of them. The other pictures of docs/images/ are
drawn by `python -m benchmarks.report --images`.
"""

from __future__ import annotations

import inspect
import json
import re
import textwrap
from pathlib import Path

import ecar_kernels
from benchmarks import micro, report, results
from ecar.evaluation.steps import best_row
from ecar.files import atomic_path
from ecar_kernels.registry import BACKENDS, OPS, RECORDS

ROOT = Path(__file__).resolve().parent.parent
PLACE = re.compile(
    r"^<!-- (figures|contract): ([\w-]+) -->\n.*?^<!-- end of \1 -->", re.DOTALL | re.MULTILINE
)
NOT_MEASURED = "Not measured yet."


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


def ops() -> str:
    """Every op, what it computes, and the backends that it has."""
    rows = ["| op | what it computes | backends |", "|---|---|---|"]
    for name, op in RECORDS.items():
        backends = ", ".join(backend for backend in BACKENDS if backend in op.backends)
        rows.append(f"| [`{name}`]({name}.md) | {op.summary} | {backends} |")
    return "\n".join(rows)


def measured(name: str, root: Path = ROOT) -> str:
    """An op's table, or those of a kind of results, of every device that it was measured on."""
    kind = "micro" if name in OPS else name
    records = map(results.read, sorted(root.glob("benchmarks/results/*/*.json")))
    records = [record for record in records if record["kind"] == kind]
    if name in OPS:
        texts = [micro.overview(record, name) for record in records]
    else:
        texts = [report.render(record) for record in records]
    return "\n\n".join(filter(None, texts)) or NOT_MEASURED


def steps(root: Path = ROOT) -> str:
    """Of each checkpoint's sweep, the best setting of each number of calls, and the paper's."""
    lines = []
    for file in sorted(root.glob("checkpoints/*/steps.json")):
        report = json.loads(file.read_text("utf-8"))
        paper = report["paper"]
        found = [best_row(report, calls) for calls in report["protocol"]["tried"]["calls"]]
        for row in (*found, paper):
            grid = "even" if row["grid"] == 1 else f"{row['grid']:g}"
            lines.append(
                (
                    file.parent.name,
                    str(row["calls"]),
                    f"{row['solver']}, {grid}",
                    " + ".join(map(str, row["steps"])),
                    f"{row['calls_x_tokens']:,}",
                    f"{row['error']:.4f}",
                    f"{row['error'] / paper['error']:.2f}x",
                )
            )
    head = ("checkpoint", "calls", "solver, grid", "steps", "calls x tokens", "error", "paper's")
    return results.markdown(head, lines) if lines else NOT_MEASURED


def bfloat16(root: Path = ROOT) -> str:
    """What each checkpoint's images are in float32 and in bfloat16."""
    lines = []
    for file in sorted(root.glob("checkpoints/*/bfloat16.json")):
        report = json.loads(file.read_text("utf-8"))
        before, after, latents = (
            report["before_cast"]["metrics"],
            report["metrics"],
            report["before_cast"]["latents"],
        )
        pairs = [
            (f"{latents[name]:.4f}" for name in ("error_before", "error")),
            (f"{column['label_accuracy']:.2%}" for column in (before, after)),
            (f"{column['frechet_distance']:.3f}" for column in (before, after)),
        ]
        lines.append((file.parent.name, f"{latents['distance']:.4f}", *map(", ".join, pairs)))
    head = ("checkpoint", "apart", "error", "read as asked", "Fréchet distance")
    return results.markdown(head, lines) if lines else NOT_MEASURED


def updated(text: str, root: Path = ROOT) -> str:
    """A page with everything in its places. Raises KeyError for an unknown name."""

    def fill(place: re.Match) -> str:
        kind, name = place.groups()
        if kind == "contract":
            made = contract(name)
        elif name == "ops":
            made = ops()
        elif name in ("steps", "bfloat16"):
            made = {"steps": steps, "bfloat16": bfloat16}[name](root)
        elif name in OPS or name in report.KINDS:
            made = measured(name, root)
        else:
            raise KeyError(name)
        return f"<!-- {kind}: {name} -->\n{made}\n<!-- end of {kind} -->"

    return PLACE.sub(fill, text)


def main() -> None:
    for page in pages():
        text = page.read_text("utf-8")
        if (new := updated(text)) != text:
            with atomic_path(page) as temporary:
                temporary.write_text(new, "utf-8")
            print(f"wrote {page.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
