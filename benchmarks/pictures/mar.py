"""The ratios of Table 3 for MAR: of 64 and 256 AR steps here, and the paper's."""

from typing import Any

from matplotlib.figure import Figure

from benchmarks import table3
from benchmarks.pictures import style

ALT = (
    "Bars: how many times as long as E-CAR's an image of MAR takes, measured here for each "
    "number of AR steps, and in the paper on an i9 and on a 4090"
)
COLOURS = {"paper, i9-13900K": style.ORANGE, "paper, RTX 4090": style.SKY}


def data(record: dict[str, Any]) -> dict[str, Any] | None:
    """pairs: {"E-CAR-S, MAR-B": {bar: ratio}}."""
    pairs = {}
    for row in record["rows"]:
        if not row.get("mar_ratios"):
            continue
        size, adds = row["size"], row["multiply_adds"]
        bars = {}
        for name, ratio in row["mar_ratios"].items():
            steps = name.removeprefix("mar, ")
            bars[f"measured here, {steps}"] = ratio["median"]
            bars[f"multiply-adds, {steps}"] = adds[name] / adds["ecar"]
        gpu, cpu = (
            theirs / mine[1]
            for theirs, mine in zip(table3.PAPER_MAR[size], table3.PAPER[size], strict=True)
        )
        pairs[f"E-CAR-{size}\nMAR-{table3.MARS[size]}"] = bars | dict(
            zip(COLOURS, (cpu, gpu), strict=True)
        )
    return {"pairs": pairs, **style.origin(record["environment"])} if pairs else None


def draw(data: dict[str, Any]) -> Figure:
    made = style.figure(
        3.9, "One 256 x 256 image: how many times as long as E-CAR MAR takes", data["note"]
    )
    axes = made.subplots()
    pairs = data["pairs"]
    bars = list(dict.fromkeys(bar for ratios in pairs.values() for bar in ratios))
    width = 0.86 / len(bars)
    for index, bar in enumerate(bars):
        places = [i + (index - (len(bars) - 1) / 2) * width for i in range(len(pairs))]
        heights = [ratios[bar] for ratios in pairs.values()]
        measured = bar.startswith("measured")
        drawn = axes.bar(
            places,
            heights,
            0.94 * width,
            label=bar,
            edgecolor="white",
            color=COLOURS.get(bar, style.BLUE if measured else style.GREY),
            hatch="//" if index > 1 and bar not in COLOURS else None,
        )
        style.bar_labels(axes, drawn, [style.times(height) for height in heights])
    axes.axhline(1, color="black", linewidth=1)
    axes.set_xticks(range(len(pairs)), pairs)
    axes.grid(axis="x", visible=False)
    axes.set_ylabel("MAR's time / E-CAR's time")
    axes.margins(y=0.12)
    axes.legend(
        loc="upper center",
        bbox_to_anchor=(0.5, 1.2),
        ncols=3,
        fontsize=8.5,
        handlelength=1.4,
        columnspacing=1.5,
    )
    return made
