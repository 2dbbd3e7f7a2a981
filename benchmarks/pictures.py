"""Pictures of results and of the checkpoints, as PNG; `python -m benchmarks.report --images`.

Colours are those of Okabe and Ito, which stay apart for the colour-blind.
"""

import csv
import io
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.ticker
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from benchmarks import micro, results
from benchmarks.results import ROOT, duration, figures
from ecar.files import atomic_path

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
CHECKPOINTS = {"digits": 7, "mnist": 7}  # by seed
Record = dict[str, Any]


def draw(file: Path, folder: Path) -> Iterator[Path]:
    """Draws the picture of a file of results, if its kind has one: <device>/<name>.png."""
    record = results.read(file)
    if record["kind"] in PICTURES:
        with matplotlib.rc_context():
            matplotlib.rcdefaults()
            matplotlib.rcParams.update(SETTINGS)
            picture = PICTURES[record["kind"]](record)
            if picture is not None:
                yield save(picture, folder / file.parent.name / f"{file.stem}.png")


def draw_all(folder: Path) -> list[Path]:
    """Every picture of docs/images/ that is made from results or checkpoints."""
    files = sorted(results.FOLDER.glob("*/*.json"))
    drawn = [picture for file in files for picture in draw(file, folder)]
    logs = sorted(ROOT.glob("checkpoints/*/log.csv"))
    return [
        save(stages(), folder / "stages.png"),
        save(losses(logs), folder / "losses.png"),
        *drawn,
    ]


def save(picture: Figure, path: Path) -> Path:
    """With at most 128 colours, a quarter of the bytes."""
    with io.BytesIO() as buffer:
        picture.savefig(buffer, dpi=DPI)
        image = Image.open(buffer).convert("RGB").quantize(128, dither=Image.Dither.NONE)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        image.save(temporary, format="PNG", optimize=True)
    return path


def figure(height: float, title: str, facts: dict[str, Any] | None = None) -> Figure:
    """An empty picture with a title above and the device below."""
    made = Figure(figsize=(WIDTH, height), layout="constrained")
    made.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    if facts is not None:
        note = (
            f"{facts['device']}, {facts['threads']} threads; torch {facts['versions']['torch']}; "
            f"{facts['date'][:10]}"
        )
        made.supxlabel(note, x=0.01, ha="left", fontsize=7.5, color="#444444")
    return made


def bars(
    title: str,
    facts: dict[str, Any],
    groups: dict[str, dict[str, float]],
    label: str,
    text: Callable[[float], str],
    *,
    log: bool = False,
) -> Figure | None:
    """Horizontal bars in groups, one colour for each name, the value's text at its end."""
    if not groups:
        return None
    names = list(dict.fromkeys(name for group in groups.values() for name in group))
    count = sum(len(group) + 1 for group in groups.values())
    made = figure(1.3 + 0.17 * count, title, facts)
    axes, place, ticks = made.subplots(), 0.0, []
    for group in groups.values():
        ticks.append(place + (len(group) - 1) / 2)
        for name, value in group.items():
            start = 1 if log else 0
            axes.barh(place, value - start, left=start, height=0.85, color=COLOURS[name])
            end = (max(value, start), place)
            style = {"textcoords": "offset points", "va": "center", "fontsize": 8}
            axes.annotate(text(value), end, (4, 0), **style)
            place += 1
        place += 1
    handles = [matplotlib.patches.Patch(color=COLOURS[name], label=name) for name in names]
    axes.legend(
        handles=handles, loc="lower left", bbox_to_anchor=(0, 1), ncols=len(names), fontsize=8.5
    )
    axes.set_yticks(ticks, list(groups))
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    axes.set_ylim(place - 1.2, -0.8)
    axes.set_xlabel(label)
    if log:
        axes.set_xscale("log")
        axes.axvline(1, color="black", linewidth=1)
    axes.margins(x=0.12)
    return made


def times(ratio: float) -> str:
    return f"{figures(ratio)}x"


def ops(record: Record) -> Figure | None:
    """Eager's and torch.compile's time over ecar_kernels', the median over an op's sizes."""
    ratios: dict[str, dict[str, list[float]]] = {}
    for row in record["rows"]:
        if row.get("overhead"):
            continue
        group = f"{row['op']}{' backward' if row['backward'] else ''}"
        seconds = row["seconds"]
        for way in micro.OWN[:2]:
            if way in seconds:
                values = ratios.setdefault(group, {}).setdefault(micro.NAMES.get(way, way), [])
                values.append(seconds[way]["median"] / seconds["ours"]["median"])
    return bars(
        "Each op: time over that of ecar_kernels, median over all sizes",
        record["runs"][-1]["environment"] if record["runs"] else {},
        {
            group: {name: statistics.median(values) for name, values in of.items()}
            for group, of in sorted(ratios.items(), key=lambda item: "backward" in item[0])
        },
        "time / time of ecar_kernels",
        times,
        log=True,
    )


def image(record: Record) -> Figure | None:
    groups = {}
    for row in record["rows"]:
        median = {name: found["median"] for name, found in row["seconds"].items()}
        shown = {
            "eager": median["eager"],
            "torch.compile": median.get("compiled"),
            "ecar_kernels": median["ours"],
            "its matrix products alone": median["linears"] + median["attention"],
        }
        groups[f"E-CAR-{row['size']}"] = {k: v for k, v in shown.items() if v is not None}
    title = "One image, 250 steps, no guidance, float32"
    return bars(title, record["environment"], groups, "seconds", duration)


def stages() -> Figure:
    """The end state of each stage of the two checkpoints, one column for each digit."""
    from ecar import ECARPipeline

    rows = []
    for name, seed in CHECKPOINTS.items():
        pipe = ECARPipeline.from_pretrained(ROOT / "checkpoints" / name)
        drawn = pipe(
            list(range(10)), seeds=[seed] * 10, output_type="np", return_stages=True, progress=False
        )
        rows += [(f"{name}, stage {i}", stage) for i, stage in enumerate(drawn.stage_images, 1)]
    made = figure(0.75 * len(rows) + 0.6, "From coarse to fine: the state at each stage's end")
    for axes, (label, stage) in zip(made.subplots(len(rows), 1), rows, strict=True):
        axes.imshow(strip(stage), cmap="gray", vmin=0, vmax=1, interpolation="none")
        axes.set_axis_off()
        side = stage.shape[1]
        axes.text(-12, 32, f"{label}\n{side} x {side}", ha="right", va="center", fontsize=9)
    return made


def losses(logs: list[Path]) -> Figure:
    """The loss of each stage over the images seen, of each training (Figure 6 of the paper)."""
    made = figure(2.6 * len(logs) + 0.4, "Training loss: each stage's, by images seen")
    grid = made.subplots(len(logs), 1, squeeze=False)
    for axes, path in zip(grid[:, 0], logs, strict=True):
        with open(path, newline="") as file:
            rows = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]
        count = sum(name.startswith("loss_") for name in rows[0])
        for stage, colour in zip(range(1, count + 1), STAGES, strict=False):
            values = [row[f"loss_{stage}"] for row in rows]
            images = [row["images"] for row in rows]
            axes.plot(images, values, color=colour, linewidth=1, label=f"stage {stage}")
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.tick_params(axis="y", which="both", labelsize=8)
        axes.set_ylabel(path.parent.name)
        axes.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter(sep=" "))
        axes.legend(fontsize=8, ncols=count)
    grid[-1, 0].set_xlabel("images")
    return made


def strip(images: np.ndarray) -> np.ndarray:
    """[n, h, w, 1] enlarged to 64 pixels, side by side, white between them."""
    factor = 64 // images.shape[1]
    large = [np.kron(picture, np.ones((factor, factor))) for picture in images[..., 0]]
    gap = np.ones((64, 4))
    return np.concatenate([part for cell in large for part in (cell, gap)][:-1], axis=1)


PICTURES: dict[str, Callable[[Record], Figure | None]] = {"micro": ops, "end_to_end": image}
