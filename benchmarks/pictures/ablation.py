"""What an image costs with one design choice switched off."""

from typing import Any

from matplotlib.figure import Figure

from benchmarks.pictures import style

ALT = "Bars: what one image costs with each design choice switched off alone"


def data(record: dict[str, Any]) -> dict[str, Any] | None:
    """sizes: {size: {choice: [median, q1, q3] over the median of everything, or a reason}}."""
    sizes = {}
    for row in record["rows"]:
        whole = row["seconds"]["everything"]["median"]
        sizes[row["size"]] = {
            name: [values[key] / whole for key in ("median", "q1", "q3")]
            for name, values in row["seconds"].items()
            if name != "everything"
        } | row.get("left_out", {})
    return {"sizes": sizes, **style.origin(record["environment"])} if sizes else None


def draw(data: dict[str, Any]) -> Figure:
    sizes = data["sizes"]
    longest = max(map(len, sizes.values()))
    made = style.figure(
        1.3 + 0.36 * longest,
        "What one image costs with one design choice switched off",
        data["note"],
    )
    most = max(
        value[0]
        for choices in sizes.values()
        for value in choices.values()
        if not isinstance(value, str)
    )
    for axes, (size, choices) in zip(
        made.subplots(1, len(sizes), squeeze=False)[0], sizes.items(), strict=True
    ):
        for place, value in enumerate(choices.values()):
            if isinstance(value, str):
                axes.text(
                    1.02, place, f"not measured: {value}", va="center", fontsize=9, color="#444444"
                )
                continue
            middle, low, high = value
            axes.barh(place, middle - 1, left=1, height=0.68, color=style.BLUE)
            axes.hlines(place, low, high, color="black", linewidth=1.4)
            axes.annotate(
                style.times(middle),
                (max(middle, high, 1), place),
                (5, 0),
                textcoords="offset points",
                va="center",
            )
        axes.axvline(1, color="black", linewidth=1)
        axes.set_yticks(range(len(choices)), choices)
        axes.set_ylim(longest - 0.5, -0.6)
        axes.set_xlim(
            min(0.95, *(v[1] for v in choices.values() if not isinstance(v, str))),
            1 + 1.18 * (most - 1),
        )
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="y", visible=False)
        axes.set_title(f"E-CAR-{size}")
        axes.set_xlabel("time / time with everything (line: quartiles)")
    return made
