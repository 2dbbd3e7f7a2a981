"""The end state of each stage, coarse to fine, of the two checkpoints of this repository."""

import hashlib
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks.pictures import style
from benchmarks.results import ROOT
from ecar.pipeline import ECARPipeline

ALT = (
    "Samples of the two checkpoints, one column for each digit; each row is a later stage, "
    "coarse to fine, and the last one is the picture"
)
CHECKPOINTS = ("digits", "mnist")
SEEDS = {"digits": 7, "mnist": 7}
PIXELS = 64  # of each picture when it is drawn: none is blurred by whoever shows it


def data() -> dict[str, Any]:
    """What decides the pictures: weights and configuration by hash, and the seeds."""
    return {
        "seeds": SEEDS,
        "files": {
            f"{name}/{file}": hashlib.sha256(
                (ROOT / "checkpoints" / name / file).read_bytes()
            ).hexdigest()
            for name in CHECKPOINTS
            for file in ("config.json", "model.safetensors", "pipeline.json")
        },
    }


def draw(data: dict[str, Any]) -> Figure:
    rows = []
    for name, seed in data["seeds"].items():
        pipe = ECARPipeline.from_pretrained(ROOT / "checkpoints" / name)
        drawn = pipe(
            list(range(10)), seeds=[seed] * 10, output_type="np", return_stages=True, progress=False
        )
        rows += [
            (name, index, len(drawn.stage_images), stage)
            for index, stage in enumerate(drawn.stage_images)
        ]
    made = style.figure(
        0.75 * len(rows) + 1.1,
        "From coarse to fine: the state at each stage's end",
        "A stage before the last one ends partly noised, and the next one begins from that.",
    )
    made.get_layout_engine().set(w_pad=0.06, h_pad=0.04, wspace=0, hspace=0)
    for axes, (name, index, count, stage) in zip(made.subplots(len(rows), 1), rows, strict=True):
        side = stage.shape[1]
        axes.imshow(_strip(stage), cmap="gray", vmin=0, vmax=1, interpolation="none")
        axes.set_axis_off()
        last = ": the picture" if index == count - 1 else ""
        axes.text(
            -12,
            PIXELS / 2,
            f"{name}, stage {index + 1}\n{side} x {side}{last}",
            ha="right",
            va="center",
            fontsize=9,
        )
    return made


def _strip(stage: np.ndarray) -> np.ndarray:
    """[n, h, w, 1] side by side, each enlarged to PIXELS, white between them."""
    cells = []
    for picture in stage[..., 0]:
        factor = PIXELS // picture.shape[0]
        cells += [
            np.kron(picture, np.ones((factor, factor), picture.dtype)),
            np.ones((PIXELS, 4), picture.dtype),
        ]
    return np.concatenate(cells[:-1], axis=1)
