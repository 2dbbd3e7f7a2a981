"""Quality of the images by solver and by number of network calls.

For each checkpoint, solver and number of calls: the share of images that are read as the class
asked for, the Fréchet distance over that of as many training images, and precision and recall.
Each is the mean over groups of images, whose seeds are their own, with half of its 95 % confidence
interval. Everything else, such as guidance, is as the checkpoint's defaults have it. Calls x tokens
count the tokens that the flow heads process, twice those of an image where a step is guided.

The rows "guidance every 2nd step" are an experiment, which the library does not offer: in between,
v_c - v_u is that of the step before, and the unconditional half is not computed.
"""

import functools
import statistics
import sys
from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from scipy.stats import t as student
from torch import Tensor

from benchmarks import commands
from benchmarks.results import ROOT, table
from ecar import ECAR, ECARPipeline, split_steps
from ecar.data import load_dataset
from ecar.evaluation import (
    draw_labels,
    extract,
    frechet_distance_of_features,
    generate,
    precision_recall,
)
from ecar.evaluation.extractors import default_extractor, to_bytes
from ecar.evaluation.measure import pixels
from ecar.sampling.guidance import PAPER_GRID, geometric_split
from ecar.sampling.stage import Inputs, Shape

CALLS = (8, 12, 18, 30, 60, 250)
CHECKPOINTS = ("digits", "mnist")  # names of folders and of their data sets
# What is measured, its scale, and how it is written.
METRICS = {
    "read as asked": (100, "{:.1f} ± {:.1f} %"),
    "Fréchet ratio": (1, "{:.2f} ± {:.2f}"),
    "precision": (1, "{:.3f} ± {:.3f}"),
    "recall": (1, "{:.3f} ± {:.3f}"),
}
TRAINING_IMAGES = "training images"
Measures = dict[str, float]


class Setting(NamedTuple):
    """How an image is drawn, apart from the number of calls."""

    name: str
    solver: str
    as_paper: bool = False  # an even grid and split, instead of the checkpoint's and the library's
    calls_of_a_step: int = 1
    guided_every: int = 1  # steps from one that computes v_c - v_u to the next

    def options(self, calls: int, num_stages: int) -> dict[str, Any]:
        """Of the pipeline's call; with too few calls for all stages, one step for each."""
        steps = max(calls // self.calls_of_a_step, num_stages)
        if self.as_paper:
            even = geometric_split(steps, num_stages, 1.0)
            return {"num_inference_steps": even, "solver": self.solver, "grid": PAPER_GRID}
        return {"num_inference_steps": steps, "solver": self.solver}


SETTINGS = (
    Setting("euler, as the paper", "euler", as_paper=True),
    Setting("euler", "euler"),
    Setting("heun", "heun", calls_of_a_step=2),
    Setting("ab2", "ab2"),
    Setting("ab2, guidance every 2nd step", "ab2", guided_every=2),
)


class Judge:
    """A data set's classifier, and as many groups of its images to compare with as are drawn.

    Not `ecar.evaluation`'s RealSets, which has one training set and picks other rows, for it and
    for precision and recall: the committed results are of those that are picked here.
    """

    def __init__(self, name: str, groups: int, images: int) -> None:
        train, held_out = (load_dataset(name, split=split) for split in ("train", "test"))
        self.extractor = default_extractor(name)
        self.held_out, _ = extract(
            self.extractor, pixels(held_out, torch.arange(len(held_out)), progress=False)
        )
        self.labels = draw_labels(train, groups * images).split(images)
        generator = torch.Generator().manual_seed(0)
        self.floor, self.real = 1.0, []
        for _ in range(groups):
            rows = torch.randperm(len(train), generator=generator)[:images]
            self.real.append(self.measure(pixels(train, rows, progress=False), train.labels[rows]))
        self.floor = statistics.fmean(found["Fréchet ratio"] for found in self.real)
        for found in self.real:
            found["Fréchet ratio"] /= self.floor

    def measure(self, images: Tensor, labels: Tensor) -> Measures:
        """Of uint8 images [N, C, H, W], asked for as the classes [N]; in the order of METRICS."""
        features, logits = extract(self.extractor, images)
        held_out = self.held_out[: len(features)]
        precision, recall = precision_recall(held_out, features[: len(held_out)])
        read = (logits.argmax(1) == labels).double().mean().item()
        distance = frechet_distance_of_features(features, self.held_out) / self.floor
        return dict(zip(METRICS, (read, distance, precision, recall), strict=True))

    def summary(self, draw: Callable[[Tensor, Tensor], Tensor]) -> dict[str, list[float]]:
        """Of the images that it draws of classes and seeds, group by group."""
        seeds = torch.arange(sum(map(len, self.labels))).split(len(self.labels[0]))
        groups = zip(self.labels, seeds, strict=True)
        return summary([self.measure(draw(*each), each[0]) for each in groups])


def summary(found: Sequence[Measures]) -> dict[str, list[float]]:
    """{metric: [mean, half of its 95 % confidence interval]} over groups."""
    quantile = float(student.ppf(0.975, len(found) - 1))
    return {
        metric: [statistics.fmean(values), quantile * statistics.stdev(values) / len(values) ** 0.5]
        for metric in METRICS
        for values in [[one[metric] for one in found]]
    }


@torch.no_grad()
def draw_reusing(
    model: ECAR, labels: Tensor, seeds: Tensor, options: dict[str, Any], scale: float, every: int
) -> Tensor:
    """Latents [B, C, h, w] by ab2, v_c - v_u computed at every so many steps of a stage."""
    counts = tuple(split_steps(options["num_inference_steps"], model.config.num_stages))
    guided = tuple(tuple(step % every == 0 for step in range(count)) for count in counts)
    inputs = Inputs(model, Shape(len(labels), counts, "ab2", guided), device_data=False)
    inputs.load(labels, seeds, [[scale] * count for count in counts], options["grid"])
    x, end = inputs.noise(), None
    for number, count in enumerate(counts, start=1):
        stage = inputs.stage(model, number, end)
        for step in range(count):
            v = stage.velocity(x, step, step)
            if stage.guided[step]:
                v, unconditional = v.chunk(2)
                difference = v - unconditional
            v = v + (scale - 1) * difference
            if step == stage.last and stage.next_time is not None:
                jump = {"time": stage.next_time, "stage": number + 1, "seeds": seeds}
                end, x = stage.solver.jump(x, v, step, 1.0, **jump)
            else:
                x = stage.solver.advance(x, v, step, 1.0)
    return x


def measure_training(judge: Callable[[], Judge]) -> dict[str, list]:
    """The row of the training images."""
    return {"rows": [{"solver": TRAINING_IMAGES, "measures": summary(judge().real)}]}


def measure(
    pipeline: ECARPipeline, judge: Callable[[], Judge], setting: Setting, calls: int
) -> dict[str, list]:
    """A row of the table."""
    config, scale = pipeline.model.config, pipeline.defaults["guidance_scale"]
    options, every = setting.options(calls, config.num_stages), setting.guided_every

    def draw(labels: Tensor, seeds: Tensor) -> Tensor:
        if every == 1:
            return generate(pipeline, labels, seeds, progress=False, **options)
        given = options | {"grid": pipeline.defaults["grid"]}
        return to_bytes(draw_reusing(pipeline.model, labels, seeds, given, scale, every))

    counts = split_steps(options["num_inference_steps"], config.num_stages)
    rows = [count + (scale != 1) * -(-count // every) for count in counts]
    work = sum(n * tokens for n, tokens in zip(rows, config.stage_tokens, strict=True))
    facts = {"solver": setting.name, "calls": calls, "options": options}
    facts["calls_x_tokens"] = work * setting.calls_of_a_step
    return {"rows": [facts | {"measures": judge().summary(draw)}]}


def cells(measures: dict[str, list[float]]) -> dict[str, str]:
    return {
        metric: written.format(*(scale * value for value in measures[metric]))
        for metric, (scale, written) in METRICS.items()
    }


def render(record: dict[str, Any]) -> str:
    rows = [
        {
            "solver": row["solver"],
            "calls": str(row.get("calls", "-")),
            "calls x tokens": f"{row['calls_x_tokens']:,}" if "calls" in row else "-",
            **cells(row["measures"]),
        }
        for row in record["rows"]
    ]
    return (
        f"{table(rows)}\n\n{record['checkpoint']}: {record['groups']} groups of "
        f"{record['images']} images; means with half of their 95 % confidence intervals."
    )


def groups_parser(name: str, doc: str, checkpoints: Sequence[str], images: int) -> ArgumentParser:
    """Of a benchmark that judges groups of checkpoints' images."""

    def two_or_more(text: str) -> int:
        if int(text) < 2:
            raise ArgumentTypeError(f"expected at least 2, got {text}")
        return int(text)

    parser = commands.parser(name, doc)
    add = parser.add_argument
    add("--checkpoints", nargs="+", default=checkpoints, metavar="NAME")
    add("--groups", type=two_or_more, default=4, help="of images (default: 4)")
    add("--images", type=int, default=images, help=f"of a group (default: {images})")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    parser = groups_parser("quality", __doc__, CHECKPOINTS, 1000)
    options, files, content = parser.parse_args(arguments), {}, {}
    sizes = {"groups": options.groups, "images": options.images}
    chosen = [(setting, calls) for setting in SETTINGS for calls in CALLS]
    for name in options.checkpoints:
        pipeline = ECARPipeline.from_pretrained(ROOT / "checkpoints" / name)
        judge = functools.cache(functools.partial(Judge, name, **sizes))
        cases = files[f"quality-{name}"] = {
            f"{name}, {setting.name}, {calls} calls": functools.partial(
                measure, pipeline, judge, setting, calls
            )
            for setting, calls in chosen
        }
        cases[f"{name}, {TRAINING_IMAGES}"] = functools.partial(measure_training, judge)
        facts = {"checkpoint": name, **sizes, "defaults": pipeline.defaults}
        content[f"quality-{name}"] = facts
    order = [(setting.name, calls) for setting, calls in chosen]
    how = {"same": lambda row: (row["solver"], row.get("calls")), "order": order}
    return commands.run_chosen(parser, options, "quality", files, render, content, **how)


if __name__ == "__main__":
    sys.exit(main())
