"""`python -m benchmarks.table3`: E-CAR against DiT and MAR, as the paper's Table 3 pairs them.

One 256 x 256 image without guidance, random weights, float32, the latent only: E-CAR and
diffusers' DiT of 250 steps, MAR (`benchmarks.mar`, on our ops) of 64 and 256 AR steps with 100
diffusion steps each. A few steps are run and scaled, as the output says. The models of a row take
turns; figures are medians over the rounds.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import dit, environment, mar, models, results, timing
from benchmarks.end_to_end import forget
from benchmarks.models import STEPS, Way, image_seconds, time_image
from benchmarks.results import duration, figures, markdown
from ecar.config import ECARConfig
from ecar.info import count_multiply_adds

PAIRS = {"S": "B", "B": "L", "L": "XL"}  # E-CAR : DiT
MARS = {"S": "B", "B": "L", "L": "H"}  # E-CAR : MAR
SHARES = {"S": 1, "B": 3, "L": 4}
# The paper's latencies: (DiT, E-CAR) on an RTX 4090 and on an i9-13900K, in seconds.
PAPER = {
    "S": ((1.44, 0.38), (17.94, 3.92)),
    "B": ((2.73, 0.68), (59.70, 10.95)),
    "L": ((3.42, 0.94), (75.35, 18.22)),
}
# The same of MAR; the paper does not say of how many AR steps.
PAPER_MAR = {"S": (40.61, 146.26), "B": (45.37, 257.02), "L": (59.54, 463.62)}
TIMED_AR_STEPS = 3
DIT_SHARE = 0.4  # of the time; MAR's rounds are longer
Runs = dict[str, Callable[[], float]]
WANTED = {"S": 16, "B": 14, "L": 12}  # section 7 of the design: at least


def measure(
    size: str,
    seconds: float,
    *,
    config: ECARConfig | None = None,
    peer: dit.DiTSize | None = None,
    masked: mar.MARSize | None = None,
    steps: int = STEPS,
    timed_steps: int = 4,
) -> dict[str, Any]:
    """The record of one size of E-CAR and its peers; None: the sizes of the paper."""
    config = ECARConfig.preset(size) if config is None else config
    peer = dit.SIZES[PAIRS[size]] if peer is None else peer
    masked = mar.SIZES[MARS[size]] if masked is None else masked
    way = Way(models.accelerated(models.random_model(config)), "auto")

    def ours() -> float:
        return image_seconds(time_image(way, timed_steps, steps), steps)

    # One peer after the other, for their weights and packed ones fill a memory.
    pair = _take_turns({"ecar": ours, **_dit_run(peer, steps, timed_steps)}, seconds * DIT_SHARE)
    others = _take_turns(
        {"ecar": ours, **_mar_runs(masked, timed_steps)}, seconds * (1 - DIT_SHARE)
    )
    counts = {_mar(ar_steps): mar.multiply_adds(masked, ar_steps) for ar_steps in mar.AR_STEPS}
    work = sum(stage.total for stage in count_multiply_adds(config, steps=steps))
    return {
        "size": size,
        "steps": steps,
        "timed_steps_of_a_stage": max(3, timed_steps),
        "timed_steps_of_dit": timed_steps,
        "timed_steps_of_mar": [TIMED_AR_STEPS, timed_steps],
        "seconds": timing.summaries(others | pair),
        "ratio": _ratios(pair)["dit"],
        "mar_ratios": _ratios(others),
        "multiply_adds": {"ecar": work, "dit": dit.count(peer, steps, guided=False)[1], **counts},
    }


def _dit_run(peer: dit.DiTSize, steps: int, timed_steps: int) -> Runs:
    sampler = dit.Sampler(peer, steps)
    return {"dit": lambda: sampler.time_image(timed_steps)}


def _mar_runs(masked: mar.MARSize, timed_steps: int) -> Runs:
    sampler = mar.Sampler(masked)
    return {
        _mar(ar_steps): lambda ar_steps=ar_steps: sampler.time_image(
            ar_steps, TIMED_AR_STEPS, timed_steps
        )
        for ar_steps in mar.AR_STEPS
    }


def _take_turns(runs: Runs, seconds: float) -> dict[str, list[float]]:
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for done in models.rounds(runs, seconds):
        for name, value in done.items():
            taken[name].append(value)
    return taken


def _ratios(taken: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Of each round, so that their spread is known."""
    return {
        name: timing.summary(
            [theirs / mine for theirs, mine in zip(values, taken["ecar"], strict=True)]
        )
        for name, values in taken.items()
        if name != "ecar"
    }


def _mar(ar_steps: int) -> str:
    return f"mar, {ar_steps} AR steps"


def render(record: dict[str, Any]) -> str:
    header = (
        "E-CAR",
        "DiT",
        "E-CAR latency",
        "DiT latency",
        "ratio",
        "wanted",
        "multiply-adds",
        "paper, i9",
        "paper, 4090",
    )
    rows = []
    for row in record["rows"]:
        size, median = row["size"], {k: v["median"] for k, v in row["seconds"].items()}
        gpu, cpu = (theirs / mine for theirs, mine in PAPER[size])
        work = row["multiply_adds"]["dit"] / row["multiply_adds"]["ecar"]
        ratio = row["ratio"]["median"]
        rows.append(
            (
                size,
                f"{PAIRS[size]}/2",
                duration(median["ecar"]),
                duration(median["dit"]),
                f"{figures(ratio)}x{'' if ratio >= WANTED[size] else ' MISSED'}",
                f"{WANTED[size]}x",
                f"{figures(work)}x",
                f"{cpu:.1f}x",
                f"{gpu:.1f}x",
            )
        )
    first = record["rows"][0]
    text = (
        f"{markdown(header, rows)}\n\nOne 256 x 256 image's latent, no guidance, random "
        f"weights, float32. Extrapolated: {first['timed_steps_of_a_stage']} steps of each "
        f"stage of E-CAR\nand {first['timed_steps_of_dit']} of DiT were run and scaled to "
        f"{first['steps']}. DiT is diffusers' in eager mode. `multiply-adds` is the ratio of "
        "the counts."
    )
    return f"{text}\n\n{_render_mar(record['rows'])}" if "mar_ratios" in first else text


def _render_mar(rows: list[dict[str, Any]]) -> str:
    header = (
        "E-CAR",
        "MAR",
        "AR steps",
        "E-CAR latency",
        "MAR latency",
        "ratio",
        "multiply-adds",
        "paper, i9",
        "paper, 4090",
    )
    cells = []
    for row in rows:
        size, median = row["size"], {k: v["median"] for k, v in row["seconds"].items()}
        gpu, cpu = (
            theirs / mine[1] for theirs, mine in zip(PAPER_MAR[size], PAPER[size], strict=True)
        )
        for ar_steps in mar.AR_STEPS:
            name = _mar(ar_steps)
            work = row["multiply_adds"][name] / row["multiply_adds"]["ecar"]
            cells.append(
                (
                    size,
                    f"MAR-{MARS[size]}",
                    str(ar_steps),
                    duration(median["ecar"]),
                    duration(median[name]),
                    f"{figures(row['mar_ratios'][name]['median'])}x",
                    f"{figures(work)}x",
                    f"{cpu:.1f}x",
                    f"{gpu:.1f}x",
                )
            )
    ar_steps, steps = rows[0]["timed_steps_of_mar"]
    return (
        f"{markdown(header, cells)}\n\nMAR is a module of its sizes on our ops, random "
        f"weights, float32. Extrapolated: {ar_steps} AR steps, evenly spread, were\nrun with "
        f"{steps} of their {mar.DIFFUSION_STEPS} diffusion steps, and scaled. The paper does "
        "not say of how many AR steps its ratios are;\nMAR's own results are of 256."
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.table3", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--sizes", nargs="+", choices=PAIRS, default=tuple(PAIRS))
    parser.add_argument(
        "--minutes", type=float, default=5.0, help="of measuring (default: %(default)s)"
    )
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument(
        "--timed-steps",
        type=int,
        default=4,
        help="of each stage, of DiT, and of MAR's diffusion (default: %(default)s)",
    )
    parser.add_argument(
        "--results",
        type=Path,
        default=results.FOLDER,
        help="folder to write <device>/table3.json into",
    )
    options = parser.parse_args(arguments)
    facts, rows = environment.describe(), []
    file = results.path("table3", options.results)
    whole = sum(SHARES[size] for size in options.sizes)
    for size in options.sizes:
        rows.append(
            measure(
                size,
                60 * options.minutes * SHARES[size] / whole,
                steps=options.steps,
                timed_steps=options.timed_steps,
            )
        )
        forget()
        results.write(file, "table3", facts, rows=rows)  # what is there survives an end
        ratio = rows[-1]["ratio"]["median"]
        print(f"E-CAR-{size}: {ratio:.1f}x", flush=True)
    print(f"{render({'rows': rows})}\n\n{results.where(facts)}\n\nwrote {file}")


if __name__ == "__main__":
    main()
