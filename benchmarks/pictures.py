"""Pictures of results and of the checkpoints, as PNG; `python -m benchmarks.report --images`.

Colours are those of Okabe and Ito, which stay apart for the colour-blind.
"""

import io
import statistics
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.style
import matplotlib.ticker
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from benchmarks import micro, results
from benchmarks.results import ROOT, duration, medians, times
from ecar import ECARPipeline
from ecar.files import atomic_path
from ecar.images import make_sheet

WIDTH = 8.6  # inches
DPI = 110
COLOURS = {
    "eager": "#E69F00",
    "torch.compile": "#56B4E9",
    "ecar_kernels": "#0072B2",
    "its matrix products alone": "#777777",
}
SETTINGS = {
    "font.family": "DejaVu Sans",  # the one that matplotlib brings
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "legend.frameon": False,
}
STAGES = ("#0072B2", "#E69F00", "#009E73", "#D55E00")
CHECKPOINTS: dict[str, list[int]] = {  # the classes of which a picture is drawn
    "emoji": [0, 1, 2, 3, 10, 15, 16, 25, 26, 27],  # smileys, hearts, people, activities, ..
    "digits": [*range(10)],
    "mnist": [*range(10)],
}
SEED = 7
Record = dict[str, Any]


def draw(file: Path, folder: Path) -> list[Path]:
    """Draws the picture of a file of results, if its kind has one: <device>/<name>.png."""
    record = results.read(file)
    if record["kind"] not in PICTURES or not record["rows"]:
        return []
    with matplotlib.style.context(["default", SETTINGS]):
        picture = PICTURES[record["kind"]](record)
        return [save(picture, folder / file.parent.name / f"{file.stem}.png")]


def draw_all(folder: Path) -> list[Path]:
    """Every picture of docs/images/ that is made from results or checkpoints."""
    files = sorted(results.FOLDER.glob("*/*.json"))
    logs = sorted(ROOT.glob("checkpoints/*/log.csv"))
    of_checkpoints = {"stages.png": stages(), "losses.png": losses(logs)}
    drawn = [save(picture, folder / name) for name, picture in of_checkpoints.items()]
    return drawn + [picture for file in files for picture in draw(file, folder)]


def save(picture: Figure | Image.Image, path: Path) -> Path:
    """With at most 256 colours, a quarter of the bytes."""
    if isinstance(picture, Figure):
        picture.savefig(buffer := io.BytesIO(), dpi=DPI)
        picture = Image.open(buffer)
    image = picture.convert("RGB").quantize(256, dither=Image.Dither.NONE)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        image.save(temporary, format="PNG", optimize=True)
    return path


def figure(height: float, title: str) -> Figure:
    """An empty picture with a title above."""
    made = Figure(figsize=(WIDTH, height), layout="constrained")
    made.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    return made


def bars(
    title: str,
    facts: dict[str, Any],
    groups: dict[str, dict[str, float]],
    label: str,
    text: Callable[[float], str],
    start: float = 0.0,
) -> Figure:
    """Horizontal bars in groups, one colour for each name, the value's text at its end.

    start: of the bars; from 1 they are ratios, and the axis is logarithmic.
    """
    made = figure(1.3 + 0.17 * sum(len(group) + 1 for group in groups.values()), title)
    made.supxlabel(results.briefly(facts), x=0.01, ha="left", fontsize=7.5, color="#444444")
    axes, place, ticks = made.subplots(), 0, []
    bars_of: dict[str, dict[int, float]] = defaultdict(dict)  # by name, {place: value}
    for group in groups.values():
        ticks.append(place + (len(group) - 1) / 2)
        for name, value in group.items():
            bars_of[name][place] = value
            place += 1
        place += 1
    for name, values in bars_of.items():
        widths = [value - start for value in values.values()]
        drawn = axes.barh([*values], widths, 0.85, start, color=COLOURS[name], label=name)
        axes.bar_label(drawn, [text(value) for value in values.values()], padding=4, fontsize=8)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(bars_of), fontsize=8.5)
    axes.set_yticks(ticks, list(groups))
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    axes.set_ylim(place - 1.2, -0.8)
    axes.set_xlabel(label)
    if start:
        axes.set_xscale("log")
        axes.axvline(start, color="black", linewidth=1)
    axes.margins(x=0.12)
    return made


def ops(record: Record) -> Figure:
    """Eager's and torch.compile's time over ecar_kernels', the median over an op's sizes."""
    ratios: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    rows = [row for row in record["rows"] if not row.get("overhead")]
    for row in sorted(rows, key=lambda row: row["backward"]):
        of_op = ratios[f"{row['op']}{' backward' * row['backward']}"]
        for way, ratio in micro.speedups(row).items():
            of_op[micro.NAMES[way]].append(ratio)
    return bars(
        "Each op: time over that of ecar_kernels, median over all sizes",
        record["runs"][-1],
        {op: {way: statistics.median(v) for way, v in of.items()} for op, of in ratios.items()},
        "time / time of ecar_kernels",
        times,
        start=1,
    )


def image(record: Record) -> Figure:
    groups = {}
    for row in record["rows"]:
        seconds = medians(row)
        gemms = seconds["linears"] + seconds["attention"]
        shown = {micro.NAMES[way]: seconds[way] for way in micro.OWN if way in seconds}
        groups[f"E-CAR-{row['size']}"] = shown | {"its matrix products alone": gemms}
    title = "One image, 250 steps, no guidance, float32"
    return bars(title, record["runs"][-1], groups, "seconds", duration)


def stages() -> Image.Image:
    """The end state of each stage of each checkpoint, one column for each class."""
    names, drawn = [], []
    for name, classes in CHECKPOINTS.items():
        pipe = ECARPipeline.from_pretrained(ROOT / "checkpoints" / name)
        seeds = [SEED] * len(classes)
        found = pipe(classes, seeds=seeds, return_stages=True, progress=False).stage_images
        for stage in found:
            names.append(f"{name} {stage[0].width} x {stage[0].height}")
            drawn += [
                its.convert("RGB").resize((64, 64), Image.Resampling.NEAREST) for its in stage
            ]
    return make_sheet(drawn, len(names), len(drawn) // len(names), padding=4, names=names)


def losses(logs: list[Path]) -> Figure:
    """The loss of each stage over the images seen, of each training (Figure 6 of the paper)."""
    made = figure(2.6 * len(logs) + 0.4, "Training loss: each stage's, by images seen")
    grid = made.subplots(len(logs), 1, squeeze=False)[:, 0]
    for axes, path in zip(grid, logs, strict=True):
        rows = np.genfromtxt(path, delimiter=",", names=True)
        names = [name for name in rows.dtype.names if name.startswith("loss_")]
        for name, colour in zip(names, STAGES, strict=False):
            label = name.replace("loss_", "stage ")
            axes.plot(rows["images"], rows[name], color=colour, linewidth=1, label=label)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.tick_params(axis="y", which="both", labelsize=8)
        axes.set_ylabel(path.parent.name)
        axes.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter(sep=" "))
        axes.legend(fontsize=8, ncols=len(names))
    grid[-1].set_xlabel("images")
    return made


PICTURES: dict[str, Callable[[Record], Figure]] = {"micro": ops, "end_to_end": image}
