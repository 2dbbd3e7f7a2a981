"""What each op reaches of the device's measured rates.

Ops that multiply matrices lie under a roof of two parts, bytes and multiply-adds; the others have
next to no arithmetic, and the copy rate is their only roof.
"""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks.pictures import rows, style

ALT = (
    "Roofline: the rate that each op reaches, under the copy rate and the matrix product rate "
    "measured in the same run"
)


def data(record: dict[str, Any]) -> dict[str, Any] | None:
    """moving, multiplying: {op: [backward, bytes, multiply-adds, seconds]}, of ours."""
    rates = rows.rates(record)
    counted = [row for row in rows.rows(record) if row.bytes]
    if rates is None or not counted:
        return None
    found: dict[str, dict[str, list[list[float]]]] = {"moving": {}, "multiplying": {}}
    for row in counted:
        kind = "multiplying" if row.multiply_adds else "moving"
        found[kind].setdefault(row.op, []).append(
            [row.backward, row.bytes, row.multiply_adds, row.ours]
        )
    return {"rates": rates, **found, **style.origin(record["environment"], rows.batches(counted))}


def draw(data: dict[str, Any]) -> Figure:
    made = style.figure(4.6, "What each op reaches of what this device can do", data["note"])
    panels = {"moving": _moving, "multiplying": _multiplying}
    of = [kind for kind in panels if data[kind]]
    for axes, kind in zip(made.subplots(1, len(of), squeeze=False)[0], of, strict=True):
        axes.set_xscale("log")
        axes.set_yscale("log")
        panels[kind](axes, data[kind], data["rates"])
        axes.legend(
            loc="upper center",
            bbox_to_anchor=(0.46, -0.17),
            fontsize=8.5,
            ncols=2,
            handletextpad=0.1,
            columnspacing=0.8,
        )
        for axis in (axes.xaxis, axes.yaxis):
            style.log_ticks(axis, style.steps(*axis.get_view_interval()))
    return made


def _moving(axes: Any, ops: dict[str, Any], rates: dict[str, float]) -> None:
    copy = rates["bytes"]
    for index, (op, points) in enumerate(ops.items()):
        _scatter(
            axes,
            index,
            op,
            [(back, size / 1e6, size / seconds / 1e9) for back, size, _, seconds in points],
        )
    axes.axhline(copy / 1e9, color="black", linewidth=1.2)
    axes.annotate(
        f"copy {copy / 1e9:.3g} GB/s",
        (0.02, copy / 1e9),
        (0, 4),
        fontsize=8.5,
        xycoords=axes.get_yaxis_transform(),
        textcoords="offset points",
    )
    axes.margins(y=0.12)
    axes.set_title("Ops that move memory (hollow: backward)")
    axes.set_xlabel("bytes read and written by a call, MB")
    axes.set_ylabel("rate reached, GB/s")


def _multiplying(axes: Any, ops: dict[str, Any], rates: dict[str, float]) -> None:
    peak, copy = 2 * rates["multiply_adds"], rates["bytes"]
    intensities = [2 * adds / size for points in ops.values() for _, size, adds, _ in points]
    for index, (op, points) in enumerate(ops.items()):
        _scatter(
            axes,
            index,
            op,
            [
                (back, 2 * adds / size, 2 * adds / seconds / 1e9)
                for back, size, adds, seconds in points
            ],
        )
    ridge = peak / copy
    low, high = 0.7 * min([ridge, *intensities]), 1.4 * max([3 * ridge, *intensities])
    axes.plot(
        [low, ridge, high], [low * copy / 1e9, peak / 1e9, peak / 1e9], color="black", linewidth=1.2
    )
    axes.annotate(
        f"matrix products {peak / 1e9:.3g} GFLOP/s",
        (high, peak / 1e9),
        (0, 4),
        textcoords="offset points",
        ha="right",
        fontsize=8.5,
    )
    middle = np.sqrt(low * ridge)
    axes.annotate(
        "copy rate",
        (middle, middle * copy / 1e9),
        (7, -3),
        fontsize=8.5,
        textcoords="offset points",
        va="top",
    )
    axes.margins(y=0.12)
    axes.set_title("Ops that multiply matrices")
    axes.set_xlabel("floating-point operations a byte, FLOP/B")
    axes.set_ylabel("rate reached, GFLOP/s")


def _scatter(axes: Any, index: int, op: str, points: list[tuple[bool, float, float]]) -> None:
    """Filled is forward, hollow backward."""
    for backward in (False, True):
        of = [(x, y) for back, x, y in points if back == backward]
        if of:
            colour = style.COLOURS[index % len(style.COLOURS)]
            axes.plot(
                *zip(*of, strict=True),
                style.MARKERS[index % len(style.MARKERS)],
                color=colour,
                markerfacecolor="none" if backward else colour,
                markersize=5,
                alpha=0.85,
                linestyle="none",
                label="" if backward and len(of) < len(points) else op,
            )
