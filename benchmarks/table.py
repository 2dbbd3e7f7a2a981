"""`python -m benchmarks.table FILE...`: results as Markdown."""

import argparse
import importlib
import sys
from pathlib import Path
from typing import Any

from benchmarks import results

# Where a kind of record is made into a table.
RENDERERS = {
    "micro": "benchmarks.micro.table",
    "gemm": "benchmarks.gemm",
    "end_to_end": "benchmarks.end_to_end",
    "gpu": "benchmarks.gpu.report",
    "table2": "benchmarks.table2",
    "table3": "benchmarks.table3",
    "memory": "benchmarks.memory",
    "saved": "benchmarks.saved",
    "profile": "benchmarks.profile",
    "backward": "benchmarks.backward",
    "ablation": "benchmarks.ablation",
    "scaling": "benchmarks.scaling",
    "example": "examples.compare",
}


def render(record: dict[str, Any]) -> str:
    """A record as Markdown, its environment below; ValueError for an unknown kind."""
    kind = record["kind"]
    if kind not in RENDERERS:
        raise ValueError(f"record 'kind': expected one of {', '.join(RENDERERS)}, got {kind!r}")
    table = importlib.import_module(RENDERERS[kind]).render(record)
    return f"{table}\n\n{results.where(record['environment'])}"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.table", description="Results as Markdown."
    )
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE")
    try:
        print("\n\n".join(render(results.read(file)) for file in parser.parse_args().files))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
