"""What drawing a batch of images must read, multiply and launch at least, by part of the work:

    AR            the transformer's pass over each stage's tokens, with its KV cache
    modulation    adaLN's part of the token maps once a stage, and of all times in one product
    flow          all steps: five fused ops a block, and the boundary between two steps
    noise         the first noise, and the jumps between stages

Every op reads and writes each of its tensors once, from memory: a floor for what memory must
move. Where a stage's weights stay in a chip's cache (E-CAR-S's heads, 28 MB in bfloat16, on one
of 50 MB) a step can be faster than that; weights, modulation and activations are apart for it.
Launches are one an op, and one for each of PyTorch's own (LayerNorm, linear, GELU, addition).
"""

import itertools
from dataclasses import dataclass, fields

from ecar import ECARConfig, split_steps
from ecar.flow import TIME_CHANNELS
from ecar.sampling.guidance import DEFAULT_STEPS, Steps
from ecar_kernels.costs import Cost, Rates, floor_seconds

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
        steps: as ``sample``'s.
        guided: every step has unconditional rows too.
        itemsize: bytes of a weight or activation; the state is float32.
    """

    def __init__(
        self,
        config: ECARConfig,
        *,
        batch: int = 1,
        steps: Steps = DEFAULT_STEPS,
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

    def linears(self, rows: int, *widths: int, bias: bool = True) -> Work:
        """Linear layers one after another, from each width to the next."""
        return sum(
            (
                self._work(
                    weights=inputs * outputs + (outputs if bias else 0),
                    activations=rows * (inputs + outputs),
                    multiply_adds=rows * inputs * outputs,
                )
                for inputs, outputs in itertools.pairwise(widths)
            ),
            Work(),
        )

    def block(self, rows: int) -> Work:
        """The linear layers of a transformer's block."""
        d = self.config.width
        mlp = self.linears(rows, d, self.config.mlp_width, d)
        return self.linears(rows, d, 3 * d) + self.linears(rows, d, d) + mlp

    def ar(self, stage: int) -> Work:
        """One stage's pass: its tokens' queries over the keys of all stages so far."""
        config, n = self.config, self.config.stage_tokens[stage - 1]
        rows, d, keys = self.rows * n, config.width, sum(config.stage_tokens[:stage])
        norm = self._work(weights=2 * d, activations=2 * rows * d)
        add, cache = (self._work(activations=count * rows * d) for count in (3, 2))
        gelu = self._work(activations=2 * rows * config.mlp_width)
        attention = self._work(
            activations=2 * rows * d + 2 * self.rows * keys * d, multiply_adds=2 * rows * keys * d
        )
        layer = self.block(rows) + (norm + cache + add) * 2 + attention + gelu
        # The class embedding's rows, or the stage before's end embedded; and the positions.
        first = self._work(weights=self.rows * d, activations=rows * d)
        if stage > 1:
            values = config.channels * max(config.patch_size // 2, 1) ** 2
            first = self.linears(self.batch * n, values, d)
        positions = self._work(weights=n * d, activations=2 * rows * d)
        return first + positions + layer * config.ar_layers + norm

    def modulation(self, stage: int) -> Work:
        """Of the stage's tokens, and of the times of its steps; SiLU where it is applied."""
        config, d = self.config, self.config.width
        rows, count = self.rows * config.stage_tokens[stage - 1], self.counts[stage - 1]
        outputs = (6 * config.flow_blocks + 2) * d
        silus = [self._work(activations=2 * size) for size in (4 * rows * d, rows * d)]
        silus += [self._work(activations=2 * count * d)] * 2
        tokens = self.linears(rows, d, 4 * d, d, outputs)
        times = self.linears(count, TIME_CHANNELS, d, d)
        return sum(silus, tokens + times + self.linears(count, d, outputs, bias=False))

    def step(self, stage: int) -> Work:
        """One network call with what is around it: 5 launches a block and one boundary."""
        config, n = self.config, self.config.stage_tokens[stage - 1]
        rows, d = self.rows * n, config.width
        part = self._work(modulation=rows * d + d, launches=0)
        attention = self._work(activations=4 * rows * d, multiply_adds=2 * rows * n * d)
        residual = self._work(activations=rows * d, launches=0)
        block = self.block(rows) + part * 6 + attention + residual * 2
        values = self.patch_values
        boundary = self._work(
            weights=2 * d * values + values + d + n * d,
            activations=2 * rows * d,
            multiply_adds=(rows + self.batch * n) * d * values,
        )
        state = Work(activations=2 * 4 * self.batch * n * values)
        return block * config.flow_blocks + part * 2 + boundary + state

    def noise(self, stage: int) -> Work:
        """What makes the stage's start: drawn, or jumped to with the step before it."""
        channels, side, _ = self.config.stage_shape(stage)
        written = 4 * self.batch * channels * side * side
        if stage == 1:
            return Work(activations=written, launches=1)
        return Work(activations=written + 3 * written // 4, launches=1)

    def _work(self, *, launches: int = 1, multiply_adds: int = 0, **elements: int) -> Work:
        """From elements to bytes."""
        size = {name: self.itemsize * count for name, count in elements.items()}
        return Work(**size, multiply_adds=multiply_adds, launches=launches)


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
