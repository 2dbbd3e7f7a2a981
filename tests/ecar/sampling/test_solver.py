"""Where steps lie, at which times velocities are taken, and the order of convergence."""

import math

import pytest
import torch

from ecar.sampling.solver import SOLVERS, Euler, Heun, place_steps, solver_class, step_times
from ecar_kernels import initial_noise

from .support import draw


def test_steps_fill_a_stage():
    placed = place_steps(7)
    assert [step.tau for step in placed] == [index / 7 for index in range(7)]
    assert [step.dt for step in placed] == pytest.approx([1 / 7] * 7)
    assert sum(step.dt for step in placed) == pytest.approx(1)


def test_times_of_steps_and_of_velocities():
    assert step_times((2, 4), 1) == pytest.approx([0, 1 / 4])
    assert step_times((2, 4), 2) == pytest.approx([1 / 2, 5 / 8, 3 / 4, 7 / 8])
    assert Euler(place_steps(2)).taus() == pytest.approx([0, 1 / 2])
    assert Heun(place_steps(2)).taus() == pytest.approx([0, 1 / 2, 1])
    assert [solver_class(name) for name in SOLVERS] == [Euler, Heun]


@pytest.mark.parametrize("solver", [Euler, Heun])
@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("device_scale", [False, True])
def test_a_step_by_hand(solver, scale, device_scale):
    """Of unequal steps, with the velocity v = t x and, unconditional, v = -x."""
    steps = tuple(step._replace(dt=step.dt / 2) for step in place_steps(4))
    made, x, taus = solver(steps), torch.randn(2, 1, 4, 4), solver(steps).taus()

    def velocity(x, step, at):
        assert at - step in (0, 1)
        return taus[at] * x if scale == 1.0 else torch.cat([taus[at] * x, -x])

    def guided(x, t):
        return t * x if scale == 1.0 else -x + scale * (t * x + x)

    given = torch.tensor(scale) if device_scale and scale != 1.0 else scale
    found = made.advance(x, made.slope(velocity, x, 2, given), 2, given)
    h, expected = 1 / 8, guided(x, 1 / 2)
    if solver is Heun:
        expected = (expected + guided(x + h * expected, 3 / 4)) / 2
    assert (found - (x + h * expected)).abs().max() < 1e-5
    end, start = made.jump(
        x,
        made.slope(velocity, x, 2, given),
        2,
        given,
        time=0.5,
        stage=2,
        seeds=torch.tensor([3, 4]),
    )
    assert end.equal(found) and start.shape == (2, 1, 8, 8)


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
