"""Kernels that sampling launches on an H100, counted without one.

E-CAR-S, B and L in bfloat16, one image, plain and accelerated, with guidance and without, by
Euler's method and by ab2: a step and the AR transformer at each stage, and an image of the paper's
250 steps. The model runs on a fake GPU (tools.fake_gpu): a launch is one of Triton's, an op of
torch (taken for one kernel), or one of the CUDA C++ library's (one kernel each). Fails if a count
is above the committed one.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import ecar_kernels
from benchmarks import results
from benchmarks.results import markdown
from ecar import ECAR, ECARConfig, split_steps
from ecar.sampling import loop
from ecar.sampling.guidance import PAPER, PAPER_STEPS
from ecar.sampling.plain import PlainEngine
from ecar.sampling.stage import Inputs, Shape
from ecar.transformer import KVCache
from ecar_kernels import _native

RESULTS = results.FOLDER / "launches.json"
SIZES = ("S", "B", "L")
SOLVERS = ("euler", "ab2")  # of one network call a step
KINDS = ("triton", "c++", "aten", "copy")
TARGET = {"S": 23, "B": 45, "L": 67}  # launches of a step, at most
COUNTED = 3  # steps of a stage: the second is as all are between the first and the last


def count(size: str, *, accelerated: bool, guided: bool, solver: str) -> dict[str, Any]:
    """A row of the results; in a process without TRITON_INTERPRET (see tools.fake_gpu)."""
    from tools.fake_gpu import FakeGPU

    if (reason := _native.why_not()) is not None:
        raise SystemExit(f"launches: {reason}")
    with FakeGPU(compile_kernels=False) as gpu, torch.no_grad():
        with torch.device("meta"):
            model = ECAR(ECARConfig.preset(size)).to(torch.bfloat16).eval()
        gpu.place(model)
        if accelerated:
            ecar_kernels.accelerate(model)
        stages = model.config.num_stages
        guidance = ((guided,) * COUNTED,) * stages
        every = (COUNTED,) * stages
        inputs = Inputs(model, Shape(1, every, solver, guidance), device_data=True)
        ends: list[int] = []  # launches after each step

        loop.run(PlainEngine(model, inputs), every)  # tables of attention's tiles are made once
        gpu.clear()
        engine = PlainEngine(model, inputs)
        loop.run(engine, every, progress=lambda taken: ends.append(len(gpu.launches)))
        launches = gpu.launches
        steps = [
            _kinds(launches[ends[first] : ends[first + 1]])
            for first in range(0, COUNTED * stages, COUNTED)
        ]
        counts = split_steps(PAPER, stages)
        image = Counter(_kinds(launches))
        for step, steps_of_stage in zip(steps, counts, strict=True):
            image.update({kind: n * (steps_of_stage - COUNTED) for kind, n in step.items()})
        return {
            "size": size,
            "accelerated": accelerated,
            "guided": guided,
            "solver": solver,
            "steps": steps,
            "ar": _ar(gpu, model, inputs.rows),
            "image": dict(image),
        }


def _ar(gpu: Any, model: ECAR, rows: int) -> list[dict[str, int]]:
    """Each stage's map from its input tokens."""
    config, found = model.config, []
    cache = KVCache(config, rows, device=model.device, dtype=model.dtype)
    for tokens in config.stage_tokens:
        x = torch.empty(rows, tokens, config.width, dtype=model.dtype, device=model.device)
        gpu.clear()
        model.ar.stage(x, cache)
        found.append(_kinds(gpu.launches))
    return found


def _kinds(launches: Sequence[Any]) -> dict[str, int]:
    found = Counter(launch.kind for launch in launches)
    return {kind: found[kind] for kind in KINDS if found[kind]}


def compare(rows: Sequence[dict[str, Any]], committed: Sequence[dict[str, Any]]) -> list[str]:
    """Where a row launches more than the committed one, or there is none."""
    before, complaints = {_name(row): row for row in committed}, []
    for row in rows:
        name = _name(row)
        if name not in before:
            complaints.append(f"{name}: not among the committed counts")
            continue
        for (what, now), then in zip(_parts(row), _parts(before[name]), strict=True):
            if (count := sum(now.values())) > (least := sum(then[1].values())):
                complaints.append(f"{name}, {what}: {count} launches, {least} committed")
    return complaints


def _parts(row: dict[str, Any]) -> list[tuple[str, dict[str, int]]]:
    steps = [(f"a step at stage {i}", part) for i, part in enumerate(row["steps"], 1)]
    return [
        *steps,
        *((f"AR at stage {i}", part) for i, part in enumerate(row["ar"], 1)),
        ("an image", row["image"]),
    ]


def _name(row: dict[str, Any]) -> str:
    return (
        f"{row['size']}, {'accelerated' if row['accelerated'] else 'plain'}"
        f"{', guided' if row['guided'] else ''}, {row['solver']}"
    )


def render(record: dict[str, Any]) -> str:
    """The counts as a Markdown table."""

    def cells(parts: Sequence[dict[str, int]]) -> str:
        return " / ".join(str(sum(part.values())) for part in parts)

    rows = [
        (
            _name(row),
            cells(row["steps"]),
            str(record["target"][row["size"]]),
            cells(row["ar"]),
            f"{sum(row['image'].values()):,}",
            ", ".join(f"{kind} {row['image'][kind]:,}" for kind in KINDS if kind in row["image"]),
        )
        for row in record["rows"]
    ]
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    header = (
        "launches",
        "a step, by stage",
        "target",
        "AR, by stage",
        f"an image of {record['step_count']} steps",
        "of which",
    )
    return (
        f"{markdown(header, rows)}\n\nAs on an {record['chip']}, bfloat16, one image; counted "
        f"without one; {versions}."
    )


def write(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    from tools.fake_gpu import H100

    versions = {name: results.package_version(name) for name in ("torch", "triton")}
    facts = {"chip": H100.name, "versions": versions, "step_count": PAPER_STEPS, "target": TARGET}
    results.save(file, {**facts, "rows": list(rows)})


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.launches", description=__doc__.partition("\n\n")[0]
    )
    parser.add_argument("--update", action="store_true", help=f"write {RESULTS.name}")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=SIZES)
    options = parser.parse_args(argv)
    if options.update and set(options.sizes) != set(SIZES):
        parser.error("--update writes all sizes, leave --sizes out")
    rows = [
        count(size, accelerated=accelerated, guided=guided, solver=solver)
        for size in options.sizes
        for accelerated in (False, True)
        for guided in (False, True)
        for solver in SOLVERS
    ]
    if options.update:
        write(RESULTS, rows)
        print(render(json.loads(RESULTS.read_text("utf-8"))))
        print(f"\nwrote {RESULTS}")
        return 0
    committed = json.loads(RESULTS.read_text("utf-8"))
    print(render(committed | {"rows": rows}))
    complaints = compare(rows, committed["rows"])
    print("\n" + ("\n".join(complaints) or "no count is above the committed one"))
    return int(bool(complaints))


if __name__ == "__main__":
    sys.exit(main())
