"""Trainings that differ in one choice each, at equal numbers of images (paper, Figure 5).

They are compared by the loss of the averaged weights on held-out images: of each stage, not
weighted, with the same noise and uniform times in all. A change is that to the mean of the base's
two seeds; what differs by no more than they do means nothing.

    python -m benchmarks.paper.training --dataset mnist --images 300000 -k AR
    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 -m benchmarks.paper.training --dataset mnist ...

Each training has a folder in --work. One that was interrupted goes on when the command is given
again; one that is finished is read. Without --images nothing is trained: the table and the picture
are made from the results there are.
"""

import csv
import operator
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import PartialState

from benchmarks import commands, results
from benchmarks.results import ROOT, markdown
from ecar import ECARConfig
from ecar.info import count_multiply_adds, count_parameters
from ecar.training import TrainConfig, Trainer
from ecar.training.state import state_path

DATASETS = ("mnist", "emoji")  # of which each has a preset
BATCH = 64
POINTS = 25  # of a curve
DECAY = 5  # a fifth of the steps
SETTINGS: dict[str, Any] = {
    "batch_size": BATCH,
    "learning_rate": 8e-4,
    "schedule": "wsd",
    "ema_decay": 0.999,
    "mixed_precision": "bf16",
    "validation_images": 1024,
    "num_workers": 0,
    "sample_every": 0,
}
BASE = "two flow blocks, equal weights"
SEED = "another seed"
FIGURE_5 = "AR transformer (Figure 5)"
AVERAGES = "moving average"
Row = dict[str, Any]


class Training(NamedTuple):
    """What a training has of its own."""

    name: str
    group: str  # of those that are drawn together
    settings: Mapping[str, Any] = {}  # of the TrainConfig
    model: Mapping[str, Any] = {}  # of the ECARConfig
    blind: bool = False  # the tokens' condition is without the end state of the stage before


def base_model(dataset: str) -> ECARConfig:
    """What the trainings change: a preset's sizes, with two flow blocks."""
    return ECARConfig.preset(dataset, flow_blocks=2)


def trainings(model: ECARConfig) -> list[Training]:
    """The table of them."""
    width, layers, blocks = model.width, model.ar_layers, model.flow_blocks
    wide = {"width": width * 5 // 4, "ar_layers": layers // 2, "flow_blocks": max(blocks // 2, 1)}
    deep = {"width": width * 3 // 4, "ar_layers": layers * 2, "flow_blocks": blocks * 2}
    moved = {"ar_layers": 0, "flow_blocks": blocks_without_ar(model)}
    return [
        Training(BASE, "", {"ema_decay": (0.999, 0.9, 0.97)}),
        Training(SEED, "seed and labels", {"seed": 1}),
        Training("no label dropout", "seed and labels", {"label_dropout": 0.0}),
        Training("label dropout 0.2", "seed and labels", {"label_dropout": 0.2}),
        Training("GradNorm", "stage weights and times", {"stage_weights": "gradnorm"}),
        Training("uncertainty", "stage weights and times", {"stage_weights": "uncertainty"}),
        Training("logit-normal times", "stage weights and times", {"tau": "logit-normal"}),
        Training("wider, half the layers", "width, depth and patch", model=wide),
        Training("narrower, twice the layers", "width, depth and patch", model=deep),
        Training("four flow blocks", "width, depth and patch", model={"flow_blocks": 4}),
        Training("patch 2", "width, depth and patch", model={"patch_size": 2}),
        Training("no AR, as many parameters", FIGURE_5, model=moved),
        Training(
            "no AR, its layers in every head",
            FIGURE_5,
            model={**moved, "flow_blocks": blocks + layers},
        ),
        Training("no AR, told the class alone", FIGURE_5, model=moved, blind=True),
    ]


def blocks_without_ar(model: ECARConfig) -> int:
    """Blocks of each flow head that come nearest to the model's parameters without AR layers."""
    wanted = count_parameters(model)["total"]

    def excess(blocks: int) -> int:
        changed = replace(model, ar_layers=0, flow_blocks=blocks)
        return abs(count_parameters(changed)["total"] - wanted)

    return min(range(1, model.flow_blocks + model.ar_layers + 1), key=excess)


def configuration(
    dataset: str, model: ECARConfig, training: Training, images: int, work: Path
) -> TrainConfig:
    steps = images // BATCH
    every = max(steps // POINTS, 1)
    values = {**SETTINGS, "stage_weights": (1.0,) * model.num_stages, **training.settings}
    return TrainConfig(
        model=replace(model, **training.model),
        dataset=dataset,
        output_dir=str(work / dataset / results.slug(training.name)),
        steps=steps,
        warmup_steps=min(300, steps // 10),
        decay_steps=max(steps // DECAY, 1),
        log_every=every,
        validate_every=every,
        save_every=every,
        **values,
    )


def train(training: Training, config: TrainConfig) -> bool:
    """Train to the end, or go on from where the folder is; False if a signal ended it before."""
    trainer = Trainer(config, resume=state_path(config.output_dir).exists())
    if training.blind:
        for model in (trainer.raw_model, *trainer.averages.values()):
            for parameter in model.ar.inputs.parameters():
                parameter.data.zero_()
                if parameter.requires_grad:
                    parameter.register_hook(torch.zeros_like)
    if trainer.validation is not None:
        trainer.validation.seed = 0
    return trainer.run().stopped_by is None


def measure(training: Training, config: TrainConfig) -> Row:
    """The row of a training that is finished."""
    with open(Path(config.output_dir) / "validation.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    numbers = {
        name: [float(row[name]) if name != "images" else int(row[name]) for row in rows]
        for name in rows[0]
        if name != "step"
    }
    return {
        "name": training.name,
        "group": training.group,
        "settings": dict(training.settings),
        "model": dict(training.model),
        "parameters": count_parameters(config.model)["total"],
        "multiply_adds": sum(stage.total for stage in count_multiply_adds(config.model)),
        "curve": numbers,
    }


def render(record: dict[str, Any]) -> str:
    rows = {row["name"]: row for row in record["rows"]}
    base = base_losses(rows)[-1] if BASE in rows else None
    stages = [name for name in record["rows"][0]["curve"] if name.startswith("loss_")]
    said = dict.fromkeys(results.briefly(facts) for facts in record["runs"])
    cells = [
        (
            row["name"],
            f"{row['parameters'] / 1e6:.2f} M",
            f"{row['multiply_adds'] / 1e9:.2f} G",
            *(f"{row['curve'][name][-1]:.4f}" for name in ("loss", *stages)),
            "-" if base is None else f"{row['curve']['loss'][-1] / base - 1:+.1%}",
        )
        for row in record["rows"]
    ]
    header = ("training", "parameters", "multiply-adds", "loss")
    table = markdown((*header, *(name.replace("loss_", "stage ") for name in stages), "change"),
                     cells)  # fmt: skip
    texts = [
        table,
        f"{record['dataset']}: loss on held-out images after {record['images']:,} images, mean and "
        "by stage; multiply-adds of one image by default, without guidance.",
        f"{'; '.join(said)}.",
    ]
    if BASE in rows:
        own = rows[BASE]["curve"]["loss"][-1]
        losses = ((decay, curve[-1]) for decay, curve in averages(rows[BASE]).items())
        shown = [(decay, f"{loss:.4f}", f"{loss / own - 1:+.1%}") for decay, loss in losses]
        texts.insert(1, markdown(("average's decay", "loss", "change"), shown))
    return "\n\n".join(texts)


def base_losses(rows: Mapping[str, Row]) -> list[float]:
    """The curve of the base, the mean of its seeds."""
    curves = [rows[name]["curve"]["loss"] for name in (BASE, SEED) if name in rows]
    return [statistics.fmean(values) for values in zip(*curves, strict=True)]


def averages(row: Row) -> dict[str, list[float]]:
    """The curves of a row's moving averages by decay, in the order of the decays."""
    decays = row["settings"]["ema_decay"]
    columns = ["loss", *(f"ema_{decay}" for decay in decays[1:])]
    return {
        str(decay): row["curve"][name] for decay, name in sorted(zip(decays, columns, strict=True))
    }


def draw(record: dict[str, Any], file: Path) -> Path:
    """The losses of Figure 5's trainings by images seen, and the others' over the base's; all from
    a tenth of the images on."""
    import matplotlib

    from benchmarks import pictures

    rows = {row["name"]: row for row in record["rows"]}
    base, usual = rows[BASE]["curve"], base_losses(rows)
    curves: dict[str, dict[str, list[float]]] = {FIGURE_5: {BASE: base["loss"]}}
    for row in record["rows"]:
        if row["group"]:
            curves.setdefault(row["group"], {})[row["name"]] = row["curve"]["loss"]
    curves[AVERAGES] = averages(rows[BASE])
    begin = len(base["images"]) // 10
    with matplotlib.rc_context(pictures.SETTINGS):
        height = (len(curves) + 1) // 2
        made = pictures.figure(2.8 * height, f"{record['dataset']}: loss on held-out images")
        panels = made.subplots(height, 2, squeeze=False).flatten()
        for axes, (group, found) in zip(panels, curves.items(), strict=False):
            absolute = group == FIGURE_5
            axes.set_prop_cycle(color=pictures.STAGES)
            for name, values in found.items():
                over = base["loss"] if group == AVERAGES else usual
                ratios = [v / b for v, b in zip(values, over, strict=True)]
                shown = values if absolute else ratios
                axes.plot(base["images"][begin:], shown[begin:], linewidth=1.2, label=name)
            if absolute:
                axes.set_yscale("log")
                axes.yaxis.set_minor_formatter("{x:g}")
            else:
                axes.axhline(1, color="black", linewidth=0.8)
            axes.yaxis.set_major_formatter("{x:g}")
            axes.set_title(group if absolute else f"{group}: loss / that of the base", fontsize=9)
            axes.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter(sep=" "))
            axes.legend(fontsize=7.5)
        for axes in panels[len(curves) :]:
            axes.set_axis_off()
        return pictures.save(made, file)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = commands.parser("paper.training", __doc__)
    parser.add_argument("--dataset", choices=DATASETS, required=True)
    parser.add_argument("--images", type=int, metavar="N", help="that each training sees")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "trainings", metavar="FOLDER")
    parser.add_argument(
        "--pictures", type=Path, default=ROOT / "docs" / "images", metavar="FOLDER",
        help="of training-DATASET.png (default: docs/images)",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    model = base_model(options.dataset)
    table = trainings(model)
    names = [one.name for one in table]
    chosen = commands.chosen(parser, options, names)
    if options.list:
        return
    if options.images is not None and options.images < 10 * BATCH:
        parser.error(f"argument --images: expected at least {10 * BATCH}, got {options.images}")
    # Losses, not times: rows of different CPUs are compared.
    file = options.results / "any-cpu" / f"training-{options.dataset}.json"
    if file.exists():
        if options.images not in (None, images := results.read(file)["images"]):
            parser.error(f"argument --images: expected {images} as in {file}, got {options.images}")
    elif options.images is None:
        parser.error(f"argument --images: is needed, as there is no {file}")
    for training in table if options.images is not None else ():
        if training.name not in chosen:
            continue
        facts = results.describe()
        config = configuration(options.dataset, model, training, options.images, options.work)
        if not train(training, config):
            sys.exit("interrupted; the same command goes on")
        if PartialState().is_main_process:
            row = measure(training, config)
            results.merge(
                file, "training", facts, {"rows": [row]}, operator.itemgetter("name"), names,
                dataset=options.dataset, images=options.images, settings=SETTINGS,
            )  # fmt: skip
    if PartialState().is_main_process:
        record = results.read(file)
        print(f"{render(record)}\n\nread {file}")
        if any(row["name"] == BASE for row in record["rows"]):
            print(f"wrote {draw(record, options.pictures / f'{file.stem}.png')}")


if __name__ == "__main__":
    main()
