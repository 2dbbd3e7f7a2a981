"""Tiles that do not straddle stages, and what each has to do with: a prefix or a suffix.

Pure arithmetic on the stage list, then one small table per list on the device.
"""

import functools
import itertools

import torch
from torch import Tensor

from ecar_kernels._triton import outside_pools

Row = tuple[int, int, int]
# Of tiles whose keys are split over programs; and nanoseconds of an H100, the first for 400 cycles.
SHARED_ROWS, SHARED_KEYS = 16, 64
BLOCK_TIME, ARRIVAL, SHARE_TIME = 220.0, 1100.0, 270.0
FEW_KEYS = 16  # below it a query's are few: no block is smaller


def query_tiles(stage_lengths: tuple[int, ...], queries: int, block: int) -> list[Row]:
    """(first query, length <= block, number of keys that they see), the most keys first."""
    before_queries = sum(stage_lengths) - queries
    rows = [
        (start - before_queries, min(block, end - start), end)
        for end, length in zip(itertools.accumulate(stage_lengths), stage_lengths, strict=True)
        for start in range(end - length, end, block)
        if start >= before_queries
    ]
    return sorted(rows, key=lambda row: -row[2])


def query_tiles_of_few_keys(*shape) -> list[Row]:
    return [row for row in query_tiles(*shape) if row[2] < FEW_KEYS]


@functools.lru_cache(1024)
def any_of_few_keys(stage_lengths: tuple[int, ...], queries: int) -> bool:
    return bool(query_tiles_of_few_keys(stage_lengths, queries, queries))


def key_tiles(stage_lengths: tuple[int, ...], queries: int, block: int) -> list[Row]:
    """(first key, length <= block, first query that sees them), the most queries first."""
    before_queries = sum(stage_lengths) - queries
    return [
        (start, min(block, end - start), max(0, end - length - before_queries))
        for end, length in zip(itertools.accumulate(stage_lengths), stage_lengths, strict=True)
        for start in range(end - length, end, block)
    ]


@functools.lru_cache(1024)
def shares(stage_lengths: tuple[int, ...], queries: int, batch_heads: int, sms: int) -> int:
    """Programs among which the keys of a tile of SHARED_ROWS queries are split; 1: they are not.

    As many as take the least time by a model of an H100: a block of SHARED_KEYS keys takes
    BLOCK_TIME, and where there are several programs the last to arrive has ARRIVAL for a fence, an
    atomic and its loads, and SHARE_TIME for each one's sums, a trip to memory. Never more programs
    than multiprocessors.
    """
    rows = query_tiles(stage_lengths, queries, SHARED_ROWS)
    if not rows or not batch_heads:
        return 1
    blocks = -(-rows[0][2] // SHARED_KEYS)

    def time(count: int) -> float:
        merging = ARRIVAL + (count - 1) * SHARE_TIME if count > 1 else 0.0
        return -(-blocks // count) * BLOCK_TIME + merging

    most = min(blocks, sms // (len(rows) * batch_heads))
    return min(range(1, most + 1), key=time, default=1)


KINDS = {"query": query_tiles, "few_keys": query_tiles_of_few_keys, "key": key_tiles}
# Never emptied: a captured CUDA graph goes on reading the tables that it was captured with.
_tables: dict[tuple, Tensor] = {}


def table(
    kind: str, stage_lengths: tuple[int, ...], queries: int, block: int, device: torch.device
) -> Tensor:
    """Tiles of a kind out of KINDS as int32 [tiles, 3], made at the first call and then kept.

    Where that first call is under CUDA-graph capture, the copy to the device becomes part of the
    graph and only its source, in pinned memory, is kept.
    """
    key = (kind, stage_lengths, queries, block, device)
    found = _tables.get(key)
    if found is not None:
        return found
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        source = _tables.get(key[:-1])
        if source is None:
            source = _tables[key[:-1]] = _rows(*key[:-1]).pin_memory()
        return source.to(device, non_blocking=True)
    return _tables.setdefault(key, outside_pools(_rows(*key[:-1]), device))


def _rows(kind: str, *shape) -> Tensor:
    return torch.tensor(KINDS[kind](*shape), dtype=torch.int32)
