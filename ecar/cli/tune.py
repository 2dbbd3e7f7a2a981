"""`ecar tune`: measure the Triton kernels' launch settings on this machine's GPU.

Each op is timed under every setting worth trying, for the shapes of models and batches; then
attention by each backend that is installed. The fastest are kept in a file for this kind of GPU,
which later runs read; without one the settings come from rules. Nothing else is changed, and
nothing is measured at any other time.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import torch

from ecar.cli.parser import UsageError, positive
from ecar.cli.runtime import chosen_device
from ecar.config import PRESETS, ECARConfig
from ecar_kernels import tune, tuning

EXAMPLES = """\
examples:
  ecar tune --preset S
      E-CAR-S in bfloat16 at 1, 8 and 64 images
  ecar tune --width 1024 --rows 256 4096 --dtype float32
      the adaLN ops and fused GEMMs of another model
  ecar tune --list --preset L --batch 1
      what the rules choose for E-CAR-L's fused GEMMs without being measured; needs no GPU
"""
FLAGS: dict[str, str] = {}
DTYPES = ("bfloat16", "float16", "float32")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--preset", nargs="+", choices=tuple(PRESETS), help="models (default: S B L)"
    )
    parser.add_argument(
        "--batch",
        nargs="+",
        type=positive,
        default=[1, 8, 64],
        metavar="N",
        help="images at once; guidance doubles them (default: 1 8 64)",
    )
    parser.add_argument(
        "--width",
        nargs="+",
        type=positive,
        metavar="C",
        help="channels instead of a preset's; needs --rows, leaves attention out",
    )
    parser.add_argument(
        "--rows", nargs="+", type=positive, metavar="N", help="tokens of all images at once"
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="bfloat16", help="of the tensors (default: bfloat16)"
    )
    parser.add_argument(
        "--device", default="cuda", metavar="DEVICE", help="cuda, cuda:1, .. (default: cuda)"
    )
    parser.add_argument(
        "--list",
        action="store_true",
        help="measure nothing: print the fused GEMMs' usual settings and expected times",
    )
    parser.add_argument(
        "--output",
        metavar="FILE.json",
        help="adds the choices (default: in $ECAR_TUNED, else ~/.cache/ecar/tuned)",
    )


def run(arguments: argparse.Namespace) -> None:
    if (arguments.width is None) != (arguments.rows is None):
        raise UsageError("--width and --rows: expected both or neither")
    if arguments.width is not None and arguments.preset is not None:
        raise UsageError("--preset: not allowed with --width and --rows")
    if arguments.list:
        _list(arguments)
        return
    if (reason := tune.why_not()) is not None:
        raise UsageError(f"nothing can be measured here: {reason}")
    device = chosen_device(arguments.device)
    if device.type != "cuda":
        raise UsageError(f"--device: expected a CUDA device, got {arguments.device!r}")
    with tune.measuring(device):
        _measure(arguments, device)


def _list(arguments: argparse.Namespace) -> None:
    device = str(chosen_device(arguments.device)) if torch.cuda.is_available() else None
    dtype = getattr(torch, arguments.dtype)
    # Of a block alone: a shape's stages are attention's.
    shapes = [dataclasses.replace(its, stages=(), heads=1) for its in _shapes(arguments)]
    for width, same in itertools.groupby(dict.fromkeys(shapes), key=lambda its: its.width):
        print(f"width {width}")
        for shape in same:
            print("\n".join(tune.listed(shape, dtype, device)))


def _measure(arguments: argparse.Namespace, device: torch.device) -> None:
    name = torch.cuda.get_device_name(device)
    path = Path(arguments.output or tuning.user_folder() / tuning.file_name(name))
    kept = {_place(entry): entry for entry in tuning.entries(path, name)}
    done: set[tuple] = set()
    for problems in _problems(arguments, device):
        for problem in problems:
            if (problem.op, problem.key, problem.rows) in done:
                continue
            done.add((problem.op, problem.key, problem.rows))
            choice = tune.measure(problem)
            entry = choice.entry()
            kept[_place(entry)] = entry
            print(_line(choice), flush=True)
        # After each group, so that an interrupted run has not been in vain.
        tuning.write(
            path,
            name,
            list(kept.values()),
            torch=torch.__version__,
            triton=_triton_version(),
            date=datetime.date.today().isoformat(),
        )
        tuning.forget()  # backends are measured under the launch settings found
    print(f"{path}: {len(done)} choices measured, {len(kept)} in all")


def _problems(arguments: argparse.Namespace, device: torch.device) -> Iterator[list[tune.Problem]]:
    """Groups of them, one at a time: each holds its tensors."""
    dtype, where = getattr(torch, arguments.dtype), str(device)
    for of in ("launches", "backends"):
        for shape in _shapes(arguments):
            yield tune.problems(shape, dtype, device=where, of=of)


def _shapes(arguments: argparse.Namespace) -> Iterator[tune.Shape]:
    if arguments.width is not None:
        for width in arguments.width:
            for rows in arguments.rows:
                yield tune.Shape(width, 4 * width, rows)
        return
    for preset in arguments.preset or ("S", "B", "L"):
        config = ECARConfig.preset(preset)
        hidden, tokens = int(config.mlp_ratio * config.width), config.stage_tokens
        for batch in arguments.batch:
            for stage, count in enumerate(tokens):  # sampling: each after those before it
                stages = tokens[: stage + 1]
                yield tune.Shape(config.width, hidden, count, batch, stages, config.heads)
            count = config.num_tokens  # training: all at once
            yield tune.Shape(config.width, hidden, count, batch, tokens, config.heads)


def _place(entry: dict) -> str:
    return json.dumps([entry["op"], entry["key"], entry["rows"]])


def _line(choice: tune.Choice) -> str:
    problem = choice.problem
    said = (
        f"{problem.op} {' '.join(map(str, problem.key))}, {problem.rows} rows: {_backend(choice)}"
        f"{1e6 * choice.seconds:.2f} us, usual {1e6 * choice.usual_seconds:.2f} us; "
        f"{choice.tried} tried"
    )
    return f"{said}, {choice.wrong} left out" if choice.wrong else said


def _backend(choice: tune.Choice) -> str:
    """The name, where that is what was chosen."""
    return f"{choice.settings.backend}, " if hasattr(choice.settings, "backend") else ""


def _triton_version() -> str:
    import triton

    return triton.__version__
