"""`python -m benchmarks.scaling`: how an image's time grows with tokens, batch and steps.

E-CAR-S, no guidance, random weights, float32: images of 256, 512 and 1024 pixels (latents of an
eighth of that side), several batches at 256 pixels, several numbers of steps. A few steps of each
stage are run and scaled, as the output says.

And the paper's A.2: attention over n tokens that are made one after the other without a cache,
O(n^3), beside the same in stages that double, O(n^2); each also with a cache of keys and values.
One layer's attention alone, by our op. Of the token-by-token curves a few calls, evenly spread, are
timed and their sum scaled. The exponents are fitted to the times.
"""

import argparse
import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import environment, models, results, timing
from benchmarks.models import STEPS, Way, image_seconds, time_image
from benchmarks.results import duration, figures, markdown
from ecar.config import ECARConfig
from ecar_kernels import resolve

# Latent sides of the stages. At 1024 pixels the patches' tokens are 64 + 256 + 1024 + 4096 = 5440.
PIXELS = {256: (8, 16, 32), 512: (16, 32, 64), 1024: (16, 32, 64, 128)}
BATCHES = (1, 2, 4, 8)
STEP_COUNTS = (25, 50, 100, 250)
TOKENS = (255, 511, 1023, 2047)  # 2^K - 1: K stages that double from one token
HEADS, HEAD_DIM = 6, 64
SAMPLED = 24  # calls of a token-by-token curve that are timed


def image_rows(
    seconds: float,
    *,
    preset: str = "S",
    pixels: dict[int, tuple] = PIXELS,
    batches: Sequence[int] = BATCHES,
    step_counts: Sequence[int] = STEP_COUNTS,
    timed_steps: int = 3,
) -> list[dict[str, Any]]:
    """One record for each size at batch 1, each further batch, and each further step count."""
    sides = {side: ECARConfig.preset(preset, stage_sides=stages) for side, stages in pixels.items()}
    smallest = min(sides)
    cases = [(side, 1, STEPS) for side in sides]
    cases += [(smallest, batch, STEPS) for batch in batches if batch > 1]
    cases += [(smallest, 1, steps) for steps in step_counts if steps != STEPS]
    # A model's cost grows about with its tokens times the batch; time is shared out likewise.
    shares = [sides[side].num_tokens * batch for side, batch, _ in cases]
    rows = []
    for side, group in itertools.groupby(zip(cases, shares, strict=True), lambda c: c[0][0]):
        config = sides[side]
        way = Way(models.accelerated(models.random_model(config)), "auto")
        for (_, batch, steps), share in group:
            runs = {
                "ours": lambda way=way, batch=batch, steps=steps: image_seconds(
                    time_image(way, timed_steps, steps, batch=batch), steps
                )
            }
            taken = [
                done["ours"]
                for done in models.rounds(runs, seconds * share / sum(shares), min_rounds=2)
            ]
            rows.append(
                {
                    "pixels": side,
                    "tokens": config.num_tokens,
                    "batch": batch,
                    "steps": steps,
                    "timed_steps_of_a_stage": max(3, timed_steps),
                    "seconds": timing.summary(taken),
                }
            )
    return rows


def attention_calls(tokens: int, way: str) -> list[tuple[int, int]]:
    """(new tokens, tokens in all) of each call; without a cache, all are queries."""
    ends = (
        range(1, tokens + 1)
        if way.startswith("token by token")
        else [2**k - 1 for k in range(1, tokens.bit_length() + 1)]
    )
    calls = list(itertools.pairwise([0, *ends]))
    if way.endswith("with a cache"):
        return [(end - begin, end) for begin, end in calls]
    return [(end, end) for _, end in calls]


WAYS = ("token by token", "in stages", "token by token, with a cache", "in stages, with a cache")


def attention_rows(seconds: float, tokens: Sequence[int] = TOKENS) -> list[dict[str, Any]]:
    """Seconds of one layer's attention over the making of n tokens, for each way."""
    attention = resolve("stage_attention", device="cpu", dtype=torch.float32, width=HEAD_DIM)
    rows = []
    for way, n in itertools.product(WAYS, tokens):
        calls = attention_calls(n, way)
        chosen = calls
        if len(calls) > SAMPLED:  # the middles of equal parts, so that their mean is the whole's
            chosen = [calls[int((i + 0.5) * len(calls) / SAMPLED)] for i in range(SAMPLED)]
        budget = seconds / len(WAYS) / len(tokens) / len(chosen)
        mean = statistics.fmean(_attention_seconds(attention, *call, budget) for call in chosen)
        rows.append(
            {
                "way": way,
                "tokens": n,
                "calls": len(calls),
                "timed_calls": len(chosen),
                "seconds": mean * len(calls),
            }
        )
    return rows


@torch.no_grad()
def _attention_seconds(attention: Callable, queries: int, keys: int, seconds: float) -> float:
    q = torch.randn(1, queries, HEADS, HEAD_DIM)
    k, v = torch.randn(2, 1, keys, HEADS, HEAD_DIM)
    # Without a cache all tokens are queries, and one square, as the paper counts them.
    lengths = (keys,) if queries == keys else (keys - queries, queries)

    def call() -> None:
        attention(q, k, v, lengths)

    call()
    return statistics.median(
        timing.interleave({"": itertools.repeat(call)}, seconds, min_rounds=3)[""]
    )


def exponent(rows: Sequence[dict[str, Any]]) -> float:
    """p of the least-squares fit seconds = a tokens^p."""
    x, y = ([math.log(row[key]) for row in rows] for key in ("tokens", "seconds"))
    return statistics.linear_regression(x, y).slope


def render(record: dict[str, Any]) -> str:
    images = markdown(
        ("pixels", "tokens", "batch", "steps", "time", "of an image", "of a token and step"),
        [
            (
                str(row["pixels"]),
                str(row["tokens"]),
                str(row["batch"]),
                str(row["steps"]),
                duration(median := row["seconds"]["median"]),
                duration(median / row["batch"]),
                duration(median / row["batch"] / row["tokens"] / row["steps"]),
            )
            for row in record["images"]
        ],
    )
    curves = {way: [row for row in record["attention"] if row["way"] == way] for way in WAYS}
    lengths = [row["tokens"] for row in curves[WAYS[0]]]
    attention = markdown(
        ("attention, one layer", *(f"{n} tokens" for n in lengths), "grows as"),
        [
            (way, *(duration(row["seconds"]) for row in rows), f"n^{figures(exponent(rows))}")
            for way, rows in curves.items()
        ],
    )
    timed = record["images"][0]["timed_steps_of_a_stage"]
    return (
        f"{images}\n\nE-CAR-{record['preset']}, no guidance, random weights, float32: {timed} "
        f"steps of each stage were run and scaled.\n\n{attention}\n\nOf the token-by-token "
        f"ways, {SAMPLED} calls, evenly spread, were timed and scaled. Small calls cost what "
        "a call costs:\nexponents below the theory's (3 and 2 without a cache) are of sizes "
        "where that still shows."
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scaling", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--minutes", type=float, default=3.0, help="of measuring (default: %(default)s)"
    )
    parser.add_argument("--pixels", type=int, nargs="+", choices=PIXELS, default=tuple(PIXELS))
    parser.add_argument(
        "--results",
        type=Path,
        default=results.FOLDER,
        help="folder to write <device>/scaling.json into",
    )
    options = parser.parse_args(arguments)
    facts, file = environment.describe(), results.path("scaling", options.results)
    seconds = 60 * options.minutes
    record = {
        "preset": "S",
        "attention": attention_rows(seconds / 4),
        "images": image_rows(
            seconds * 3 / 4, pixels={side: PIXELS[side] for side in options.pixels}
        ),
    }
    results.write(file, "scaling", facts, **record)
    print(f"{render(record)}\n\n{results.where(facts)}\n\nwrote {file}")


if __name__ == "__main__":
    main()
