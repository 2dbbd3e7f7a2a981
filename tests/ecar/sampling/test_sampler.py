import gc

import pytest
import torch
from torch import nn

from ecar import sampling, stages
from ecar.model import ECAR
from ecar.sampling import loop, sample, sampler
from ecar_kernels import initial_noise
from ecar_kernels.flow_step.reference import block_details

from ..conftest import tiny_config
from .support import assert_same_image, draw


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


class TestSteps:
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

    def test_the_default_and_the_papers_protocol(self, model):
        """What is not said, said; the paper's steps are even, and all of them are taken."""
        given = {"class_labels": torch.tensor([3, 7]), "seeds": torch.tensor([11, -5])}
        default = sample(model, **given).latents
        said = sample(model, **given, steps=[17, 13], solver="ab2", grid=1.6).latents
        assert torch.equal(default, said)
        seen = []
        drawn = draw(model, steps="paper", callback=seen.append).latents
        assert [info.tau for info in seen] == pytest.approx([i / 125 for i in range(125)] * 2)
        same = draw(model, steps=[125, 125], solver="euler", grid=1.0).latents
        assert torch.equal(drawn, same)

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
        ({"steps": "papr"}, ValueError, "'steps'.*'paper', got 'papr'"),
        ({"steps": "paper", "grid": 1.5}, ValueError, "'grid': expected 1.0.*got 1.5"),
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


@pytest.mark.parametrize("setting", [False, True])
def test_tf32_is_set_for_the_call_alone(model, monkeypatch, setting):
    products, seen, run = torch.backends.cuda.matmul, [], loop.run
    monkeypatch.setattr(
        loop,
        "run",
        lambda *given, **options: (
            seen.append(products.fp32_precision == "tf32"),
            run(*given, **options),
        )[1],
    )
    before = products.fp32_precision
    try:
        products.fp32_precision = "tf32" if setting else "ieee"
        for wanted in (None, True, False):
            draw(model, tf32=wanted)
        assert (products.fp32_precision == "tf32") is setting
    finally:
        products.fp32_precision = before
    assert seen == [setting, True, False]
