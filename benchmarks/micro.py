"""Each op at the stages of models and at 64 MiB, by all ways to compute it, and its floor.

All ways to compute a row take turns, so that a machine's moods hit all of them. Inputs are used
in turn from sets that are larger than the cache. An "overhead" row is what a call costs besides
its arithmetic: at 16 x 768 out of the cache, and with one token of 8 channels ("least").

Results are {"runs": [{environment, commit, rates}], "rows": [{..., "run": its index}]}. A row that
is measured again replaces the older one; all other rows stay, with the run they are of.
"""

import itertools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ecar_kernels
from benchmarks import cases, peers, rates, results, timing
from benchmarks.cases import Case
from benchmarks.results import duration, figures, markdown
from benchmarks.timing import Call
from ecar_kernels.costs import Cost, Rates, backward_cost, cost, floor_seconds
from ecar_kernels.registry import FAMILIES, resolve

DTYPE = cases.DTYPE
MIN_ROUNDS, MAX_ROUNDS = 5, 2000
LONG_ROUND, LONG_ROUNDS = 1.5, 3  # seconds of a round from which on fewer are enough
CALLS = 100  # in a round of an overhead row
NAMES = {"compiled": "torch.compile", "ours": "ecar_kernels"}
OWN = ("eager", "compiled", "ours")
# Ways that hold attention's scores, and how many times at once, as seen of the eager reference.
HOLD_SCORES = ("eager", "compiled", "SDPA math")
SCORES_HELD = {False: 3, True: 6}
KEY = ("op", "size", "tokens", "batch", "backward", "whole", "overhead")
Row = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """A row to measure."""

    case: Case
    overhead: bool = False

    @property
    def name(self) -> str:
        return f"{self.case.op}-overhead" if self.overhead else self.case.name


def jobs(full: bool = False, words: Sequence[str] = ()) -> list[Job]:
    """Those whose names contain all words, the most important first."""
    chosen = cases.every() if full else cases.default()
    found = [Job(Case(op, 16, 1, cases.SIZES[0]), overhead=True) for op in cases.OPS]
    found += [Job(case) for case in dict.fromkeys([*cases.at_64_mib(), *chosen])]
    return [job for job in found if all(word in job.name for word in words)]


def run(
    chosen: Sequence[Job],
    file: Path,
    *,
    seconds: float = 0.5,
    minutes: float | None = None,
    interrupted: Callable[[], bool] = lambda: False,
) -> list[Row]:
    """Measures rows and merges each into the file before the next is begun; returns them.

    Rows that would begin after `minutes` are left out. An exception, KeyboardInterrupt among
    them, loses the row that is being measured and no other. interrupted: asked before each row,
    where a KeyboardInterrupt was swallowed by what was measured.
    """
    results.keep_memory()
    before = results.read(file) if file.exists() else {"kind": "micro", "runs": [], "rows": []}
    if before["kind"] != "micro":
        raise ValueError(f"{file}: expected a result of kind 'micro', got {before['kind']!r}")
    facts, begin = results.describe(), time.monotonic()
    best, tried = rates.measure(seconds=2 * seconds)
    this = {"environment": facts, "commit": results.commit(), "rates": _recorded(best, tried)}
    arena, rows = cases.Arena(cases.ARENA_BYTES, DTYPE), []
    for index, job in enumerate(chosen):
        if interrupted():
            raise KeyboardInterrupt
        taken = time.monotonic() - begin
        if minutes is not None and taken > 60 * minutes:
            print(f"{minutes:g} minutes are over: {len(chosen) - index} rows were left out")
            break
        measured = overhead if job.overhead else measure
        rows.append(measured(job.case, arena, best, seconds))
        results.save(file, merged(before, this, rows))
        median = rows[-1]["seconds"]["ours"]["median"]
        print(
            f"[{index + 1}/{len(chosen)}, {taken / 60:.1f} min] {job.name}: {duration(median)}",
            flush=True,
        )
    return rows


def _recorded(best: Rates, tried: dict[str, float]) -> dict[str, Any]:
    return {
        "bytes_per_second": best.bytes_per_second,
        "multiply_adds_per_second": best.multiply_adds_per_second,
        "tried": tried,
    }


def key(row: Row) -> tuple:
    """What a row times; two rows with one key are measurements of the same."""
    return tuple(row.get(name, False) for name in KEY)


def merged(record: dict[str, Any], this: dict[str, Any], rows: Sequence[Row]) -> dict[str, Any]:
    """The record with the rows of a run: in the place of those with the same key, or at the end."""
    runs = [*record["runs"], this]
    found = {key(row): row for row in record["rows"]}
    found |= {key(row): {**row, "run": len(runs) - 1} for row in rows}
    used = sorted({row["run"] for row in found.values()})
    return {
        "kind": "micro",
        "runs": [runs[index] for index in used],
        "rows": [{**row, "run": used.index(row["run"])} for row in found.values()],
    }


@torch.no_grad()
def overhead(case: Case, arena: cases.Arena, best: Rates, seconds: float) -> Row:
    """What a call costs: bound, through the public function, eager; and all with `least`."""
    ours = resolve(case.op, device="cpu", dtype=DTYPE)
    public = getattr(ecar_kernels, case.op)
    eager = resolve(case.op, device="cpu", dtype=DTYPE, backend="reference")
    arguments = cases.inputs(case, arena)
    small = least(arguments)
    ways = {
        "ours": (ours, arguments),
        "api": (public, arguments),
        "eager": (eager, arguments),
        "least": (ours, small),
        "api, least": (public, small),
        "eager, least": (eager, small),
    }

    def turns(function: Callable, given: dict) -> Iterator[Call]:
        while True:
            function(**given)  # the first call after another way's is not timed
            yield lambda: [function(**given) for _ in range(CALLS)]

    variants = {name: turns(*way) for name, way in ways.items()}
    for calls in variants.values():
        next(calls)()
    times = timing.interleave(variants, seconds, at_most=200)
    return identity(case) | {
        "overhead": True,
        "calls": CALLS,
        "seconds": timing.summaries(times, CALLS),
    }


def identity(case: Case) -> Row:
    """What a row is of."""
    return {"op": case.op, "size": case.size, "tokens": case.tokens, "batch": case.batch}


def least(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments cut down to one token of 8 channels, or one pixel."""

    def cut(name: str, value: Any) -> Any:
        if name == "shape":
            return (1, 1, 1)
        if name == "stage_lengths":
            return (1,)
        if not isinstance(value, Tensor) or name == "seeds":
            return value
        if name in ("q", "k", "v"):
            return value[:, :1, :1, :8]
        if value.ndim == 4:
            return value[:, :1, :1, :1]
        if value.ndim == 3:
            return value[:, :1, :8]
        if name == "positions":
            return value[:1, :8]
        return value[:8, :8].clone() if value.ndim == 2 else value[:8]

    return {name: cut(name, value) for name, value in arguments.items()}


def measure(case: Case, arena: cases.Arena, best: Rates, seconds: float) -> Row:
    """One row: each way's median and quartiles, or why it could not be measured."""
    sets = list(cases.input_sets(case, arena))
    ways, failures = functions(case), {}
    variants: dict[str, Iterator[Call]] = {}
    for name, function in ways.items():
        if (reason := why_not(case, name, function, sets)) is None:
            variants[name] = calls(case, function, sets)
        elif not reason.endswith("is not installed"):  # which the run's versions say
            failures[name] = reason
    variants["ours"] = variants.pop("ours")  # the last of a round
    start = time.perf_counter()
    for turns in variants.values():
        next(turns)()
    long = time.perf_counter() - start > LONG_ROUND
    times = timing.interleave(
        variants, seconds, at_least=LONG_ROUNDS if long else MIN_ROUNDS, at_most=MAX_ROUNDS
    )
    needed = case_cost(case, sets[0])
    return identity(case) | {
        "backward": case.backward,
        "whole": case.whole,
        "sets": len(sets),
        "backend": ways["ours"].backend,
        "bytes": needed.bytes,
        "multiply_adds": needed.multiply_adds,
        "floor_seconds": floor_seconds(needed, best),
        "seconds": timing.summaries(times),
        "failures": failures,
    }


def functions(case: Case) -> dict[str, Callable]:
    """Each way's function, with the op's signature; "ours" is ecar_kernels'."""
    reference = resolve(case.op, device="cpu", dtype=DTYPE, backend="reference")
    torch._dynamo.reset()  # one function has a graph for each shape, and a limit of graphs
    compiled = torch.compile(reference, fullgraph=True, dynamic=False)
    ours = resolve(case.op, device="cpu", dtype=DTYPE, width=case.op_width)
    return {"eager": reference, "compiled": compiled, "ours": ours} | peers.functions(case.op)


def calls(case: Case, function: Callable, sets: Sequence[dict[str, Any]]) -> Iterator[Call]:
    """Endless calls with the sets in turn; backward, each comes with its forward just done."""
    for arguments in itertools.cycle(sets):
        yield (
            _backward(function, arguments)
            if case.backward
            else lambda arguments=arguments: _forward(function, arguments)
        )


def why_not(
    case: Case, name: str, function: Callable, sets: Sequence[dict[str, Any]]
) -> str | None:
    """Warms a way up; returns why it cannot serve the case, None if it can.

    Graphs are compiled by one call. "ours" packs each set's weights, if the op has weights.
    """
    if name in HOLD_SCORES and (size := _score_bytes(case, sets[0])) > _memory() / 2:
        return f"its scores would take {size / 1e9:.0f} GB"
    count = len(sets) if name == "ours" and case.op in FAMILIES["flow_block"] else 1

    def warm_up() -> None:
        for call in itertools.islice(calls(case, function, sets), count):
            call()

    if name in ("ours", "eager"):  # these must work
        warm_up()
        return None
    return peers.why_not(warm_up)


def _score_bytes(case: Case, arguments: dict[str, Any]) -> int:
    if case.op != "stage_attention":
        return 0
    q, k = arguments["q"], arguments["k"]
    scores = q.shape[0] * q.shape[2] * q.shape[1] * k.shape[1] * q.element_size()
    return SCORES_HELD[case.backward] * scores


def _memory() -> int:
    """Bytes of the machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@torch.no_grad()
def _forward(function: Callable, arguments: dict[str, Any]) -> Any:
    # Not in inference mode, whose tensors have no version: no weight would be packed.
    return function(**arguments)


def _backward(function: Callable, arguments: dict[str, Any]) -> Call:
    given = {
        name: value.detach().requires_grad_()
        if isinstance(value, Tensor) and value.is_floating_point()
        else value
        for name, value in arguments.items()
    }
    leaves = [v for v in given.values() if isinstance(v, Tensor) and v.requires_grad]
    with torch.enable_grad():
        outputs = function(**given)
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    gradients = [torch.randn_like(output) for output in outputs]
    # A peer may not know all arguments.
    return lambda: torch.autograd.grad(outputs, leaves, gradients, allow_unused=True)


def case_cost(case: Case, arguments: dict[str, Any]) -> Cost:
    """Bytes and multiply-adds of one call, forward or backward."""
    meta = {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in arguments.items()}
    if case.op == "initial_noise":
        shape = len(arguments["seeds"]), *arguments["shape"]
        outputs: Any = torch.empty(shape, dtype=arguments["dtype"], device="meta")
    elif case.op == "upsample_renoise_euler":
        x = meta["x"]
        outputs = (x, x.new_empty(*x.shape[:2], 2 * x.shape[2], 2 * x.shape[3]))
    else:
        outputs = resolve(case.op, device="meta", dtype=DTYPE, backend="reference")(**meta)
    return (backward_cost if case.backward else cost)(case.op, meta, outputs)


def render(record: dict[str, Any]) -> str:
    """Tables of the ops, of other libraries, of what was not measured, and of a call's cost."""
    rows = [row for row in record["rows"] if not row.get("overhead")]
    overheads = [row for row in record["rows"] if row.get("overhead")]
    case = ("op", "size", "tokens", "batch")
    parts = []
    if rows:
        header = (*case, "time", "vs eager", "vs torch.compile", "rate", "of the floor")
        cells = map(_cells, rows)
        if len(record["runs"]) > 1:
            header = (*header, "run")
            cells = [(*_cells(row), str(row["run"] + 1)) for row in rows]
        parts.append(markdown(header, cells))
    if others := [(row, name) for row in rows for name in row["seconds"] if name not in OWN]:
        header = (*case, "library", "time", "vs ecar_kernels", "rate", "of the floor")
        parts.append(markdown(header, itertools.starmap(_peer_cells, others)))
    reasons = dict.fromkeys(
        (_name(row), NAMES.get(name, name), why)
        for row in rows
        for name, why in row["failures"].items()
    )
    if reasons:
        parts.append(markdown(("op", "library", "not measured because"), reasons))
    if overheads:
        ways = ("ours", "api", "eager", "least", "api, least", "eager, least")
        parts.append(
            markdown(
                ("a call, 16 x 768", "bound", *ways[1:]),
                [
                    (row["op"], *(duration(row["seconds"][way]["median"]) for way in ways))
                    for row in overheads
                ],
            )
        )
    return "\n\n".join([*parts, *(_run_line(*run) for run in enumerate(record["runs"], 1))])


def _run_line(number: int, this: dict[str, Any]) -> str:
    copy, gemm = (this["rates"][name] for name in ("bytes_per_second", "multiply_adds_per_second"))
    return (
        f"Run {number}: {results.where(this['environment'])}; copy {copy * 1e-9:.1f} GB/s, GEMM "
        f"{2e-9 * gemm:.0f} GFLOP/s"
    )


def _name(row: Row) -> str:
    return row["op"] + (
        " backward" if row["backward"] else ", all stages" if row.get("whole") else ""
    )


def _case_cells(row: Row) -> tuple[str, ...]:
    return (_name(row), row["size"], str(row["tokens"]), str(row["batch"]))


def _rate_cells(row: Row, seconds: float) -> tuple[str, str]:
    # GEMMs are judged by their FLOPs, the rest by their bytes.
    adds = row["multiply_adds"]
    rate = f"{2e-9 * adds / seconds:.1f} GFLOP/s"
    if not adds:
        rate = f"{1e-9 * row['bytes'] / seconds:.1f} GB/s"
    return rate, f"{row['floor_seconds'] / seconds:.0%}"


def _medians(row: Row) -> dict[str, float]:
    return {name: found["median"] for name, found in row["seconds"].items()}


def ratios(row: Row) -> list[str]:
    """Times of eager and torch.compile over that of ecar_kernels."""
    times = _medians(row)
    return [
        f"{figures(times[name] / times['ours'])}x" if name in times else "-" for name in OWN[:2]
    ]


def _cells(row: Row) -> tuple[str, ...]:
    ours = _medians(row)["ours"]
    return (*_case_cells(row), duration(ours), *ratios(row), *_rate_cells(row, ours))


def _peer_cells(row: Row, name: str) -> tuple[str, ...]:
    times = _medians(row)
    ratio = f"{figures(times[name] / times['ours'])}x"
    reached = _rate_cells(row, times[name])
    return (*_case_cells(row), name, duration(times[name]), ratio, *reached)


def overview(record: dict[str, Any], op: str, backward_batch: int = 8) -> str:
    """An op at the stages of E-CAR-S: forward of one image, backward of a batch."""
    rows = {
        (row["backward"], row["tokens"]): row
        for row in record["rows"]
        if row["op"] == op
        and row["size"] in ("S", "-")
        and row["tokens"] in cases.STAGES
        and not (row.get("overhead") or row.get("whole"))
        and row["batch"] == (backward_batch if row["backward"] else 1)
    }
    if not rows:
        return ""
    table = markdown(
        ("E-CAR-S", "eager", "torch.compile", "ecar_kernels", "vs eager", "vs torch.compile"),
        [
            (
                f"{'backward' if backward else 'forward'}, {tokens} tokens",
                *(duration(_medians(row).get(name)) for name in OWN),
                *ratios(row),
            )
            for (backward, tokens), row in sorted(rows.items())
        ],
    )
    facts = [record["runs"][row["run"]]["environment"] for row in rows.values()]
    said = dict.fromkeys(
        f"{fact['device']}, {fact['threads']} threads, float32, torch "
        f"{fact['versions']['torch']}, {fact['date'][:10]}"
        for fact in facts
    )
    batch = f"; backward: a batch of {backward_batch}" if any(back for back, _ in rows) else ""
    return f"{table}\n\n{'; '.join(said)}. Forward: one image{batch}."
