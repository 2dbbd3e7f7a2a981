"""How every picture looks, and how it is written: the same bytes for the same data.

Colours are those of Okabe and Ito, which stay apart for the colour-blind; no meaning rests on
colour alone. Sizes are for a page 830 pixels wide.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks import results
from ecar.files import atomic_path

STAMP = "Identifier"  # the key in a PNG's metadata; an SVG's is Dublin Core's
WIDTH = 8.6  # inches
BLUE, ORANGE, GREEN, RED, SKY, PURPLE, GREY = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#D55E00",
    "#56B4E9",
    "#CC79A7",
    "#777777",
)
COLOURS = (BLUE, ORANGE, GREEN, RED, SKY, PURPLE, GREY)
MARKERS = ("o", "s", "^", "D", "v", "P", "X")

_SETTINGS = {
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "font.family": "DejaVu Sans",  # the one that matplotlib brings
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "svg.hashsalt": "ecar",
    "svg.fonttype": "path",
}


@contextlib.contextmanager
def applied() -> Iterator[None]:
    """The settings hold within, whatever those of the user are."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_SETTINGS)
        yield


def figure(height: float, title: str, note: str = "") -> Figure:
    """An empty picture, `height` inches high, with a title above and a line of origin below."""
    made = Figure(figsize=(WIDTH, height), layout="constrained")
    made.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    if note:
        made.supxlabel(note, x=0.01, ha="left", fontsize=7.5, color="#444444")
    return made


def origin(facts: dict[str, Any], *more: str) -> dict[str, str]:
    """What a record's environment says below its picture, as part of a picture's data."""
    device = facts.get("gpu", facts).get("name", facts["device"])
    kind = f"{facts['threads']} threads, {facts['cpu_capability']}"
    if "gpu" in facts:
        kind = f"CUDA {facts['gpu'].get('CUDA')}, driver {facts['gpu'].get('driver')}"
    said = (f"{device}, {kind}", f"torch {facts['versions']['torch']}", facts["date"][:10], *more)
    return {"device": device, "note": "; ".join(said)}


def times(ratio: float) -> str:
    """2.43 -> "2.43x", to three figures."""
    return f"{results.figures(ratio)}x"


def log_ticks(axis: Any, values: list[float], labels: list[str] | None = None) -> None:
    """These ticks alone on a logarithmic axis, as plain numbers."""
    axis.set_ticks(values, labels or [f"{value:g}" for value in values])
    axis.set_ticks([], minor=True)


def steps(low: float, high: float) -> list[float]:
    """Plain numbers within bounds to put ticks at: few, but not fewer than two where it can be."""
    for factors in ((1,), (1, 3), (1, 2, 5), (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8)):
        found = [
            factor * 10.0**power
            for power in range(-12, 13)
            for factor in factors
            if low <= factor * 10.0**power <= high
        ]
        if len(found) > 2:
            break
    return found


def bar_labels(axes: Axes, bars: Any, texts: list[str], **kwargs: Any) -> None:
    """A text at the end of each bar."""
    axes.bar_label(bars, texts, padding=kwargs.pop("padding", 3), fontsize=8.5, **kwargs)


def write(made: Figure, path: Path, stamp: str) -> None:
    """Without a date or a version in it. path: its suffix says which format."""
    fields = (
        {STAMP: stamp, "Software": None}
        if path.suffix == ".png"
        else {STAMP: stamp, "Creator": "benchmarks.pictures", "Date": None}
    )
    with atomic_path(path) as temporary:
        made.savefig(temporary, dpi=200, metadata=fields)
