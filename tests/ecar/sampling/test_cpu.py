"""The CPU's engine: the same images as the plain one's, no allocation, and when it serves."""

import contextlib
import statistics

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import ecar_kernels
from ecar.flow import FlowHead
from ecar.sampling import plain, sample
from ecar.sampling.cpu import CpuEngine
from ecar.sampling.solver import AB2, Euler, Heun
from ecar.sampling.stage import Inputs, Shape
from ecar_kernels import use_backend
from tests.support.native import needs_native

from ..conftest import tiny_model
from .support import assert_same_image, draw

pytestmark = needs_native

PATTERNS = [
    {},
    {"guidance_scale": 2.5},
    {"guidance_scale": 2.5, "guidance_interval": (0.1, 0.6)},
    {"guidance_scale": 2.5, "guidance_schedule": "linear"},
    {"solver": "ab2", "grid": 1.5},
    {"solver": "ab2", "guidance_scale": 2.5, "guidance_interval": (0.1, 0.6)},
]


@contextlib.contextmanager
def plain_engine():
    """The state as an image, one op after the other."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plain, "boundary_op", lambda *settings: None)
        patch.setattr(CpuEngine, "serves", lambda *settings: False)
        yield


@torch.no_grad()
def serves(model, solver=Euler):
    return CpuEngine.serves(model, solver)


def engine_for(model, batch=2, counts=(4, 5), guided=False, solver="euler"):
    shape = Shape(batch, counts, solver, tuple((guided,) * n for n in counts))
    inputs = Inputs(model, shape, device_data=False)
    scales = [[2.0 if guided else 1.0] * count for count in counts]
    inputs.load(torch.arange(batch), torch.arange(batch), scales, 1.5)
    return CpuEngine(model, inputs)


@pytest.mark.parametrize("accelerated", [False, True])
@pytest.mark.parametrize("options", PATTERNS)
def test_it_is_the_plain_loop_s_image(model, options, accelerated):
    if accelerated:
        ecar_kernels.accelerate(model, keep_weights=False)
    assert serves(model)
    found = draw(model, steps=[4, 5], return_stage_ends=True, **options).stage_ends
    with plain_engine():
        assert not serves(model)
        expected = draw(model, steps=[4, 5], return_stage_ends=True, **options).stage_ends
    for bound, right in zip(found, expected, strict=True):
        assert bound.shape == right.shape
        assert_same_image(bound, right)


@pytest.mark.parametrize(
    "changes",
    [
        {"patch_size": 1},
        {"channels": 3, "heads": 4},
        {"stage_sides": (8,)},
        {"stage_sides": (4, 8, 16)},
    ],
)
def test_other_sizes(changes):
    model = tiny_model(**changes)
    counts = [1, 3, 2][: model.config.num_stages]
    found = draw(model, steps=counts, guidance_scale=2.0).latents
    with plain_engine():
        expected = draw(model, steps=counts, guidance_scale=2.0).latents
    assert_same_image(found, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("solver", ["euler", "ab2"])
def test_16_bit_models_keep_their_state_in_float32(dtype, solver):
    """No further from float32's image than the plain loop, by the median of 9 models: of one, the
    two roundings' distances have differed by up to 2.7 either way."""
    options = {"steps": [4, 5], "guidance_scale": 2.0, "solver": solver}
    ratios = []
    for _ in range(9):
        model, images = tiny_model().to(dtype), []
        assert serves(model)
        for loop in (contextlib.nullcontext(), plain_engine()):
            with loop:
                images.append(draw(model, **options).latents)
        assert images[0].dtype == torch.float32
        exact = draw(model.float(), **options).latents
        bound, op_by_op = ((image - exact).norm().item() for image in images)
        ratios.append(bound / op_by_op)
    assert statistics.median(ratios) <= 1.5, ratios


@pytest.mark.parametrize(
    ("options", "guided"),
    [
        ({}, [False, False]),
        ({"guidance_interval": (0.1, 0.4)}, [True, False]),
        ({"guidance_interval": (0.6, 0.9)}, [True, True]),
        ({"guidance_schedule": "linear"}, [True, True]),
    ],
)
def test_the_ar_has_unconditional_rows_up_to_the_last_guided_stage(
    model, monkeypatch, options, guided
):
    """Bit for bit what it draws with all of them at every stage."""
    options = {"guidance_scale": 2.5 if any(guided) else 1.0, **options}
    seen, own = [], model.ar.stage
    monkeypatch.setattr(model.ar, "stage", lambda x, cache: seen.append(len(x)) or own(x, cache))
    found = draw(model, **options).latents
    assert seen == [3 * (1 + stage) for stage in guided]
    load = Inputs.load

    def with_all_rows(inputs, *data):
        inputs.stage_rows = [inputs.rows] * len(guided)
        load(inputs, *data)

    monkeypatch.setattr(Inputs, "load", with_all_rows)
    assert draw(model, **options).latents.equal(found)
    assert seen[2:] == [3 * (1 + any(guided))] * 2


def test_an_image_has_the_same_bits_beside_others_of_the_same_batch_size(model):
    first = draw(model, (3, 7), (5, 6)).latents
    assert first[1].equal(draw(model, (2, 7), (-9, 6)).latents[1])
    assert first.flip(0).equal(draw(model, (7, 3), (6, 5)).latents)


def test_a_guided_batch_of_none(model):
    empty = torch.empty(0, dtype=torch.int64)
    found = sample(model, empty, seeds=empty, steps=4, guidance_scale=2.0).latents
    assert found.shape == (0, 1, 8, 8)


class TestCallback:
    @pytest.mark.parametrize("solver", ["euler", "ab2"])
    def test_it_sees_and_replaces_images(self, model, solver):
        def turned(info):
            seen.append(info.latents)
            return info.latents.flip(-1) if info.index in (0, 4, 6) else None

        images = []
        for loop in (contextlib.nullcontext(), plain_engine()):
            seen = []
            with loop:
                output = draw(
                    model, steps=[3, 4], guidance_scale=2.0, callback=turned, solver=solver
                )
            images.append([*seen, output.latents])  # those kept are not written over later
        assert len(images[0]) == 8
        for found, expected in zip(*images, strict=True):
            assert_same_image(found, expected)

    def test_too_late_at_a_jump(self, model):
        with pytest.raises(ValueError, match="comes too late"):
            draw(model, steps=[1, 2], callback=lambda info: info.latents.flip(-1))


class TestWhenItServes:
    def test_not_for_heun(self, model):
        assert serves(model) and serves(model, AB2) and not serves(model, Heun)

    def test_not_under_the_reference_nor_under_autocast(self, model):
        with use_backend("reference"):
            assert not serves(model)
            ecar_kernels.accelerate(model)
        assert not serves(model)  # its blocks are bound to the reference
        ecar_kernels.accelerate(model, backend="auto")
        assert serves(model)
        with torch.autocast("cpu", torch.bfloat16):
            assert not serves(model)

    @pytest.mark.parametrize("what", ["velocity", "stream", "infer"])
    def test_not_where_a_method_is_replaced(self, model, monkeypatch, what):
        """A compiled velocity, for instance: it is called, and for all steps."""
        called = []
        owner = model.heads[1].blocks[0] if what == "infer" else model.heads[1]
        own = getattr(owner, what)
        monkeypatch.setattr(owner, what, lambda *x: called.append(1) or own(*x))
        assert not serves(model)
        draw(model, steps=[2, 3])
        assert len(called) == 3

    def test_a_head_of_another_class_is_called(self, model):
        """Unless all of its methods are ours."""

        class Renamed(FlowHead):
            pass

        class Other(FlowHead):
            def forward(self, *inputs):
                return 2 * super().forward(*inputs)

        before = draw(model).latents
        model.heads[1].__class__ = Renamed
        assert serves(model)
        assert draw(model).latents.equal(before)
        model.heads[1].__class__ = Other
        assert not serves(model)
        doubled = draw(model).latents
        model.heads[1].__class__ = FlowHead
        with torch.no_grad():
            model.heads[1].output.weight.mul_(2)
            model.heads[1].output.bias.mul_(2)
        assert (draw(model).latents - doubled).abs().max() < 1e-4 * doubled.abs().max()

    def test_a_weight_that_changed_is_seen(self, model):
        first = draw(model).latents
        with torch.no_grad():
            model.heads[0].blocks[0].qkv.weight.mul_(2)
        second = draw(model).latents
        assert not second.equal(first)
        with plain_engine():
            assert_same_image(draw(model).latents, second)


def allocations(work):
    """Allocations of tensor memory while `work` runs."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    return [
        event
        for event in profiler.profiler.kineto_results.events()
        if event.name() == "[memory]" and event.nbytes() > 0
    ]


@pytest.mark.parametrize("solver", ["euler", "ab2"])
@pytest.mark.parametrize("guided", [False, True])
@torch.no_grad()
def test_no_allocation_from_the_first_step_to_the_last(model, guided, solver):
    ecar_kernels.accelerate(model)
    engine = engine_for(model, counts=(6, 6), guided=guided, solver=solver)

    def all_steps():
        for step in range(6):
            engine.step(step)

    for stage in (1, 2):
        engine.begin(stage)
        all_steps()
        assert not allocations(all_steps)
        assert engine.finish().isfinite().all()
    assert allocations(lambda: torch.empty(3) + 1)  # the counter counts


@torch.no_grad()
def test_the_buffers_are_no_more_than_a_step_s_activations(model):
    """Nor is the state beside them: the qkv of all rows and the MLP's hidden tokens share one."""
    config, bound = model.config, engine_for(model, guided=True, solver="ab2").bound
    rows = 4 * max(config.stage_tokens)
    assert bound._stream.numel() == rows * config.width
    assert bound._wide.numel() == rows * config.mlp_width
    assert bound._workspace.numel() <= rows * config.mlp_width
    assert bound._state.numel() == rows // 2 * config.channels * config.patch_size**2
    assert bound._velocity.numel() == bound._state.numel()
    assert engine_for(model).bound._velocity.numel() == 0
