"""One E-CAR image: eager, torch.compile, ecar_kernels, its matrix products alone, and its floor.

Random weights, no guidance, float32, the paper's protocol of 250 steps, of which a few of each
stage are run and scaled. Then by the default of 30 steps (all are run) and in bfloat16, and next to
diffusers' DiT by the paper's 250 steps of DDIM and by 20 of DPM-Solver++, which its users take.
All ways take turns; figures are medians over the rounds. torch.compile makes one graph of S's
whole flow heads; of B and L, with four and six blocks a head, it compiles the repeated block, as
PyTorch recommends for deep models. The floor is all that an image must read and multiply
(`benchmarks.roofline`) at the rates of a copy and of a large product in the same run.
"""

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import models, rates, results, roofline, timing
from benchmarks.models import STEPS, StageTime, Way, image_seconds, time_image
from benchmarks.paper import dit
from benchmarks.results import duration, figures, markdown
from ecar import ECAR, ECARConfig, split_steps
from ecar.cli.parser import step_list
from ecar.info import count_multiply_adds
from ecar.sampling.guidance import DEFAULT_STEPS, PAPER, Steps, plan_steps
from ecar_kernels import _native
from ecar_kernels.costs import Rates
from ecar_kernels.flow_block import packing

SHARES = {"S": 1, "B": 3, "L": 5}  # of the time: an image of L takes longest
WAYS_SHARE = 0.6  # of the time, for the paper's protocol in all ways; the rest for the protocols
PEERS = {"S": "B", "B": "L", "L": "XL"}  # E-CAR : DiT, as the paper pairs them
DIT_SOLVERS = {"ddim": 250, "dpmsolver++": 20}  # and their steps
WHOLE = ("S",)  # sizes whose heads are compiled whole
Calls = list[Callable[[], object]]


def measure(
    size: str,
    config: ECARConfig,
    seconds: float,
    *,
    steps: Steps = STEPS,
    timed_steps: int = 4,
    compile: str | None = "whole",
    best: Rates | None = None,
) -> dict[str, Any]:
    """One size's record. compile: "whole" heads, "blocks", or None; best: for the floor."""
    ways = models.ways(models.random_model(config), compile)
    gemms = ImageGemms(ways["ours"].model, steps)
    runs: dict[str, Callable[[], Any]] = {
        name: lambda way=way: time_image(way, timed_steps, steps) for name, way in ways.items()
    }
    begin = time.perf_counter()
    if compile is not None:
        runs["compiled"]()
    compile_seconds = time.perf_counter() - begin
    runs["gemms"] = lambda: gemms.time(timed_steps)
    taken = timing.rounds(runs, seconds, at_least=3, warm_up=True)
    for alone in taken.pop("gemms"):
        for name, stages in alone.items():
            taken.setdefault(name, []).append(stages)
    row = {
        "size": size,
        "steps": sum(split_steps(steps, config.num_stages)),
        "timed_steps_of_a_stage": max(3, timed_steps),
        "seconds": {
            name: timing.summary([image_seconds(stages, steps) for stages in values])
            for name, values in taken.items()
        },
        "compile": compile,
        "compile_seconds": compile_seconds,
    }
    if best is not None:
        work = roofline.Roofline(config, steps=steps, itemsize=4).total()
        row["floor"] = {
            "bytes": work.bytes,
            "multiply_adds": work.multiply_adds,
            "seconds": roofline.floor(work, best).seconds,
        }
    return row


class ImageGemms:
    """The matrix products of one image: the same shapes, weights and order, nothing else.

    Linear layers are computed by the GEMM of the fused ops with a neutral epilogue. Attention is
    its two products, without the softmax.
    """

    def __init__(self, model: ECAR, steps: Steps) -> None:
        """Packs the weights; those that the model has packed are shared."""
        self.inputs: dict[tuple[int, int], Tensor] = {}
        config = model.config
        self.linears: list[tuple[Calls, Calls]] = []
        self.attention: list[tuple[Calls, Calls]] = []
        counts = split_steps(steps, config.num_stages)
        for stage, (head, rows, count) in enumerate(
            zip(model.heads, config.stage_tokens, counts, strict=True)
        ):
            once = [
                *([] if stage == 0 else [(model.ar.inputs[stage - 1], rows)]),
                *((layer, rows) for block in model.ar.blocks for layer in _layers(block)),
                (head.condition.fc1, rows),
                (head.condition.fc2, rows),
                (head.modulation, rows),
                (head.time[0], count),
                (head.time[2], count),
                (head.modulation, count),
            ]
            step = [
                (head.embed, rows),
                *((layer, rows) for block in head.blocks for layer in _layers(block)),
                (head.output, rows),
            ]
            self.linears.append(
                ([self._linear(*layer) for layer in once], [self._linear(*layer) for layer in step])
            )
            keys, heads, dim = sum(config.stage_tokens[: stage + 1]), config.heads, config.head_dim
            self.attention.append(
                (
                    _products(heads, rows, keys, dim) * config.ar_layers,
                    _products(heads, rows, rows, dim) * config.flow_blocks,
                )
            )

    def _linear(self, layer: nn.Linear, rows: int) -> Callable[[], object]:
        width = layer.in_features
        x = self.inputs.setdefault((rows, width), torch.randn(1, rows, width))
        run: Callable = layer
        if _native.why_not() is None:
            run = rates.packed_linear(layer.weight, layer.bias, rows)
        return lambda: run(x)

    @torch.no_grad()
    def time(self, timed_steps: int) -> dict[str, list[StageTime]]:
        """Each stage's times: of "linears" and of "attention"."""
        return {
            name: [
                StageTime(
                    _seconds(once),
                    statistics.median(_seconds(step) for _ in range(max(2, timed_steps))),
                )
                for once, step in stages
            ]
            for name, stages in (("linears", self.linears), ("attention", self.attention))
        }


def _layers(block: nn.Module) -> tuple[nn.Linear, ...]:
    return block.qkv, block.proj, block.mlp.fc1, block.mlp.fc2


def _products(heads: int, queries: int, keys: int, head_dim: int) -> Calls:
    q, k, v = (torch.randn(heads, n, head_dim) for n in (queries, keys, keys))
    scores, output = torch.empty(heads, queries, keys), torch.empty_like(q)
    return [
        lambda: torch.bmm(q, k.transpose(1, 2), out=scores),
        lambda: torch.bmm(scores, v, out=output),
    ]


def _seconds(calls: Calls) -> float:
    begin = time.perf_counter()
    for call in calls:
        call()
    return time.perf_counter() - begin


def measure_protocols(
    size: str,
    config: ECARConfig,
    seconds: float,
    *,
    peer: dit.DiTSize | None = None,
    timed_steps: int = 4,
) -> list[dict[str, Any]]:
    """A row for each protocol and dtype of one size of E-CAR and of the DiT that the paper pairs it
    with; all of them take turns. peer: that DiT's sizes; None: the paper's."""
    model, peer = models.random_model(config), peer or dit.SIZES[PEERS[size]]
    rows: list[dict[str, Any]] = []
    runs: dict[str, Callable[[], Any]] = {}

    def add(run: Callable[[], Any], **facts: Any) -> None:
        runs[str(len(rows))] = run
        rows.append(facts)

    for dtype in (torch.float32, torch.bfloat16):
        way = Way(models.pipelines(model, dtype), "auto")
        for protocol, timed in ((PAPER, timed_steps), (DEFAULT_STEPS, None)):
            counts, solver, grid = plan_steps(protocol, None, None, config.num_stages)
            work = count_multiply_adds(config, steps=protocol)
            add(
                lambda way=way, timed=timed, steps=protocol: time_image(way, timed, steps),
                size=size, model=f"E-CAR-{size}", dtype=str(dtype).removeprefix("torch."),
                steps=counts, solver=solver, grid=grid, timed_steps_of_a_stage=timed,
                multiply_adds=sum(stage.total for stage in work),
                multiply_adds_before_steps=sum(stage.ar + stage.modulation for stage in work),
            )  # fmt: skip
        module = dit.build(peer).to(dtype)
        for solver, steps in DIT_SOLVERS.items():
            sampler = dit.Sampler(peer, steps, solver, dtype, module)
            add(
                lambda sampler=sampler: sampler.time_image(timed_steps),
                size=size, model=f"DiT-{PEERS[size]}/2", dtype=str(dtype).removeprefix("torch."),
                steps=[steps], solver=solver, grid=None, timed_steps_of_a_stage=timed_steps,
                multiply_adds=dit.count(peer, steps, guided=False)[1],
                multiply_adds_before_steps=0,
            )  # fmt: skip
    taken = timing.rounds(runs, seconds, at_least=3, warm_up=True)
    for row, found in zip(rows, taken.values(), strict=True):
        if row["solver"] not in DIT_SOLVERS:
            before = [sum(s.once for s in stages) for stages in found]
            found[:] = [image_seconds(stages, row["steps"]) for stages in found]
            row["seconds_before_steps"] = timing.summary(before)
        row["seconds"] = timing.summary(found)
    for row, found in zip(rows, taken.values(), strict=True):
        pairs = zip(taken["0"], found, strict=True)
        row["speedup"] = timing.summary([first / own for first, own in pairs])
    return rows


def forget() -> None:
    """Frees what a size left behind, for the next one."""
    torch._dynamo.reset()
    packing.forget_packed()
    gc.collect()


def render(record: dict[str, Any]) -> str:
    header = (
        "model", "eager", "torch.compile", "ecar_kernels", "vs eager", "vs torch.compile",
        "its GEMMs alone", "non-GEMM", "floor", "of the floor",
    )  # fmt: skip
    first = record["rows"][0]
    text = (
        f"{markdown(header, map(_cells, record['rows']))}\n\nOne image, no guidance, random "
        f"weights, float32: {first['timed_steps_of_a_stage']} steps of each stage were run and "
        f"scaled to {first['steps']} in all. non-GEMM: its\ntime over its linear layers' and "
        "attention's products alone, less one. floor: what must be read and multiplied, at "
        "measured rates."
    )
    protocols = record.get("protocols")  # older results have none
    return f"{text}\n\n{render_protocols(protocols)}" if protocols else text


def render_protocols(rows: Sequence[dict[str, Any]]) -> str:
    header = (
        "model", "dtype", "steps", "solver", "multiply-adds", "one image", "speed-up",
        "before the steps",
    )  # fmt: skip
    cells = [
        (
            row["model"],
            row["dtype"],
            " + ".join(map(str, row["steps"])),
            row["solver"] if row["grid"] in (None, 1) else f"{row['solver']}, grid {row['grid']:g}",
            f"{row['multiply_adds'] * 1e-9:,.0f} G",
            duration(row["seconds"]["median"]),
            f"{figures(row['speedup']['median'])}x",
            "-"
            if "seconds_before_steps" not in row
            else f"{row['seconds_before_steps']['median'] / row['seconds']['median']:.0%}",
        )
        for row in rows
    ]
    timed = next(row["timed_steps_of_a_stage"] for row in rows if row["timed_steps_of_a_stage"])
    return (
        f"{markdown(header, cells)}\n\nOne image, no guidance, random weights. By the paper's "
        f"protocol {timed} steps of each stage, and of DiT, were run and scaled; by the\ndefault "
        "all were run. speed-up: over the same size of E-CAR by the paper's protocol in float32, "
        "in the same rounds.\nbefore the steps: the AR transformer and the modulation, once a "
        "stage. DiT is diffusers' in eager mode, with its\nDDIMScheduler and its "
        "DPMSolverMultistepScheduler (DPM-Solver++ of order 2)."
    )


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    median = {name: found["median"] for name, found in row["seconds"].items()}
    ours, compiled = median["ours"], median.get("compiled")
    gemms = median["linears"] + median["attention"]
    floor = row.get("floor", {}).get("seconds")
    return (
        f"E-CAR-{row['size']}",
        duration(median["eager"]),
        duration(compiled),
        duration(ours),
        f"{figures(median['eager'] / ours)}x",
        "-" if compiled is None else f"{figures(compiled / ours)}x",
        duration(gemms),
        f"{ours / gemms - 1:.0%}",
        duration(floor),
        "-" if floor is None else f"{floor / ours:.0%}",
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = results.parser("end_to_end", __doc__)
    parser.add_argument("--sizes", nargs="+", choices=SHARES, default=tuple(SHARES))
    parser.add_argument(
        "--minutes", type=float, default=9.0, help="of measuring, without compilation (default: 9)"
    )
    parser.add_argument("--steps", type=step_list, default=STEPS, help="default: %(default)s")
    parser.add_argument(
        "--timed-steps", type=int, default=4, help="of each stage that are run (default: 4)"
    )
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile")
    options = parser.parse_args(arguments)
    facts, rows, protocols = results.describe(), [], []
    shares = sum(SHARES[size] for size in options.sizes)
    best, _ = rates.measure()
    for size in options.sizes:
        compile = "whole" if size in WHOLE else "blocks"
        seconds = 60 * options.minutes * SHARES[size] / shares
        rows.append(
            measure(
                size,
                ECARConfig.preset(size),
                seconds * WAYS_SHARE,
                steps=options.steps,
                timed_steps=options.timed_steps,
                compile=None if options.no_compile else compile,
                best=best,
            )
        )
        forget()
        protocols += measure_protocols(
            size,
            ECARConfig.preset(size),
            seconds * (1 - WAYS_SHARE),
            timed_steps=options.timed_steps,
        )
        forget()
        # Sizes that are done survive an interruption.
        content = {"rows": rows, "protocols": protocols}
        results.write(results.path("end_to_end", options.results), "end_to_end", facts, **content)
        print(f"E-CAR-{size} done", flush=True)
    results.finish(options.results, "end_to_end", facts, render, rows=rows, protocols=protocols)


if __name__ == "__main__":
    main()
