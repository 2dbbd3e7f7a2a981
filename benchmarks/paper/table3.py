"""The paper's Table 3: latencies of E-CAR, DiT and MAR, in the paper's pairs.

One 256 x 256 image's latent, no guidance, random weights, float32: E-CAR by the paper's protocol of
250 even Euler steps, diffusers' DiT of 250 steps in eager mode, and by the best runtime that is
installed (torch.compile, OpenVINO, ONNX Runtime), and MAR, a module of its sizes on this library's
ops, of 64 and 256 AR steps with 100 diffusion steps each. Four steps of each stage
of E-CAR, four of DiT, and three AR steps of MAR with four of their diffusion steps are run and
scaled. The models of a pair take turns; figures are medians over the rounds. The paper does not say
of how many AR steps its MAR ratios are.
"""

import functools
import gc
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks import models, runtimes, timing
from benchmarks.models import TIMED_STEPS, Way
from benchmarks.paper import dit, mar
from benchmarks.paper.dit import PEERS
from benchmarks.results import duration, medians, table, times
from ecar import ECARConfig
from ecar.info import count_multiply_adds
from ecar.sampling.guidance import PAPER, PAPER_STEPS

MARS = {"S": "B", "B": "L", "L": "H"}  # E-CAR : MAR
# The paper's latencies in seconds: E-CAR, DiT, MAR.
I9 = {"S": (3.92, 17.94, 146.26), "B": (10.95, 59.70, 257.02), "L": (18.22, 75.35, 463.62)}
RTX_4090 = {"S": (0.38, 1.44, 40.61), "B": (0.68, 2.73, 45.37), "L": (0.94, 3.42, 59.54)}
TIMED_AR_STEPS = 3
DIT_SHARE = 0.4  # of the time; MAR's rounds are longer


def measure(size: str, seconds: float) -> dict[str, list]:
    """The row of one size of E-CAR and its peers."""
    config, peer, masked = ECARConfig.preset(size), dit.SIZES[PEERS[size]], mar.SIZES[MARS[size]]
    ours = models.images({"ecar": Way(models.accelerated(models.random_model(config)))})
    # One peer after the other, for their weights and packed ones fill a memory.
    module = peer.build()
    step = functools.partial(dit.step_seconds, module, PAPER_STEPS, "ddim", TIMED_STEPS)
    pair = models.compare(ours | {"dit": lambda: PAPER_STEPS * step()}, DIT_SHARE / 2 * seconds)
    served: dict[str, dict[str, float]] = {}  # DiT by each of them, over E-CAR
    for way in runtimes.RUNTIMES:
        if call := _by_runtime(way, module, size):
            share = DIT_SHARE / 2 / len(runtimes.RUNTIMES)
            served |= _ratios(models.compare(ours | call, share * seconds))
        # One runtime after the other, for each holds the weights once more.
        call.clear()
        torch._dynamo.reset()
        gc.collect()
    image = functools.partial(mar.image_seconds, mar.build(masked))
    timed = (TIMED_AR_STEPS, TIMED_STEPS)
    theirs = {_name(steps): functools.partial(image, steps, *timed) for steps in mar.AR_STEPS}
    others = models.compare(ours | theirs, (1 - DIT_SHARE) * seconds)
    adds = {"ecar": sum(stage.total for stage in count_multiply_adds(config, steps=PAPER))}
    adds["dit"] = dit.count(peer, PAPER_STEPS, guided=False)[1]
    row = {
        "size": size,
        "seconds": timing.summaries(others | pair),
        "ratio": _ratios(pair)["dit"],
        "runtimes": served,
        "mar_ratios": _ratios(others),
        "multiply_adds": adds | {_name(n): mar.multiply_adds(masked, n) for n in mar.AR_STEPS},
    }
    return {"rows": [row]}


def _by_runtime(way: str, module: nn.Module, size: str) -> dict[str, Callable[[], float]]:
    """DiT's image by a runtime, under its name; nothing if it can't."""
    work = runtimes.Work(f"DiT-{PEERS[size]}-call", "float32")
    runtimes.dit_call(work, module, (way,))
    return {
        name: lambda call=call: PAPER_STEPS * timing.seconds_of(call)
        for name, call in work.calls.items()
    }


def _name(steps: int) -> str:
    return f"mar, {steps} AR steps"


def _ratios(taken: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Of each round, so that their spread is known."""
    ours = taken["ecar"]
    return {
        name: timing.summary([theirs / mine for theirs, mine in zip(values, ours, strict=True)])
        for name, values in taken.items()
        if name != "ecar"
    }


def pairs(row: dict[str, Any]) -> list[tuple[str, str, dict[str, float]]]:
    """(peer, its seconds' name, its time over E-CAR's by column) of a size's row."""
    size, adds, found = row["size"], row["multiply_adds"], []
    for key, measured in ({"dit": row["ratio"]} | row["mar_ratios"]).items():
        column = 1 if key == "dit" else 2
        name = f"DiT-{PEERS[size]}/2" if key == "dit" else f"MAR-{MARS[size]}{key[len('mar') :]}"
        ratios = {
            "ratio": measured["median"],
            "multiply-adds": adds[key] / adds["ecar"],
            "paper, i9": I9[size][column] / I9[size][0],
            "paper, 4090": RTX_4090[size][column] / RTX_4090[size][0],
        }
        found.append((name, key, ratios))
    return found


def render(record: dict[str, Any]) -> str:
    rows = [
        {
            "E-CAR": row["size"],
            "peer": peer,
            "E-CAR latency": duration(medians(row)["ecar"]),
            "peer latency": duration(medians(row)[key]),
            "by its best runtime": _best(row) if key == "dit" else "-",
        }
        | {column: times(ratio) for column, ratio in ratios.items()}
        for row in record["rows"]
        for peer, key, ratios in pairs(row)
    ]
    return table(rows)


def _best(row: dict[str, Any]) -> str:
    """DiT's time over E-CAR's by the fastest of the runtimes, and its name."""
    found = {way: ratio["median"] for way, ratio in row.get("runtimes", {}).items()}
    way = min(found, key=found.__getitem__, default=None)  # older results have none
    return "-" if way is None else f"{times(found[way])} ({way})"


main = functools.partial(models.main, "paper.table3", __doc__, measure, render, seconds=33)

if __name__ == "__main__":
    sys.exit(main())
