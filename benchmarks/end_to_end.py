"""One E-CAR image: eager, torch.compile, ecar_kernels, its matrix products alone, and its floor.

Random weights, no guidance, the paper's protocol of 250 steps, of which four of each stage are run
and scaled. All ways take turns; figures are medians over the rounds. torch.compile makes one graph
of S's whole flow heads; of B and L, with four and six blocks a head, it compiles the repeated
block, as PyTorch recommends for deep models. non-GEMM: the time over that of the linear layers' and
attention's products alone, less one. floor: what must be read and multiplied, at the rates of a
copy and of a large product in the same run.

Then by the default, all of whose steps are run, and in bfloat16, next to diffusers' DiT in eager
mode with 250 steps of DDIM and with 20 of DPM-Solver++ (order 2), of which four are run. speed-up:
over the same size of E-CAR by the paper's protocol in float32, in the same rounds. before the
steps: the AR transformer and the modulation, once a stage.
"""

import copy
import functools
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

import ecar_kernels
from benchmarks import models, timing
from benchmarks.models import TIMED_STEPS, StageTime, Way, image_seconds, time_image
from benchmarks.paper import dit
from benchmarks.paper.dit import PEERS
from benchmarks.results import duration, medians, tables, times
from ecar import ECAR, ECARConfig, split_steps
from ecar.info import count_multiply_adds
from ecar.sampling.guidance import DEFAULT_STEPS, PAPER, Steps, plan_steps

WAYS_SHARE = 0.6  # of a size's time, for the paper's protocol in all ways
DIT_SOLVERS = {"ddim": 250, "dpmsolver++": 20}  # and their steps
WHOLE = ("S",)  # sizes whose heads are compiled whole
Calls = list[Callable[[], object]]


def measure(size: str, seconds: float) -> dict[str, Any]:
    """One size's row."""
    config, (best, _) = ECARConfig.preset(size), timing.measure_rates()
    ways = models.ways(models.random_model(config), size in WHOLE)
    gemms, runs = products(ways["ours"].model), models.images(ways)
    runs |= {name: lambda calls=calls: image_seconds(_time(calls)) for name, calls in gemms.items()}
    return {
        "size": size,
        "seconds": timing.summaries(models.compare(runs, seconds)),
        "compile": "whole" if size in WHOLE else "blocks",
        "floor": {"seconds": max(models.floors(config, best).values())},
    }


def products(model: ECAR, steps: Steps = PAPER) -> dict[str, list[tuple[Calls, Calls]]]:
    """An image's matrix products and nothing else: each stage's that are done once, and a step's.

    "linears" are computed by the GEMM of the fused ops with a neutral epilogue, from the weights
    that the model has packed. "attention" is its two products, without the softmax.
    """
    config, found = model.config, {"linears": [], "attention": []}
    normal = functools.partial(torch.randn, dtype=model.dtype)
    tokens = functools.cache(lambda rows, width: normal(1, rows, width))

    def linears(rows: int, layers: Iterable[nn.Linear]) -> Calls:
        return [
            functools.partial(
                timing.packed_linear(layer.weight, layer.bias, rows),
                tokens(rows, layer.in_features),
            )
            for layer in layers
        ]

    def attention(queries: int, keys: int) -> Calls:
        q, k, v = (normal(config.heads, n, config.head_dim) for n in (queries, keys, keys))
        scores, output = q.new_empty(config.heads, queries, keys), torch.empty_like(q)
        return [
            lambda: torch.bmm(q, k.transpose(1, 2), out=scores),
            lambda: torch.bmm(scores, v, out=output),
        ]

    counts = split_steps(steps, config.num_stages)
    for stage, (head, rows) in enumerate(zip(model.heads, config.stage_tokens, strict=True)):
        condition = (head.condition.fc1, head.condition.fc2, head.modulation)
        of_tokens = [
            *model.ar.inputs[stage - 1 : stage],
            *models.linears(model.ar.blocks),
            *condition,
        ]
        of_times = (head.time[0], head.time[2], head.modulation)
        step = [head.embed, *models.linears(head.blocks), head.output]
        once = [*linears(rows, of_tokens), *linears(counts[stage], of_times)]
        found["linears"].append((once, linears(rows, step)))
        over_all = attention(rows, sum(config.stage_tokens[: stage + 1])) * config.ar_layers
        found["attention"].append((over_all, attention(rows, rows) * config.flow_blocks))
    return found


@torch.no_grad()
def _time(stages: list[tuple[Calls, Calls]]) -> list[StageTime]:
    def seconds(calls: Calls) -> float:
        begin = time.perf_counter()
        for call in calls:
            call()
        return time.perf_counter() - begin

    return [
        StageTime(seconds(once), statistics.median(seconds(step) for _ in range(TIMED_STEPS)))
        for once, step in stages
    ]


def measure_protocols(size: str, seconds: float) -> list[dict[str, Any]]:
    """A row for each protocol and dtype of one size of E-CAR and of the DiT that the paper pairs it
    with; all of them take turns."""
    config, peer = ECARConfig.preset(size), dit.SIZES[PEERS[size]]
    model = models.random_model(config)
    rows: list[dict[str, Any]] = []
    runs: list[Callable[[], list[StageTime]]] = []

    def add(run: Callable[[], list[StageTime]], **facts: Any) -> None:
        runs.append(run)
        rows.append({"size": size, "dtype": str(dtype).removeprefix("torch."), **facts})

    for dtype in (torch.float32, torch.bfloat16):
        ours = copy.deepcopy(model).to(dtype)
        ecar_kernels.accelerate(ours, keep_weights=False)  # as a pipeline does
        for steps, timed in ((PAPER, TIMED_STEPS), (DEFAULT_STEPS, None)):
            counts, solver, grid = plan_steps(steps, None, None, config.num_stages)
            work = count_multiply_adds(config, steps=steps)
            add(
                functools.partial(time_image, Way(ours), steps, timed),
                model=f"E-CAR-{size}", steps=counts, solver=solver, grid=grid,
                timed_steps_of_a_stage=timed, multiply_adds=sum(stage.total for stage in work),
            )  # fmt: skip
        module = peer.build().to(dtype)
        for solver, count in DIT_SOLVERS.items():
            step = functools.partial(dit.step_seconds, module, count, solver, TIMED_STEPS)
            add(
                lambda step=step: [StageTime(0.0, step())],
                model=f"DiT-{PEERS[size]}/2", steps=[count], solver=solver, grid=None,
                timed_steps_of_a_stage=TIMED_STEPS,
                multiply_adds=dit.count(peer, count, guided=False)[1],
            )  # fmt: skip
    taken = models.compare(dict(enumerate(runs)), seconds)
    images = [
        [image_seconds(stages, row["steps"]) for stages in taken[i]] for i, row in enumerate(rows)
    ]
    for i, row in enumerate(rows):
        before = [sum(stage.once for stage in stages) for stages in taken[i]]
        pairs = zip(images[0], images[i], strict=True)
        row |= {
            "seconds_before_steps": timing.summary(before),
            "seconds": timing.summary(images[i]),
            "speedup": timing.summary([first / own for first, own in pairs]),
        }
    return rows


def render(record: dict[str, Any]) -> str:
    protocols = record.get("protocols", [])  # older results have none
    return tables([*map(_cells, record["rows"])], [*map(_protocol_cells, protocols)])


def _cells(row: dict[str, Any]) -> dict[str, str]:
    seconds = medians(row)
    ours, compiled, floor = seconds["ours"], seconds["compiled"], row["floor"]["seconds"]
    gemms = seconds["linears"] + seconds["attention"]
    return {
        "model": f"E-CAR-{row['size']}",
        "eager": duration(seconds["eager"]),
        "torch.compile": duration(compiled),
        "ecar_kernels": duration(ours),
        "vs eager": times(seconds["eager"], ours),
        "vs torch.compile": times(compiled, ours),
        "its GEMMs alone": duration(gemms),
        "non-GEMM": f"{ours / gemms - 1:.0%}",
        "floor": duration(floor),
        "of the floor": f"{floor / ours:.0%}",
    }


def _protocol_cells(row: dict[str, Any]) -> dict[str, str]:
    grid = "" if row["grid"] in (None, 1) else f", grid {row['grid']:g}"
    image, before = row["seconds"]["median"], row.get("seconds_before_steps")
    return {
        "model": row["model"],
        "dtype": row["dtype"],
        "steps": " + ".join(map(str, row["steps"])),
        "solver": f"{row['solver']}{grid}",
        "multiply-adds": f"{row['multiply_adds'] * 1e-9:,.0f} G",
        "one image": duration(image),
        "speed-up": times(row["speedup"]["median"]),
        "before the steps": f"{before['median'] / image:.0%}" if before else "-",
    }


def measure_size(size: str, seconds: float) -> dict[str, list]:
    row = measure(size, seconds * WAYS_SHARE)
    models.forget()
    return {"rows": [row], "protocols": measure_protocols(size, seconds * (1 - WAYS_SHARE))}


main = functools.partial(models.main, "end_to_end", __doc__, measure_size, render, seconds=60)

if __name__ == "__main__":
    sys.exit(main())
