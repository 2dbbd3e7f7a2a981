"""`ecar sample`: draw images, or a sheet of them, from a checkpoint."""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image, Resampling
from tqdm.auto import tqdm

from ecar.checkpoint import merge_settings
from ecar.cli.parser import (
    UsageError,
    add_checkpoint,
    add_device,
    add_sampling,
    class_list,
    positive,
    seed_list,
    sheet_size,
)
from ecar.cli.runtime import chosen_backend, chosen_device, chosen_settings, describe_backends
from ecar.images import check_output_file, check_output_folder, make_sheet, save_image
from ecar.inputs import draw_seeds
from ecar.pipeline import ECARPipeline
from ecar.sampling import split_steps

EXAMPLES = """\
examples:
  ecar sample --checkpoint checkpoints/mnist --output digits.png
      a sheet: rows are the first ten classes, columns the seeds 0 to 9
  ecar sample --checkpoint runs/birds --classes 7,robin --seeds 3-6 --steps 20,40,80 \\
      --guidance 3 --stages --output birds/
      eight images in a folder, with the states in which their stages ended
"""
FLAGS = {
    "class_labels": "--classes",
    "seeds": "--seeds",
    "steps": "--steps",
    "num_inference_steps": "--steps",
    "guidance_scale": "--guidance",
    "guidance_schedule": "--guidance-schedule",
    "guidance_interval": "--guidance-interval",
    "solver": "--solver",
    "grid": "--grid",
}
DEFAULT_ROWS, DEFAULT_COLUMNS = 10, 10
PADDING = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_checkpoint(parser)
    parser.add_argument(
        "--output",
        default="samples.png",
        metavar="PATH",
        help="a picture (.png, .jpg, ..): one image, or a sheet with a row for "
        "each class and a column for each seed. Or a folder: one file for "
        "each image. Default: samples.png",
    )
    group = parser.add_argument_group("what to draw: each class with each seed")
    group.add_argument(
        "--classes",
        type=class_list,
        metavar="LIST",
        help="numbers, ranges or names, such as 0-4,7,cat; default: the first ten",
    )
    group.add_argument("--seeds", type=seed_list, metavar="LIST", help="seeds, such as 0,5,10-19")
    group.add_argument("--seed", type=int, metavar="N", help="the first of consecutive seeds (0)")
    group.add_argument("--per-class", type=positive, metavar="K", help="how many of them (10)")
    group.add_argument(
        "--sheet",
        type=sheet_size,
        metavar="ROWSxCOLUMNS",
        help="as many classes and seeds; in a folder, also draws sheet.png",
    )
    add_sampling(parser)
    group = parser.add_argument_group("pictures")
    group.add_argument(
        "--stages",
        action="store_true",
        help="also write the state in which each stage but the last ended, as "
        "NAME-stage1.png ..: smaller and partly noise, enlarged to fit",
    )
    group.add_argument(
        "--strip",
        action="store_true",
        help="also write the first image of each row from stage to stage, as NAME-strip.png",
    )
    group.add_argument("--names", action="store_true", help="write the classes next to the rows")
    group.add_argument(
        "--scale",
        type=positive,
        default=1,
        metavar="K",
        help="enlarge each image K times, nearest neighbour",
    )
    add_device(parser)
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="of the weights and the network calls; the state is always float32",
    )
    parser.add_argument(
        "--batch-size",
        type=positive,
        default=100,
        metavar="N",
        help="images drawn at once; changes no image (100)",
    )
    parser.add_argument("--no-progress", action="store_true", help="show no progress bar")


@dataclass(frozen=True)
class Grid:
    """The images to draw: ``classes`` down, ``seeds`` across."""

    classes: list[int]
    seeds: list[int]

    @property
    def pairs(self) -> list[tuple[int, int]]:
        return [(number, seed) for number in self.classes for seed in self.seeds]


def run(arguments: argparse.Namespace) -> None:
    output = Path(arguments.output)
    to_folder = output.is_dir() or not output.suffix or arguments.output.endswith(os.sep)
    if to_folder:
        check_output_folder(output if output.exists() else output.parent)
    else:
        check_output_file(output)
    device = chosen_device(arguments.device)
    pipe = ECARPipeline.from_pretrained(arguments.checkpoint)
    pipe.to(device, getattr(torch, arguments.dtype))
    grid = choose_grid(arguments, pipe)
    stages = pipe.model.config.num_stages
    settings = merge_settings(pipe.defaults, chosen_settings(arguments), stages)
    with chosen_backend(arguments.backend):
        backends = describe_backends(pipe.model.config, pipe.device, pipe.dtype)
        begin = time.perf_counter()
        images, ends = draw(pipe, grid, arguments, settings)
        seconds = time.perf_counter() - begin
    names = row_names(pipe, grid) if arguments.names else None
    sheet, shown = output, ends if arguments.stages else []
    if to_folder:
        output.mkdir(exist_ok=True)
        sheet = output / "sheet.png"
        written = write_folder(output, grid, images, shown, arguments, names)
    else:
        written = write_sheets(output, grid, images, shown, arguments.scale, names)
    if arguments.strip:
        write_strip(sheet, grid, images, ends, arguments.scale, names)
    count = len(grid.pairs)
    print(written)
    print(f"{seconds / count:.3g} s per image ({count} images in {seconds:.3g} s on {pipe.device})")
    print(f"backends: {backends}")


def choose_grid(arguments: argparse.Namespace, pipe: ECARPipeline) -> Grid:
    """Classes and seeds from --classes, --seeds, --seed, --per-class and --sheet."""
    count = pipe.model.config.num_classes
    rows, columns = arguments.sheet or (None, None)
    if arguments.classes is not None:
        classes = pipe.classes.numbers(arguments.classes)
        if rows not in (None, len(classes)):
            raise UsageError(
                f"--classes: expected {rows} classes for the rows of the sheet, got {len(classes)}"
            )
    elif rows is not None and rows > count:
        raise UsageError(f"--sheet: expected at most {count} rows, one for each class, got {rows}")
    else:
        classes = list(range(rows or min(DEFAULT_ROWS, count)))
    if arguments.seeds is not None:
        if arguments.seed is not None or arguments.per_class is not None:
            raise UsageError("--seeds: lists all seeds; --seed and --per-class do not go with it")
        seeds = draw_seeds(arguments.seeds, None, len(arguments.seeds))
        if columns not in (None, len(seeds)):
            raise UsageError(
                f"--seeds: expected {columns} seeds for the columns of the sheet, got {len(seeds)}"
            )
    else:
        if None not in (columns, arguments.per_class) and columns != arguments.per_class:
            raise UsageError(
                f"--per-class: expected {columns}, the columns of the sheet, got "
                f"{arguments.per_class}"
            )
        first = arguments.seed or 0
        seeds = list(range(first, first + (columns or arguments.per_class or DEFAULT_COLUMNS)))
    return Grid(classes, seeds)


def draw(
    pipe: ECARPipeline, grid: Grid, arguments: argparse.Namespace, settings: dict[str, Any]
) -> tuple[list[Image], list[list[Image]]]:
    """All images of the grid, and of each stage but the last its end states."""
    size, pairs = arguments.batch_size, grid.pairs
    batches = [pairs[first : first + size] for first in range(0, len(pairs), size)]
    stage_count = pipe.model.config.num_stages
    total = len(batches) * sum(split_steps(settings["num_inference_steps"], stage_count))
    images: list[Image] = []
    kept = arguments.stages or arguments.strip
    stages: list[list[Image]] = [[] for _ in range(stage_count - 1)] if kept else []
    with tqdm(
        total=total, desc=f"{len(pairs)} images", unit="step", disable=arguments.no_progress
    ) as bar:

        def step_done(*_: Any) -> None:
            bar.update()

        for batch in batches:
            classes, seeds = zip(*batch, strict=True)
            output = pipe(
                list(classes),
                seeds=list(seeds),
                return_stages=kept,
                progress=False,
                callback_on_step_end=step_done,
                **settings,
            )
            images += output.images
            for stage, ends in zip(stages, output.stage_images or [], strict=False):
                stage += ends
    return images, stages


def row_names(pipe: ECARPipeline, grid: Grid) -> list[str]:
    """The classes by name, or by number where they have none."""
    names = pipe.class_names
    return [str(number) if names is None else names[number] for number in grid.classes]


def write_strip(
    path: Path,
    grid: Grid,
    images: list[Image],
    stages: list[list[Image]],
    scale: int,
    names: list[str] | None,
) -> None:
    """Each row's first image, at the left as stage 1 ended and at the right done."""
    cells = [
        ends[first].resize(images[0].size, Resampling.NEAREST)
        for first in range(0, len(images), len(grid.seeds))
        for ends in (*stages, images)
    ]
    sheet = make_sheet(cells, len(grid.classes), len(stages) + 1, PADDING, scale, names)
    save_image(sheet, path.with_name(f"{path.stem}-strip{path.suffix}"))


def write_sheets(
    path: Path,
    grid: Grid,
    images: list[Image],
    stages: list[list[Image]],
    scale: int,
    names: list[str] | None = None,
) -> Path:
    """The sheet, and beside it one of each stage; a lone image gets no frame."""
    rows, columns = len(grid.classes), len(grid.seeds)
    padding = PADDING if rows * columns > 1 else 0
    for stage, ends in enumerate(stages, start=1):
        enlarged = scale * (images[0].width // ends[0].width)
        sheet = make_sheet(ends, rows, columns, padding, enlarged, names)
        save_image(sheet, path.with_name(f"{path.stem}-stage{stage}{path.suffix}"))
    return save_image(make_sheet(images, rows, columns, padding, scale, names), path)


def write_folder(
    folder: Path,
    grid: Grid,
    images: list[Image],
    stages: list[list[Image]],
    arguments: argparse.Namespace,
    names: list[str] | None,
) -> Path:
    """One file for each image and end state, and the sheet if one was asked for."""
    for index, (number, seed) in enumerate(grid.pairs):
        path = folder / f"{index:05d}-class{number}-seed{seed}.png"
        one = Grid([number], [seed])
        ends = [[stage[index]] for stage in stages]
        write_sheets(path, one, [images[index]], ends, arguments.scale)
    if arguments.sheet:
        write_sheets(folder / "sheet.png", grid, images, stages, arguments.scale, names)
    return folder
