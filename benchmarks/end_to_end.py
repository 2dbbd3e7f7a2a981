"""`python -m benchmarks.end_to_end`: one E-CAR image: eager, compiled, ours, and its GEMMs alone.

Random weights, one image, 250 steps, no guidance, float32. A few steps of each stage are run and
scaled to 250, as the output says. All ways take turns; figures are medians over the rounds.

torch.compile makes one graph of S's whole flow heads. Of B and L, with four and six blocks a head,
it compiles the repeated block, as PyTorch recommends for deep models; --compile-whole has it make
whole graphs of them, too, in minutes.
"""

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import environment, models, rates, results, roofline, timing
from benchmarks.image_gemms import ImageGemms
from benchmarks.models import STEPS, StageTime, Way, image_seconds, time_image
from benchmarks.results import duration, figures, markdown
from benchmarks.roofline import Roofline
from ecar.config import ECARConfig
from ecar_kernels.costs import Rates
from ecar_kernels.flow_block import packing

SIZES = ("S", "B", "L")
SHARES = {"S": 1, "B": 3, "L": 5}  # of the time: an image of L takes longest
COMPILED = {
    "whole": "E-CAR-{size}: torch.compile of whole flow heads; its first run took "
    "{compile_seconds:.0f} s.",
    "blocks": "E-CAR-{size}: torch.compile of the repeated block, one graph a stage, as PyTorch "
    "recommends for deep models;\nits first run took {compile_seconds:.0f} s.",
}
NON_GEMM = 0.10  # section 7 of the design: of the GEMMs' own time, at most
FLOOR = (
    "floor: all that must be read and multiplied (`python -m benchmarks.roofline`), at the "
    "rates of a copy and of\na large product in the same run.\n"
)
WHOLE = ("S",)  # sizes whose heads are compiled whole
FASTER_THAN_EAGER = {"S": 1.4, "L": 1.3}  # likewise: at least


def measure(
    size: str,
    config: ECARConfig,
    seconds: float,
    *,
    steps: int = STEPS,
    timed_steps: int = 4,
    compile: str | None = "whole",
    rates_found: Rates | None = None,
) -> dict[str, Any]:
    """One size's record; compile: "whole" heads, "blocks", or None; with rates, the floor too."""
    model = models.random_model(config)
    ways = models.ways(model, compile)
    gemms = ImageGemms(ways["ours"].model, steps)
    runs = {name: _timer(way, timed_steps, steps) for name, way in ways.items()}
    taken: dict[str, list[list[StageTime]]] = {}
    begin = time.perf_counter()
    if compile is not None:
        runs["compiled"]()
    compile_seconds = time.perf_counter() - begin
    for done in models.rounds({**runs, "gemms": lambda: gemms.time(timed_steps)}, seconds):
        alone = done.pop("gemms")
        for name, stages in (done | alone).items():
            taken.setdefault(name, []).append(stages)
    return {
        "size": size,
        "steps": steps,
        "timed_steps_of_a_stage": max(3, timed_steps),
        "seconds": {
            name: timing.summary([image_seconds(stages, steps) for stages in rounds])
            for name, rounds in taken.items()
        },
        "stages": {name: _medians(rounds) for name, rounds in taken.items()},
        "compile": compile,
        "compile_seconds": compile_seconds,
    } | ({} if rates_found is None else {"floor": _floor(config, steps, rates_found)})


def _floor(config: ECARConfig, steps: int, rates_found: Rates) -> dict[str, float]:
    """What the image must read and multiply at least, and the seconds that this takes."""
    work = Roofline(config, steps=steps, itemsize=4).total()
    least = roofline.floor(work, rates_found)
    return {
        "bytes": work.bytes,
        "multiply_adds": work.multiply_adds,
        "memory": least.memory,
        "arithmetic": least.arithmetic,
        "seconds": least.seconds,
    }


def _timer(way: Way, timed_steps: int, steps: int) -> Callable[[], list[StageTime]]:
    return lambda: time_image(way, timed_steps, steps)


def _medians(rounds: list[list[StageTime]]) -> list[dict[str, float]]:
    return [
        {
            "once": statistics.median(time.once for time in stage),
            "step": statistics.median(time.step for time in stage),
        }
        for stage in zip(*rounds, strict=True)
    ]


def forget() -> None:
    """Frees what a size left behind, for the next one."""
    torch._dynamo.reset()
    packing.forget_packed()
    gc.collect()


def render(record: dict[str, Any]) -> str:
    header = (
        "model",
        "eager",
        "compiled",
        "ours",
        "eager / ours",
        "compiled / ours",
        "linear layers alone",
        "with attention's products",
        "non-GEMM",
        "non-GEMM beside attention",
    )
    floors = any("floor" in row for row in record["rows"])  # results of before have none
    text = markdown(
        header + (("floor", "floor / ours") if floors else ()),
        [_cells(row) + (_floor_cells(row) if floors else ()) for row in record["rows"]],
    )
    steps = [
        f"{row['timed_steps_of_a_stage']} steps of each stage were run and scaled to "
        f"{row['steps']} in all"
        for row in record["rows"]
    ]
    compiled = "".join(
        COMPILED[row["compile"]].format(**row) + "\n"
        for row in record["rows"]
        if row.get("compile") is not None
    )
    verdicts = "\n".join(verdict for row in record["rows"] for verdict in _verdicts(row))
    return (
        f"{text}\n\nOne image, no guidance, random weights, float32: {steps[0]}. Medians of "
        "interleaved rounds.\nnon-GEMM: ours over its GEMMs alone, less one: over the linear "
        "layers, and over those and attention's products.\n"
        f"{FLOOR if floors else ''}{compiled}\n{verdicts}"
    )


def non_gemm(row: dict[str, Any]) -> tuple[float, float]:
    """Ours over its GEMMs alone, less one: of the linear layers, and with attention's products."""
    median = _medians_of(row)
    linears = median["linears"]
    return (median["ours"] / linears - 1, median["ours"] / (linears + median["attention"]) - 1)


def _medians_of(row: dict[str, Any]) -> dict[str, float]:
    return {name: summary["median"] for name, summary in row["seconds"].items()}


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    median = _medians_of(row)
    compiled = median.get("compiled")
    return (
        f"E-CAR-{row['size']}",
        duration(median["eager"]),
        duration(compiled),
        duration(median["ours"]),
        f"{figures(median['eager'] / median['ours'])}x",
        "-" if compiled is None else f"{figures(compiled / median['ours'])}x",
        duration(median["linears"]),
        duration(median["linears"] + median["attention"]),
        *(f"{value:.0%}" for value in non_gemm(row)),
    )


def _floor_cells(row: dict[str, Any]) -> tuple[str, str]:
    if (floor := row.get("floor")) is None:
        return "-", "-"
    return (duration(floor["seconds"]), f"{floor['seconds'] / _medians_of(row)['ours']:.0%}")


def _verdicts(row: dict[str, Any]) -> list[str]:
    """What section 7 of the design asks for, and whether it is so."""
    median, name = _medians_of(row), f"E-CAR-{row['size']}"

    def said(met: bool, text: str) -> str:
        return f"{name}: {'met' if met else 'MISSED'}: {text}"

    rest = non_gemm(row)[1]
    found = [
        said(
            rest <= NON_GEMM,
            f"non-GEMM {rest:.0%} of the GEMMs (attention's products "
            f"among them), wanted <= {NON_GEMM:.0%}",
        )
    ]
    if (wanted := FASTER_THAN_EAGER.get(row["size"])) is not None:
        ratio = median["eager"] / median["ours"]
        found.append(said(ratio >= wanted, f"{ratio:.2f}x eager, wanted >= {wanted}x"))
    if "compiled" in median:
        ratio = median["compiled"] / median["ours"]
        found.append(said(ratio > 1, f"{ratio:.2f}x torch.compile, wanted > 1x"))
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.end_to_end", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=SIZES)
    parser.add_argument(
        "--minutes",
        type=float,
        default=6.0,
        help="of measuring, without compilation (default: %(default)s)",
    )
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument(
        "--timed-steps",
        type=int,
        default=4,
        help="of each stage that are run, at least 3 (default: %(default)s)",
    )
    parser.add_argument(
        "--compile",
        nargs="*",
        choices=SIZES,
        default=SIZES,
        help="sizes that are compiled, too (default: all)",
    )
    parser.add_argument(
        "--compile-whole",
        nargs="*",
        choices=SIZES,
        default=WHOLE,
        help="of these, whose heads are compiled whole, in minutes for L (default: S)",
    )
    parser.add_argument(
        "--results",
        type=Path,
        default=results.FOLDER,
        help="folder to write <device>/end_to_end.json into",
    )
    options = parser.parse_args(arguments)
    facts, rows = environment.describe(), []
    file = results.path("end_to_end", options.results)
    whole = sum(SHARES[size] for size in options.sizes)
    found, _ = rates.measure()
    for size in options.sizes:
        rows.append(
            measure(
                size,
                ECARConfig.preset(size),
                60 * options.minutes * SHARES[size] / whole,
                steps=options.steps,
                timed_steps=options.timed_steps,
                compile=None
                if size not in options.compile
                else "whole"
                if size in options.compile_whole
                else "blocks",
                rates_found=found,
            )
        )
        forget()
        results.write(file, "end_to_end", facts, rows=rows)  # what is there survives an end
        print(f"E-CAR-{size} done", flush=True)
    print(f"{render({'rows': rows})}\n\n{results.where(facts)}\n\nwrote {file}")


if __name__ == "__main__":
    main()
