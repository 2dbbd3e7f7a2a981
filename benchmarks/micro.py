"""Times every op, merges the rows into a file, prints a table. Ctrl-C keeps the rows that were
measured. benchmarks/README.md says how to read them.

Times are medians; the floor is the longer of the op's bytes over the rate of a copy and its
multiply-adds over that of a GEMM. Where an op moves 64 MiB or more, a copy of as many bytes is
timed in the same rounds. An "overhead" row is what a call costs besides its arithmetic, at 16 x 768
out of the cache, and with one token of 8 channels ("least").
"""

import functools
import itertools
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ecar_kernels
from benchmarks import cases, commands, peers, results, timing
from benchmarks.cases import Case
from benchmarks.results import CPU, Record, Row, duration, medians, table, tables, times
from benchmarks.timing import Call, Clock
from ecar_kernels.costs import Cost, Rates, backward_cost, cost, floor_seconds
from ecar_kernels.registry import BACKENDS, FAMILIES, resolve
from ecar_kernels.testing import tensors

MAX_ROUNDS = 2000
LARGE = 2**26  # bytes that a copy of as many is timed with
CALLS = 100  # in a round of an overhead row
NAMES = {"eager": "eager", "compiled": "torch.compile", "ours": "ecar_kernels"}
OWN = tuple(NAMES)
COMPILED = ("compiled", "FlexAttention")
HOLD_SCORES = ("eager", "compiled", "SDPA math")  # ways that hold attention's scores
MINUTES = 14.0


def choose(full: bool = False, device: torch.device = CPU, dtype: str = "float32") -> list[Case]:
    """The rows, the most important first; on CUDA with more batches, and what fills it before what
    does not."""
    rows = [*cases.beyond_caches(), *(cases.every() if full else cases.default())]
    if device.type == "cuda":
        rows += cases.select(forward=(8, 64), backward=(1, 8, 64))
        rows.sort(key=lambda case: (case.tokens < 256, case.batch))
    else:
        rows = [*cases.overheads(), *rows]
    return list(dict.fromkeys(replace(case, dtype=dtype) for case in rows))


def run(
    chosen: Sequence[Case],
    file: Path,
    *,
    seconds: float = 0.5,
    minutes: float | None = None,
    device: torch.device = CPU,
    compiling: bool = True,
) -> tuple[Record, int]:
    """Measures rows and merges each into the file, see `commands.run`; returns them, and how many
    failed. compiling: with the ways of COMPILED, which take seconds to compile."""
    results.keep_memory()
    facts = results.describe(device)
    best, tried = timing.measure_rates(2 * seconds, device)

    def measured(case: Case) -> dict[str, list[Row]]:
        timed = overhead if case.overhead else measure
        return {"rows": [timed(case, best, seconds, device, compiling)]}

    measures = {case.name: functools.partial(measured, case) for case in chosen}
    how = {"this": facts | {"rates": vars(best) | {"tried": tried}}, "minutes": minutes}
    record, failed = commands.run(measures, file, "micro", same=case_of, say=_said, **how)
    return record, failed + sum(map(_broken, record.get("rows", ())))


def _broken(row: Row) -> bool:
    """Has a backend of this library failed?"""
    return not row.get("failures", {}).keys().isdisjoint(BACKENDS)


def _said(row: Row) -> str:
    return "FAILED: " * _broken(row) + duration(row["seconds"]["ours"]["median"])


def case_of(row: Row) -> Case:
    """What a row times; two rows of one case are measurements of the same."""
    return Case(**{field.name: row[field.name] for field in fields(Case) if field.name in row})


@torch.no_grad()
def overhead(case: Case, best: Rates, seconds: float, *_: Any) -> Row:
    """What a call costs: bound, through the public function, eager; and all with one token."""
    bind = functools.partial(resolve, case.op, device=CPU, dtype=case.numbers)
    api = getattr(ecar_kernels, case.op)
    functions = {"ours": bind(), "api": api, "eager": bind(backend="reference")}

    def turns(function: Callable, given: dict) -> Iterator[Call]:
        while True:
            function(**given)  # the first call after another way's is not timed
            yield lambda: [function(**given) for _ in range(CALLS)]

    clocks = {}
    for name, function in functions.items():
        clocks[name] = Clock(turns(function, cases.inputs(case)))
        least = replace(case, tokens=1, size=cases.LEAST)
        small = "least" if name == "ours" else f"{name}, least"
        clocks[small] = Clock(turns(function, cases.inputs(least)))
    found = timing.rounds(clocks, seconds, at_most=200, warm_up=True)
    return vars(case) | {"calls": CALLS, "seconds": timing.summaries(found, CALLS)}


def measure(
    case: Case, best: Rates, seconds: float, device: torch.device = CPU, compiling: bool = True
) -> Row:
    """One row: each way's median and quartiles, or why it could not be measured."""
    sets = cases.input_sets(case, device)
    ways, failures, clocks = functions(case, device, compiling), {}, {}
    for name, function in ways.items():
        if reason := why_not(case, name, function, sets):
            failures[name] = reason
        else:
            clocks[name] = Clock(calls(case, function, sets), len(sets), device)
    needed = case_cost(case, sets[0])
    if device.type == "cpu" and not needed.multiply_adds and needed.bytes >= LARGE:
        # A guest's rate of memory halves and doubles within seconds: a copy in the same rounds.
        source = torch.zeros(needed.bytes // 2, dtype=torch.uint8)
        target = torch.zeros_like(source)
        clocks["copy"] = Clock(itertools.repeat(functools.partial(target.copy_, source)))
    clocks["ours"] = clocks.pop("ours")  # the last of a round
    found = timing.rounds(clocks, seconds, at_most=MAX_ROUNDS, warm_up=True)
    if "copy" in found:
        rate = needed.bytes / statistics.median(found.pop("copy"))
        best = replace(best, bytes_per_second=rate)
    return vars(case) | {
        "sets": len(sets),
        "how": clocks["ours"].how,
        "backend": ways["ours"].backend,
        "bytes": needed.bytes,
        "multiply_adds": needed.multiply_adds,
        "floor_seconds": floor_seconds(needed, best),
        "seconds": timing.summaries(found),
        "failures": failures,
    }


def functions(
    case: Case, device: torch.device = CPU, compiling: bool = True
) -> dict[str, Callable]:
    """Each way's function, with the op's signature; "ours" is ecar_kernels'. On CUDA its other
    backends, too, and other libraries in a call for each stage."""
    cuda = device.type == "cuda"
    how = {"device": device, "dtype": case.numbers, "width": case.op_width}
    reference, ours = resolve(case.op, backend="reference", **how), resolve(case.op, **how)
    torch._dynamo.reset()  # one function has a graph for each shape, and a limit of graphs
    compiled = torch.compile(reference, fullgraph=True, dynamic=False)
    found = {"eager": reference, "compiled": compiled, "ours": ours}
    own = cases.backends(case, device) if cuda else {}
    found |= {name: own[name] for name in own if name not in ("reference", ours.backend)}
    found |= peers.functions(case.op, per_stage=cuda)
    return {name: way for name, way in found.items() if compiling or name not in COMPILED}


def calls(case: Case, function: Callable, sets: Sequence[dict[str, Any]]) -> Iterator[Call]:
    """Endless calls with the sets in turn; backward, each comes with its forward just done."""
    if not case.backward:
        yield from itertools.cycle([_forward(function, arguments) for arguments in sets])
    gradients: list[list[Tensor]] = [[] for _ in sets]
    for arguments, drawn in itertools.cycle(zip(sets, gradients, strict=True)):
        yield _backward(function, arguments, drawn)


def _forward(function: Callable, arguments: dict[str, Any]) -> Call:
    # Not in inference mode, whose tensors have no version: no weight would be packed.
    return torch.no_grad()(lambda: function(**arguments))


def _backward(function: Callable, arguments: dict[str, Any], gradients: list[Tensor]) -> Call:
    given, leaves = dict(arguments), []
    for name, value in arguments.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            given[name] = value.detach().requires_grad_()
            leaves.append(given[name])
    with torch.enable_grad():
        outputs = tensors(function(**given))
    # Drawn once: a cache full of what was just drawn is written to memory in the timed call.
    gradients += [torch.randn_like(output) for output in outputs[len(gradients) :]]
    # A peer may not know all arguments; on CUDA a call is repeated.
    return lambda: torch.autograd.grad(
        outputs, leaves, gradients, allow_unused=True, retain_graph=leaves[0].is_cuda
    )


def why_not(
    case: Case, name: str, function: Callable, sets: Sequence[dict[str, Any]]
) -> str | None:
    """Warms a way up; returns why it cannot serve the case, None if it can.

    Graphs are compiled by one call. "ours" packs each set's weights, if the op has weights.
    """
    if name in HOLD_SCORES and case.op == "stage_attention":
        queries, keys = (sets[0][side].shape[1] for side in ("q", "k"))
        scores = case.batch * case.model.heads * queries * keys * case.numbers.itemsize
        held = 6 if case.backward else 3  # times at once, as seen of the eager reference
        if (size := held * scores) > memory(sets[0]["q"].device) / 2:
            return f"its scores would take {size / 1e9:.0f} GB"
    count = len(sets) if name == "ours" and case.op in FAMILIES["flow_block"] else 1

    def warm_up() -> None:
        for call in itertools.islice(calls(case, function, sets), count):
            call()

    if name not in ("ours", "eager"):
        return peers.why_not(warm_up)
    warm_up()  # these must work
    return None


def memory(device: torch.device) -> int:
    """Bytes of the machine, or of the GPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@torch.no_grad()
def case_cost(case: Case, arguments: dict[str, Any]) -> Cost:
    """Bytes and multiply-adds of one call, forward or backward."""
    outputs = getattr(ecar_kernels, case.op)(**arguments)
    return (backward_cost if case.backward else cost)(case.op, arguments, outputs)


def render(record: Record) -> str:
    """Tables of the ops, of other libraries, of what was not measured, and of a call's cost."""
    own, others, overheads = [], [], []
    refused: dict[tuple, dict[str, str]] = {}
    for row in record["rows"]:
        name, seconds = {"row": case_of(row).name}, medians(row)
        if row.get("overhead"):
            ways = ("ours", "api", "eager", "least", "api, least", "eager, least")
            overheads.append(name | {NAMES.get(way, way): duration(seconds[way]) for way in ways})
            continue
        time = {"time": duration(seconds["ours"])}
        run = {"run": str(row["run"] + 1)} if len(record["runs"]) > 1 else {}
        own.append(name | time | _ratios(row) | _reached(row, seconds["ours"]) | run)
        for way in (way for way in seconds if way not in OWN):
            said = {"library": way, "time": duration(seconds[way])}
            said["vs ecar_kernels"] = times(seconds[way], seconds["ours"])
            others.append(name | said | _reached(row, seconds[way]))
        for way, why in row["failures"].items():
            said = {"op": row["op"], "library": NAMES.get(way, way), "not measured because": why}
            refused[tuple(said.values())] = said
    return tables(own, others, list(refused.values()), overheads)


def speedups(row: Row) -> dict[str, float]:
    """Eager's and torch.compile's time over ecar_kernels'; of those that were timed."""
    seconds = medians(row)
    return {way: seconds[way] / seconds["ours"] for way in OWN[:2] if way in seconds}


def _ratios(row: Row) -> dict[str, str]:
    found = speedups(row)
    return {f"vs {NAMES[way]}": times(found.get(way)) for way in OWN[:2]}


def _reached(row: Row, seconds: float) -> dict[str, str]:
    # GEMMs are judged by their FLOPs, the rest by their bytes.
    flops, moved = 2 * row["multiply_adds"], row["bytes"]
    return {
        "rate": f"{1e-9 * (flops or moved) / seconds:.1f} {'GFLOP/s' if flops else 'GB/s'}",
        "of the floor": f"{row['floor_seconds'] / seconds:.0%}",
    }


def overview(record: dict[str, Any], op: str) -> str:
    """An op at the stages of E-CAR-S: forward of one image, backward of a batch of 8."""
    of_op = {case_of(row): row for row in record["rows"] if row["op"] == op}
    dtypes = dict.fromkeys(case.dtype for case in of_op)
    cells, said, note = [], {}, ""
    chosen = cases.select(("S",), forward=(1,), backward=(8,), ops=(op,))
    for case, dtype in itertools.product(chosen, dtypes):
        if (row := of_op.get(replace(case, dtype=dtype))) is not None:
            kind = "backward" if case.backward else "forward"
            note = "; backward: a batch of 8" * case.backward
            seconds = {NAMES[way]: duration(medians(row).get(way)) for way in OWN}
            name = f"{kind}, {case.tokens} tokens{f', {dtype}' * (len(dtypes) > 1)}"
            cells.append({"E-CAR-S": name} | seconds | _ratios(row))
            facts = record["runs"][row["run"]]
            said[results.briefly(facts, f"{dtype}, ")] = True
    return f"{table(cells)}\n\n{'; '.join(said)}. Forward: one image{note}." if cells else ""


def main() -> int:
    parser = commands.parser("", __doc__, seconds=0.5)
    add = parser.add_argument
    add("--full", action="store_true",
        help="every size, stage and batch, forward and backward (about an hour)")  # fmt: skip
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--dtype", choices=("float32", "bfloat16", "float16"),
        help="default: float32, bfloat16 on CUDA")  # fmt: skip
    add("--no-compile", action="store_false", dest="compiling",
        help="without torch.compile and FlexAttention, which take seconds a row")  # fmt: skip
    add("--minutes", type=float,
        help="start no row later (default: 14, no limit with --full)")  # fmt: skip
    options = parser.parse_args()
    device = torch.device(options.device)
    dtype = options.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    by_name = {case.name: case for case in choose(options.full, device, dtype)}
    chosen = [by_name[name] for name in commands.chosen(parser, options, by_name)]
    if options.list:
        return 0
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error(f"argument --device: torch {torch.__version__} sees no CUDA GPU here")
    file = results.path("micro", options.results, device)
    minutes = options.minutes or (None if options.full else MINUTES)
    how = {"minutes": minutes, "device": device, "compiling": options.compiling}
    return commands.finish(*run(chosen, file, seconds=options.seconds, **how), file, render)
