"""`python -m ecar_kernels`: which backend can serve which op on this machine, and why not."""

import sys

import torch

from ecar_kernels import _native
from ecar_kernels.registry import RECORDS, active_backend, backends
from ecar_kernels.version import __version__

HEADER = ("op", "backend", "available", "serves", "why not")


def main() -> int:
    try:
        active = active_backend()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    rows = [
        (row.op, row.backend, "yes" if row.available else "no", row.limits or "-", row.why_not)
        for row in backends()
        if row.backend in RECORDS[row.op].backends
    ]
    widths = [max(map(len, column)) for column in zip(HEADER, *rows, strict=True)]
    print(f"ecar_kernels {__version__}, torch {torch.__version__}, active: {active}")
    if (reason := _native.outdated()) is not None:
        print(f"the C++ library is of an earlier build; the last one failed: {reason}")
    for row in (HEADER, *rows):
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())
    return 0


if __name__ == "__main__":
    sys.exit(main())
