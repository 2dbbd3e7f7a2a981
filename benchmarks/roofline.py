"""What drawing a batch of images must read, multiply and launch at least.

Every op reads and writes each of its tensors once, from memory: a floor for what memory must
move. Where a stage's weights stay in a chip's cache (E-CAR-S's heads, 28 MB in bfloat16, on one
of 50 MB) a step can be faster than that. Launches are one an op, and one for each of PyTorch's own
(LayerNorm, linear, GELU, addition).
"""

import itertools
from dataclasses import dataclass
from typing import NamedTuple

from ecar import ECARConfig, split_steps
from ecar.flow import TIME_CHANNELS
from ecar.sampling.guidance import DEFAULT_STEPS, Steps
from ecar_kernels.costs import Rates


class Work(NamedTuple):
    """Bytes, multiply-adds and launches."""

    bytes: int = 0
    multiply_adds: int = 0
    launches: int = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(*(a + b for a, b in zip(self, other, strict=True)))

    def __mul__(self, times: int) -> "Work":
        return Work(*(times * part for part in self))


class Roofline:
    """The work of drawing ``batch`` images.

    Args:
        config: the model's sizes.
        steps: as ``sample``'s.
        itemsize: bytes of a weight or activation; the state is float32.
    """

    def __init__(
        self, config: ECARConfig, *, batch: int = 1, steps: Steps = DEFAULT_STEPS, itemsize: int = 2
    ) -> None:
        self.config, self.batch, self.itemsize = config, batch, itemsize
        self.counts = split_steps(steps, config.num_stages)

    def total(self) -> Work:
        found = Work()
        for stage, count in enumerate(self.counts, start=1):
            found += self.ar(stage) + self.modulation(stage) + self.step(stage) * count
            found += self.noise(stage)
        return found

    def op(self, elements: int, multiply_adds: int = 0, launches: int = 1) -> Work:
        """One that reads and writes so many elements."""
        return Work(self.itemsize * elements, multiply_adds, launches)

    def linears(self, rows: int, *widths: int, bias: bool = True) -> Work:
        """Linear layers one after another, from each width to the next."""
        pairs = itertools.pairwise(widths)
        layers = (
            self.op((rows + n) * k + (rows + bias) * n, multiply_adds=rows * k * n)
            for k, n in pairs
        )
        return sum(layers, Work())

    def block(self, rows: int) -> Work:
        """The linear layers of a transformer's block."""
        d, hidden = self.config.width, self.config.mlp_width
        return (
            self.linears(rows, d, 3 * d)
            + self.linears(rows, d, d)
            + self.linears(rows, d, hidden, d)
        )

    def ar(self, stage: int) -> Work:
        """One stage's pass: its tokens' queries over the keys of all stages so far."""
        config, n, d = self.config, self.config.stage_tokens[stage - 1], self.config.width
        rows, keys = self.batch * n, sum(config.stage_tokens[:stage])
        norm = self.op(2 * d + 2 * rows * d)
        add, cache = self.op(3 * rows * d), self.op(2 * rows * d)
        gelu = self.op(2 * rows * config.mlp_width)
        attention = self.op(2 * (rows + self.batch * keys) * d, multiply_adds=2 * rows * keys * d)
        layer = self.block(rows) + (norm + cache + add) * 2 + attention + gelu
        # The class embedding's rows, or the stage before's end embedded; and the positions.
        first = self.op(self.batch * d + rows * d)
        if stage > 1:
            values = config.channels * max(config.patch_size // 2, 1) ** 2
            first = self.linears(rows, values, d)
        positions = self.op(n * d + 2 * rows * d)
        return first + positions + layer * config.ar_layers + norm

    def modulation(self, stage: int) -> Work:
        """Of the stage's tokens, and of the times of its steps; SiLU where it is applied."""
        config, d = self.config, self.config.width
        rows, count = self.batch * config.stage_tokens[stage - 1], self.counts[stage - 1]
        outputs = (6 * config.flow_blocks + 2) * d
        silus = self.op(8 * rows * d) + self.op(2 * rows * d) + self.op(2 * count * d) * 2
        tokens = self.linears(rows, d, 4 * d, d, outputs)
        times = self.linears(count, TIME_CHANNELS, d, d)
        return silus + tokens + times + self.linears(count, d, outputs, bias=False)

    def step(self, stage: int) -> Work:
        """One network call with what is around it: 5 launches a block and one boundary."""
        config, n, d = self.config, self.config.stage_tokens[stage - 1], self.config.width
        rows, values = self.batch * n, config.channels * config.patch_size**2
        part = self.op(rows * d + d, launches=0)  # of the modulation
        attention = self.op(4 * rows * d, multiply_adds=2 * rows * n * d)
        residual = self.op(rows * d, launches=0)
        block = self.block(rows) + part * 6 + attention + residual * 2
        boundary = self.op(
            2 * d * values + values + d + n * d + 2 * rows * d, multiply_adds=2 * rows * d * values
        )
        state = Work(2 * 4 * rows * values)
        return block * config.flow_blocks + part * 2 + boundary + state

    def noise(self, stage: int) -> Work:
        """What makes the stage's start: drawn, or jumped to with the step before it."""
        channels, side, _ = self.config.stage_shape(stage)
        written = 4 * self.batch * channels * side * side
        return Work(written if stage == 1 else written + 3 * written // 4, launches=1)


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
    memory = work.bytes / rates.bytes_per_second
    arithmetic = work.multiply_adds / rates.multiply_adds_per_second
    return Floor(memory, arithmetic, work.launches * launch_seconds)
