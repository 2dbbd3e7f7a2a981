"""The loop over an engine, and the callback's protocol."""

import pytest
import torch

import ecar_kernels
from ecar.sampling import loop, sample

from .support import draw


class Counting:
    """An engine whose state is the number of steps done, and its log."""

    def __init__(self, at_once=1):
        self.log, self.at_once, self.state = [], at_once, torch.zeros(1, 1, 2, 2)

    def begin(self, stage):
        self.log.append(f"begin {stage}")

    def step(self, step):
        self.log.append(f"step {step}")
        self.state = self.state + self.at_once
        return self.at_once

    def image(self):
        self.log.append("image")
        return self.state

    def replace(self, x, step):
        self.log.append(f"replace before {step}")
        self.state = x

    def finish(self):
        self.log.append("finish")
        return self.state


class TestEngine:
    def test_begin_steps_and_finish_of_each_stage(self):
        engine, taken = Counting(), []
        ends = loop.run(engine, (2, 1), progress=taken.append)
        steps = ["begin 1", "step 0", "step 1", "finish", "begin 2", "step 0", "finish"]
        assert engine.log == steps  # and no image, which nobody asked for
        assert taken == [1, 1, 1]
        assert [end.mean().item() for end in ends] == [2, 3]

    def test_one_that_takes_several_steps_at_once(self):
        engine, taken = Counting(at_once=3), []
        loop.run(engine, (3, 6), progress=taken.append)
        steps = ["begin 1", "step 0", "finish", "begin 2", "step 0", "step 3", "finish"]
        assert engine.log == steps
        assert taken == [3, 3, 3]

    def test_a_state_is_replaced_before_the_step_after_it(self):
        engine = Counting()
        (end,) = loop.run(
            engine, (3,), callback=lambda info: info.latents + 10 if info.index else None
        )
        assert [entry for entry in engine.log if "replace" in entry] == [
            "replace before 2",
            "replace before 3",
        ]
        assert end.mean() == 23

    def test_an_untouched_state_is_not_replaced_whatever_its_values(self):
        for values in (0.0, float("nan"), float("inf")):
            engine = Counting()
            engine.state = torch.full((1, 1, 2, 2), values)
            for returned in (lambda info: None, lambda info: info.latents):
                loop.run(engine, (2, 1), callback=returned)
            assert not [entry for entry in engine.log if "replace" in entry]


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

    def test_a_state_that_is_not_finite_is_no_edit(self, model):
        model.heads[0].output.bias.data.fill_(float("nan"))
        with ecar_kernels.use_backend("reference"):
            output = draw(model, steps=[2, 3], callback=lambda info: None)
        assert output.latents.isnan().all()

    def test_a_state_of_another_shape_or_too_late_is_refused(self, model):
        with pytest.raises(ValueError, match="callback: expected None or a tensor of shape"):
            draw(model, callback=lambda info: torch.zeros(1))
        with pytest.raises(ValueError, match="comes too late"):
            draw(model, steps=[1, 3], callback=lambda info: info.latents + 1)


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
