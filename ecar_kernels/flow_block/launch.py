"""Launch settings of the fused GEMMs' Triton kernels.

The rules are arithmetic about bytes, registers and the chip's size; none was measured. That no
tile below spills a register or asks for more shared memory than a chip has was seen by compiling
it (compile_cases.py). `ecar tune --list` prints what the rules choose, `ecar tune` measures.
"""

import functools
from dataclasses import dataclass, replace

SPLITS = (1, 2, 4, 8, 16)
ROW_WARPS = 4
# Rates of an H100, a nanosecond. A multiprocessor's: bytes from the L2 cache while all are busy and
# at most, multiply-adds where there is no matrix unit. Bytes of memory.
SHARE, MOST, EXACT, MEMORY = 45.0, 100.0, 250.0, 3000.0
# Nanoseconds: until a load arrives, and until the last program of a tile knows that it is.
LATENCY, MEETING = 700.0, 1500.0
# Up to as many rows a product normalises in its loop. It reads x, shift and scale again for every
# column of tiles, which costs about what a launch does that writes the normalised x; with more
# rows it costs more.
PROLOGUE_ROWS = 512


@dataclass(frozen=True)
class Settings:
    """One product's tile and how the product is divided.

    splits: programs that share a tile, each with a part of the inputs. prologue: normalise in the
    product's loop; else in a pass of its own, which writes the normalised x. It means nothing to
    linear_gated_residual.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    splits: int = 1
    prologue: bool = False

    @property
    def splittable(self) -> bool:
        """Larger tiles are for rows enough to fill the chip, and with splits ptxas has too few
        registers for them, as for float32's (less than 64 inputs at a time) with a prologue."""
        most = 2048 if self.prologue and self.block_k < 64 else 4096
        return self.block_m * self.block_n <= most


def row_block(channels: int) -> int:
    """Channels that a row's pass reads at once: a row of the models is one or two reads."""
    return 1024 if channels <= 1024 else 2048


def statistics_block(its: Settings) -> int:
    """Channels that a prologue reads at once for its rows' statistics: 64 values a thread of 4
    warps, all under way at the same time."""
    return 8192 // its.block_m


def tiles(
    itemsize: int, precision: str, arch: int, *, prologue: bool = False
) -> tuple[Settings, ...]:
    """What `default` chooses from, without a prologue or with one.

    `precision` as _triton.product_precision has it.
    """
    few: tuple[Settings, ...]
    many: tuple[Settings, ...]
    if itemsize == 4 and precision == "ieee":
        # No matrix unit: operands go through registers, 16 inputs of them at a time, and each
        # thread has 8 (up to 16 rows), 16 (up to 32) or 32 sums. With 8 of 32 rows, Triton 3.6
        # spills on sm_90.
        few = (Settings(16, 64, 32, 4, 4), Settings(32, 64, 16, 4, 3), Settings(64, 64, 16, 4, 3))
        many = () if prologue else (Settings(128, 64, 16, 8, 3),)
    else:
        depth = 128 // itemsize  # a cache line of each row
        # 112 KiB in flight hide memory's latency on one multiprocessor; sm_120 has 99 KiB.
        stages = 3 if arch >= 120 else 4
        # Few rows: the weight's bytes are the time, so 5 of its tiles are under way; 16 rows are
        # the matrix unit's least. 32 outputs make programs enough without splits.
        few = (
            Settings(16, 32, depth, 4, 6),
            Settings(16, 64, depth, 4, 6),
            # ptxas spills 8 bytes of TF32's on sm_90, where the tile is split.
            *((Settings(32, 32, depth, 4, stages + 1),) if itemsize == 2 or prologue else ()),
            Settings(32, 128, depth, 4, stages),
        )
        many = (
            # One warp group's least on sm_90 and sm_100 (64 rows).
            Settings(64, 64, depth, 4, 4),
            # Two warp groups, which share the weight's tile: three quarters of the bytes.
            Settings(128, 64, depth, 8, 3),
            # Half of the bytes. With a float32 gate and residual the epilogue has no registers
            # for it.
            *((Settings(128, 128, depth, 8, 3),) if itemsize == 2 else ()),
        )
        if prologue:
            # Of 64 outputs, x, shift and scale would be three times the weight's bytes.
            many = (
                Settings(64, 128, depth, 8, stages - 1),
                Settings(64, 256, depth, 8, stages - 1),
            )
    return tuple(replace(its, prologue=prologue) for its in (*few, *many))


def odd_tiles() -> tuple[Settings, ...]:
    """The same for inputs or outputs that are no multiple of 16. Values are then read singly,
    each by an instruction and, in 16-bit types, through a register: small tiles, or they spill."""
    return (Settings(16, 64, 32, 8, 3), Settings(32, 64, 32, 8, 3), Settings(64, 64, 32, 8, 3))


def _choices(
    outputs: int, inputs: int, itemsize: int, precision: str, arch: int, prologue: bool
) -> tuple[Settings, ...]:
    if outputs % 16 or inputs % 16:
        return odd_tiles()
    return tiles(itemsize, precision, arch, prologue=prologue)


def _count(size: int, block: int) -> int:
    return -(-size // block)


def _programs(tile: Settings, rows: int, outputs: int) -> int:
    return _count(rows, tile.block_m) * _count(outputs, tile.block_n)


def nanoseconds(
    its: Settings, rows: int, outputs: int, inputs: int, itemsize: int, precision: str, sms: int
) -> float:
    """What a product takes by the model: waves of programs, and the bytes of each.

    The weight comes from memory once. Each program reads its rows and columns from the L2 cache,
    with a prologue shift and scale, too, and has all stages but one under way. Where a tile is
    split, its last program has the sums of all to read.
    """
    programs = _programs(its, rows, outputs) * its.splits
    waves, part = _count(programs, sms), inputs / its.splits
    read = ((3 if its.prologue else 1) * its.block_m + its.block_n) * part * itemsize
    busy = max(waves * read / MOST, programs * read / (sms * SHARE))
    busy = max(busy, part / its.block_k * LATENCY / (its.num_stages - 1))
    if itemsize == 4 and precision == "ieee":
        busy = max(busy, waves * its.block_m * its.block_n * part / EXACT)
    memory = outputs * inputs * itemsize / MEMORY
    meeting = MEETING + 4 * its.splits * its.block_m * its.block_n / MOST
    return max(busy, memory) + meeting * (its.splits > 1)


@functools.lru_cache(1024)
def default(
    rows: int,
    outputs: int,
    inputs: int,
    itemsize: int,
    precision: str,
    sms: int,
    arch: int,
    normalised: bool = False,
) -> Settings:
    """For [rows, inputs] times [inputs, outputs]; normalised: of adaln_linear.

    What is fastest by the model, with no more splits than bring a twentieth.
    """
    problem = rows, outputs, inputs, itemsize, precision, sms
    found = _worth_trying(*problem, arch, normalised and rows <= PROLOGUE_ROWS)
    times = {its: nanoseconds(its, *problem) for its in found}
    good = [its for its in found if times[its] <= 1.05 * min(times.values())]
    return min(good, key=lambda its: (its.splits, times[its]))


def candidates(
    rows: int,
    outputs: int,
    inputs: int,
    itemsize: int,
    precision: str,
    sms: int,
    arch: int,
    normalised: bool = False,
) -> list[Settings]:
    """What is worth measuring: both ways to normalise where there are both."""
    problem = rows, outputs, inputs, itemsize, precision, sms, arch
    found = _worth_trying(*problem, False)
    if normalised:
        found += _worth_trying(*problem, True)
    return list(dict.fromkeys(found))


def _worth_trying(
    rows: int,
    outputs: int,
    inputs: int,
    itemsize: int,
    precision: str,
    sms: int,
    arch: int,
    prologue: bool,
) -> list[Settings]:
    """Tiles that are not mostly empty, under numbers of splits with which the sums, written and
    read again in float32, are at most as many bytes as the weight, and no program idles."""
    found = []
    for tile in _choices(outputs, inputs, itemsize, precision, arch, prologue):
        if tile.block_m >= 2 * max(rows, 16):
            continue
        most = min(
            _count(inputs, tile.block_k),
            inputs * itemsize // (8 * max(rows, 1)),
            4 * sms // max(_programs(tile, rows, outputs), 1) if tile.splittable else 1,
        )
        found += [replace(tile, splits=splits) for splits in SPLITS if splits <= max(most, 1)]
    return found
