"""`python -m ecar_kernels`: which backend can serve which op on this machine, and why not."""

import sys
import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence

import torch

from ecar_kernels import _native
from ecar_kernels.registry import (
    BACKENDS,
    OPS,
    RECORDS,
    Availability,
    active_backend,
    backends,
    why_not_bfloat16,
)
from ecar_kernels.version import __version__

WIDTH = 100


def main() -> int:
    try:
        active = active_backend()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"ecar_kernels {__version__}, torch {torch.__version__}, active: {active}")
    if (reason := _native.outdated()) is not None:
        print(f"the C++ library is of an earlier build; the last one failed: {reason}")
    rows = [row for row in backends() if row.backend in RECORDS[row.op].backends]
    named = [name for name in BACKENDS if any(row.backend == name for row in rows)]
    print(table(rows, named))
    bfloat16 = why_not_bfloat16() or "multiplied at twice the rate of float32"
    print("", *notes(rows), f"bfloat16 on the CPU: {bfloat16}", sep="\n")
    return 0


def table(rows: Sequence[Availability], named: Sequence[str]) -> str:
    """A line for each op: yes, no or, where a backend has no such op, a hyphen."""
    said = {(row.op, row.backend): "yes" if row.available else "no" for row in rows}
    lines = [("op", *named), *((op, *(said.get((op, name), "-") for name in named)) for op in OPS)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = [
        [cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines
    ]
    return "\n".join(" ".join(line).rstrip() for line in padded)


def notes(rows: Sequence[Availability]) -> Iterator[str]:
    """Why backends are missing, and what they serve, once for all ops of which it is true."""
    missing: dict[tuple[str, str], list[str]] = {}
    serving: dict[tuple[str, str], list[str]] = {}
    ops_of = Counter(row.backend for row in rows)
    for row in rows:
        if row.why_not:
            missing.setdefault((row.backend, row.why_not), []).append(row.op)
        if row.limits:
            serving.setdefault((row.backend, row.limits), []).append(row.op)
    for verb, found in (("is missing", missing), ("serves", serving)):
        for (backend, text), ops in sorted(found.items()):
            which = "" if len(ops) == ops_of[backend] else f" ({', '.join(ops)})"
            line = f"{backend} {verb}{which}: {text}"
            yield textwrap.fill(line, WIDTH, subsequent_indent="  ", break_on_hyphens=False)


if __name__ == "__main__":
    sys.exit(main())
