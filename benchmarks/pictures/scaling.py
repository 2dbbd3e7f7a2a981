"""How an image's time grows with its tokens, the batch and the steps."""

from typing import Any

from matplotlib.figure import Figure

from benchmarks.pictures import style
from benchmarks.results import duration

ALT = "Curves: the time of an image by its tokens, by the batch and by the number of steps"


def data(record: dict[str, Any]) -> dict[str, Any] | None:
    """tokens, batch, steps: [x, seconds] with the other two as in the first image."""
    images = record["images"]
    if not images:
        return None
    first, found = images[0], {}
    for varied in ("tokens", "batch", "steps"):
        fixed = [name for name in ("tokens", "batch", "steps") if name != varied]
        found[varied] = sorted(
            [image[varied], image["seconds"]["median"], image.get("pixels")]
            for image in images
            if all(image[name] == first[name] for name in fixed)
        )
    return {
        "preset": record["preset"],
        "curves": found,
        "fixed": {name: first[name] for name in ("tokens", "batch", "steps")},
        **style.origin(record["environment"]),
    }


def draw(data: dict[str, Any]) -> Figure:
    made = style.figure(
        3.5, f"How the time of an image of E-CAR-{data['preset']} grows", data["note"]
    )
    fixed = data["fixed"]
    texts = {
        "tokens": (
            "with its tokens",
            "tokens of the image",
            f"batch {fixed['batch']}, {fixed['steps']} steps",
        ),
        "batch": (
            "with the batch",
            "images in the batch",
            f"{fixed['tokens']} tokens, {fixed['steps']} steps",
        ),
        "steps": (
            "with the steps",
            "steps in all",
            f"{fixed['tokens']} tokens, batch {fixed['batch']}",
        ),
    }
    for axes, (varied, points) in zip(made.subplots(1, 3), data["curves"].items(), strict=True):
        title, label, rest = texts[varied]
        x, seconds, pixels = zip(*points, strict=True)
        if varied == "batch":
            seconds = [value / count for value, count in zip(seconds, x, strict=True)]
        axes.plot(x, seconds, "o-", color=style.BLUE)
        for place, value, side in zip(x, seconds, pixels, strict=True):
            side = f"{side} px\n" if varied == "tokens" else ""
            text = f"{side}{duration(value)}"
            right = varied != "batch"
            axes.annotate(
                text,
                (place, value),
                (-5 if right else 0, 6),
                fontsize=8.5,
                textcoords="offset points",
                ha="right" if right else "center",
            )
        axes.set_title(title)
        axes.set_xlabel(f"{label}\n({rest})")
        axes.set_ylabel("seconds an image" if varied == "batch" else "seconds")
        axes.set_xscale("log")
        style.log_ticks(axes.xaxis, list(x))
        axes.margins(0.42 if varied != "batch" else 0.2, 0.25)
        if varied == "batch":
            axes.set_ylim(0, 1.25 * max(seconds))
        else:
            axes.set_yscale("log")
            style.log_ticks(axes.yaxis, style.steps(min(seconds) / 1.5, 1.5 * max(seconds)))
    return made
