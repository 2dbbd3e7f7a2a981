"""The paper's A.2: attention over n tokens generated one by one, and in stages that double.

Token by token without a cache it is O(n^3), in stages O(n^2); each is also timed with a cache of
keys and values. One layer's attention alone, by this library's op. Of the token-by-token ways a
few calls, evenly spread, are timed and their sum scaled. Exponents are fitted to the times.
"""

import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks import results, timing
from benchmarks.results import duration, figures, markdown
from ecar_kernels import resolve

TOKENS = (255, 511, 1023, 2047)  # 2^K - 1: K stages that double from one token
HEADS, HEAD_DIM = 6, 64
SAMPLED = 24  # calls of a token-by-token way that are timed
WAYS = ("token by token", "in stages", "token by token, with a cache", "in stages, with a cache")


def calls_of(tokens: int, way: str) -> list[tuple[int, int]]:
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


def measure(seconds: float, tokens: Sequence[int] = TOKENS) -> list[dict[str, Any]]:
    """Seconds of one layer's attention over the making of n tokens, for each way."""
    attention = resolve("stage_attention", device="cpu", dtype=torch.float32, width=HEAD_DIM)
    rows = []
    for way, n in itertools.product(WAYS, tokens):
        calls = calls_of(n, way)
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
        timing.interleave({"": itertools.repeat(call)}, seconds, at_least=3)[""]
    )


def exponent(rows: Sequence[dict[str, Any]]) -> float:
    """p of the least-squares fit seconds = a tokens^p."""
    x, y = ([math.log(row[key]) for row in rows] for key in ("tokens", "seconds"))
    return statistics.linear_regression(x, y).slope


def curves(record: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The rows by way."""
    ways = dict.fromkeys(row["way"] for row in record["rows"])
    return {way: [row for row in record["rows"] if row["way"] == way] for way in ways}


def render(record: dict[str, Any]) -> str:
    found = curves(record)
    lengths = [row["tokens"] for row in next(iter(found.values()))]
    table = markdown(
        ("attention, one layer", *(f"{n} tokens" for n in lengths), "grows as"),
        [
            (way, *(duration(row["seconds"]) for row in rows), f"n^{figures(exponent(rows))}")
            for way, rows in found.items()
        ],
    )
    return (
        f"{table}\n\nOf the token-by-token ways, {SAMPLED} calls, evenly spread, were timed and "
        "scaled. Exponents below the theory's (3 and 2\nwithout a cache) are of sizes at which "
        "the cost of a call still shows."
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = results.parser("paper.complexity", __doc__)
    parser.add_argument("--minutes", type=float, default=1.0, help="of measuring (default: 1)")
    options = parser.parse_args(arguments)
    facts = results.describe()
    rows = measure(60 * options.minutes)
    results.finish(options.results, "complexity", facts, render, rows=rows)


if __name__ == "__main__":
    main()
