"""The paper's A.2: attention over n tokens generated one by one, and in stages that double.

Token by token without a cache it is O(n^3), in stages O(n^2); each is also timed with a cache of
keys and values. One layer's attention alone, by this library's op. Of the token-by-token ways 24
calls, evenly spread, are timed and scaled. Exponents are fitted to the times; those below the
theory's are of sizes at which the cost of a call still shows.
"""

import functools
import itertools
import math
import operator
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks import commands, timing
from benchmarks.results import duration, figures, table
from ecar_kernels import resolve

TOKENS = (255, 511, 1023, 2047)  # 2^K - 1: K stages that double from one token
HEADS, HEAD_DIM = 6, 64
SAMPLED = 24  # calls of a token-by-token way that are timed
WAYS = ("token by token", "in stages", "token by token, with a cache", "in stages, with a cache")


def calls_of(tokens: int, way: str) -> list[tuple[int, int]]:
    """(new tokens, tokens in all) of each call; without a cache, all are queries."""
    ends = [*range(1, tokens + 1)]
    if way.startswith("in stages"):
        ends = [2**k - 1 for k in range(1, tokens.bit_length() + 1)]
    cached = way.endswith("with a cache")
    return [(end - begin if cached else end, end) for begin, end in itertools.pairwise([0, *ends])]


@torch.no_grad()
def measure(
    way: str, seconds: float, tokens: Sequence[int] = TOKENS
) -> dict[str, list[dict[str, Any]]]:
    """A way's seconds of one layer's attention over the making of n tokens."""
    attention = resolve("stage_attention", device="cpu", dtype=torch.float32, width=HEAD_DIM)
    rows = []
    for n in tokens:
        calls = calls_of(n, way)
        count = min(len(calls), SAMPLED)  # the middles of equal parts: their mean is the whole's
        chosen = [calls[int((i + 0.5) * len(calls) / count)] for i in range(count)]
        budget = seconds / len(tokens) / count
        mean = statistics.fmean(_seconds(attention, *call, budget) for call in chosen)
        whole = {"calls": len(calls), "timed_calls": count, "seconds": mean * len(calls)}
        rows.append({"way": way, "tokens": n, **whole})
    return {"rows": rows}


def _seconds(attention: Callable, queries: int, keys: int, seconds: float) -> float:
    q = torch.randn(1, queries, HEADS, HEAD_DIM)
    k, v = torch.randn(2, 1, keys, HEADS, HEAD_DIM)
    # Without a cache all tokens are queries, and one square, as the paper counts them.
    lengths = (keys,) if queries == keys else (keys - queries, queries)
    clock = timing.Clock(itertools.repeat(lambda: attention(q, k, v, lengths)))
    return statistics.median(timing.rounds({"": clock}, seconds, at_least=3, warm_up=True)[""])


def exponent(rows: Sequence[dict[str, Any]]) -> float:
    """p of the least-squares fit seconds = a tokens^p."""
    x, y = ([math.log(row[key]) for row in rows] for key in ("tokens", "seconds"))
    return statistics.linear_regression(x, y).slope


def render(record: dict[str, Any]) -> str:
    cells = []
    for way in dict.fromkeys(row["way"] for row in record["rows"]):
        rows = [row for row in record["rows"] if row["way"] == way]
        lengths = {f"{row['tokens']} tokens": duration(row["seconds"]) for row in rows}
        grows = {"grows as": f"n^{figures(exponent(rows))}"}
        cells.append({"attention, one layer": way} | lengths | grows)
    return table(cells)


main = functools.partial(
    commands.main, "paper.complexity", __doc__, measure, WAYS, render,
    seconds=15, same=operator.itemgetter("way"), order=WAYS,
)  # fmt: skip

if __name__ == "__main__":
    sys.exit(main())
