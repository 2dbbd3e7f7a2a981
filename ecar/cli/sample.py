"""`ecar sample`: draw images, or a sheet of them, from a checkpoint.

--output is a picture (.png, .jpg, ..): one image, or a sheet with a row for each class. Or it is a
folder, which gets a PNG for each image as soon as it is drawn; images that are there already, of
the same weights and settings, are kept. Image k of class c has the seed SEED + k * (number of
classes) + c, and so noise of its own; --seeds gives each class the same.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from tqdm.auto import tqdm

from ecar.checkpoint import merge_settings
from ecar.cli.parser import (
    UsageError,
    add_checkpoint,
    add_device,
    add_dtype,
    add_sampling,
    class_list,
    positive,
    seed_list,
    sheet_size,
)
from ecar.cli.pictures import Cell, Grid, ImageFolder, write_sheets, write_strip
from ecar.cli.runtime import (
    SETTINGS,
    chosen_backend,
    chosen_dtype,
    chosen_settings,
    describe_backends,
    own_device,
    process_share,
)
from ecar.codec import AutoencoderKLCodec
from ecar.evaluation.provenance import describe_device
from ecar.files import weights_sha256
from ecar.images import check_output_file, check_output_folder
from ecar.inputs import draw_seeds
from ecar.pipeline import ECARPipeline
from ecar.sampling import split_steps
from ecar_kernels import __version__

EXAMPLES = """\
examples:
  ecar sample --checkpoint checkpoints/mnist --output digits.png
      a sheet: rows are the first ten classes, with ten images of each
  ecar sample --checkpoint runs/birds --classes 7,robin --seeds 3-6 --steps 20,40,80 \\
      --guidance 3 --stages --output birds/
      eight images in a folder, with the states in which their stages ended
  torchrun --nproc-per-node 8 -m ecar sample --checkpoint runs/imagenet --classes 0-999 \\
      --per-class 50 --output images/
      50,000 images by eight processes; the same command goes on after an interruption
"""
FLAGS = {
    "class_labels": "--classes",
    "seed": "--seed",
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_checkpoint(parser)
    parser.add_argument(
        "--output",
        default="samples.png",
        metavar="PATH",
        help="a picture, or a folder of pictures (default: samples.png)",
    )
    group = parser.add_argument_group("what to draw")
    group.add_argument(
        "--classes",
        type=class_list,
        metavar="LIST",
        help="numbers, ranges or names, such as 0-4,7,cat (default: the first ten)",
    )
    group.add_argument(
        "--per-class", type=positive, metavar="K", help="images of each class (default: 10)"
    )
    group.add_argument(
        "--seed",
        type=int,
        metavar="N",
        help="of the first image; all have noise of their own (default: 0)",
    )
    group.add_argument(
        "--seeds",
        type=seed_list,
        metavar="LIST",
        help="instead, the seeds of each class's images, such as 0,5,10-19",
    )
    group.add_argument(
        "--sheet",
        type=sheet_size,
        metavar="ROWSxCOLUMNS",
        help="as many classes and images of each; in a folder, also draws sheet.png",
    )
    add_sampling(parser)
    group = parser.add_argument_group("pictures")
    group.add_argument(
        "--stages",
        action="store_true",
        help="also write the states in which stages ended, as NAME-stage1.png",
    )
    group.add_argument(
        "--strip",
        action="store_true",
        help="also write each row's first image from stage to stage, NAME-strip.png",
    )
    group.add_argument("--names", action="store_true", help="write the classes next to the rows")
    group.add_argument(
        "--scale",
        type=positive,
        default=1,
        metavar="K",
        help="enlarge each image K times, nearest neighbour (default: 1)",
    )
    add_device(parser)
    add_dtype(parser, "float32")
    parser.add_argument(
        "--batch-size",
        type=positive,
        default=100,
        metavar="N",
        help="images drawn at once; changes no image (default: 100)",
    )
    parser.add_argument("--no-progress", action="store_true", help="show no progress bar")


def run(arguments: argparse.Namespace) -> None:
    output = Path(arguments.output)
    to_folder = output.is_dir() or not output.suffix or arguments.output.endswith(os.sep)
    if to_folder:
        check_output_folder(output)
    else:
        check_output_file(output)
    rank, processes = chosen_share(arguments, to_folder)
    device = own_device(arguments.device)
    pipe = ECARPipeline.from_pretrained(arguments.checkpoint)
    stages = pipe.model.config.num_stages
    settings = merge_settings(pipe.defaults, chosen_settings(arguments), stages)
    with chosen_backend(arguments.backend):
        dtype = chosen_dtype(arguments.dtype, device)
    grid = choose_grid(arguments, pipe, settings, dtype)
    pipe.to(device, dtype)
    folder = ImageFolder(output, grid, arguments.scale, stages if arguments.stages else 1)
    cells, there = grid.cells, 0
    with chosen_backend(arguments.backend):
        backends = describe_backends(pipe.model.config, pipe.device, pipe.dtype)
        begin = time.perf_counter()
        if to_folder:
            output.mkdir(parents=True, exist_ok=True)
            share = list(dict.fromkeys(cells))[rank::processes]
            cells = [cell for cell in share if not folder.has(cell)]
            there = len(share) - len(cells)
        images = []
        for cell, states in draw(pipe, cells, arguments, settings, quiet=rank > 0):
            if to_folder:
                folder.write(cell, states)
            else:
                images.append(states)
        seconds = time.perf_counter() - begin
    named, scale = arguments.names, arguments.scale
    if to_folder and (arguments.sheet or arguments.strip):
        images, scale = [folder.read(cell) for cell in grid.cells], 1
    sheet = output / "sheet.png" if to_folder else output
    if arguments.sheet or not to_folder:
        shown = images if arguments.stages else [states[-1:] for states in images]
        write_sheets(sheet, grid, shown, scale, named=named)
    if arguments.strip:
        write_strip(sheet, grid, images, scale, named=named)
    if rank == 0:
        share_of = f" by one of {processes} processes" if processes > 1 else ""
        print(output)
        print(
            f"{seconds / max(len(cells), 1):.3g} s per image ({len(cells)} images in "
            f"{seconds:.3g} s on {describe_device(pipe.device)}{share_of}, in "
            f"{str(dtype).removeprefix('torch.')}"
            + (f"; {there} were there already)" if there else ")")
        )
        print(f"backends: {backends}")


def chosen_share(arguments: argparse.Namespace, to_folder: bool) -> tuple[int, int]:
    """This process's rank and the number of processes, if they can draw what was given."""
    rank, processes = process_share()
    if processes > 1:
        if not to_folder:
            raise UsageError(f"--output: {processes} processes need a folder, not a picture")
        for flag, given in (("--sheet", arguments.sheet), ("--strip", arguments.strip)):
            if given:
                raise UsageError(
                    f"{flag}: is drawn by one process; once the images are there, call the same "
                    "command alone"
                )
    if to_folder and arguments.strip and not arguments.stages:
        raise UsageError("--strip: in a folder, it is drawn of what --stages writes")
    return rank, processes


def choose_grid(
    arguments: argparse.Namespace, pipe: ECARPipeline, settings: dict[str, Any], dtype: torch.dtype
) -> Grid:
    """Classes and seeds from --classes, --per-class, --seed, --seeds and --sheet."""
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
        seeds = [arguments.seeds] * len(classes)
        if columns not in (None, len(arguments.seeds)):
            raise UsageError(
                f"--seeds: expected {columns} seeds for the columns of the sheet, got "
                f"{len(arguments.seeds)}"
            )
    else:
        if None not in (columns, arguments.per_class) and columns != arguments.per_class:
            raise UsageError(
                f"--per-class: expected {columns}, the columns of the sheet, got "
                f"{arguments.per_class}"
            )
        first, per_class = arguments.seed or 0, columns or arguments.per_class or DEFAULT_COLUMNS
        seeds = [[first + k * count + number for k in range(per_class)] for number in classes]
    for row in seeds:  # are they int64?
        draw_seeds(row, None, len(row), name="seed" if arguments.seeds is None else "seeds")
    names = pipe.class_names or [str(number) for number in range(count)]
    return Grid(classes, seeds, list(names), describe(arguments, pipe, settings, dtype))


def describe(
    arguments: argparse.Namespace, pipe: ECARPipeline, settings: dict[str, Any], dtype: torch.dtype
) -> dict[str, str]:
    """What all images are drawn with, for the text of their PNGs."""
    text = {
        "Software": f"ecar {__version__}",
        "checkpoint": arguments.checkpoint,
        "weights": weights_sha256(pipe.model),
        "dtype": str(dtype).removeprefix("torch."),
    }
    if isinstance(pipe.codec, AutoencoderKLCodec):
        text["vae"] = weights_sha256(pipe.codec.vae)
    return text | {flag: json.dumps(settings[name]) for name, flag in SETTINGS.items()}


def draw(
    pipe: ECARPipeline,
    cells: list[Cell],
    arguments: argparse.Namespace,
    settings: dict[str, Any],
    *,
    quiet: bool,
) -> Iterator[tuple[Cell, list[Image]]]:
    """Each image's class and seed, and the states in which its stages ended, or the last alone."""
    size = arguments.batch_size
    batches = [cells[first : first + size] for first in range(0, len(cells), size)]
    stages = pipe.model.config.num_stages
    total = len(batches) * sum(split_steps(settings["num_inference_steps"], stages))
    with tqdm(
        total=total,
        desc=f"{len(cells)} images",
        unit="step",
        disable=quiet or arguments.no_progress,
    ) as bar:

        def step_done(*_: Any) -> None:
            bar.update()

        for batch in batches:
            output = pipe(
                [number for number, _ in batch],
                seeds=[seed for _, seed in batch],
                return_stages=arguments.stages or arguments.strip,
                progress=False,
                callback_on_step_end=step_done,
                **settings,
            )
            ends = (output.stage_images or [output.images])[:-1]
            yield from zip(batch, map(list, zip(*ends, output.images, strict=True)), strict=True)
