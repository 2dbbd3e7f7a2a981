"""Blocks in a row by the Triton kernels, each of which leaves the rows' statistics for the next."""

import pytest
import torch

from ecar.sampling import plain
from ecar.sampling.cpu import CpuEngine
from ecar.transformer import KVCache
from ecar_kernels import FlowBlock, accelerate

from .sampling.support import assert_same_image, composed_boundary, draw

triton = pytest.importorskip("ecar_kernels.flow_block.triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def taken(monkeypatch):
    """Of each adaln_linear by Triton: did it take statistics?"""
    found, run = [], triton.launch_adaln_linear

    def noting(*given):
        found.append(len(given) > 11 and given[11] is not None)
        return run(*given)

    monkeypatch.setattr(triton, "launch_adaln_linear", noting)
    return found


def hook(block):
    block.register_forward_pre_hook(lambda module, args: None)


def replace_infer(block):
    block.infer = lambda *given: FlowBlock.infer(block, *given)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda block: None, [False, True, True, True, True]),  # the last: the output's
        (hook, [False, True, True]),  # called, by the ops of training
        (replace_infer, [False, True, False, True, True]),
    ],
    ids=["as written", "hooked", "infer replaced"],
)
@torch.no_grad()
def test_a_velocity(model, taken, change, expected):
    head = model.to(DEVICE).heads[1]
    x = torch.randn(2, *model.config.stage_shape(2), device=DEVICE)
    token_map = torch.randn(2, model.config.stage_tokens[1], model.config.width, device=DEVICE)
    parts = head.spatial_parts(token_map), head.step_parts(torch.tensor([0.3], device=DEVICE))[0]
    plain = head.velocity(x, *parts)
    accelerate(head, backend="triton")
    change(head.blocks[0])
    taken.clear()
    assert (head.velocity(x, *parts) - plain).abs().max() < 1e-5 * plain.abs().max()
    assert taken == expected


@pytest.mark.parametrize(
    ("hooked", "expected"), [(False, [False, True, True, True]), (True, [False, True] * 2)]
)
@torch.no_grad()
def test_stages_over_a_cache(model, taken, hooked, expected):
    labels, ar = torch.tensor([1, 2], device=DEVICE), model.to(DEVICE).ar
    end = torch.randn(2, *model.config.stage_shape(1), device=DEVICE)

    def maps():
        cache = KVCache(model.config, 2, device=model.device, dtype=model.dtype)
        return ar.stage(ar.embed_class(labels), cache), ar.stage(ar.embed_end(end, 2), cache)

    plain = maps()
    accelerate(ar, backend="triton")
    if hooked:
        hook(ar.blocks[1])
    taken.clear()
    for found, usual in zip(maps(), plain, strict=True):
        assert (found - usual).abs().max() < 1e-5
    assert taken == expected * 2


def statistics_of(x):
    """Of every 16 channels: [R, N, 3, parts]."""
    parts = x.float().unflatten(-1, (-1, 16))
    mean = parts.mean(-1)
    square = (parts - mean[..., None]).square().sum(-1)
    return torch.stack([mean, torch.zeros_like(mean), square], 2)


@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.2, 0.6)])  # of guided steps: twice the rows
def test_the_boundary_leaves_them_for_the_first_block(model, taken, monkeypatch, interval):
    options = {"steps": [3, 4], "guidance_scale": 2.5, "guidance_interval": interval}
    model = model.to(DEVICE)
    monkeypatch.setattr(CpuEngine, "serves", lambda *settings: False)
    monkeypatch.setattr(plain, "boundary_op", lambda *settings: composed_boundary)
    expected = draw(model, **options, solver="ab2").latents

    def leaving(*given, **options):
        state, embedded, *velocity = composed_boundary(*given, **options)
        return state, embedded, statistics_of(embedded), *velocity

    monkeypatch.setattr(plain, "boundary_op", lambda *settings: leaving)
    accelerate(model, backend="triton")
    taken.clear()
    assert_same_image(draw(model, **options, solver="ab2").latents, expected)
    begun = [False, True, True, True]  # of the AR, and of a stage's first step
    assert taken == 2 * begun + 2 * 4 * [True] + 2 * begun + 3 * 4 * [True]
