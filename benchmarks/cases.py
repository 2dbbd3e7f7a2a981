"""What is timed: every op at the stages of whole models, with inputs that the cache does not hold.

E-CAR-S/B/L at 256 pixels, S and L at larger images, and VAR-d16 with its ten stages. Forward,
stage_attention is the sampler's: a stage's queries over the keys of all stages so far. Backward,
and where a case says `whole`, it is the training's: the queries of all stages up to that one.
"""

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.results import CPU, last_level_cache
from ecar import ECARConfig
from ecar_kernels.costs import BACKWARD_READS, bytes_of
from ecar_kernels.ops import Argument, BoundOp
from ecar_kernels.registry import BACKENDS, FAMILIES, OPS, RECORDS, BackendUnavailableError, resolve
from ecar_kernels.testing import Draw, SampleSizes

SIZES = ("S", "B", "L")
VAR, LEAST = "VAR-d16", "one token"
BATCHES = (1, 8, 32)
ADALN = FAMILIES["adaln"]
WIDTHLESS = tuple(op for op in OPS if not RECORDS[op].width)
WIDE = tuple(op for op in OPS if op not in WIDTHLESS)
CHANNELS, PATCH = 4, 2
# Inputs used in turn hold this many times what the cache does, unless that takes too many sets.
ROTATION = 4
MAX_SETS = 512


class Model(NamedTuple):
    """What an op knows of a model."""

    width: int
    heads: int
    stages: tuple[int, ...]


VAR_SIDES = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
MODELS = {VAR: Model(1024, 16, tuple(n * n for n in VAR_SIDES)), LEAST: Model(8, 1, (1,))}
for _size in SIZES:
    _config = ECARConfig.preset(_size)
    MODELS[_size] = Model(_config.width, _config.heads, _config.stage_tokens)
    # Of a larger image, side by pixels: 4 times as many tokens in a further stage.
    for _pixels, _stages in {512: 3, 1024: 4, 2048: 5}.items():
        _tokens = tuple(4**stage for stage in range(3, 3 + _stages))
        MODELS[f"{_size}-{_pixels}px"] = MODELS[_size]._replace(stages=_tokens)


@dataclass(frozen=True)
class Case:
    """One row of the table: an op at a stage of a size, for `batch` images.

    whole: stage_attention's queries are those of all stages up to this one; backward always.
    overhead: what a call costs besides its arithmetic.
    """

    op: str
    tokens: int
    batch: int
    size: str = "-"  # for ops that know no width
    backward: bool = False
    whole: bool = False
    overhead: bool = False
    dtype: str = "float32"

    @property
    def name(self) -> str:
        numbers = "" if self.dtype == "float32" else f"-{self.dtype}"
        if self.overhead:
            return f"{self.op}-overhead{numbers}"
        way = "backward" if self.backward else "whole" if self.whole else "forward"
        return f"{self.op}-{way}-{self.size}-{self.tokens}tokens-batch{self.batch}{numbers}"

    @property
    def model(self) -> Model:
        return MODELS[self.size]

    @property
    def numbers(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def op_width(self) -> int:
        """What `resolve` is told as the op's width; 0 for ops that have none."""
        if self.size == "-":
            return 0
        return self.model.width // (self.model.heads if self.op == "stage_attention" else 1)


def select(
    sizes: Sequence[str] = SIZES,
    *,
    forward: Sequence[int] = (),
    backward: Sequence[int] = (),
    ops: Sequence[str] = OPS,
    last: bool = False,
) -> list[Case]:
    """These ops at all stages of these sizes, which have the same, or at the last; forward at these
    batches, and backward where an op has one."""
    stages = MODELS[sizes[0]].stages[-1 if last else 0 :]
    return [
        Case(op, tokens, batch, size, way)
        for op in ops
        for way, batches in ((False, forward), (True, backward if op in BACKWARD_READS else ()))
        for size in (("-",) if op in WIDTHLESS else sizes)
        for batch in batches
        for tokens in stages
    ]


def attention(*sizes: str) -> list[Case]:
    """Training's: all stages of a size at once, forward and backward."""
    return [
        Case("stage_attention", MODELS[size].stages[-1], 1, size, backward, whole=not backward)
        for size in sizes
        for backward in (False, True)
    ]


def large(pixels: int) -> list[Case]:
    """Every op at the last stage of a larger image of S and L, the adaLN family with backward."""
    sizes = (f"S-{pixels}px", f"L-{pixels}px")
    return [
        *select(sizes, forward=(1,), last=True),
        *select(sizes, backward=(1,), ops=ADALN, last=True),
    ]


def every() -> list[Case]:
    found = [
        *default(),
        *select(forward=BATCHES, backward=BATCHES),
        *select((VAR,), backward=(1,), ops=WIDE),
        *attention("L-1024px", "S-2048px"),
        *large(2048),
    ]
    return list(dict.fromkeys(found))


def default() -> list[Case]:
    """What fits into the time of `make bench`, the most important first.

    One image for all sizes, attention over all stages, larger images, VAR's stages, then batches.
    """
    found = [
        *select(forward=(1,)),
        *attention(*SIZES, VAR, "S-512px", "L-512px", "S-1024px"),
        *(*large(512), *large(1024), *select((VAR,), forward=(1,), ops=WIDE)),
        *select(("S",), forward=(8, 32), backward=(8,)),
        *select(("L",), backward=(8,), ops=WIDE),
    ]
    return list(dict.fromkeys(found))


def beyond_caches() -> list[Case]:
    """Tokens, or a step's larger image, of 64 MiB; and tokens of 18 MiB, a batch of E-CAR-L."""
    family = [
        Case(op, 256, batch, size, backward)
        for size, batch in (("B", 64), ("L", 16))
        for op in ADALN
        for backward in (False, True)
    ]
    return [*family, Case("euler_step", 256, 4096), Case("upsample_renoise_euler", 256, 1024)]


def overheads() -> list[Case]:
    """Every op at the 16 x 768 of E-CAR-S's first stage, for what a call of it costs."""
    return [Case(op, 16, 1, "S", overhead=True) for op in OPS]


def backends(case: Case, device: torch.device) -> dict[str, BoundOp]:
    """The case's op by each backend that serves it there, the reference first."""
    found = {}
    for name in BACKENDS:
        with contextlib.suppress(BackendUnavailableError):
            how = {"device": device, "dtype": case.numbers, "width": case.op_width}
            found[name] = resolve(case.op, backend=name, **how)
    return found


class RowDraw(Draw):
    """Random arguments: modulations and steps are each chunks of one projection."""

    def one_of(self, names: tuple[str, ...]) -> str:
        return "seeds" if "seeds" in names else names[0]

    def takes(self, argument: Argument) -> bool:
        """Steps' parts; numbers have their defaults, and steps are Euler's."""
        return not argument.optional or (argument.is_tensor and argument.name != "previous")

    def projection(self, arguments: Sequence[Argument], shape: tuple[int, ...]) -> list[Tensor]:
        if len(shape) == 4:  # heads: queries alone, over a cache of keys and values
            return [self.normal(*shape) for _ in arguments]
        return super().projection(arguments, shape)


def inputs(case: Case, device: torch.device = CPU) -> dict[str, Any]:
    """One set of arguments by name; modulations are chunks of one projection, as in a model."""
    side = PATCH * math.isqrt(case.tokens)
    sizes: dict[str, Any] = {"stages": (case.tokens,), "image": (CHANNELS, side, side)}
    if case.op not in WIDTHLESS:
        width, heads, stages = case.model
        sizes |= {"heads": heads, "head_dim": width // heads, "channels": width}
        sizes |= {"hidden": 4 * width, "outputs": PATCH**2 * CHANNELS}
    if case.op in FAMILIES["stage_attention"]:
        sizes |= {"stages": stages[: stages.index(case.tokens) + 1]}
        sizes |= {"queries": None if case.backward or case.whole else case.tokens}
    drawn = SampleSizes(batch=case.batch, guided=False, **sizes)
    return RowDraw(drawn, case.numbers, str(device))(RECORDS[case.op])


def input_sets(case: Case, device: torch.device = CPU) -> list[dict[str, Any]]:
    """Sets of inputs that together are larger than the cache; at least one."""
    first = inputs(case, device)
    size = bytes_of(first.values())
    count = min(math.ceil(ROTATION * last_level_cache(device) / size), MAX_SETS)
    return [first, *(inputs(case, device) for _ in range(count - 1))]
