"""The paper's Table 3: latencies of E-CAR, DiT and MAR, in the paper's pairs.

One 256 x 256 image without guidance, random weights, float32, the latent only: E-CAR by the paper's
protocol (250 even steps of Euler's), diffusers' DiT of 250 steps, MAR (`benchmarks.paper.mar`, on
this library's ops) of 64 and 256 AR steps with 100 diffusion steps each. A few steps are run and
scaled. The models of a row take turns; figures are medians over the rounds.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks import models, results, timing
from benchmarks.end_to_end import PEERS, forget
from benchmarks.models import STEPS, Way, image_seconds, time_image
from benchmarks.paper import dit, mar
from benchmarks.results import duration, figures, markdown
from ecar import ECARConfig, split_steps
from ecar.cli.parser import step_list
from ecar.info import count_multiply_adds
from ecar.sampling.guidance import Steps

MARS = {"S": "B", "B": "L", "L": "H"}  # E-CAR : MAR
SHARES = {"S": 1, "B": 3, "L": 4}
# The paper's latencies in seconds: E-CAR, DiT, MAR. It does not say of how many AR steps MAR's are.
I9 = {"S": (3.92, 17.94, 146.26), "B": (10.95, 59.70, 257.02), "L": (18.22, 75.35, 463.62)}
RTX_4090 = {"S": (0.38, 1.44, 40.61), "B": (0.68, 2.73, 45.37), "L": (0.94, 3.42, 59.54)}
TIMED_AR_STEPS = 3
DIT_SHARE = 0.4  # of the time; MAR's rounds are longer
Runs = dict[str, Callable[[], float]]


def measure(
    size: str,
    seconds: float,
    *,
    config: ECARConfig | None = None,
    peer: dit.DiTSize | None = None,
    masked: mar.MARSize | None = None,
    steps: Steps = STEPS,
    timed_steps: int = 4,
) -> dict[str, Any]:
    """The record of one size of E-CAR and its peers; None: the sizes of the paper."""
    config = config or ECARConfig.preset(size)
    peer, masked = peer or dit.SIZES[PEERS[size]], masked or mar.SIZES[MARS[size]]
    way = Way(models.accelerated(models.random_model(config)), "auto")
    ours = {"ecar": lambda: image_seconds(time_image(way, timed_steps, steps), steps)}
    # One peer after the other, for their weights and packed ones fill a memory.
    turns = functools.partial(timing.rounds, at_least=3, warm_up=True)
    count = sum(split_steps(steps, config.num_stages))
    pair = turns(ours | _dit(peer, count, timed_steps), seconds * DIT_SHARE)
    others = turns(ours | _mar(masked, timed_steps), seconds * (1 - DIT_SHARE))
    counts = {name(ar_steps): mar.multiply_adds(masked, ar_steps) for ar_steps in mar.AR_STEPS}
    work = sum(stage.total for stage in count_multiply_adds(config, steps=steps))
    return {
        "size": size,
        "steps": count,
        "timed_steps_of_a_stage": max(3, timed_steps),
        "timed_steps_of_dit": timed_steps,
        "timed_steps_of_mar": [TIMED_AR_STEPS, timed_steps],
        "seconds": timing.summaries(others | pair),
        "ratio": _ratios(pair)["dit"],
        "mar_ratios": _ratios(others),
        "multiply_adds": {"ecar": work, "dit": dit.count(peer, count, guided=False)[1], **counts},
    }


def _dit(peer: dit.DiTSize, steps: int, timed_steps: int) -> Runs:
    sampler = dit.Sampler(peer, steps)
    return {"dit": lambda: sampler.time_image(timed_steps)}


def _mar(masked: mar.MARSize, timed_steps: int) -> Runs:
    sampler = mar.Sampler(masked)
    return {
        name(steps): lambda steps=steps: sampler.time_image(steps, TIMED_AR_STEPS, timed_steps)
        for steps in mar.AR_STEPS
    }


def name(ar_steps: int) -> str:
    return f"mar, {ar_steps} AR steps"


def _ratios(taken: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Of each round, so that their spread is known."""
    ours = taken["ecar"]
    return {
        name: timing.summary([theirs / mine for theirs, mine in zip(values, ours, strict=True)])
        for name, values in taken.items()
        if name != "ecar"
    }


def pairs(row: dict[str, Any]) -> list[tuple[str, str, dict[str, float]]]:
    """(peer, its seconds' name, {what: its time over E-CAR's}) of a size's row."""
    size, adds = row["size"], row["multiply_adds"]

    def ratios(key: str, measured: dict[str, float], column: int) -> dict[str, float]:
        return {
            "measured": measured["median"],
            "multiply-adds": adds[key] / adds["ecar"],
            "paper, i9-13900K": I9[size][column] / I9[size][0],
            "paper, RTX 4090": RTX_4090[size][column] / RTX_4090[size][0],
        }

    found = [(f"DiT-{PEERS[size]}/2", "dit", ratios("dit", row["ratio"], 1))]
    for key, measured in row["mar_ratios"].items():
        peer = f"MAR-{MARS[size]}{key.removeprefix('mar')}"
        found.append((peer, key, ratios(key, measured, 2)))
    return found


def render(record: dict[str, Any]) -> str:
    header = (
        "E-CAR", "peer", "E-CAR latency", "peer latency", "ratio", "multiply-adds",
        "paper, i9", "paper, 4090",
    )  # fmt: skip
    rows = [
        (
            row["size"],
            peer,
            *(duration(row["seconds"][name]["median"]) for name in ("ecar", key)),
            *(f"{figures(value)}x" for value in ratios.values()),
        )
        for row in record["rows"]
        for peer, key, ratios in pairs(row)
    ]
    first = record["rows"][0]
    return (
        f"{markdown(header, rows)}\n\nOne 256 x 256 image's latent, no guidance, random weights, "
        f"float32. {first['timed_steps_of_a_stage']} steps of each stage of E-CAR,\n"
        f"{first['timed_steps_of_dit']} of DiT, {first['timed_steps_of_mar'][0]} AR steps of MAR "
        f"with {first['timed_steps_of_mar'][1]} of their {mar.DIFFUSION_STEPS} diffusion steps "
        "were run and scaled. DiT is\ndiffusers' in eager mode, MAR a module of its sizes on this "
        "library's ops. The paper does not say of how\nmany AR steps its MAR ratios are."
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = results.parser("paper.table3", __doc__)
    parser.add_argument("--sizes", nargs="+", choices=PEERS, default=tuple(PEERS))
    parser.add_argument("--minutes", type=float, default=5.0, help="of measuring (default: 5)")
    parser.add_argument("--steps", type=step_list, default=STEPS, help="default: %(default)s")
    parser.add_argument(
        "--timed-steps", type=int, default=4, help="of each kind that are run (default: 4)"
    )
    options = parser.parse_args(arguments)
    facts, rows = results.describe(), []
    shares = sum(SHARES[size] for size in options.sizes)
    for size in options.sizes:
        seconds = 60 * options.minutes * SHARES[size] / shares
        given = {"steps": options.steps, "timed_steps": options.timed_steps}
        rows.append(measure(size, seconds, **given))
        forget()
        # Sizes that are done survive an interruption.
        results.write(results.path("table3", options.results), "table3", facts, rows=rows)
        print(f"E-CAR-{size}: {figures(rows[-1]['ratio']['median'])}x", flush=True)
    results.finish(options.results, "table3", facts, render, rows=rows)


if __name__ == "__main__":
    main()
