"""Keys split over programs, in stage attention's forward of few queries that see many keys."""

import itertools

import pytest
import torch

from ecar_kernels import _triton
from ecar_kernels.stage_attention import launch, tiles
from tests.support import stage_attention
from tests.support.stage_attention import E_CAR, VAR_STAGES

triton = pytest.importorskip("ecar_kernels.stage_attention.triton")

# Interpreted, kernels compute in numpy, which warns where a GPU does not.
pytestmark = [
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning:triton"),
    pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning:triton"),
]
SMS = 132  # of an H100


def call_of(*shape, **kinds):
    return stage_attention.call_of(*shape, **kinds, backend="triton")


@pytest.fixture
def split(monkeypatch):
    """`split(n)`: over n programs, whatever the model says. Grids of the launches that are."""
    grids, kernel = [], triton.split_forward_kernel
    run = kernel.run

    def noting(*args, **options):
        grids.append(options["grid"])
        return run(*args, **options)

    def over(count):
        monkeypatch.setattr(tiles, "shares", lambda *_: count)

    monkeypatch.setattr(kernel, "run", noting)
    over.grids = grids
    return over


@pytest.mark.parametrize(
    ("stages", "newest", "count", "head_dim", "dtype", "layout", "scale"),
    [
        # The last share is one key.
        ((100, 29), 1, 3, 64, torch.bfloat16, "packed", None),
        # Two stages, and a tile less a few rows.
        ((100, 28), 2, 2, 72, torch.float16, "heads first", -0.3),
        # Shares without a key.
        ((50, 17), 1, 5, 40, torch.bfloat16, "tokens first", 0.0),
        ((130,), 1, 2, 104, torch.float16, "contiguous", 1.0),
    ],
)
def test_outputs(
    stages, newest, count, head_dim, dtype, layout, scale, split, programs_in_any_order
):
    """In layouts that users have, by any order of programs the same bits; and zeros are left."""
    split(count)
    queries = sum(stages[-newest:])
    how = {"head_dim": head_dim, "dtype": dtype, "layouts": (layout,) * 3}
    call = call_of(stages, queries, batch=2, heads=1, **how) | {"scale": scale}
    first, second = (triton.stage_attention(**call) for _ in range(2))
    assert first.equal(second)
    stage_attention.check("triton", call, gradients=False)
    rows = len(tiles.query_tiles(stages, queries, tiles.SHARED_ROWS))
    assert split.grids == [(rows * 2, count)] * 3
    assert not _triton.counters(first.device, 1).any()


def test_not_a_number_stays_in_its_row(split):
    split(2)
    call = call_of((100, 20), 20, head_dim=64, dtype=torch.bfloat16)
    given = [call[name].clone() for name in ("q", "k", "v")]
    clean = triton.stage_attention(*given, (100, 20))
    given[0][0, 3, 1, 5] = torch.nan
    result = triton.stage_attention(*given, (100, 20))
    assert result[0, 3, 1].isnan().all()
    result[0, 3, 1] = clean[0, 3, 1]
    assert result.equal(clean)


def test_what_is_not_split(split, monkeypatch):
    """Float32, wide heads, rows that are not aligned, with gradients, and without counters."""
    split(2)

    def run(requires_grad=False, **how):
        given = {"head_dim": 64, "dtype": torch.bfloat16} | how
        call = call_of((90, 20), 20, **given)
        q, k, v = (call[name].requires_grad_(requires_grad) for name in ("q", "k", "v"))
        split.grids.clear()
        triton.stage_attention(q, k, v, (90, 20))
        return len(split.grids)

    assert run() == 1
    assert run(dtype=torch.float32) == 0
    assert run(head_dim=136) == 0
    assert run(layouts=("sliced",) * 3) == 0
    assert run(requires_grad=True) == 0
    monkeypatch.setattr(_triton, "counters", lambda *_: None)
    assert run() == 0


def test_models_with_growing_stages_keep_one_program():
    """E-CAR's and VAR's: there are few keys where there are few queries. Also on larger chips."""
    for heads, images, sms in itertools.product((6, 16), (1, 2, 16), (58, 108, SMS, 148, 170)):
        for stages in (E_CAR, VAR_STAGES):
            for last in range(1, len(stages) + 1):
                seen = stages[:last]
                assert tiles.shares(seen, seen[-1], heads * images, sms) == 1
                assert tiles.shares(seen[-1:], seen[-1], heads * images, sms) == 1


@pytest.mark.parametrize(
    ("keys", "heads", "expected"), [(500, 6, 1), (1000, 6, 4), (5000, 6, 8), (5000, 132, 1)]
)
def test_few_queries_of_many_keys(keys, heads, expected):
    assert tiles.shares((keys - 16, 16), 16, heads, SMS) == expected


def test_no_more_programs_than_multiprocessors():
    for keys, queries, heads in itertools.product((64, 1000, 20000), (1, 16, 40), (1, 6, 50)):
        stages = (keys, queries)
        rows = len(tiles.query_tiles(stages, queries, tiles.SHARED_ROWS))
        count = tiles.shares(stages, queries, heads, SMS)
        assert count == 1 or count * rows * heads <= SMS
        assert count <= -(-(keys + queries) // tiles.SHARED_KEYS)
    assert tiles.shares((16,), 16, 0, SMS) == 1


def test_every_kind_has_tiles_or_none():
    for head_dim, kind in itertools.product(range(8, 257, 8), launch.KINDS):
        its = launch.split(head_dim, kind)
        assert (its is None) == (kind in ("tf32", "exact") or head_dim > 128)
