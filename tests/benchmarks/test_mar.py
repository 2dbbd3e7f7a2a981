"""MAR as a peer: its published sizes, its schedule, its count, and its sampler at a tiny size."""

import contextlib

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.paper import mar
from ecar_kernels import use_backend
from tests.support.accuracy import error, ulp
from tests.support.blocks import is_served

TINY = mar.MARSize(layers=2, width=16, heads=2, mlp_blocks=2, mlp_width=24, tokens=16, buffer=4)


@contextlib.contextmanager
def counted():
    """The reference's products, all of which the counter knows."""
    with use_backend("reference"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        yield counter


@pytest.mark.parametrize(("size", "millions"), [("B", 208), ("L", 479), ("H", 943)])
def test_parameters_are_the_published_ones(size, millions):
    with torch.device("meta"):
        parameters = mar.MAR(mar.SIZES[size]).parameters()
    assert sum(p.numel() for p in parameters) == pytest.approx(millions * 1e6, rel=0.01)


@pytest.mark.parametrize("steps", [1, 7, 64, 256])
def test_every_token_is_drawn_once_and_few_at_first(steps):
    drawn = mar.next_tokens(steps)
    assert len(drawn) == steps and sum(drawn) == 256 and min(drawn) >= 1
    assert drawn[0] <= drawn[steps // 2] <= max(drawn)


def test_multiply_adds_are_those_of_the_modules():
    ar_steps, known, total = 3, 0, 0
    model = mar.MAR(TINY)
    latents, order = torch.randn(1, TINY.tokens, mar.CHANNELS), torch.randperm(TINY.tokens)
    for drawn in mar.next_tokens(ar_steps, TINY.tokens):
        with counted() as counter:
            z = model.condition(
                torch.tensor([3]), latents, order[:known], order[known : known + drawn]
            )
            total += counter.get_total_flops() // 2
        assert z.shape == (1, drawn, TINY.width)
        with counted() as counter:
            model.mlp(torch.randn(drawn, mar.CHANNELS), torch.rand(drawn), z[0])
            total += counter.get_total_flops() // 2 * mar.DIFFUSION_STEPS
        known += drawn
    assert mar.multiply_adds(TINY, ar_steps) == total


def test_the_accelerated_model_computes_the_same():
    plain = mar.MAR(TINY).eval()
    fast = mar.build(TINY)
    fast.load_state_dict(plain.state_dict())
    assert is_served(fast.mlp)
    order, latents = torch.randperm(TINY.tokens), torch.randn(1, TINY.tokens, mar.CHANNELS)
    given = (torch.tensor([3]), latents, order[:5], order[5:8])
    x, t = torch.randn(3, mar.CHANNELS), torch.rand(3)
    with torch.no_grad():
        found = fast.condition(*given)
        z = found[0]
        pairs = [
            (found, lambda m, kind: m.condition(given[0], latents.to(kind), *given[2:])),
            (fast.mlp(x, t, z), lambda m, kind: m.mlp(x.to(kind), t.to(kind), z.to(kind))),
        ]
        for ours, run in pairs:
            with use_backend("reference"):
                usual, exact = run(plain.float(), torch.float32), run(plain.double(), torch.float64)
            assert error(ours, exact) <= 2 * error(usual, exact) + ulp(exact, torch.float32)


def test_what_is_not_known_is_not_read():
    model = mar.MAR(TINY)
    order, latents = torch.randperm(TINY.tokens), torch.randn(1, TINY.tokens, mar.CHANNELS)
    other = latents.clone()
    other[:, order[5:]] = torch.randn(1, TINY.tokens - 5, mar.CHANNELS)
    label = torch.tensor([3])
    with torch.no_grad():
        one, two = (
            model.condition(label, values, order[:5], order[5:7]) for values in (latents, other)
        )
    assert torch.equal(one, two)


def test_an_image_takes_its_ar_and_diffusion_steps(monkeypatch):
    """A second each: all AR steps, and 100 diffusion steps of each."""
    calls = []
    monkeypatch.setattr(mar, "seconds_of", lambda call: calls.append(call()) or 1.0)
    assert mar.image_seconds(mar.build(TINY), 4, 2, 3) == 4 * (1 + mar.DIFFUSION_STEPS)
    assert len(calls) == 2 * (1 + 3)
    assert all(call.isfinite().all() for call in calls)
