"""The picture of a sweep of steps: error against calls x tokens, and against seconds, as SVG."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ecar.files import atomic_path

from .steps import frontier

__all__ = ["draw_steps"]

WIDTH, HEIGHT = 860, 400
PANEL_WIDTH, PANEL_HEIGHT, TOP = 350, 262, 70
LEFTS = (62, 62 + 430)
MARGIN = 0.06  # around the values, as a share of their range
# Of Okabe and Ito, which stay apart for the colour-blind.
COLOURS = {"euler": "#E69F00", "heun": "#009E73", "ab2": "#0072B2"}
COSTS = {"calls_x_tokens": "network calls x tokens", "seconds": "seconds of one image"}
Point = tuple[float, float]


def draw_steps(
    report: dict[str, Any], path: str | os.PathLike[str], best: dict[str, Any], title: str
) -> Path:
    """Write the picture of a report of ``sweep_steps``.

    Both axes are logarithmic. A line for each solver joins its least errors, one for each number
    of calls; the grey one is the frontier of all settings.

    Args:
        path: ends in .svg.
        best: the row to be marked.
        title: above it.

    Raises:
        ValueError: another suffix. OSError: the file can't be written.
    """
    path = Path(path)
    if path.suffix != ".svg":
        raise ValueError(f"argument 'picture': expected a name that ends in .svg, got {path}")
    protocol = report["protocol"]
    threads = protocol["threads"]
    note = (
        f"{protocol['device']}, {threads} thread{'' if threads == 1 else 's'}; torch "
        f"{protocol['versions']['torch']}; {protocol['images']} images; {protocol['date'][:10]}"
    )
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" '
        f'viewBox="0 0 {WIDTH} {HEIGHT}" font-family="DejaVu Sans, Verdana, sans-serif" '
        'font-size="11">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        _text(16, 24, title, size=15, weight="bold"),
        _text(16, HEIGHT - 8, note, size=10, fill="#444444"),
    ]
    for left, (cost, label) in zip(LEFTS, COSTS.items(), strict=True):
        parts += _panel(report, best, cost, label, left)
    parts += [*_legend(report), "</svg>", ""]
    with atomic_path(path) as temporary:
        temporary.write_text("\n".join(parts), encoding="utf-8")
    return path


def least_errors(rows: Sequence[dict[str, Any]], solver: str) -> list[dict[str, Any]]:
    """The solver's row with the least error for each number of calls."""
    found: dict[int, dict[str, Any]] = {}
    for row in rows:
        if row["solver"] == solver:
            other = found.setdefault(row["calls"], row)
            if row["error"] < other["error"]:
                found[row["calls"]] = row
    return [found[calls] for calls in sorted(found)]


def _panel(
    report: dict[str, Any], best: dict[str, Any], cost: str, label: str, left: int
) -> Iterator[str]:
    rows, paper = report["rows"], report["paper"]
    across = _Axis([row[cost] for row in (*rows, paper)], left, left + PANEL_WIDTH)
    up = _Axis([row["error"] for row in (*rows, paper)], TOP + PANEL_HEIGHT, TOP)

    def place(row: dict[str, Any]) -> Point:
        return across(row[cost]), up(row["error"])

    bottom, right = TOP + PANEL_HEIGHT, left + PANEL_WIDTH
    for value in across.ticks():
        x = across(value)
        yield _line([(x, TOP), (x, bottom)], "#dddddd")
        yield _text(x, bottom + 15, f"{value:g}", anchor="middle")
    for value in up.ticks():
        y = up(value)
        yield _line([(left, y), (right, y)], "#dddddd")
        yield _text(left - 6, y + 4, f"{value:g}", anchor="end")
    yield _line([(left, TOP), (left, bottom), (right, bottom)], "#444444")
    yield _text((left + right) / 2, bottom + 33, label, anchor="middle")
    yield _text(left, TOP - 8, "relative error", fill="#444444")
    yield _line([place(row) for row in frontier(rows, cost)], "#bbbbbb", 6)
    for solver, colour in COLOURS.items():
        points = [place(row) for row in least_errors(rows, solver)]
        yield _line(points, colour, 1.8)
        yield from (f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in points)
    x, y = place(paper)
    yield f'<path d="M{x - 5:.1f} {y - 5:.1f}l10 10m-10 0l10 -10" stroke="black" stroke-width="2"/>'
    x, y = place(best)
    yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="7" fill="none" stroke="black" stroke-width="1.6"/>'


def _legend(report: dict[str, Any]) -> Iterator[str]:
    x, y = LEFTS[0], 42
    for solver, colour in COLOURS.items():
        yield _line([(x, y - 4), (x + 20, y - 4)], colour, 2)
        yield _text(x + 25, y, solver)
        x += 75
    yield _line([(x, y - 4), (x + 20, y - 4)], "#bbbbbb", 6)
    yield _text(x + 25, y, "frontier of all settings")
    x += 180
    yield f'<path d="M{x} {y - 9}l10 10m-10 0l10 -10" stroke="black" stroke-width="2"/>'
    yield _text(x + 16, y, f"the paper: {report['paper']['calls']} even Euler steps")
    x += 220
    yield f'<circle cx="{x}" cy="{y - 4}" r="6" fill="none" stroke="black" stroke-width="1.6"/>'
    yield _text(x + 12, y, "the best within the limit")


class _Axis:
    """A logarithmic axis from ``begin`` to ``end``, in pixels."""

    def __init__(self, values: Sequence[float], begin: float, end: float) -> None:
        low, high = math.log10(min(values)), math.log10(max(values))
        margin = MARGIN * max(high - low, 0.1)
        self.low, self.high, self.begin, self.end = low - margin, high + margin, begin, end

    def __call__(self, value: float) -> float:
        share = (math.log10(value) - self.low) / (self.high - self.low)
        return self.begin + share * (self.end - self.begin)

    def ticks(self) -> list[float]:
        """1, 2 and 5 times the powers of ten."""
        decades = range(math.floor(self.low), math.ceil(self.high) + 1)
        values = [float(f"{digit}e{decade}") for decade in decades for digit in (1, 2, 5)]
        return [value for value in values if self.low <= math.log10(value) <= self.high]


def _line(points: Sequence[Point], colour: str, width: float = 1) -> str:
    places = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return (
        f'<polyline points="{places}" fill="none" stroke="{colour}" stroke-width="{width}" '
        'stroke-linejoin="round"/>'
    )


def _text(
    x: float, y: float, text: str, *, size: int = 11, anchor: str = "start",
    fill: str = "black", weight: str = "normal",
) -> str:  # fmt: skip
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" fill="{fill}" '
        f'font-weight="{weight}">{escape(text)}</text>'
    )
