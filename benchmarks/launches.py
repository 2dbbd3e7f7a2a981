"""Kernels that sampling launches on an H100, counted without one; fails if a count has risen.

Then what an image should take on each chip of `ecar_kernels.costs.CHIPS`, accelerated and without
guidance: each launch's bytes, multiply-adds and waves of programs, at published rates
(`costs.expected_seconds`). It is a prediction; no GPU has been measured against it yet.

E-CAR-S, B and L in bfloat16, one image, plain and accelerated, with guidance and without, by
Euler's method and by ab2: a step and the AR transformer at each stage, and an image of the paper's
250 steps. The model runs on a fake GPU (tools.fake_gpu): a launch is one of Triton's, an op of
torch (taken for one kernel), or one of the CUDA C++ library's (one kernel each).
"""

import itertools
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

import ecar_kernels
from benchmarks import commands, results
from benchmarks.results import duration, table
from ecar import ECAR, ECARConfig, split_steps
from ecar.sampling import loop
from ecar.sampling.guidance import DEFAULT_SOLVER, DEFAULT_STEPS, PAPER, PAPER_SOLVER, PAPER_STEPS
from ecar.sampling.plain import PlainEngine
from ecar.sampling.stage import Inputs, Shape
from ecar.transformer import KVCache
from ecar_kernels import _native, costs

RESULTS = results.FOLDER / "launches.json"
SIZES = ("S", "B", "L")
SOLVERS = ("euler", "ab2")  # of one network call a step
KINDS = ("triton", "c++", "aten", "copy")
TARGET = {"S": 11, "B": 21, "L": 31}  # launches of a step, at most: 5 a block and the boundary
COUNTED = 3  # steps of a stage: the second is as all are between the first and the last
SETTINGS = {
    f"{PAPER_STEPS} Euler steps": (PAPER, PAPER_SOLVER),
    "default": (DEFAULT_STEPS, DEFAULT_SOLVER),
}
Row = dict[str, Any]


def _draw(
    gpu: Any,
    size: str,
    *,
    accelerated: bool,
    guided: bool,
    solver: str,
    images: int = 1,
    **changes: Any,
) -> tuple[ECAR, Inputs, list[Any], list[list[Any]]]:
    """A model on the fake GPU and what it drew from; the launches of images of COUNTED steps a
    stage, and of a step in the middle of each stage. changes: to the size's configuration."""
    with torch.device("meta"):
        model = ECAR(ECARConfig.preset(size, **changes)).to(torch.bfloat16).eval()
    gpu.place(model)
    if accelerated:
        ecar_kernels.accelerate(model)
    stages = model.config.num_stages
    every = (COUNTED,) * stages
    shape = Shape(images, every, solver, ((guided,) * COUNTED,) * stages)
    inputs = Inputs(model, shape, device_data=True)
    ends: list[int] = []  # launches after each step
    loop.run(PlainEngine(model, inputs), every)  # tables of attention's tiles are made once
    gpu.clear()
    loop.run(
        PlainEngine(model, inputs), every, progress=lambda taken: ends.append(len(gpu.launches))
    )
    launches = gpu.launches
    firsts = range(0, COUNTED * stages, COUNTED)
    return model, inputs, launches, [launches[ends[i] : ends[i + 1]] for i in firsts]


def count(size: str, *, accelerated: bool, guided: bool, solver: str) -> Row:
    """A row of the results; in a process without TRITON_INTERPRET (see tools.fake_gpu)."""
    what = {"size": size, "accelerated": accelerated, "guided": guided, "solver": solver}
    with _fake_gpu() as gpu:
        model, inputs, launches, middle = _draw(gpu, **what)
        steps = [_kinds(step) for step in middle]
        image = Counter(_kinds(launches))
        for step, steps_of_stage in zip(steps, split_steps(PAPER, len(steps)), strict=True):
            image.update({kind: n * (steps_of_stage - COUNTED) for kind, n in step.items()})
        ar = _count_ar(gpu, model, inputs.rows)
    return {**what, "steps": steps, "ar": ar, "image": dict(image)}


def _count_ar(gpu: Any, model: ECAR, rows: int) -> list[dict[str, int]]:
    """Of each stage."""
    cache, found = KVCache(model.config, rows, device=model.device, dtype=model.dtype), []
    for tokens in model.config.stage_tokens:
        x = torch.empty(rows, tokens, model.config.width, dtype=model.dtype, device=model.device)
        gpu.clear()
        model.ar.stage(x, cache)
        found.append(_kinds(gpu.launches))
    return found


def count_rows(size: str, *, images: int, **changes: Any) -> Row:
    """Launches of a guided, accelerated step and of the AR at each stage, for many images or larger
    ones: `changes` to the size's configuration."""
    what: dict[str, Any] = {"accelerated": True, "guided": True, "solver": "euler"}
    with _fake_gpu() as gpu:
        model, inputs, _, middle = _draw(gpu, size, images=images, **what, **changes)
        steps = [_kinds(step) for step in middle]
        return {"steps": steps, "ar": _count_ar(gpu, model, inputs.rows)}


def predict(size: str, setting: str, chip: costs.Chip) -> Row:
    """One image on a chip; in a process without TRITON_INTERPRET. setting: out of SETTINGS.

    bytes are those that each launch moves, and launching is the part of the seconds that launches
    take which do nothing.
    """
    steps, solver = SETTINGS[setting]
    with _fake_gpu(chip) as gpu:
        *_, launches, middle = _draw(gpu, size, accelerated=True, guided=False, solver=solver)
    for step, steps_of_stage in zip(middle, split_steps(steps, len(middle)), strict=True):
        launches += step * (steps_of_stage - COUNTED)
    return {
        "chip": chip.name,
        "size": size,
        "setting": setting,
        "launches": len(launches),
        "waves": sum(costs.waves(its.programs or 1, chip) for its in launches),
        "bytes": sum(its.cost.bytes for its in launches),
        "launching": round(len(launches) * costs.launch_seconds(chip), 6),
        "seconds": round(
            sum(costs.expected_seconds(its.cost, its.programs, chip) for its in launches), 6
        ),
    }


def predicted_seconds(size: str, setting: str, chip: str) -> float | None:
    """Of the committed prediction; None where there is none of that chip or setting."""
    record = json.loads(RESULTS.read_text("utf-8")) if RESULTS.exists() else {"predicted": []}
    for row in record["predicted"]:
        if (row["size"], row["setting"], row["chip"]) == (size, setting, chip):
            return row["seconds"]
    return None


@contextmanager
def _fake_gpu(*chips: costs.Chip) -> Iterator[Any]:
    from tools.fake_gpu import FakeGPU

    if (reason := _native.why_not()) is not None:
        raise SystemExit(f"launches: {reason}")
    with FakeGPU(*chips, compile_kernels=False) as gpu, torch.no_grad():
        yield gpu


def _kinds(launches: Iterable[Any]) -> dict[str, int]:
    found = Counter(launch.kind for launch in launches)
    return {kind: found[kind] for kind in KINDS if found[kind]}


def count_all() -> dict[str, Any]:
    from tools.fake_gpu import H100

    both = (False, True)
    versions = {name: results.package_version(name) for name in ("torch", "triton")}
    facts = {"chip": H100.name, "versions": versions, "step_count": PAPER_STEPS, "target": TARGET}
    rows = [
        count(size, accelerated=accelerated, guided=guided, solver=solver)
        for size, accelerated, guided, solver in itertools.product(SIZES, both, both, SOLVERS)
    ]
    predicted = [
        predict(size, setting, chip)
        for chip, size, setting in itertools.product(costs.CHIPS.values(), SIZES, SETTINGS)
    ]
    return {**facts, "rows": rows, "predicted": predicted}


def compare(record: dict[str, Any], committed: dict[str, Any]) -> list[str]:
    """Where a row launches more than the committed one, or there is none."""
    return commands.risen(_totals(record["rows"]), _totals(committed["rows"]))


def _totals(rows: Iterable[Row]) -> dict[str, int]:
    """All launches of each part of each row."""
    found = {}
    for row in rows:
        parts = {f"a step at stage {i}": step for i, step in enumerate(row["steps"], 1)}
        parts |= {f"AR at stage {i}": stage for i, stage in enumerate(row["ar"], 1)}
        parts["an image"] = row["image"]
        found |= {f"{_name(row)}, {what}": sum(part.values()) for what, part in parts.items()}
    return found


def _name(row: Row) -> str:
    return (
        f"{row['size']}, {'accelerated' if row['accelerated'] else 'plain'}"
        f"{', guided' if row['guided'] else ''}, {row['solver']}"
    )


def render(record: dict[str, Any]) -> str:
    """The counts as a Markdown table."""

    def by_stage(parts: Sequence[dict[str, int]]) -> str:
        return " / ".join(str(sum(part.values())) for part in parts)

    rows = []
    for row in record["rows"]:
        image = row["image"]
        rows.append(
            {
                "launches": _name(row),
                "a step, by stage": by_stage(row["steps"]),
                "target": str(record["target"][row["size"]]),
                "AR, by stage": by_stage(row["ar"]),
                f"an image of {record['step_count']} steps": f"{sum(image.values()):,}",
                "of which": ", ".join(f"{kind} {image[kind]:,}" for kind in KINDS if kind in image),
            }
        )
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    return (
        f"{table(rows)}\n\nAs on an {record['chip']}, bfloat16, one image; counted "
        f"without one; {versions}.\n\n{render_predicted(record['predicted'])}"
    )


def render_predicted(predicted: Sequence[Row]) -> str:
    """The predictions as a Markdown table."""
    return table(
        [
            {
                "predicted": f"{row['chip'].removeprefix('NVIDIA ')}, {row['size']}, "
                f"{row['setting']}",
                "an image": duration(row["seconds"]),
                "launching alone": duration(row["launching"]),
                "launches": f"{row['launches']:,}",
                "waves": f"{row['waves']:,}",
                "moved": f"{row['bytes'] / 1e9:.1f} GB",
            }
            for row in predicted
        ]
    )


if __name__ == "__main__":
    sys.exit(commands.check_counts(RESULTS, __doc__, count_all, compare, render))
