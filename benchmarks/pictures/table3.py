"""Table 3 as ratios: how many times as long as E-CAR DiT takes, here and in the paper."""

from typing import Any

from matplotlib.figure import Figure

from benchmarks.pictures import style
from benchmarks.table3 import PAIRS, PAPER

ALT = (
    "Bars: how many times as long as E-CAR's an image of DiT takes, measured here, in the paper "
    "on an i9 and on a 4090, and by multiply-adds alone"
)
BARS = (
    ("measured here", style.BLUE),
    ("multiply-adds alone", style.GREY),
    ("paper, i9-13900K", style.ORANGE),
    ("paper, RTX 4090", style.SKY),
)


def data(record: dict[str, Any]) -> dict[str, Any] | None:
    """pairs: {"E-CAR-S, DiT-B/2": {bar: ratio}}; spread: the same, quartiles of the measured."""
    pairs, spread = {}, {}
    for row in record["rows"]:
        if row.get("size") not in PAIRS or "multiply_adds" not in row:
            continue
        gpu, cpu = (theirs / mine for theirs, mine in PAPER[row["size"]])
        adds = row["multiply_adds"]
        name = f"E-CAR-{row['size']}\nDiT-{PAIRS[row['size']]}/2"
        ratios = (row["ratio"]["median"], adds["dit"] / adds["ecar"], cpu, gpu)
        pairs[name] = dict(zip((bar for bar, _ in BARS), ratios, strict=True))
        spread[name] = [row["ratio"]["q1"], row["ratio"]["q3"]]
    if not pairs:
        return None
    return {"pairs": pairs, "spread": spread, **style.origin(record["environment"])}


def draw(data: dict[str, Any]) -> Figure:
    made = style.figure(
        3.9, "One 256 x 256 image: how many times as long as E-CAR DiT takes", data["note"]
    )
    axes = made.subplots()
    pairs, width = data["pairs"], 0.8 / len(BARS)
    for index, (bar, colour) in enumerate(BARS):
        places = [i + (index - (len(BARS) - 1) / 2) * width for i in range(len(pairs))]
        heights = [ratios[bar] for ratios in pairs.values()]
        drawn = axes.bar(places, heights, 0.92 * width, color=colour, label=bar)
        style.bar_labels(
            axes, drawn, [style.times(height) for height in heights], padding=6 if index == 0 else 3
        )
        if index == 0:
            low, high = zip(*data["spread"].values(), strict=True)
            axes.vlines(places, low, high, color="black", linewidth=1.4)
    axes.axhline(1, color="black", linewidth=1)
    axes.set_xticks(range(len(pairs)), pairs)
    axes.grid(axis="x", visible=False)
    axes.set_ylabel("DiT's time / E-CAR's time")
    axes.margins(y=0.12)
    axes.legend(
        loc="upper center",
        bbox_to_anchor=(0.5, 1.13),
        ncols=len(BARS),
        fontsize=9,
        handlelength=1.2,
        columnspacing=1.5,
    )
    return made
