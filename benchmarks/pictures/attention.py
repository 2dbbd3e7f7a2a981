"""The paper's A.2, measured: attention over n tokens made one by one, and in stages."""

import math
from typing import Any

from matplotlib.figure import Figure

from benchmarks import results
from benchmarks.pictures import style
from benchmarks.scaling import exponent

ALT = (
    "Curves, both axes logarithmic: the time of one layer's attention over the making of n "
    "tokens, one by one and in stages, each with and without a cache"
)
UNITS = {-3: "{} ns", -2: "{} us", -1: "{} ms", 0: "{} s", 1: "{},000 s"}


def data(record: dict[str, Any]) -> dict[str, Any] | None:
    """curves: {way: [[tokens, seconds], ..]}; exponents: those fitted to them."""
    ways = dict.fromkeys(row["way"] for row in record["attention"])
    of = {way: [row for row in record["attention"] if row["way"] == way] for way in ways}
    of = {way: found for way, found in of.items() if len(found) > 1}
    if not of:
        return None
    return {
        "curves": {
            way: [[row["tokens"], row["seconds"]] for row in found] for way, found in of.items()
        },
        "exponents": {way: exponent(found) for way, found in of.items()},
        **style.origin(record["environment"]),
    }


def draw(data: dict[str, Any]) -> Figure:
    made = style.figure(
        4.4, "Attention over the making of n tokens: one by one, and in stages", data["note"]
    )
    axes = made.subplots()
    for index, (way, points) in enumerate(data["curves"].items()):
        x, seconds = zip(*points, strict=True)
        colour = style.COLOURS[index % len(style.COLOURS)]
        axes.plot(x, seconds, style.MARKERS[index % len(style.MARKERS)] + "-", color=colour)
        axes.annotate(
            f"{way}: n^{results.figures(data['exponents'][way])}",
            (x[-1], seconds[-1]),
            (8, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
        )
    # The paper's two, drawn from the first curve's and the second's beginning.
    for power, points in zip((3, 2), data["curves"].values(), strict=False):
        (first, seconds), (last, _) = points[0], points[-1]
        ends = [seconds, seconds * (last / first) ** power]
        axes.plot([first, last], ends, ":", color=style.GREY, linewidth=1.3)
        axes.annotate(
            f"dotted:\nn^{power}",
            (first, seconds),
            (-9, 0),
            va="center",
            ha="right",
            textcoords="offset points",
            color="#444444",
            fontsize=8.5,
        )
    ticks = [tokens for tokens, _ in next(iter(data["curves"].values()))]
    axes.set_xscale("log")
    axes.set_yscale("log")
    style.log_ticks(axes.xaxis, ticks)
    times = [seconds for points in data["curves"].values() for _, seconds in points]
    powers = range(math.floor(math.log10(min(times))), math.ceil(math.log10(max(times))) + 1)
    style.log_ticks(
        axes.yaxis,
        [10.0**power for power in powers],
        [UNITS[power // 3].format(10 ** (power % 3)) for power in powers],
    )
    axes.set_xlim(ticks[0] / 1.35, ticks[-1] * (ticks[-1] / ticks[0]) ** 0.75)
    axes.set_xlabel("tokens n, made in all")
    axes.set_ylabel("time of one layer's attention")
    return made
