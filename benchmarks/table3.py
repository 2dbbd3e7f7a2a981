"""`python -m benchmarks.table3`: E-CAR against diffusers' DiT, as the paper's Table 3 pairs them.

One 256 x 256 image without guidance, 250 steps, random weights, float32, the latent only. A few
steps are run and scaled to 250, as the output says. Both models of a pair take turns; figures are
medians over the rounds.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import dit, environment, models, results, timing
from benchmarks.end_to_end import forget
from benchmarks.models import STEPS, Way, image_seconds, time_image
from benchmarks.results import duration, figures, markdown
from ecar.config import ECARConfig
from ecar.info import count_multiply_adds

PAIRS = {"S": "B", "B": "L", "L": "XL"}  # E-CAR : DiT
SHARES = {"S": 1, "B": 3, "L": 4}
# The paper's latencies: (DiT, E-CAR) on an RTX 4090 and on an i9-13900K, in seconds.
PAPER = {"S": ((1.44, 0.38), (17.94, 3.92)), "B": ((2.73, 0.68), (59.70, 10.95)),
         "L": ((3.42, 0.94), (75.35, 18.22))}
WANTED = {"S": 16, "B": 14, "L": 12}  # section 7 of the design: at least


def measure(size: str, seconds: float, *, config: ECARConfig | None = None,
            peer: dit.DiTSize | None = None, steps: int = STEPS,
            timed_steps: int = 4) -> dict[str, Any]:
    """One pair's record."""
    config = ECARConfig.preset(size) if config is None else config
    peer = dit.SIZES[PAIRS[size]] if peer is None else peer
    way = Way(models.accelerated(models.random_model(config)), "auto")
    sampler = dit.Sampler(peer, steps)
    runs = {"ecar": lambda: image_seconds(time_image(way, timed_steps, steps), steps),
            "dit": lambda: sampler.time_image(timed_steps)}
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for done in models.rounds(runs, seconds):
        for name, value in done.items():
            taken[name].append(value)
    ours = sum(stage.total for stage in count_multiply_adds(config, steps=steps))
    return {"size": size, "steps": steps, "timed_steps_of_a_stage": max(3, timed_steps),
            "timed_steps_of_dit": timed_steps, "seconds": timing.summaries(taken),
            # Of each round, so that its spread is known.
            "ratio": timing.summary([theirs / mine for theirs, mine in
                                     zip(taken["dit"], taken["ecar"], strict=True)]),
            "multiply_adds": {"ecar": ours, "dit": dit.count(peer, steps, guided=False)[1]}}


def render(record: dict[str, Any]) -> str:
    header = ("E-CAR", "DiT", "E-CAR latency", "DiT latency", "ratio", "wanted", "multiply-adds",
              "paper, i9", "paper, 4090")
    rows = []
    for row in record["rows"]:
        size, median = row["size"], {k: v["median"] for k, v in row["seconds"].items()}
        gpu, cpu = (theirs / mine for theirs, mine in PAPER[size])
        work = row["multiply_adds"]["dit"] / row["multiply_adds"]["ecar"]
        ratio = row["ratio"]["median"]
        rows.append((size, f"{PAIRS[size]}/2", duration(median["ecar"]), duration(median["dit"]),
                     f"{figures(ratio)}x{'' if ratio >= WANTED[size] else ' MISSED'}",
                     f"{WANTED[size]}x", f"{figures(work)}x", f"{cpu:.1f}x", f"{gpu:.1f}x"))
    first = record["rows"][0]
    return (f"{markdown(header, rows)}\n\nOne 256 x 256 image's latent, no guidance, random "
            f"weights, float32. Extrapolated: {first['timed_steps_of_a_stage']} steps of each "
            f"stage of E-CAR\nand {first['timed_steps_of_dit']} of DiT were run and scaled to "
            f"{first['steps']}. DiT is diffusers' in eager mode. `multiply-adds` is the ratio of "
            "the counts.")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.table3",
                                     description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", choices=PAIRS, default=tuple(PAIRS))
    parser.add_argument("--minutes", type=float, default=3.0,
                        help="of measuring (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--timed-steps", type=int, default=4,
                        help="of each stage and of DiT (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=results.FOLDER,
                        help="folder to write <device>/table3.json into")
    options = parser.parse_args(arguments)
    facts, rows = environment.describe(), []
    file = results.path("table3", options.results)
    whole = sum(SHARES[size] for size in options.sizes)
    for size in options.sizes:
        rows.append(measure(size, 60 * options.minutes * SHARES[size] / whole,
                            steps=options.steps, timed_steps=options.timed_steps))
        forget()
        results.write(file, "table3", facts, rows=rows)  # what is there survives an end
        ratio = rows[-1]["ratio"]["median"]
        print(f"E-CAR-{size}: {ratio:.1f}x", flush=True)
    print(f"{render({'rows': rows})}\n\n{results.where(facts)}\n\nwrote {file}")


if __name__ == "__main__":
    main()
