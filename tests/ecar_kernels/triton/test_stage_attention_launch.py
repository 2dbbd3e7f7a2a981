"""Stage attention's tiles, and the rules of its launch settings: arithmetic, no kernel runs."""

import itertools

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from ecar_kernels import _triton
from ecar_kernels.stage_attention import launch, reference, tiles

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@given(
    st.lists(st.integers(1, 20), min_size=1, max_size=5),
    st.integers(1, 5),
    st.integers(1, 9),
    st.integers(1, 9),
)
@example([1], 1, 1, 1)
def test_tiles_cover_the_mask_once(lengths, newest, block_m, block_n):
    stages, newest = tuple(lengths), min(newest, len(lengths))
    queries = sum(stages[-newest:])
    mask = reference.block_causal_mask(stages, queries).int()
    seen = torch.zeros_like(mask)
    rows = tiles.query_tiles(stages, queries, block_m)
    for start, length, end in rows:
        assert 1 <= length <= block_m
        seen[start : start + length, :end] += 1
    assert seen.equal(mask)
    assert all(a[2] >= b[2] for a, b in itertools.pairwise(rows))
    few = tiles.query_tiles_of_few_keys(stages, queries, block_m)
    assert few == [row for row in rows if row[2] < 16]
    assert tiles.any_of_few_keys(stages, queries) == bool(few)
    seen = torch.zeros_like(mask)
    rows = tiles.key_tiles(stages, queries, block_n)
    for start, length, first in rows:
        assert 1 <= length <= block_n
        seen[first:, start : start + length] += 1
    assert seen.equal(mask)
    assert all(a[2] <= b[2] for a, b in itertools.pairwise(rows))


def test_a_table_is_made_once():
    device = torch.device(DEVICE)
    table = tiles.table("query", (3, 20), 20, 16, device)
    assert table is tiles.table("query", (3, 20), 20, 16, device)
    assert table.tolist() == [[0, 16, 23], [16, 4, 23]]
    assert table.dtype == torch.int32


def test_settings_hold_the_head_and_fit_the_chip():
    powers = (16, 32, 64, 128, 256)
    for op, head_dim, kind, arch in itertools.product(
        launch.OPS, range(8, 257, 8), launch.KINDS, (80, 86, 89, 90, 100, 103, 120)
    ):
        part1, part2 = launch.parts(head_dim)
        assert part1 in powers and part2 in (0, *powers) and part1 + part2 >= head_dim
        found = launch.settings(op, head_dim, kind, arch)
        own = [its.block_n if op == "stage_attention_keys" else its.block_m for its in found]
        assert own == sorted(set(own))
        for its in found:
            assert its.block_m in powers and its.block_n in powers
            assert its.num_warps in (2, 4, 8) and its.num_stages in (1, 2, 3)
            limit = 1024 * launch.SHARED_KIB.get(arch, 99)
            assert launch._least_shared(op, head_dim, kind, its) <= limit
        strips = launch.unaligned(op, kind)
        assert {strips.block_m, strips.block_n, strips.strip, strips.columns} <= set(powers)
        correction = launch.correction(kind)
        assert kind in ("tf32", "exact") or correction.block_n >= tiles.FEW_KEYS
        strip = launch.reload(op, head_dim, kind)
        assert (strip > 0) == (kind == "exact")
        whole = launch.parts(head_dim, op, kind)
        assert strip in (0, whole[0]) or (strip in powers and whole == (256, 0))
        assert set(found) <= set(launch.candidates(op, head_dim, kind, arch))
    assert launch.parts(72) == (64, 16) and launch.parts(56) == (64, 0)


@pytest.mark.parametrize(
    "stages, queries, batch_heads, arch, rows",
    [
        ((1024, 4096), 4096, 1, 80, 64),
        ((1,) * 20, 20, 1000, 80, 32),  # a tile of 64 rows would do twice as much
        ((1,) * 20, 20, 1000, 90, 64),  # but at twice the rate
        ((256,), 256, 12, 80, 32),  # 48 programs of 64 rows, fewer than half of the chip's 108
        ((256,), 256, 12, 90, 64),  # but a warp group has 64
        ((256,), 256, 12, 100, 64),
        ((256,), 256, 12, 120, 32),
        ((256,), 256, 64, 120, 64),
        ((256,), 256, 512, 80, 128),  # 1024 programs of 128 rows
        ((256,), 256, 64, 80, 64),  # 128 of them, not two for each multiprocessor
        ((64, 64), 128, 2000, 80, 64),  # 128 rows would be half empty
    ],
)
def test_the_tile_follows_the_stages_and_the_chip(stages, queries, batch_heads, arch, rows):
    its = launch.default("stage_attention", 64, "bfloat16", stages, queries, batch_heads, arch, 108)
    assert its.block_m == rows


@pytest.mark.parametrize("arch", [80, 90, 100, 120])
@pytest.mark.parametrize("precision", ["tf32", "ieee"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_last_block_is_pipelined_but_on_sm_90(monkeypatch, arch, precision, dtype):
    """There wgmma would be serialised; exact products have none, and 64 rows of D = 64 do."""
    module = pytest.importorskip("ecar_kernels.stage_attention.triton")
    started = []
    monkeypatch.setattr(module, "_start", lambda kernel, *_, **constants: started.append(constants))
    monkeypatch.setattr(_triton, "architecture", lambda index=None: arch)
    monkeypatch.setattr(_triton, "product_precision", lambda dtype: precision)
    q, k, v = torch.randn(3, 1, 64, 2, 64, dtype=dtype)
    out, lse = module._results(q)
    module._launch_forward(q, k, v, out, out, lse, [64], 1.0, leave_rest=False)
    read = (q, k, v, out, lse, lse)
    for op in ("stage_attention_queries", "stage_attention_keys"):
        module._launch(
            op, q, k, [64], strided=read[:4], tensors=read, counts=(64,), scales=(1.0, 1.0)
        )
    forward, queries, keys = (constants.get("PIPELINE_TAIL") for constants in started)
    wgmma = arch == 90 and (dtype is torch.bfloat16 or precision == "tf32")
    assert forward == queries == (not wgmma)
    assert keys is None
