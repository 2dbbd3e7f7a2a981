"""`ecar steps`: measure how a checkpoint's error depends on the solver and its steps.

Every solver is tried on several grids, with several splits of several numbers of network calls
over the stages. The error is the distance of the images to the exact ones (the same seeds on their
converged trajectories), relative to their size; it says how well the model's own equation is
solved, not how good the model is. --write makes the best setting the checkpoint's default.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ecar.cli.parser import UsageError, add_checkpoint, add_device, add_guidance, positive
from ecar.cli.runtime import chosen_backend, chosen_device, chosen_settings
from ecar.evaluation.chart import draw_steps
from ecar.evaluation.provenance import describe_device
from ecar.evaluation.steps import CALLS, best_row, frontier, sweep_steps, write_best
from ecar.files import check_output_folder, check_target, write_json
from ecar.pipeline import ECARPipeline

EXAMPLES = """\
examples:
  ecar steps --checkpoint runs/birds
      the best settings of 8 to 60 calls, and the paper's 250
  ecar steps --checkpoint runs/birds --calls 24 --picture steps.svg --write
      also a picture, and the best of at most 24 calls as the checkpoint's default
"""
FLAGS = {
    "calls": "--calls",
    "images": "--images",
    "batch_size": "--batch-size",
    "first_seed": "--seed",
    "source": "--checkpoint",
    "picture": "--picture",
    "guidance_scale": "--guidance",
    "guidance_schedule": "--guidance-schedule",
    "guidance_interval": "--guidance-interval",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_checkpoint(parser)
    parser.add_argument(
        "--calls",
        type=positive,
        default=30,
        metavar="N",
        help="network calls that the best setting may have at most (default: 30)",
    )
    parser.add_argument(
        "--write",
        action="store_true",
        help="make the best setting the default in the checkpoint's pipeline.json",
    )
    parser.add_argument(
        "--images",
        type=positive,
        default=64,
        metavar="N",
        help="whose errors are averaged (default: 64)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="of the first image; image i has seed N + i (default: 0)",
    )
    parser.add_argument(
        "--batch-size",
        type=positive,
        default=64,
        metavar="N",
        help="images drawn at once (default: 64)",
    )
    parser.add_argument("--output", metavar="FILE", help="write the report as JSON")
    parser.add_argument(
        "--picture", metavar="FILE", help="draw error against calls x tokens and seconds (.svg)"
    )
    add_guidance(parser)
    add_device(parser)
    parser.add_argument("--no-progress", action="store_true", help="show no progress bar")


def run(arguments: argparse.Namespace) -> None:
    for path in filter(None, (arguments.output, arguments.picture)):
        check_output_folder(Path(path).parent)
        check_target(path)
    if arguments.picture is not None and Path(arguments.picture).suffix != ".svg":
        raise UsageError(f"--picture: expected a name that ends in .svg, got {arguments.picture}")
    if arguments.write and not Path(arguments.checkpoint).is_dir():
        raise UsageError(f"--write: expected a local folder, got {arguments.checkpoint}")
    pipe = ECARPipeline.from_pretrained(arguments.checkpoint)
    with chosen_backend(arguments.backend):
        report = sweep_steps(
            pipe,
            calls=sorted({*CALLS, arguments.calls}),
            images=arguments.images,
            first_seed=arguments.seed,
            batch_size=arguments.batch_size,
            device=chosen_device(arguments.device),
            progress=not arguments.no_progress,
            **chosen_settings(arguments),
        )
    best = best_row(report, arguments.calls)
    print(describe(report, best))
    print(f"drawn on {describe_device(pipe.device)}")
    if arguments.output is not None:
        write_json(arguments.output, {"checkpoint": Path(arguments.checkpoint).name, **report})
        print(arguments.output)
    if arguments.picture is not None:
        title = f"{Path(arguments.checkpoint).name}: error of the solver, by its cost"
        print(draw_steps(report, arguments.picture, best, title))
    if arguments.write:
        print(write_best(arguments.checkpoint, best))


def describe(report: dict[str, Any], best: dict[str, Any]) -> str:
    """The frontier, the paper's protocol and the best setting, as a table."""
    columns = ("calls", "solver", "grid", "steps", "calls x tokens", "error", "seconds")
    widths = (6, 8, 6, 16, 16, 19, 10)
    lines = ["".join(name.rjust(width) for name, width in zip(columns, widths, strict=True))]
    rows = frontier(report["rows"])
    rows += [row for row in (best,) if row not in rows]
    for row in (*sorted(rows, key=lambda row: row["calls"]), report["paper"]):
        cells = (
            str(row["calls"]),
            row["solver"],
            f"{row['grid']:g}",
            " + ".join(map(str, row["steps"])),
            f"{row['calls_x_tokens']:,}",
            f"{row['error']:.4f} +- {row['standard_error']:.4f}",
            f"{row['seconds']:.3g}",
        )
        line = "".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
        mark = {id(best): "  best", id(report["paper"]): "  the paper's"}.get(id(row), "")
        lines.append(f"{line}{mark}")
    protocol = report["protocol"]
    exact = protocol["converged"]
    lines.append(
        f"errors of {protocol['images']} images against {exact['steps_of_a_stage']} Heun steps a "
        f"stage, which half as many are {exact['moved_by_the_last_doubling']:.2%} from"
    )
    lines.append(
        f"of {protocol['tried']['settings']} settings; seconds of one image alone on "
        f"{protocol['device']}"
    )
    return "\n".join(lines)
