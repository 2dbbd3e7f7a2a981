import gc
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ecar_kernels
from ecar import sampling, stages
from ecar.model import ECAR
from ecar.sampling import Guidance, plain, sample, sampler, split_steps
from ecar.sampling.cpu import CpuEngine
from ecar.transformer import KVCache
from ecar_kernels import adaln_linear, initial_noise
from ecar_kernels.flow_step.reference import block_details

from ..conftest import tiny_config


def draw(model, labels=(3, 7, 1), seeds=(11, -5, 2**40), **options):
    options = {"steps": 6, **options}
    return sample(model, torch.tensor(labels), seeds=torch.tensor(seeds), **options)


def assert_same_image(found, expected):
    """To float rounding, which differs with the rows of a product and which a random model
    enlarges: 3.1e-5 of 5.8 has been seen. Other noise makes a difference of more than 0.1."""
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


def test_the_module_s_old_place_warns_and_has_its_names():
    from ecar import sampler as old

    assert set(old.__all__) == set(sampling.__all__) >= {"SampleOutput", "StepInfo", "sample"}
    for name in old.__all__:
        with pytest.warns(DeprecationWarning, match=f"ecar.sampler.{name} is deprecated"):
            assert getattr(old, name) is getattr(sampling, name)
    with pytest.raises(AttributeError, match="no attribute 'Plan'"):
        old.Plan  # noqa: B018


class TestSeeds:
    """Noise belongs to the image, not to the batch."""

    def test_twice_the_same_bits(self, model):
        assert torch.equal(draw(model).latents, draw(model).latents)

    @pytest.mark.parametrize("options", [{}, {"guidance_scale": 2.5}, {"solver": "heun"}])
    def test_alone_elsewhere_and_in_another_batch(self, make_model, options):
        model = make_model(stage_sides=(4, 8, 16))
        batch = draw(model, **options).latents
        alone = draw(model, (7,), (-5,), **options).latents
        moved = draw(model, (7, 3), (-5, 11), **options).latents
        among = draw(model, (1,) * 8 + (7,) * 9, (*range(16), -5), **options).latents
        for found in (alone[0], moved[0], among[16]):
            assert_same_image(found, batch[1])
        assert_same_image(moved[1], batch[0])

    def test_another_seed_or_class_is_another_image(self, model):
        first = draw(model, (3,), (1,)).latents
        assert (draw(model, (3,), (2,)).latents - first).abs().max() > 0.1
        assert (draw(model, (4,), (1,)).latents - first).abs().max() > 1e-3

    def test_an_empty_batch(self, model):
        empty = torch.empty(0, dtype=torch.int64)
        assert sample(model, empty, seeds=empty, steps=4).latents.shape == (0, 1, 8, 8)


class TestGuidance:
    def test_scale_one_is_no_guidance(self, model, monkeypatch):
        rows = []
        velocity = type(model.heads[0]).velocity

        def counted(head, x, spatial, step):
            rows.append(len(x))
            return velocity(head, x, spatial, step)

        monkeypatch.setattr(type(model.heads[0]), "velocity", counted)
        draw(model, guidance_scale=1.0)
        assert set(rows) == {3}  # no unconditional row was run
        rows.clear()
        draw(model, guidance_scale=2.0)
        assert set(rows) == {6}

    def test_scale_one_equals_a_guided_run_outside_its_interval(self, model):
        plain = draw(model).latents
        guided = draw(model, guidance_scale=3.0, guidance_interval=(0.0, 0.0)).latents
        # Only the first step of all, at t = 0, is guided.
        assert not torch.equal(plain, guided)
        none = draw(model, guidance_scale=3.0, guidance_interval=(0.99, 1.0)).latents
        assert_same_image(none, plain)

    def test_it_is_the_linear_combination(self, model):
        """v = v_u + w (v_c - v_u), against two plain runs of one step of one stage."""
        one = ECAR(tiny_config(stage_sides=(8,)))
        nn.init.normal_(one.heads[0].modulation.weight, std=0.1)
        nn.init.normal_(one.heads[0].output.weight, std=0.3)
        conditional = draw(one, steps=1).latents
        embedding = one.ar.class_embedding.weight.data
        guided = draw(one, steps=1, guidance_scale=3.0).latents
        embedding[:] = embedding[one.config.null_class].clone()
        unconditional = draw(one, steps=1).latents
        expected = unconditional + 3.0 * (conditional - unconditional)
        assert (guided - expected).abs().max() < 1e-4

    def test_schedules_and_intervals(self):
        constant = Guidance(4.0)
        assert [constant.at(s, 3, 0.5) for s in (1, 2, 3)] == [4.0, 4.0, 4.0]
        linear = Guidance(4.0, "linear")
        assert [linear.at(s, 3, 0.5) for s in (1, 2, 3)] == [1.0, 2.5, 4.0]
        assert linear.at(1, 1, 0.5) == 4.0
        inside = Guidance(4.0, interval=(0.2, 0.6))
        assert [inside.at(1, 3, t) for t in (0.1, 0.2, 0.6, 0.7)] == [1.0, 4.0, 4.0, 1.0]


class TestSteps:
    def test_split(self):
        assert split_steps(250, 3) == [84, 83, 83]
        assert split_steps(3, 3) == [1, 1, 1]
        assert split_steps([5, 1, 9], 3) == [5, 1, 9]

    def test_every_step_is_one_network_call_at_its_time(self, model, monkeypatch):
        """N_s calls at tau = 0, 1/N_s .. (N_s - 1)/N_s: none on a last sliver."""
        seen = []
        monkeypatch.setattr(
            type(model.heads[0]),
            "step_modulation",
            lambda head, time: time[:, None, None].expand(-1, 1, head.parts * 32),
        )
        monkeypatch.setattr(
            type(model.heads[0]),
            "velocity",
            lambda head, x, spatial, step: seen.append(step[0].mean().item()) or 0 * x,
        )
        draw(model, steps=[2, 3])
        assert seen == pytest.approx([0, 1 / 4, 1 / 2, 1 / 2 + 1 / 6, 1 / 2 + 2 / 6])
        seen.clear()
        draw(model, steps=[1, 2], solver="heun")
        assert seen == pytest.approx([0, 1 / 2, 1 / 2, 3 / 4, 3 / 4, 1])

    def test_the_jump_is_the_transition(self, model, monkeypatch):
        """With no velocity, stage 2 starts at the transition of stage 1's noise."""
        monkeypatch.setattr(
            type(model.heads[0]), "velocity", lambda head, x, spatial, step: torch.zeros_like(x)
        )
        seeds = torch.tensor([11, -5, 2**40])
        output = draw(model, return_stage_ends=True)
        noise = initial_noise(seeds, (1, 4, 4), device="cpu", dtype=torch.float32)
        high_pass = stages.haar_high_pass(block_details(seeds, 2, (1, 4, 4)))
        assert (output.stage_ends[0] - noise).abs().max() < 1e-6
        assert (output.latents - stages.transition(noise, 0.5, high_pass)).abs().max() < 1e-6


def order_of_convergence(model, solver, monkeypatch):
    """Measured on dx/dtau = (x + tau) / 2, whose solution is known, from the last halving."""
    head = type(model.heads[0])
    monkeypatch.setattr(
        head, "step_modulation", lambda self, time: time[:, None, None].double().expand(-1, 1, 1)
    )
    monkeypatch.setattr(head, "spatial_modulation", lambda self, token_map: token_map)
    monkeypatch.setattr(
        head, "velocity", lambda self, x, spatial, step: ((x + step[0].item()) / 2).to(x.dtype)
    )
    seeds = torch.tensor([11, -5, 2**40])
    noise = initial_noise(seeds, (1, 8, 8), device="cpu", dtype=torch.float32).double()
    exact = (noise + 2) * math.exp(0.5) - 3
    errors = [
        (draw(model, steps=n, solver=solver).latents.double() - exact).abs().max().item()
        for n in (4, 8)
    ]
    return math.log2(errors[0] / errors[1])


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
def test_solvers_converge_with_their_order(make_model, solver, order, monkeypatch):
    model = make_model(stage_sides=(8,))
    assert abs(order_of_convergence(model, solver, monkeypatch) - order) < 0.15


class TestCallback:
    def test_it_is_told_every_step(self, model):
        seen = []
        draw(model, steps=[2, 3], callback=seen.append)
        assert [(info.index, info.total, info.stage) for info in seen] == [
            (0, 5, 1),
            (1, 5, 1),
            (2, 5, 2),
            (3, 5, 2),
            (4, 5, 2),
        ]
        assert [info.tau for info in seen] == pytest.approx([0, 1 / 2, 0, 1 / 3, 2 / 3])
        assert [info.latents.shape[-1] for info in seen] == [4, 4, 8, 8, 8]

    def test_a_returned_state_takes_its_place(self, model):
        def zero(info):
            return torch.zeros_like(info.latents) if info.index == 4 else None

        assert torch.count_nonzero(draw(model, steps=[2, 3], callback=zero).latents) == 0

    def test_a_state_of_another_shape_or_too_late_is_refused(self, model):
        with pytest.raises(ValueError, match="callback: expected None or a tensor of shape"):
            draw(model, callback=lambda info: torch.zeros(1))
        with pytest.raises(ValueError, match="comes too late"):
            draw(model, steps=[1, 3], callback=lambda info: info.latents + 1)


def test_stage_ends_are_returned_and_the_bar_runs(model, capsys):
    output = draw(model, return_stage_ends=True, progress=True)
    assert [end.shape[-1] for end in output.stage_ends] == [4, 8]
    assert torch.equal(output.stage_ends[-1], output.latents)
    assert "6/6" in capsys.readouterr().err
    assert draw(model).stage_ends is None


def test_a_bfloat16_model_draws_much_the_same(model):
    expected = draw(model).latents
    found = draw(model.to(torch.bfloat16)).latents
    assert found.dtype == torch.float32
    assert (found - expected).norm() < 0.02 * expected.norm()


def composed_boundary(
    x,
    state,
    shift,
    scale,
    weight,
    bias,
    embed_weight,
    embed_bias,
    positions,
    dt,
    *,
    step_shift,
    step_scale,
    guidance_scale,
    eps,
):
    """flow_boundary by its contract, out of plain ops."""
    v = adaln_linear(
        x, shift, scale, weight, bias, step_shift=step_shift, step_scale=step_scale, eps=eps
    ).to(state.dtype)
    if len(v) != len(state):
        conditional, unconditional = v.chunk(2)
        v = unconditional + guidance_scale * (conditional - unconditional)
    state = state + dt * v
    embedded = F.linear(state.to(x.dtype), embed_weight, embed_bias) + positions
    return state, embedded.repeat(len(x) // len(state), 1, 1) if len(state) else embedded


class TestTokenLayout:
    """Where flow_boundary serves, the state stays in tokens inside a stage."""

    @pytest.fixture
    def boundary(self, monkeypatch):
        calls = []

        def flow_boundary(*arguments, **options):
            calls.append(len(arguments[0]))
            return composed_boundary(*arguments, **options)

        monkeypatch.setattr(plain, "boundary_op", lambda *settings: flow_boundary)
        monkeypatch.setattr(CpuEngine, "serves", lambda *settings: False)
        return calls

    @pytest.mark.parametrize(
        ("options", "rows"),
        [
            ({}, [3] * 7),
            ({"guidance_scale": 2.5}, [6] * 7),
            ({"guidance_scale": 2.5, "guidance_interval": (0.1, 0.6)}, [3, 6, 6, 6, 6, 3, 3]),
            ({"guidance_scale": 2.5, "guidance_schedule": "linear"}, [3] * 3 + [6] * 4),
        ],
    )
    def test_it_is_the_same_image(self, model, boundary, monkeypatch, options, rows):
        found = draw(model, steps=[4, 5], **options).latents
        assert boundary == rows  # each stage's last step ends in another way
        monkeypatch.undo()
        expected = draw(model, steps=[4, 5], **options).latents
        assert (found - expected).abs().max() < 1e-4 * expected.abs().max()

    def test_stages_of_one_step_and_heun_need_none(self, model, boundary):
        draw(model, steps=[1, 1])
        draw(model, solver="heun")
        assert boundary == []

    def test_the_callback_sees_and_replaces_images(self, model, boundary, monkeypatch):
        def turned(info):
            seen.append(info.latents.clone())
            return info.latents.flip(-1) if info.index in (0, 4) else None

        images = []
        for undo in (False, True):
            if undo:
                monkeypatch.undo()
            seen = []
            output = draw(model, steps=[3, 4], guidance_scale=2.0, callback=turned)
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
        for stage, (head, count) in enumerate(zip(model.heads, counts, strict=True), start=1):
            tokens = (
                model.ar.embed_class(both)
                if stage == 1
                else model.ar.embed_end(end.repeat(2, 1, 1, 1), stage)  # noqa: F821
            )
            token_map = model.ar.stage(tokens, cache)
            for step in range(count):
                time = torch.full((4,), (stage - 1 + step / count) / 2)
                conditional, unconditional = head(x.repeat(2, 1, 1, 1), time, token_map).chunk(2)
                x = x + (unconditional + w * (conditional - unconditional)) / count
            end = x
            if stage == 1:
                high_pass = stages.haar_high_pass(block_details(seeds, 2, (1, 4, 4)))
                x = stages.transition(end, 0.5, high_pass)
    found = draw(model, (3, 7), (5, -6), steps=list(counts), guidance_scale=w).latents
    assert (found - x).abs().max() < 1e-4 * x.abs().max()


def test_memory_does_not_grow_from_step_to_step(model):
    """All tensors alive after each step but a stage's last, at which the next one's begin."""
    held = []
    # Not those of tests before: tensors that torch.export leaves have no storage to ask for.
    older = [value for value in gc.get_objects() if type(value) is torch.Tensor]
    known = set(map(id, older))

    def count(info):
        gc.collect()
        storages = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
            for tensor in gc.get_objects()
            if type(tensor) is torch.Tensor and id(tensor) not in known
        }
        held.append(sum(storages.values()))

    draw(model, steps=[2, 6], guidance_scale=2.0, callback=count)
    assert len(set(held[3:7])) == 1


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"labels": (1, 2, 10)}, ValueError, "'labels'.*0 to 9, got 10"),
        ({"seeds": (1, 2)}, ValueError, r"'seeds'.*\[3\].*got \[2\]"),
        ({"seeds": (1.0, 2.0, 3.0)}, TypeError, "'seeds'.*int64"),
        ({"steps": 0}, ValueError, "'steps'.*got 0"),
        ({"steps": 1}, ValueError, "'steps'.*at least one step for each of 2 stages"),
        ({"steps": -3}, ValueError, "'steps'.*got -3"),
        ({"steps": [1, 2, 3]}, ValueError, "'steps'.*list of 2"),
        ({"steps": [1, 0]}, ValueError, "'steps'.*positive"),
        ({"steps": [1, 1.5]}, TypeError, "'steps'.*integers"),
        ({"steps": 2.5}, TypeError, "'steps'"),
        ({"steps": True}, TypeError, "'steps'"),
        ({"solver": "rk4"}, ValueError, "'solver'.*'rk4'"),
        ({"guidance_scale": float("nan")}, ValueError, "'guidance_scale'.*finite"),
        ({"guidance_scale": "2"}, TypeError, "'guidance_scale'"),
        ({"guidance_schedule": "cosine"}, ValueError, "'guidance_schedule'.*'cosine'"),
        ({"guidance_interval": (0.5, 0.2)}, ValueError, "'guidance_interval'.*low <= high"),
        ({"guidance_interval": (0.5,)}, ValueError, "'guidance_interval'.*two"),
        ({"guidance_interval": 0.5}, TypeError, "'guidance_interval'.*two"),
    ],
)
def test_a_bad_argument_is_named(model, options, error, words):
    with pytest.raises(error, match=words):
        draw(model, **options)


@pytest.mark.parametrize("setting", ["ieee", "tf32"])
@pytest.mark.parametrize("wishes", [(True, True), (True, False), (False, True)], ids=str)
def test_tf32_of_runs_that_overlap_and_end_in_any_order(wishes, setting):
    products = torch.backends.cuda.matmul
    before = products.fp32_precision
    try:
        products.fp32_precision = setting
        first, second = (sampler._tf32(wish) for wish in wishes)
        first.__enter__()
        second.__enter__()
        assert (products.fp32_precision == "tf32") == wishes[1]
        first.__exit__(None, None, None)
        assert (products.fp32_precision == "tf32") == wishes[1]
        second.__exit__(None, None, None)
        assert products.fp32_precision == setting
    finally:
        products.fp32_precision = before


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("edit", ["returned", "in place", "through data"])
def test_a_callback_that_edits(model, edit, backend):
    """An edit in place and a returned tensor mean the same, with whatever backend."""

    def change(info):
        if info.index != 1:
            return None
        if edit == "returned":
            return info.latents * 0.5
        (info.latents if edit == "in place" else info.latents.data).mul_(0.5)
        return None

    def returned(info):
        return info.latents * 0.5 if info.index == 1 else None

    data, options = (torch.tensor([1, 2]),), {"seeds": torch.tensor([3, 4]), "steps": [3, 3]}
    with ecar_kernels.use_backend("reference"):
        right = sample(model, *data, callback=returned, **options).latents
    with ecar_kernels.use_backend(backend):
        got = sample(model, *data, callback=change, **options).latents
    assert (got - right).abs().max() < 1e-4 * right.abs().max()
