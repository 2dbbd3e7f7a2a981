"""Time of each peer relative to ours, op by op: a bar is the median over sizes, a dot one size."""

import statistics
from typing import Any

from matplotlib.figure import Figure

from benchmarks.pictures import rows, style

ALT = (
    "Bars: time of PyTorch eager, torch.compile and other libraries as a multiple of ours, for "
    "each op, forward and backward"
)


def data(record: dict[str, Any]) -> dict[str, Any] | None:
    """ratios: {direction: {op: {peer: a ratio for each size}}}."""
    ratios: dict[str, dict[str, dict[str, list[float]]]] = {}
    found = rows.rows(record)
    for row in found:
        direction = "backward" if row.backward else "forward"
        for peer, seconds in row.peers.items():
            of_op = ratios.setdefault(direction, {}).setdefault(row.op, {})
            of_op.setdefault(peer, []).append(seconds / row.ours)
    if not ratios:
        return None
    return {"ratios": ratios, **style.origin(record["environment"], rows.batches(found))}


def draw(data: dict[str, Any]) -> Figure:
    ratios = data["ratios"]
    # Each has one colour in all pictures of a kind: the usual two first, the rest as they come.
    peers = dict.fromkeys(
        (
            *rows.NAMES.values(),
            *(peer for ops in ratios.values() for of_op in ops.values() for peer in of_op),
        )
    )
    colours = {peer: style.COLOURS[i % len(style.COLOURS)] for i, peer in enumerate(peers)}
    lengths = {
        name: sum(len(of_op) + 1.3 for of_op in ops.values()) for name, ops in ratios.items()
    }
    made = style.figure(
        1.5 + 0.185 * max(lengths.values()),
        "How many times as long as ours each other way takes",
        data["note"],
    )
    for axes, (direction, ops) in zip(
        made.subplots(1, len(ratios), squeeze=False)[0], ratios.items(), strict=True
    ):
        _column(axes, direction, ops, colours, max(lengths.values()))
    return made


def _column(
    axes: Any, direction: str, ops: dict[str, Any], colours: dict[str, str], length: float
) -> None:
    place, ticks, labels = 0.0, [], []
    for op, of_op in ops.items():
        axes.text(
            0.02,
            place,
            op,
            transform=axes.get_yaxis_transform(),
            va="center",
            fontsize=9,
            fontweight="bold",
            zorder=3,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5},
        )
        for peer, values in of_op.items():
            place += 1
            middle = statistics.median(values)
            axes.barh(place, middle - 1, left=1, height=0.78, color=colours[peer])
            axes.plot(values, [place] * len(values), ".", color="black", markersize=2.6, alpha=0.55)
            axes.text(
                0.995,
                place,
                style.times(middle),
                transform=axes.get_yaxis_transform(),
                va="center",
                ha="right",
                fontsize=8.5,
            )
            ticks.append(place)
            labels.append(peer)
        place += 1.3
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(ticks, labels, fontsize=8)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    axes.set_ylim(length - 0.5, -0.8)
    every = [
        1.0,
        *(value for of_op in ops.values() for values in of_op.values() for value in values),
    ]
    low, high = min(every), max(every)
    axes.set_xscale("log")
    # Room for the numbers on the right.
    axes.set_xlim(low / (high / low) ** 0.06, high * (high / low) ** 0.2)
    style.log_ticks(axes.xaxis, style.steps(low, high))
    axes.set_title(direction)
    axes.set_xlabel("time / ours; bar and number: median\nover sizes, dot: one size")
