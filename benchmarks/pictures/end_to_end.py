"""One image in eager mode, under torch.compile and ours, beside its matrix products alone."""

from typing import Any

from matplotlib.figure import Figure

from benchmarks.pictures import style
from benchmarks.results import duration

ALT = (
    "Bars: the time of one image in eager mode, under torch.compile, with our kernels, and of "
    "its matrix products alone"
)
WAYS = (
    ("eager", "eager", style.ORANGE),
    ("compiled", "torch.compile", style.SKY),
    ("ours", "ours", style.BLUE),
    ("linears", "its linear layers alone", style.GREY),
)


def data(record: dict[str, Any]) -> dict[str, Any] | None:
    """sizes: {size: {way: median seconds}} of those that were timed."""
    sizes = {
        row["size"]: {
            name: row["seconds"][name]["median"]
            for name, *_ in WAYS
            if "median" in row["seconds"].get(name, {})
        }
        for row in record["rows"]
    }
    sizes = {size: found for size, found in sizes.items() if "ours" in found}
    return {"sizes": sizes, **style.origin(record["environment"])} if sizes else None


def draw(data: dict[str, Any]) -> Figure:
    made = style.figure(
        0.9 + 0.95 * len(data["sizes"]), "One image, 250 steps: time of each way", data["note"]
    )
    axes = made.subplots()
    place, ticks, most = 0.0, [], max(max(found.values()) for found in data["sizes"].values())
    for size, found in data["sizes"].items():
        begin = place
        for name, label, colour in WAYS:
            if name not in found:
                continue
            ratio = found[name] / found["ours"]
            axes.barh(place, found[name], height=0.8, color=colour)
            text = f"{label}, {duration(found[name])}"
            axes.annotate(
                text if name == "ours" else f"{text}, {style.times(ratio)} ours",
                (found[name], place),
                (5, 0),
                textcoords="offset points",
                va="center",
                fontsize=9,
            )
            place += 1
        ticks.append(((begin + place - 1) / 2, f"E-CAR-{size}"))
        place += 0.8
    axes.set_yticks(*zip(*ticks, strict=True))
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    axes.set_ylim(place - 0.9, -0.7)
    axes.set_xlim(0, 1.3 * most)
    axes.set_xlabel("seconds")
    return made
