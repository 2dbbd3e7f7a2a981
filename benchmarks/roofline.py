"""`python -m benchmarks.roofline`: what drawing a batch must read, multiply and launch at least.

One row for each size of E-CAR, by part of the work:

    AR            the transformer's pass over each stage's tokens, with its KV cache
    modulation    adaLN's part of the token maps once a stage, and of all times in one product
    flow          all steps: five fused ops a block, and the boundary between two steps
    noise         the first noise, and the jumps between stages

Every op reads and writes each of its tensors once, from memory: a floor for what memory must
move. Where a stage's weights stay in a chip's cache (E-CAR-S's heads, 28 MB in bfloat16, on one
of 50 MB) a step can be faster than that; weights, modulation and activations are apart for it.
Launches are one an op, and one for each of PyTorch's own (LayerNorm, linear, GELU, addition).
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch

from ecar.config import PRESETS, ECARConfig
from ecar.flow import TIME_CHANNELS
from ecar.sampling import split_steps
from ecar_kernels.costs import Cost, Rates, floor_seconds

SIZES = ("S", "B", "L")
PARTS = ("AR", "modulation", "flow", "noise")


@dataclass(frozen=True)
class Work:
    """Bytes of weights, modulations and activations, multiply-adds, and launches."""

    weights: int = 0
    modulation: int = 0
    activations: int = 0
    multiply_adds: int = 0
    launches: int = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __mul__(self, times: int) -> "Work":
        return Work(*(times * getattr(self, f.name) for f in fields(self)))

    @property
    def bytes(self) -> int:
        return self.weights + self.modulation + self.activations

    @property
    def cost(self) -> Cost:
        return Cost(self.bytes, self.multiply_adds)


class Roofline:
    """The work of drawing ``batch`` images.

    Args:
        config: the model's sizes.
        steps: of all stages, or each stage's.
        guided: every step has unconditional rows too.
        itemsize: bytes of a weight or activation; the state is float32.
    """

    def __init__(
        self,
        config: ECARConfig,
        *,
        batch: int = 1,
        steps: int | Sequence[int] = 250,
        guided: bool = False,
        itemsize: int = 2,
    ) -> None:
        self.config, self.batch, self.itemsize = config, batch, itemsize
        self.counts = split_steps(steps, config.num_stages)
        self.rows = 2 * batch if guided else batch
        self.patch_values = config.channels * config.patch_size**2

    def parts(self) -> dict[str, Work]:
        """Work by part, summed over stages."""
        found = dict.fromkeys(PARTS, Work())
        for stage in range(1, self.config.num_stages + 1):
            found["AR"] += self.ar(stage)
            found["modulation"] += self.modulation(stage)
            found["flow"] += self.step(stage) * self.counts[stage - 1]
            found["noise"] += self.noise(stage)
        return found

    def total(self) -> Work:
        return sum(self.parts().values(), Work())

    def linear(self, rows: int, inputs: int, outputs: int, *, bias: bool = True) -> Work:
        weights = inputs * outputs + (outputs if bias else 0)
        return self._work(
            weights=weights,
            activations=rows * (inputs + outputs),
            multiply_adds=rows * inputs * outputs,
        )

    def ar(self, stage: int) -> Work:
        """One stage's pass: its tokens' queries over the keys of all stages so far."""
        config, n = self.config, self.config.stage_tokens[stage - 1]
        rows, d, keys = self.rows * n, config.width, sum(config.stage_tokens[:stage])
        norm = self._work(weights=2 * d, activations=2 * rows * d)
        elementwise = self._work(activations=2 * rows * config.mlp_width)
        add = self._work(activations=3 * rows * d)
        cache = self._work(activations=2 * rows * d)
        attention = self._work(
            activations=2 * rows * d + 2 * self.rows * keys * d, multiply_adds=2 * rows * keys * d
        )
        layer = (
            norm
            + self.linear(rows, d, 3 * d)
            + cache * 2
            + attention
            + self.linear(rows, d, d)
            + add
            + norm
            + self.linear(rows, d, config.mlp_width)
            + elementwise
            + self.linear(rows, config.mlp_width, d)
            + add
        )
        # The class embedding's rows, or the stage before's end embedded; and the positions.
        first = self._work(weights=self.rows * d, activations=rows * d)
        if stage > 1:
            values = config.channels * max(config.patch_size // 2, 1) ** 2
            first = self.linear(self.batch * n, values, d)
        positions = self._work(weights=n * d, activations=2 * rows * d)
        return first + positions + layer * config.ar_layers + norm

    def modulation(self, stage: int) -> Work:
        config, d = self.config, self.config.width
        rows, count = self.rows * config.stage_tokens[stage - 1], self.counts[stage - 1]
        outputs = (6 * config.flow_blocks + 2) * d

        def silu(n: int, width: int) -> Work:
            return self._work(activations=2 * n * width)

        tokens = (
            self.linear(rows, d, 4 * d)
            + silu(rows, 4 * d)
            + self.linear(rows, 4 * d, d)
            + silu(rows, d)
            + self.linear(rows, d, outputs)
        )
        times = (
            self.linear(count, TIME_CHANNELS, d)
            + silu(count, d)
            + self.linear(count, d, d)
            + silu(count, d)
            + self.linear(count, d, outputs, bias=False)
        )
        return tokens + times

    def step(self, stage: int) -> Work:
        """One network call with what is around it: 5 launches a block and one boundary."""
        config, n = self.config, self.config.stage_tokens[stage - 1]
        rows, d, hidden = self.rows * n, config.width, config.mlp_width
        part = self._work(modulation=rows * d + d, launches=0)
        attention = self._work(activations=4 * rows * d, multiply_adds=2 * rows * n * d)
        residual = self._work(activations=rows * d, launches=0)
        block = (
            self.linear(rows, d, 3 * d)
            + part * 2
            + attention
            + self.linear(rows, d, d)
            + part
            + residual
            + self.linear(rows, d, hidden)
            + part * 2
            + self.linear(rows, hidden, d)
            + part
            + residual
        )
        values, state = self.patch_values, self.batch * n * self.patch_values
        boundary = (
            part * 2
            + self._work(
                weights=2 * d * values + values + d + n * d,
                activations=2 * rows * d,
                multiply_adds=(rows + self.batch * n) * d * values,
            )
            + Work(activations=2 * 4 * state)
        )
        return block * config.flow_blocks + boundary

    def noise(self, stage: int) -> Work:
        """What makes the stage's start: drawn, or jumped to with the step before it."""
        channels, side, _ = self.config.stage_shape(stage)
        written = 4 * self.batch * channels * side * side
        if stage == 1:
            return Work(activations=written, launches=1)
        return Work(activations=written + 3 * written // 4, launches=1)

    def _work(
        self,
        *,
        weights: int = 0,
        modulation: int = 0,
        activations: int = 0,
        multiply_adds: int = 0,
        launches: int = 1,
    ) -> Work:
        """From elements to bytes."""
        size = self.itemsize
        return Work(size * weights, size * modulation, size * activations, multiply_adds, launches)


@dataclass(frozen=True)
class Floor:
    """What the rates imply, each taken alone; a run takes at least the longest."""

    memory: float
    arithmetic: float
    launches: float

    @property
    def seconds(self) -> float:
        return max(self.memory, self.arithmetic, self.launches)


def floor(work: Work, rates: Rates, launch_seconds: float = 0.0) -> Floor:
    """Seconds by memory, by multiply-adds, and by launches of ``launch_seconds`` each."""
    memory = floor_seconds(Cost(work.bytes, 0), rates)
    arithmetic = floor_seconds(Cost(0, work.multiply_adds), rates)
    return Floor(memory, arithmetic, work.launches * launch_seconds)


def render(
    rows: Sequence[tuple[str, str, Work]], rates: Rates | None = None, launch_seconds: float = 0.0
) -> str:
    """(size, part, work) as a Markdown table; with rates, the floor of each row."""
    head = [
        "size",
        "part",
        "weights MB",
        "modulation MB",
        "activations MB",
        "multiply-adds G",
        "launches",
    ]
    if rates is not None:
        head += ["memory ms", "arithmetic ms", "launches ms", "floor ms"]
    lines = ["| " + " | ".join(head) + " |", "| " + " | ".join(["---"] * len(head)) + " |"]
    for size, part, work in rows:
        cells = [
            size,
            part,
            f"{work.weights / 1e6:.0f}",
            f"{work.modulation / 1e6:.0f}",
            f"{work.activations / 1e6:.0f}",
            f"{work.multiply_adds / 1e9:.1f}",
            str(work.launches),
        ]
        if rates is not None:
            found = floor(work, rates, launch_seconds)
            cells += [
                f"{1e3 * seconds:.2f}"
                for seconds in (found.memory, found.arithmetic, found.launches, found.seconds)
            ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.roofline",
        description="What drawing a batch of images must read, multiply and launch at least.",
    )
    parser.add_argument("--sizes", nargs="+", choices=sorted(PRESETS), default=list(SIZES))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--guided", action="store_true", help="every step is guided")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--bytes-per-second", type=float, help="copy rate, read and written bytes")
    parser.add_argument("--multiply-adds-per-second", type=float, help="of a large product")
    parser.add_argument(
        "--launch-seconds",
        type=float,
        default=0.0,
        help="of one kernel in a CUDA graph that does nothing",
    )
    options = parser.parse_args(arguments)
    given = options.bytes_per_second, options.multiply_adds_per_second
    if (given[0] is None) != (given[1] is None):
        parser.error("--bytes-per-second and --multiply-adds-per-second go together")
    rates = None if given[0] is None else Rates(*given)
    rows = []
    for size in options.sizes:
        line = Roofline(
            ECARConfig.preset(size),
            batch=options.batch,
            steps=options.steps,
            guided=options.guided,
            itemsize=getattr(torch, options.dtype).itemsize,
        )
        rows += [(size, part, work) for part, work in line.parts().items()]
        rows.append((size, "all", line.total()))
    print(render(rows, rates, options.launch_seconds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
