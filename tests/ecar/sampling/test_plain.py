"""The plain engine: the design's formulas, and the state in the token layout."""

import pytest
import torch

from ecar import stages
from ecar.sampling import plain
from ecar.sampling.cpu import CpuEngine
from ecar.transformer import KVCache
from ecar_kernels import initial_noise
from ecar_kernels.flow_step.reference import block_details

from .support import composed_boundary, draw


class TestTokenLayout:
    """Where flow_boundary serves, the state stays in tokens inside a stage."""

    @pytest.fixture
    def boundary(self, monkeypatch):
        calls, histories = [], []

        def flow_boundary(*arguments, **options):
            calls.append(len(arguments[0]))
            histories.append("previous" in options)
            return composed_boundary(*arguments, **options)

        monkeypatch.setattr(plain, "boundary_op", lambda *settings: flow_boundary)
        monkeypatch.setattr(CpuEngine, "serves", lambda *settings: False)
        return calls, histories

    @pytest.mark.parametrize("solver", ["euler", "ab2"])
    @pytest.mark.parametrize(
        ("options", "rows"),
        [
            ({}, [3] * 9),
            ({"guidance_scale": 2.5}, [6] * 9),
            ({"guidance_scale": 2.5, "guidance_interval": (0.1, 0.6)}, [3, *[6] * 5, 3, 3, 3]),
            ({"guidance_scale": 2.5, "guidance_schedule": "linear"}, [3] * 4 + [6] * 5),
        ],
    )
    def test_it_is_the_same_image(self, model, boundary, monkeypatch, options, rows, solver):
        options = {"steps": [4, 5], "solver": solver} | options
        found = draw(model, **options).latents
        calls, histories = boundary
        assert calls == rows
        assert histories == [solver == "ab2" and step not in (0, 4) for step in range(9)]
        monkeypatch.undo()
        monkeypatch.setattr(plain, "boundary_op", lambda *settings: None)
        monkeypatch.setattr(CpuEngine, "serves", lambda *settings: False)
        expected = draw(model, **options).latents
        assert (found - expected).abs().max() < 1e-4 * expected.abs().max()

    def test_heun_needs_none(self, model, boundary):
        draw(model, solver="heun")
        assert boundary == ([], [])

    def test_a_stage_of_one_step(self, model, boundary, monkeypatch):
        found = draw(model, steps=[1, 1], solver="ab2").latents
        assert boundary == ([3, 3], [False, False])
        monkeypatch.undo()
        expected = draw(model, steps=[1, 1]).latents
        assert (found - expected).abs().max() < 1e-4 * expected.abs().max()

    @pytest.mark.parametrize("solver", ["euler", "ab2"])
    def test_the_callback_sees_and_replaces_images(self, model, boundary, monkeypatch, solver):
        def turned(info):
            seen.append(info.latents.clone())
            return info.latents.flip(-1) if info.index in (0, 4, 6) else None

        images = []
        options = {"steps": [3, 4], "guidance_scale": 2.0, "solver": solver, "grid": 1.5}
        for undo in (False, True):
            if undo:
                monkeypatch.undo()
            seen = []
            output = draw(model, callback=turned, **options)
            images.append([*seen, output.latents])
        assert len(images[0]) == 8
        for found, expected in zip(*images, strict=True):
            assert (found - expected).abs().max() < 1e-4 * expected.abs().max()

    def test_a_bfloat16_model_keeps_its_state_in_float32(self, model, boundary, monkeypatch):
        model.to(torch.bfloat16)
        found = draw(model, steps=[4, 5], guidance_scale=2.0).latents
        monkeypatch.setattr(plain, "boundary_op", lambda *settings: None)
        expected = draw(model, steps=[4, 5], guidance_scale=2.0).latents
        assert found.dtype == torch.float32
        assert (found - expected).norm() < 0.01 * expected.norm()


def test_it_is_the_design_s_formulas(model):
    """Section 3.4 written out: the same numbers."""
    labels, seeds = torch.tensor([3, 7]), torch.tensor([5, -6])
    counts, w = (3, 2), 2.0
    with torch.no_grad():
        cache = KVCache(model.config, 4, device=model.device, dtype=model.dtype)
        both = torch.cat([labels, torch.full_like(labels, model.config.null_class)])
        x = initial_noise(seeds, (1, 4, 4), device="cpu", dtype=torch.float32)
        tokens = model.ar.embed_class(both)
        for stage, (head, count) in enumerate(zip(model.heads, counts, strict=True), start=1):
            token_map = model.ar.stage(tokens, cache)
            for step in range(count):
                time = torch.full((4,), (stage - 1 + step / count) / 2)
                conditional, unconditional = head(x.repeat(2, 1, 1, 1), time, token_map).chunk(2)
                x = x + (unconditional + w * (conditional - unconditional)) / count
            if stage == 1:
                tokens = model.ar.embed_end(x.repeat(2, 1, 1, 1), 2)
                high_pass = stages.haar_high_pass(block_details(seeds, 2, (1, 4, 4)))
                x = stages.transition(x, 0.5, high_pass)
    found = draw(model, (3, 7), (5, -6), steps=list(counts), guidance_scale=w).latents
    assert (found - x).abs().max() < 1e-4 * x.abs().max()
