"""Launch settings of the fused GEMMs' Triton kernels.

The rules are arithmetic about bytes, registers and the chip's size; none was measured. That no
tile below spills a register or asks for more shared memory than a chip has was seen by compiling
it (compile_cases.py).
"""

import functools
from dataclasses import dataclass, replace

SPLITS = (1, 2, 4, 8, 16)
# The sum of splits: a program adds up 4 values a thread, 16 bytes of each split, and the programs
# are small, so that at batch 1 there are many.
SUM_OUTPUTS, SUM_WARPS = 256, 2
ROW_WARPS = 4


@dataclass(frozen=True)
class Settings:
    """One product's tile and how the product is divided.

    splits: programs that share a tile, each with a part of the inputs. prologue: normalise in the
    product's loop, from statistics computed before it; else in a pass of its own, which writes
    the normalised x. It means nothing to linear_gated_residual.
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
        """Larger tiles are for rows enough to fill the chip."""
        return self.block_m <= 64


def row_block(channels: int) -> int:
    """Channels that a row's pass reads at once: a row of the models is one or two reads."""
    return 1024 if channels <= 1024 else 2048


def tiles(itemsize: int, precision: str, arch: int) -> tuple[Settings, ...]:
    """What `default` chooses from, by rows: up to 16, up to 32, and then from small to large.

    `precision` as _triton.product_precision has it.
    """
    if itemsize == 4 and precision == "ieee":
        # No matrix unit: operands go through registers, 16 inputs of them at a time, and each
        # thread has 8 (up to 16 rows), 16 (up to 32) or 32 sums. With 8 of 32 rows, Triton 3.6
        # spills on sm_90.
        return (
            Settings(16, 64, 32, 4, 4, prologue=True),
            Settings(32, 64, 16, 4, 3),
            Settings(64, 64, 16, 4, 3),
            Settings(128, 64, 16, 8, 3),
        )
    depth = 128 // itemsize  # a cache line of each row
    # 112 KiB in flight hide memory's latency on one multiprocessor; sm_120 has 99 KiB.
    stages = 3 if arch >= 120 else 4
    return (
        # Few rows: the weight's bytes are the time, so 5 of its tiles are under way; 16 rows are
        # the matrix unit's least.
        Settings(16, 64, depth, 4, 6, prologue=True),
        # The modulation is read again for every column of tiles: with 32 rows and 64 outputs
        # x, shift and scale would be 1.5 times the weight's bytes, with 128 they are 0.75.
        Settings(32, 128, depth, 4, stages, prologue=True),
        # One warp group's least on sm_90 and sm_100 (64 rows). It has the most bytes for each
        # multiply-add of those that fill the chip, and only they hold it back.
        Settings(64, 64, depth, 4, 4),
        # Two warp groups, which share the weight's tile: three quarters of the bytes.
        Settings(128, 64, depth, 8, 3),
        # Half of the bytes. With a float32 gate and residual the epilogue has no registers for it.
        *((Settings(128, 128, depth, 8, 3),) if itemsize == 2 else ()),
    )


def odd_tiles() -> tuple[Settings, ...]:
    """The same for inputs or outputs that are no multiple of 16. Values are then read singly,
    each by an instruction and, in 16-bit types, through a register: small tiles, or they spill."""
    return (Settings(16, 64, 32, 8, 3), Settings(32, 64, 32, 8, 3), Settings(64, 64, 32, 8, 3))


def _choices(
    outputs: int, inputs: int, itemsize: int, precision: str, arch: int
) -> tuple[Settings, ...]:
    return odd_tiles() if outputs % 16 or inputs % 16 else tiles(itemsize, precision, arch)


def _count(size: int, block: int) -> int:
    return -(-size // block)


def _programs(tile: Settings, rows: int, outputs: int) -> int:
    return _count(rows, tile.block_m) * _count(outputs, tile.block_n)


def _tile(rows: int, outputs: int, found: tuple[Settings, ...], sms: int) -> Settings:
    if rows <= 16:
        return found[0]
    if rows <= 32:
        return found[1]
    # The larger a tile, the less is read for each multiply-add, if every multiprocessor has one.
    for tile in reversed(found[3:]):
        if 2 * rows > tile.block_m and _programs(tile, rows, outputs) >= sms:
            return tile
    return found[2]


def _most_splits(tile: Settings, inputs: int, itemsize: int) -> int:
    """A split's sums, written and read again in float32, may be as many bytes as it reads."""
    sums = 8 * tile.block_m * tile.block_n
    block = (tile.block_m + tile.block_n) * tile.block_k * itemsize
    return _count(inputs, tile.block_k) // _count(sums, block)


@functools.lru_cache(1024)
def default(
    rows: int, outputs: int, inputs: int, itemsize: int, precision: str, sms: int, arch: int
) -> Settings:
    """For [rows, inputs] times [inputs, outputs], either op.

    Splits double until three quarters of the `sms` multiprocessors have a program (another
    doubling would help the rest less than it costs to sum up), within `_most_splits`.

    The prologue is for the products of up to 32 rows alone, in one row of tiles. There the
    weight comes from memory once, while x, shift and scale, no more bytes than it for each tile,
    come again for each column of tiles from the L2 cache, which is at least twice as fast. With
    more rows the weight too comes from L2, and re-reading the modulation would cost more than
    a pass that writes the normalised x: with T columns of tiles and R bytes of x, R + 3 R T
    against 4 R + R T. A float32 tile of 32 rows has only 64 outputs, hence no prologue.
    """
    tile = _tile(rows, outputs, _choices(outputs, inputs, itemsize, precision, arch), sms)
    splits, programs = 1, _programs(tile, rows, outputs)
    most = min(SPLITS[-1], _most_splits(tile, inputs, itemsize)) if tile.splittable else 1
    while 4 * splits * programs < 3 * sms and 2 * splits <= most:
        splits *= 2
    return replace(tile, splits=splits)


def candidates(
    rows: int, outputs: int, inputs: int, itemsize: int, precision: str, sms: int, arch: int
) -> list[Settings]:
    """What is worth measuring: tiles that are not mostly empty, their splits, both ways to
    normalise where there are both."""
    found = []
    for tile in _choices(outputs, inputs, itemsize, precision, arch):
        if tile.block_m >= 2 * max(rows, 16):
            continue
        most = min(_count(inputs, tile.block_k), 4 * sms // _programs(tile, rows, outputs))
        for splits in SPLITS if tile.splittable else SPLITS[:1]:
            if splits <= max(1, most):
                found += [
                    replace(tile, splits=splits, prologue=prologue)
                    for prologue in sorted({tile.prologue, False})
                ]
    return found
