"""Launch settings of stage attention's Triton kernels.

A kernel owns tiles of one side, queries or keys, and loops over blocks of the other. The rules
are arithmetic about registers, shared memory and the chip's size; none was measured. Where a
rule names spills, they were seen by compiling what it avoids; compile_cases.py lists what the
compile gate checks.
"""

import functools
from dataclasses import dataclass, replace

import torch

from ecar_kernels._triton import SHARED_KIB
from ecar_kernels.stage_attention import tiles

OPS = ("stage_attention", "stage_attention_keys", "stage_attention_queries")
SHARES = "stage_attention_shares"  # as an op, of which `Shares` are the settings
KINDS = ("bfloat16", "float16", "tf32", "exact")
# Keys and values of the heads that run at the same time stay within the L2 cache: 40 MiB on
# A100, 50 on H100, more on later chips, of which a tile's own rows and the output take a part.
L2_BYTES = 16 << 20


@dataclass(frozen=True)
class Settings:
    """block_m: queries, block_n: keys. One is the tile that a program owns, one the loop's."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Shares:
    """Programs that split the keys of a tile; 1 are the forward under `Settings`."""

    shares: int


@dataclass(frozen=True)
class StripSettings:
    """Of kernels that take the same registers at every head dimension. Blocks as in Settings;
    strip: columns of both sides that are multiplied at once; columns: those of the results that
    a program owns, 0 where the results have none."""

    block_m: int
    block_n: int
    strip: int
    num_warps: int
    num_stages: int
    columns: int = 0


@dataclass(frozen=True)
class DeltaSettings:
    """rows of `width` columns, a power of two, at once."""

    rows: int
    width: int
    num_warps: int


def kind(dtype: torch.dtype, precision: str) -> str:
    """Out of KINDS; `precision` as _triton.product_precision has it."""
    if dtype is torch.float32:
        return "tf32" if precision == "tf32" else "exact"
    return "bfloat16" if dtype is torch.bfloat16 else "float16"


@functools.cache
def parts(head_dim: int, op: str = "stage_attention", kind: str = "bfloat16") -> tuple[int, int]:
    """Widths, powers of two from 16 on, of the one or two parts that hold a head's dimensions.

    16 is the least that a matrix product takes. Two parts only where they are narrower than
    one: 72 is 64 + 16, but 56 is 64. One part, too, of float32 where Triton 3.6 or 3.9 spills of
    two: TF32 from 128 to 160; exact products for gradients of queries beyond 128, for those of keys
    from 128 to 160, and forward between 160 and 192; for gradients between 32 and 48.
    """
    whole = max(16, 1 << (head_dim - 1).bit_length())
    first = 1 << (head_dim.bit_length() - 1)
    one = whole == 256 and {
        "tf32": head_dim <= 160,
        "exact": {
            "stage_attention": 160 < head_dim < 192,
            "stage_attention_keys": head_dim <= 160,
        }.get(op, True),
    }.get(kind, False)
    one |= whole == 64 and kind == "exact" and op != "stage_attention"
    if first < 16 or first == head_dim or one:
        return whole, 0
    second = max(16, 1 << (head_dim - first - 1).bit_length())
    return (first, second) if first + second < whole else (whole, 0)


@functools.cache
def delta(head_dim: int) -> DeltaSettings:
    """16 values a thread, of out, its rest and its gradient: two loads of 16 bytes in 16-bit
    types."""
    width = max(16, 1 << (head_dim - 1).bit_length())
    return DeltaSettings(2048 // width, width, 4)


def reload(op: str, head_dim: int, kind: str) -> int:
    """Columns of an exact product's factors that are read at once, whole parts; 0 for the others.

    In the gradients of keys a thread would hold whole rows of both factors, twice the columns of
    a part, and has 255 registers: of a part of 256 Triton 3.6 spills 320 bytes and more, of strips
    of 64 columns none.
    """
    if kind != "exact":
        return 0
    whole = parts(head_dim, op, kind)[0]
    return 64 if op == "stage_attention_keys" and whole == 256 else whole


def pipeline_tail(kind: str, arch: int, its: Settings) -> bool:
    """Is the last, partial block, which is one pass of a loop of its own, pipelined as the others
    are, where queries are the tile?

    Not where warp groups multiply on sm_90, in tiles of 64 rows and more: ptxas would wait for
    every wgmma of the kernel before the next. In the gradients of keys it does not.
    """
    return kind == "exact" or its.block_m < 64 or not _sums_in_registers(arch)


def max_registers(op: str, head_dim: int, kind: str) -> int | None:
    """Of a thread: all. Left alone, ptxas spills a few to fit one more program; but exact
    products for gradients of wide heads spill fewer if left alone: queries' beyond 64 columns,
    and keys' of one part of 256."""
    if kind != "exact" or op == "stage_attention":
        return 255
    width = sum(parts(head_dim, op, kind))
    left_alone = width > 64 if op == "stage_attention_queries" else width == 256
    return None if left_alone else 255


def unaligned(op: str, kind: str) -> StripSettings:
    """For rows at addresses that are no multiples of 16 bytes, whose elements are loaded one by
    one, each by an address of two registers: few at a time. Gradients of keys load two factors of
    the results and have two sums, and spill with a block of 32 queries on sm_80 and sm_120."""
    if kind == "exact":
        return StripSettings(32, 32, 16, 8, 1, columns=64)
    blocks = (16, 64) if op == "stage_attention_keys" else (64, 32)
    return StripSettings(*blocks, 16, 8, 1, columns=64)


def correction(kind: str) -> StripSettings:
    """Of delta.

    16-bit types have it for a few keys, of which the least block holds all. An exact product's
    threads hold whole rows of a strip, two by two of them; a warp's matrix instruction 16 rows.
    """
    if kind == "exact":
        return StripSettings(32, 32, 16, 8, 1)
    if kind == "tf32":
        return StripSettings(64, 32, 32, 8, 2)
    return StripSettings(16, 16, 32, 1, 1)


def settings(op: str, head_dim: int, kind: str, arch: int) -> tuple[Settings, ...]:
    """What `default` chooses from, by the size of the owned tile, smallest first.

    op: out of OPS, the forward and the gradients of keys and of queries. A warp's matrix
    instruction has 16 rows, so that 64 rows are 4 warps: one for each matrix unit of a
    multiprocessor, and the least that sm_90's and sm_100's warp groups take.
    """
    width = sum(parts(head_dim, op, kind))
    found: tuple[tuple[int, int, int, int], ...]
    if kind == "exact":
        # No matrix unit. Threads hold whole rows of a factor: a product of 64 x 16 by 256
        # threads is two by two of them a thread, for rows of 64. Longer rows go one by one; or
        # one by two, where that spills.
        few = op == "stage_attention_queries" and width in (128, 256)
        found = ((64, 16, 8, 1) if width <= 64 else (16, 16, 4 if few else 8, 1),)
    elif kind == "tf32":
        found = _tf32(op, width, head_dim < width, arch)
    else:
        found = _sixteen_bits(op, width, head_dim < width, arch)
    if op == "stage_attention_keys":
        return tuple(Settings(loop, own, *rest) for own, loop, *rest in found)
    return tuple(Settings(*its) for its in found)


def _has_warp_groups(arch: int) -> bool:
    """sm_90 and sm_100 read factors from shared memory; others, sm_120 too, from registers."""
    return 90 <= arch < 120


def _sums_in_registers(arch: int) -> bool:
    """Those of warp groups, 64 rows and more: on sm_90. On sm_100 they are in tensor memory."""
    return 90 <= arch < 100


def _sixteen_bits(
    op: str, width: int, masked: bool, arch: int
) -> tuple[tuple[int, int, int, int], ...]:
    # (own, loop, warps, stages). A thread of a 64-row tile has width / 2 registers of each
    # sum, half of that for each of the tile's factors, and half the loop's block of scores:
    # what is left of 255 sets the loop's block. Parts with empty columns take masks, which cost a
    # few more: where two blocks in flight would spill with Triton 3.6 or 3.9, there is one.
    groups = _has_warp_groups(arch)
    if width > 128:
        if op == "stage_attention_keys":  # two sums, two factors
            if width < 256 and groups:
                return ((64, 16, 8, 2),)
            return ((32, 16, 8 if masked and groups else 4, 2),)
        if op == "stage_attention_queries":  # two factors; 8 warps share a row's columns
            # 64 rows of one part spill on sm_90, as the last block goes through registers.
            if width == 256 and _sums_in_registers(arch):
                return ((32, 64, 8, 2),)
            # On sm_120 two parts of a wider block spill, one takes too much shared memory.
            two = arch >= 120 and width < 256
            one_block = arch >= 120 and (not two or width == 144)
            return ((64, 16 if two else 32, 8, 1 if one_block else 2),)
        # 8 warps share a single part's columns; of two parts both would do the same.
        if width == 256:
            return ((64, 32, 8, 2),)
        # On others than those with warp groups 32 spill.
        return ((64, 32 if groups else 16, 4, 1 if masked and arch >= 120 else 2),)
    two_parts = 64 < width < 128
    few = 1 if masked and width > 64 else 2
    if op == "stage_attention_keys":
        # Of two parts warp groups leave the factors out of registers.
        loop = 32 if width < 64 or groups else 16
        if arch >= 120 and two_parts:  # 2 warps spill a few of two parts with Triton 3.6
            return ((64, loop, 4, few),)
        if masked and width == 128:
            return (32, 16, 4, 2), (64, 16, 4, 2)
        return (32, 16, 2, few), (64, loop, 4, 2 if groups else few)
    if op == "stage_attention_queries":
        return (32, 32, 2, 2 if two_parts else few), (64, 32, 4, 2)
    # Blocks in flight: 16 KiB each at width 64, 32 KiB at 128. On sm_120 a loop of 64 spills, too,
    # at D = 56 and 88 in the usual tile, and from D = 104 on in both.
    loop = 32 if masked and arch >= 120 and (width == 64 or width > 80) else 64
    large = (128, 32, 8, 1) if loop == 32 and width == 128 else (128, 64, 8, 2)
    # 16 rows are one warp's, which wide heads spill in. Few queries have few keys: small blocks.
    least = (16, 16, 1 if width <= 80 else 2, 2)
    return least, (32, 32, 2, few), (64, loop, 4, 3 if width <= 64 else 2), large


def _tf32(op: str, width: int, masked: bool, arch: int) -> tuple[tuple[int, int, int, int], ...]:
    # Factors take twice the registers and the shared memory. Gradients of wide parts with empty
    # columns, whose masks take registers, too, have them spread over twice the threads.
    more = 8 if masked and width >= 128 else 4
    little_shared, groups = arch >= 120, _has_warp_groups(arch)
    if op == "stage_attention":
        if width <= 128:
            # Without warp groups blocks of 32 spill at D = 56, and two of 16 at D = 88 on sm_120.
            few = (little_shared and width > 64) or (masked and width == 64 and not groups)
            one_block = masked and little_shared and width == 96
            return ((64, 16 if few else 32, 4, 1 if one_block else 2),)
        # On sm_90 64 rows spill, as in bfloat16's queries, and 128 at D = 136 with Triton 3.6.
        if _sums_in_registers(arch):
            return ((32, 32, 8, 2),)
        return ((32, 16, 4, 1) if little_shared else (64, 16 if groups else 32, 8, 2),)
    if width > 128:
        if little_shared:
            # Shared memory holds 16 keys of one part, registers 16 queries of two.
            least = (width == 256) == (op == "stage_attention_keys")
            return ((16 if least else 32, 16, more, 1),)
        return ((32, 16, more, 1 if groups and op == "stage_attention_keys" else 2),)
    if op == "stage_attention_queries":
        # A single part of 128 spills with Triton 3.6 on sm_90 in tiles of 64 rows, of four warps
        # and of eight. Of 128 rows eight warps hold what four do of 64, but half of each block.
        if width == 128 and _sums_in_registers(arch):
            return ((128, 16, 8, 2),)
        # Blocks of 32 spill at D = 40 with Triton 3.9 on sm_120.
        few = width > 64 or (masked and little_shared and width == 48)
        return ((64, 16 if few else 32, 8 if groups and width == 128 else 4, 2),)
    if 64 < width < 128 and not groups:
        return ((16, 16, 4, 1 if masked else 2),)  # two parts of 32 keys spill
    one_block = masked and little_shared and width == 64  # at D = 56 two spill with Triton 3.9
    own = 64 if width <= (96 if groups else 64) else 32
    return ((own, 16, more, 1 if one_block else 2),)


def _own(op: str, its: Settings) -> int:
    """Rows of the tile that a program owns."""
    return its.block_n if op == "stage_attention_keys" else its.block_m


def _tiling(
    op: str, stage_lengths: tuple[int, ...], queries: int, its: Settings
) -> tuple[int, int]:
    """Tiles, and pairs of a query and a key that they compute, unused rows included."""
    own = _own(op, its)
    if op == "stage_attention_keys":
        rows = tiles.key_tiles(stage_lengths, queries, own)
        return len(rows), own * sum(queries - first for _, _, first in rows)
    rows = tiles.query_tiles(stage_lengths, queries, own)
    return len(rows), own * sum(end for _, _, end in rows)


def _busiest(
    stage_lengths: tuple[int, ...], queries: int, batch_heads: int, sms: int, its: Settings
) -> int:
    """Pairs of the multiprocessor that does most, where each gets a tile of queries in turn, the
    most keys first."""
    rows = tiles.query_tiles(stage_lengths, queries, its.block_m)
    firsts = range(0, len(rows) * batch_heads, sms)
    return its.block_m * sum(rows[first // batch_heads][2] for first in firsts)


@functools.lru_cache(1024)
def default(
    op: str,
    head_dim: int,
    kind: str,
    stage_lengths: tuple[int, ...],
    queries: int,
    batch_heads: int,
    arch: int,
    sms: int,
) -> Settings:
    """For the newest `queries` tokens of these stages, over all heads of all images.

    The tile of 64 rows, but

    on chips whose matrix instructions are single warps', a smaller one for stages so short that
    the next larger would compute half as many pairs again. Warp groups, which small tiles are too
    small for, multiply at about twice the rate of single warps: there where 64 rows would compute
    more than twice as many;

    on the former, too, 32 rows where not even every second multiprocessor would have a program of
    64. Every warp does 16 rows in either tile, but those of the small one are spread over twice
    the multiprocessors, each with its own shared memory to read the keys from;

    the large one where the busiest multiprocessor has at most an eighth more to do than with 64
    rows: it reads the other side half as often. E-CAR-S at 1024 pixels has 192 programs of it, one
    image and no guidance, so that some of an H100's 132 multiprocessors would do 256 rows where
    384 programs of 64 leave none more than 192. An A100's 108 do 256 in either.
    """
    found = settings(op, head_dim, kind, arch)
    if len(found) == 1:
        return found[0]
    tilings = [_tiling(op, stage_lengths, queries, its) for its in found]
    at = usual = [_own(op, its) for its in found].index(64)
    count, pairs = tilings[usual]
    for i in reversed(range(usual)):
        few_pairs = tilings[i][1]
        if 2 * few_pairs < pairs if _has_warp_groups(arch) else 3 * few_pairs <= 2 * tilings[at][1]:
            at = i
    if at < usual:
        return found[at]
    if not _has_warp_groups(arch) and 2 * count * batch_heads <= sms:
        return found[usual - 1]
    shape = stage_lengths, queries, batch_heads, sms
    if 8 * _busiest(*shape, found[-1]) <= 9 * _busiest(*shape, found[usual]):
        return found[-1]
    return found[usual]


def split(head_dim: int, kind: str) -> Settings | None:
    """Of tiles whose keys are split over programs (tiles.shares): one warp's rows, and four warps
    that share a block of keys: half of one for two parts of 64 + 16, which Triton 3.9 spills at
    D = 72. None where they are not: in float32, whose products are the longer part, and for wide
    heads, of which some chips' shared memory does not hold two such blocks."""
    width = sum(parts(head_dim, "stage_attention", kind))
    if kind in ("tf32", "exact") or width > 128:
        return None
    keys = tiles.SHARED_KEYS // (2 if width == 80 else 1)
    return Settings(tiles.SHARED_ROWS, keys, 4, 2)


def candidates(op: str, head_dim: int, kind: str, arch: int) -> list[Settings]:
    """What is worth measuring: the tiles of `settings`, loops of half and twice their blocks,
    one to four stages; what shared memory surely cannot hold is left out."""
    found = []
    for usual in settings(op, head_dim, kind, arch):
        side = "block_m" if op == "stage_attention_keys" else "block_n"
        block = getattr(usual, side)
        for loop in sorted({max(16, block // 2), block, 2 * block}):
            for stages in (1,) if kind == "exact" else (1, 2, 3, 4):
                its = replace(usual, num_stages=stages, **{side: loop})
                if _least_shared(op, head_dim, kind, its) <= 1024 * SHARED_KIB.get(arch, 99):
                    found.append(its)
    return list(dict.fromkeys(found))


def _least_shared(op: str, head_dim: int, kind: str, its: Settings) -> int:
    """Bytes of the loop's two factors in flight: all stages but the one in use."""
    loop = its.block_m if op == "stage_attention_keys" else its.block_n
    itemsize = 2 if kind in ("bfloat16", "float16") else 4
    return 2 * (its.num_stages - 1) * loop * sum(parts(head_dim, op, kind)) * itemsize


def heads_in_cache(batch_heads: int, rows: int, head_dim: int, itemsize: int) -> int:
    """Heads that go together, because their other side's two factors fit into the L2 cache."""
    return max(1, min(batch_heads, L2_BYTES // (2 * rows * head_dim * itemsize)))
