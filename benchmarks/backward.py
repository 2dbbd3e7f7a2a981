"""`python -m benchmarks.backward`: what the time of an elementwise op's backward is made of.

The profile behind the backward rows of `make bench`: the whole call of torch.autograd.grad, ours
and the reference's under torch.compile, each as it is; and of ours, what torch's profiler sees in
ops (the C++ kernel and, with it, the allocation of its outputs). The rest is the call itself:
autograd's engine, which takes a Python thread state for each Function, and Python.
"""

import argparse
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks import cases, environment, rates, results, timing
from benchmarks.micro import variants
from benchmarks.results import duration, markdown
from ecar_kernels.costs import Rates, floor_seconds
from ecar_kernels.registry import FAMILIES

OPS = (*FAMILIES["adaln"], "euler_step", "upsample_renoise_euler")
BATCH = 8
PROFILED = 50  # calls
CALL = "backward call"
NOTE = """

float32. In ops, by torch's profiler: the C++ kernel and its outputs. The call: what is left of
ours, autograd's engine, Python and the freeing of the gradients. The floor: bytes at a copy's rate
in the same run; a call of a few megabytes that the cache holds may lie below it."""


def measure(case: cases.Case, arena: cases.Arena, found: Rates, seconds: float) -> dict[str, Any]:
    """One case's row."""
    functions = {
        name: function
        for name, function in variants.functions(case).items()
        if name in ("compiled", "ours")
    }
    sets = list(cases.input_sets(case, arena))
    for name, function in functions.items():
        if reason := variants.why_not(case, name, function, sets):
            raise RuntimeError(f"{case.op}, {name}: {reason}")
    times = timing.interleave(
        {name: variants.calls(case, function, sets) for name, function in functions.items()},
        seconds,
    )
    return {
        "op": case.op,
        "size": case.size,
        "tokens": case.tokens,
        "batch": case.batch,
        "seconds": timing.summaries(times),
        "ops": in_ops(case, functions, sets),
        "floor_seconds": floor_seconds(variants.case_cost(case, sets[0]), found),
    }


def in_ops(
    case: cases.Case, functions: dict[str, Callable], sets: Sequence[dict[str, Any]]
) -> float:
    """Seconds of our backward's call that lie in ops, as a median; the forwards are left out.

    The ways take turns as where the call is timed, so that the caches are as they are there.
    """
    compiled, ours = (variants.calls(case, functions[name], sets) for name in ("compiled", "ours"))
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(PROFILED):
            next(compiled)()
            call = next(ours)
            with record_function(CALL):
                call()
    taken: Counter[int] = Counter()
    for event in profiler.events():
        if event.name.startswith(("ecar::", "aten::")) and (root := _root(event)).name == CALL:
            taken[root.id] += event.self_cpu_time_total
    return statistics.median(taken.values()) * 1e-6


def _root(event: FunctionEvent) -> FunctionEvent:
    while event.cpu_parent is not None:
        event = event.cpu_parent
    return event


def render(record: dict[str, Any]) -> str:
    header = (
        "backward",
        "size",
        "tokens",
        "batch",
        "torch.compile",
        "ours",
        "in ops",
        "the call",
        "floor of the op",
    )
    return markdown(header, map(_cells, record["rows"])) + NOTE


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    ours, compiled = (row["seconds"][name]["median"] for name in ("ours", "compiled"))
    return (
        row["op"],
        row["size"],
        str(row["tokens"]),
        str(row["batch"]),
        duration(compiled),
        duration(ours),
        duration(row["ops"]),
        duration(max(0.0, ours - row["ops"])),
        duration(row["floor_seconds"]),
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.backward", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--sizes", nargs="+", choices=cases.SIZES, default=["S", "L"])
    parser.add_argument(
        "--ops", nargs="+", choices=OPS, default=OPS, metavar="OP", help="of " + ", ".join(OPS)
    )
    parser.add_argument("--seconds", type=float, default=0.6, help="of measuring for each row")
    parser.add_argument(
        "--results",
        type=Path,
        default=results.FOLDER,
        help="folder to write <device>/backward.json into",
    )
    options = parser.parse_args(arguments)
    environment.keep_memory()
    facts, file = environment.describe(), results.path("backward", options.results)
    found, _ = rates.measure(seconds=2 * options.seconds)
    arena = cases.Arena(cases.ARENA_BYTES, cases.DTYPE)
    rows = [
        measure(case, arena, found, options.seconds)
        for case in cases.select(options.sizes, backward=(BATCH,), ops=options.ops)
    ]
    results.write(file, "backward", facts, rows=rows)
    print(f"{render({'rows': rows})}\n\n{results.where(facts)}\n\nwrote {file}")


if __name__ == "__main__":
    main()
