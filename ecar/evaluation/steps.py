"""The error of solvers, grids and splits of steps, measured for a checkpoint.

    report = sweep_steps("checkpoints/mnist")
    write_best("checkpoints/mnist", best_row(report, 30))

The error of a setting is the root mean square distance of its final latents to those of the same
classes and seeds on their converged trajectories, over the root mean square of the latter. It is
the solver's error alone: what the model has not learned is on both sides.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import itertools
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ecar.checkpoint import PIPELINE_FILE, complete_settings, merge_settings, read_settings
from ecar.config import ECARConfig
from ecar.files import weights_sha256, write_json
from ecar.model import ECAR
from ecar.pipeline import ECARPipeline
from ecar.sampling import SOLVERS
from ecar.sampling.guidance import (
    DEFAULT_GRID,
    PAPER_GRID,
    PAPER_SOLVER,
    geometric_split,
    split_steps,
)
from ecar.sampling.solver import Grid

from .provenance import device_name, versions
from .sampling import as_pipeline, image_seeds, require_positive

__all__ = ["best_row", "frontier", "sweep_steps", "write_best"]

CALLS = (8, 12, 18, 24, 30, 40, 60)
GRIDS = (1.0, 1.25, 1.5, 1.6, 1.75, 2.0)
RATIOS = (1.0, 0.75, 0.6, 0.45)  # steps of a stage over those of the one before
CALLS_A_STEP = {name: 2 if name == "heun" else 1 for name in SOLVERS}
# A trajectory is converged where twice the steps move its end by no more than this share.
CONVERGED = 0.005
FIRST_STEPS, MOST_STEPS = 32, 1024  # of each stage, by Heun's method
TIMED_SECONDS, LEAST_ROUNDS = 20.0, 3
# Of settings whose errors are this near to the least, the cheapest is the best.
NEAR = 1.05


class Setting(NamedTuple):
    """What is measured."""

    solver: str
    grid: Grid
    steps: tuple[int, ...]  # of each stage

    @property
    def calls(self) -> int:
        return sum(self.steps) * CALLS_A_STEP[self.solver]

    def tokens(self, config: ECARConfig) -> int:
        """Network calls times the tokens of their stage."""
        pairs = zip(self.steps, config.stage_tokens, strict=True)
        return sum(count * tokens for count, tokens in pairs) * CALLS_A_STEP[self.solver]


def sweep_steps(
    source: ECARPipeline | ECAR | str | os.PathLike[str],
    *,
    calls: Sequence[int] = CALLS,
    images: int = 64,
    first_seed: int = 0,
    batch_size: int = 64,
    device: str | torch.device | None = None,
    progress: bool = True,
    **guidance: Any,
) -> dict[str, Any]:
    """Measure every solver on every grid, with every split of every number of network calls.

    A grid is an exponent out of ``GRIDS``; steps are split so that each stage has a ratio out of
    ``RATIOS`` times those of the stage before. Converged is Heun's method with as many steps as
    it takes until twice as many move the latents by no more than ``CONVERGED``.

    Args:
        source: a pipeline, a model, or a checkpoint's folder.
        calls: numbers of network calls, each at least the number of stages.
        images: whose errors are averaged; their classes are spread over all there are.
        first_seed: image i has seed first_seed + i.
        batch_size: images drawn at once; changes no error beyond rounding.
        device: where to sample; None leaves the source where it is.
        guidance: guidance_scale, guidance_schedule, guidance_interval; by default the pipeline's.

    Returns: {"rows": [..], "paper": row, "protocol": ..}, all of it JSON. A row is a setting,
        {"solver", "grid", "steps" of each stage, "calls", "calls_x_tokens", "error",
        "standard_error" (over images), "seconds" (of one image alone, the median of interleaved
        rounds)}. The rows are those of the frontier (see ``frontier``), and of each solver and
        number of calls the one with the least error; "paper" is the paper's protocol.

    Raises:
        TypeError, ValueError: naming the argument; also where the trajectories do not converge.
    """
    require_positive("images", images)
    require_positive("batch_size", batch_size)
    image_seeds(first_seed, images)
    for number in calls:
        require_positive("calls", number)
    if unknown := sorted(name for name in guidance if not name.startswith("guidance_")):
        raise TypeError(f"argument {unknown[0]!r}: expected guidance_scale, _schedule or _interval")
    if isinstance(source, (str, os.PathLike)):
        source = ECARPipeline.from_pretrained(source)
    with as_pipeline(source) as pipeline:
        if device is not None:
            pipeline.to(device)
        config = pipeline.model.config
        if not calls or min(calls) < config.num_stages:
            raise ValueError(
                f"argument 'calls': expected numbers of at least {config.num_stages}, one call for "
                f"each stage, got {list(calls)}"
            )
        settings = merge_settings(pipeline.defaults, guidance, config.num_stages)
        guidance = {name: settings[name] for name in settings if name.startswith("guidance_")}
        sweep = Sweep(pipeline, images, first_seed, batch_size, guidance, progress)
        paper = Setting(PAPER_SOLVER, PAPER_GRID, tuple(split_steps("paper", config.num_stages)))
        chosen = candidates(config.num_stages, calls)
        paper_row, *rows = sweep.measure([paper, *chosen])
        kept = _shown(rows)
        sweep.time([paper_row, *kept])
        return {
            "rows": kept,
            "paper": paper_row,
            "protocol": {
                "error": "RMS distance of the final latents to the converged ones, over their RMS",
                "converged": sweep.reference_facts,
                "images": images,
                "seeds": [first_seed, first_seed + images - 1],
                "guidance": guidance,
                "tried": {
                    "solvers": list(SOLVERS),
                    "grids": list(GRIDS),
                    "ratios": list(RATIOS),
                    "calls": sorted(set(calls)),
                    "settings": len(chosen),
                },
                "stage_tokens": list(config.stage_tokens),
                "weights_sha256": weights_sha256(pipeline.model),
                "dtype": str(pipeline.dtype),
                "device": device_name(pipeline.device),
                "threads": torch.get_num_threads(),
                "versions": versions(),
                "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            },
        }


def candidates(num_stages: int, calls: Sequence[int]) -> list[Setting]:
    """All settings that are tried, each once."""
    found = [
        Setting(solver, grid, tuple(geometric_split(number, num_stages, ratio)))
        for solver in SOLVERS
        for number in sorted({most // CALLS_A_STEP[solver] for most in calls})
        if number >= num_stages
        for grid in GRIDS
        for ratio in RATIOS
    ]
    return list(dict.fromkeys(found))


def frontier(rows: Sequence[dict[str, Any]], cost: str = "calls_x_tokens") -> list[dict[str, Any]]:
    """The rows than which none is both cheaper and better, the cheapest first."""
    found: list[dict[str, Any]] = []
    for row in sorted(rows, key=lambda row: (row[cost], row["error"])):
        if not found or row["error"] < found[-1]["error"]:
            found.append(row)
    return found


def best_row(report: dict[str, Any], calls: int) -> dict[str, Any]:
    """The best setting of at most ``calls`` network calls: of those whose error is within 5 % of
    the least, the one with the fewest calls x tokens.

    Raises:
        ValueError: the sweep had none with so few.
    """
    rows = [row for row in report["rows"] if row["calls"] <= calls]
    if not rows:
        least = min(row["calls"] for row in report["rows"])
        raise ValueError(f"argument 'calls': expected at least {least}, got {calls}")
    limit = NEAR * min(row["error"] for row in rows)
    near = [row for row in rows if row["error"] <= limit]
    return min(near, key=lambda row: (row["calls_x_tokens"], row["error"]))


def write_best(checkpoint: str | os.PathLike[str], row: dict[str, Any]) -> Path:
    """Make a row's solver, grid and steps the defaults in a checkpoint's pipeline.json.

    Everything else in the file stays, and it is replaced whole or not at all.

    Returns: its path.

    Raises:
        OSError: the folder is missing, or the file can't be written.
        ValueError: the file holds something else, or the checkpoint has other stages.
    """
    folder = Path(checkpoint)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"checkpoint {os.fspath(checkpoint)!r}: no such folder; only a local one is written"
        )
    settings = read_settings(folder)
    chosen = {"num_inference_steps": row["steps"], "solver": row["solver"], "grid": row["grid"]}
    defaults = {**(settings.get("defaults") or {}), **chosen}
    complete_settings(defaults, len(row["steps"]))
    path = folder / PIPELINE_FILE
    write_json(path, {**settings, "defaults": defaults})
    return path


def _shown(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What a report keeps: the frontier, and the best of each solver with each number of calls;
    in the order of their calls."""
    groups: dict[Any, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["solver"], row["calls"]), []).append(row)
    best = [min(group, key=lambda row: row["error"]) for group in groups.values()]
    # The cheapest within reach of the least error, of any number of calls that is a limit.
    limits = sorted({row["calls"] for row in rows})
    best += [best_row({"rows": rows}, limit) for limit in limits]
    kept = {id(row) for row in (*frontier(rows), *best)}
    return sorted(
        (row for row in rows if id(row) in kept),
        key=lambda row: (row["calls"], row["calls_x_tokens"], row["error"]),
    )


class Sweep:
    """The images, drawn with one setting after another."""

    def __init__(
        self,
        pipeline: ECARPipeline,
        images: int,
        first_seed: int,
        batch_size: int,
        guidance: dict[str, Any],
        progress: bool,
    ) -> None:
        self.pipeline, self.guidance, self.progress = pipeline, guidance, progress
        self.config = pipeline.model.config
        classes = self.config.num_classes
        labels = torch.arange(images) % classes
        if classes > images:
            labels = torch.linspace(0, classes - 1, images).round().long()
        seeds = image_seeds(first_seed, images)
        self.batches = list(zip(labels.split(batch_size), seeds.split(batch_size), strict=True))
        self.reference, self.reference_facts = self._converged()

    def draw(self, setting: Setting, done: Callable[[], object] = lambda: None) -> Tensor:
        """Latents [N, C, H, W], float32 on the CPU. done: called after each batch."""
        latents = []
        for labels, seeds in self.batches:
            latents.append(self._latents(setting, labels, seeds).cpu())
            done()
        return torch.cat(latents)

    def _latents(self, setting: Setting, labels: Tensor, seeds: Tensor) -> Tensor:
        return self.pipeline(
            labels,
            list(setting.steps),
            solver=setting.solver,
            grid=setting.grid,
            seeds=seeds,
            output_type="latent",
            progress=False,
            **self.guidance,
        ).images

    def _converged(self) -> tuple[Tensor, dict[str, Any]]:
        steps, stages = FIRST_STEPS, self.config.num_stages
        before, moved = None, math.inf
        with _without_graphs(self.pipeline), self._bar("converging") as bar:
            while steps <= MOST_STEPS:
                bar.set_postfix_str(f"{steps} Heun steps a stage")
                found = self.draw(Setting("heun", DEFAULT_GRID, (steps,) * stages))
                if before is not None:
                    moved = relative_distance(before, found)
                    if moved <= CONVERGED:
                        facts = {"solver": "heun", "grid": DEFAULT_GRID, "steps_of_a_stage": steps}
                        return found, {**facts, "moved_by_the_last_doubling": moved}
                before, steps = found, 2 * steps
        raise ValueError(
            "argument 'source': expected trajectories that converge; from "
            f"{MOST_STEPS // 2} to {MOST_STEPS} Heun steps a stage they still move by {moved:.2%}"
        )

    def measure(self, settings: Sequence[Setting]) -> list[dict[str, Any]]:
        """Each setting's row, without seconds."""
        rows = []
        work = [setting.tokens(self.config) for setting in settings]
        norm = _square(self.reference).mean()
        with (
            _without_graphs(self.pipeline),
            self._bar("measuring errors", total=sum(work) * len(self.batches)) as bar,
        ):
            for setting, tokens in zip(settings, work, strict=True):
                bar.set_postfix_str(f"{setting.calls} calls of {setting.solver}", refresh=False)
                latents = self.draw(setting, functools.partial(bar.update, tokens))
                squares = _square(latents - self.reference)
                error = (squares.mean() / norm).sqrt().item()
                # Of the mean of squares, over images, by the root's derivative.
                spread = squares.std().item() / math.sqrt(len(squares)) if len(squares) > 1 else 0.0
                rows.append(
                    {
                        "solver": setting.solver,
                        "grid": setting.grid,
                        "steps": list(setting.steps),
                        "calls": setting.calls,
                        "calls_x_tokens": tokens,
                        "error": error,
                        "standard_error": spread / norm.item() / (2 * error) if error else 0.0,
                    }
                )
        return rows

    def time(self, rows: Sequence[dict[str, Any]]) -> None:
        """Add each row's seconds: of one image alone, medians of rounds in which all take turns;
        at least ``LEAST_ROUNDS``, and more for ``TIMED_SECONDS``."""
        taken: list[list[float]] = [[] for _ in rows]
        settings = [Setting(row["solver"], row["grid"], tuple(row["steps"])) for row in rows]
        labels, seeds = (part[:1] for part in self.batches[0])
        end = math.inf
        with self._bar("measuring seconds") as bar:
            for turn in itertools.count():
                if turn == 1:  # the first warmed up
                    end = time.perf_counter() + TIMED_SECONDS
                if turn > LEAST_ROUNDS and time.perf_counter() > end:
                    break
                bar.set_postfix_str(f"round {turn} of {len(rows)} settings")
                for setting, times in zip(settings, taken, strict=True):
                    begin = time.perf_counter()
                    self._latents(setting, labels, seeds).cpu()
                    times.append(time.perf_counter() - begin)
        for row, times in zip(rows, taken, strict=True):
            row["seconds"] = statistics.median(times[1:])

    def _bar(self, title: str, total: int | None = None) -> tqdm:
        form = "{desc}: {elapsed}{postfix}"
        if total is not None:
            form = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"
        return tqdm(total=total, desc=title, bar_format=form, disable=not self.progress)


def relative_distance(latents: Tensor, exact: Tensor) -> float:
    """Root mean square distance of latents [N, C, H, W], over the root mean square of the exact
    ones."""
    return (_square(latents - exact).mean() / _square(exact).mean()).sqrt().item()


def _square(x: Tensor) -> Tensor:
    """The mean square of each image, [N], float64."""
    return x.double().square().flatten(1).mean(1)


@contextlib.contextmanager
def _without_graphs(pipeline: ECARPipeline) -> Iterator[None]:
    """A block in which no CUDA graph is captured: each would draw but a few times."""
    before, pipeline.graphs = pipeline.graphs, False
    try:
        yield
    finally:
        pipeline.graphs = before
