"""Launch settings of the fused GEMMs' Triton kernels.

The rules are arithmetic about bytes, registers and the chip's size; none was measured. That no
tile below spills a register or asks for more shared memory than a chip has was seen by compiling
it (compile_cases.py).

No product is split over its inputs. The programs of a split add their sums up in a second launch,
or wait for each other in one, which takes a fence, an atomic and another trip to memory: some
1.5 us, and counters that outlive the call. A program that reads 128 or 256 inputs at a time keeps
its multiprocessor's reads as busy. By `nanoseconds`, with those 1.5 us and tiles of up to 64 x 64,
splits would save nothing for qkv, proj and fc1 of E-CAR-S, B and L at 16 to 512 rows on an H100,
and for fc2 at 32 to 128 rows up to a fifth: at most 7 percent of a block's products.

A prologue takes its rows' statistics from what the product before it left of each of its tiles,
where it can: one load, of 12 bytes a tile and row. Without, each program reads its rows whole
first, 8192 / block_m channels at a time, and what comes next waits for each. At LATENCY a turn the
two prologues of a block lose by it, in bfloat16 on an H100, without and with what was left (us):

    rows           16           64          256          512
    S         2.8   1.4    4.2   1.4    8.4   1.4    8.4   1.4
    B         2.8   1.4    5.6   1.4   11.2   1.4   11.2   1.4
    L         4.2   1.4    7.0   1.4   12.6   1.4   18.9   2.1

It is the most that can be saved, for turns may overlap, and the product that leaves statistics sums
its tile twice more. Read for them in a step of B are 14.7, 29.4 and 83.9 MB of rows at 16, 64 and
256, or 5.5, 5.5 and 7.9 MB of statistics.
"""

import functools
from dataclasses import dataclass

from ecar_kernels._triton import SHARED_KIB

ROW_WARPS = 4
# Rows that a program claims where they normalise together: 2048 rows are a group for each of the
# programs that an H100 runs at a time, of which a multiprocessor has two.
GROUP, RESIDENT = 8, 2
# Rates of an H100, a nanosecond. A multiprocessor's: bytes from the L2 cache while all are busy and
# at most, multiply-adds where there is no matrix unit. Bytes of memory.
SHARE, MOST, EXACT, MEMORY = 45.0, 100.0, 250.0, 3000.0
LATENCY = 700.0  # nanoseconds, until a load arrives
LAUNCH = 1500.0  # nanoseconds, of one more launch
MOST_STAGES = 6
# Up to as many rows a product normalises in its loop: those of one image, guided or not. There it
# reads x, shift and scale again for every column of tiles. With more rows its programs first write
# the normalised x together, in the product's own launch (row_kernels.py); where they cannot, that
# is one more. By `nanoseconds` and `normalising`, in bfloat16 on an H100, qkv takes in its loop,
# with statistics at hand, with a launch of its own for the pass (1.5 us more, and LATENCY or its
# bytes), and together (us):
#
#    rows             128               256               512               2048
#    S       4.9  4.6  6.6     6.7  5.8  7.1     9.1  7.0  8.3    35.5 22.7 22.6
#    B       7.3  6.1  7.4    11.3  7.8  9.1    15.5 10.7 12.0    61.4 38.2 37.4
#    L       8.1  6.6  8.6    13.3  8.5 10.5    20.2 13.0 14.9    80.7 47.6 47.1
#
# So together may be faster from 256 rows on. It is to be measured before an image of 512 rows takes
# it: `candidates` has both for `ecar tune`. At 1024 rows it is 0.5 to 1.1 us slower than with a
# launch of its own, of 12 to 25, from 2048 on as fast, to 3 percent.
PROLOGUE_ROWS = 512


@dataclass(frozen=True)
class Settings:
    """One product's tile.

    prologue: normalise in the product's loop; else before it, which writes the normalised x. It
    means nothing to linear_gated_residual.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    prologue: bool = False

    @property
    def max_registers(self) -> int | None:
        """Of a thread. Left alone, ptxas spills some of a prologue's, and of 64 x 64 sums' with
        their statistics, to fit one more program, for which shared memory has no room."""
        many = self.num_warps == 4 and self.block_m * self.block_n == 4096
        return 255 if self.prologue or many else None


def row_block(channels: int) -> int:
    """Channels that a row's pass reads at once: a row of the models is one or two reads."""
    return 1024 if channels <= 1024 else 2048


def shares(its: Settings, *, odd: bool) -> bool:
    """Do a product's programs normalise together, in its own launch: row_kernels.py? Under tiles of
    many rows."""
    return its.block_m >= 64 and not its.prologue and not odd


def group_block(its: Settings) -> int:
    """Channels of GROUP rows that a product's programs normalise at once: 16 values a thread. With
    32 a thread has more than 128 registers, and a multiprocessor of sm_90 one program, not two."""
    return 512 * its.num_warps // GROUP


def registers_together(its: Settings, itemsize: int, arch: int) -> int | None:
    """Of a thread, where programs normalise together: all. Left alone, ptxas spills a few to fit
    one more program; but on sm_90 it fits two of 16-bit types without."""
    return its.max_registers if arch == 90 and itemsize == 2 else 255


def counters(its: Settings, rows: int) -> int:
    """What programs that normalise together count: row_kernels.py."""
    return 2 + -(-rows // its.block_m)


def statistics_block(rows: int, *, parts: bool) -> int:
    """What is read at once for the statistics of so many rows: channels, 64 values a thread of 4
    warps, all under way at the same time; or parts, of three values each."""
    return (2048 if parts else 8192) // rows


def part_width(channels: int, parts: int) -> int:
    """Channels of each of a row's parts, the last of which may have fewer: a power of two, as tiles
    are."""
    return 1 << (-(-channels // parts) - 1).bit_length()


def tiles(
    itemsize: int, precision: str, arch: int, *, prologue: bool = False
) -> tuple[Settings, ...]:
    """What `default` chooses from, from small to large, without a prologue or with one.

    `precision` as _triton.product_precision has it.
    """
    line = 128 // itemsize  # inputs of a cache line
    roomy = SHARED_KIB.get(arch, 99) > 99
    if itemsize == 4 and precision == "ieee":
        # No matrix unit: operands go through registers, 16 or 32 inputs of them at a time, and
        # each thread has 8 (up to 16 rows), 16 (up to 32) or 32 sums. With 8 of 32 rows, Triton
        # 3.6 spills on sm_90.
        found = [(16, 64, 32, 4), (32, 64, 16, 4)]
        if roomy or not prologue:  # a prologue of 64 rows takes 124 KiB of shared memory
            found.append((64, 64, 16, 4))
        if not prologue:
            found.append((128, 64, 16, 8))
    elif prologue:
        # x, shift and scale are three times a tile's rows, and read again for every column of
        # tiles: more outputs than rows.
        found = [
            (16, 32, 2 * line, 4),
            (16, 64, line, 4),
            (32, 64, line, 4),
            (32, 128, line, 4),
            (64, 128, line, 8),
        ]
        if roomy:  # the others hold one block of it
            found.append((64, 256, line, 8))
    else:
        # 16 rows are the matrix unit's least, and 64 a warp group's on sm_90 and sm_100. Few
        # programs each read much: the fewer, the more inputs at a time.
        found = [
            (16, 16, 4 * line, 4),
            (16, 32, 4 * line, 4),
            (32, 32, 2 * line, 4),
            (32, 64, 2 * line, 4),
            (64, 64, line, 4),
            # Two warp groups, which share the weight's tile.
            (128, 64, line, 8),
        ]
        # With a float32 gate and residual the epilogue has no registers for it.
        if itemsize == 2:
            found.append((128, 128, line, 8))
    return tuple(_staged(its, itemsize, arch, prologue) for its in found)


def _staged(tile: tuple[int, int, int, int], itemsize: int, arch: int, prologue: bool) -> Settings:
    """With as many stages as hide memory's latency: what shared memory holds of them and of what
    the compiler keeps there; of tiles that fill the chip, what two programs on a multiprocessor of
    sm_90 and sm_100 have room for."""
    rows, outputs, inputs, _ = tile
    block = ((3 if prologue else 1) * rows + outputs) * inputs * itemsize
    held = 144 if SHARED_KIB.get(arch, 99) > 99 and rows < 128 else 96
    return Settings(*tile, min(MOST_STAGES, 1024 * held // block), prologue)


def is_odd(outputs: int, inputs: int) -> bool:
    return outputs % 16 != 0 or inputs % 16 != 0


def odd_tiles() -> tuple[Settings, ...]:
    """The same for inputs or outputs that are no multiple of 16. Values are then read singly,
    each by an instruction and, in 16-bit types, through a register: small tiles, or they spill.
    They leave no statistics, for which Triton 3.6 would let no two of their TF32 products overlap
    on sm_90."""
    return (Settings(16, 64, 32, 8, 3), Settings(32, 64, 32, 8, 3), Settings(64, 64, 32, 8, 3))


def programs(tile: Settings, rows: int, outputs: int) -> int:
    return -(-rows // tile.block_m) * -(-outputs // tile.block_n)


def nanoseconds(
    its: Settings, rows: int, outputs: int, inputs: int, itemsize: int, precision: str, sms: int
) -> float:
    """What a product takes by the model: waves of programs, and the bytes of each.

    The weight comes from memory once. Each program reads its rows and columns from the L2 cache,
    with a prologue shift and scale, too, and has all stages but one under way. A multiprocessor
    does its programs one after the other.
    """
    count = programs(its, rows, outputs)
    waves = -(-count // sms)
    read = ((3 if its.prologue else 1) * its.block_m + its.block_n) * inputs * itemsize
    one = max(read / MOST, inputs / its.block_k * LATENCY / max(its.num_stages - 1, 1))
    if itemsize == 4 and precision == "ieee":
        one = max(one, its.block_m * its.block_n * inputs / EXACT)
    return max(waves * one, count * read / (sms * SHARE), outputs * inputs * itemsize / MEMORY)


def normalising(
    its: Settings, rows: int, inputs: int, itemsize: int, sms: int, *, launched: bool = False
) -> float:
    """What it takes to write the normalised x before a product, in nanoseconds: together, or
    `launched` on its own.

    Together, each program claims a group of rows, reads and writes it block by block, and
    counts it, as often as there are groups for it; and a product's program asks whether it may
    begin. Each of these waits for the one before.
    """
    moved = 4 * rows * inputs * itemsize / (sms * SHARE)
    if launched:
        return LAUNCH + max(moved, LATENCY)
    turns = -(-rows // (GROUP * RESIDENT * sms))
    return max(moved, turns * (2 - (-inputs // group_block(its))) * LATENCY) + LATENCY


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

    What is fastest by the model, and of those the one that reads least.
    """
    problem = rows, outputs, inputs, itemsize, precision, sms
    prologue = normalised and rows <= PROLOGUE_ROWS
    return min(
        _worth_trying(*problem[:-1], arch, prologue),
        key=lambda its: (
            nanoseconds(its, *problem),
            programs(its, rows, outputs) * (its.block_m + its.block_n),
        ),
    )


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
    del sms
    problem = rows, outputs, inputs, itemsize, precision, arch
    found = _worth_trying(*problem, False)
    if normalised:
        found += _worth_trying(*problem, True)
    return list(dict.fromkeys(found))


def _worth_trying(
    rows: int, outputs: int, inputs: int, itemsize: int, precision: str, arch: int, prologue: bool
) -> list[Settings]:
    """Tiles that are not mostly empty."""
    found = odd_tiles()
    if not is_odd(outputs, inputs):
        found = tiles(itemsize, precision, arch, prologue=prologue)
    return [its for its in found if its.block_m < 2 * max(rows, 16)]
