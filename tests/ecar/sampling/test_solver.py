"""Where steps lie, at which times velocities are taken, and the order of convergence."""

import math

import pytest
import torch

from ecar.sampling import sample
from ecar.sampling.solver import (
    AB2,
    SOLVERS,
    Euler,
    Heun,
    Step,
    check_grid,
    place_steps,
    solver_class,
    step_times,
)
from ecar_kernels import initial_noise

from .support import draw


def test_steps_fill_a_stage():
    placed = place_steps((7,), 1)
    assert [step.tau for step in placed] == [index / 7 for index in range(7)]
    assert [step.dt for step in placed] == pytest.approx([1 / 7] * 7)
    assert sum(step.dt for step in placed) == pytest.approx(1)
    assert [step.ratio for step in placed] == [0, 1, 1, 1, 1, 1, 1]


def test_times_of_steps_and_of_velocities():
    assert step_times((2, 4), 1) == pytest.approx([0, 1 / 4])
    assert step_times((2, 4), 2) == pytest.approx([1 / 2, 5 / 8, 3 / 4, 7 / 8])
    assert Euler(place_steps((2,), 1)).taus() == pytest.approx([0, 1 / 2])
    assert Heun(place_steps((2,), 1)).taus() == pytest.approx([0, 1 / 2, 1])
    assert [solver_class(name) for name in SOLVERS] == [Euler, Heun, AB2]


@pytest.mark.parametrize("solver", [Euler, Heun, AB2])
@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("device_scale", [False, True])
def test_a_step_by_hand(solver, scale, device_scale):
    """Of unequal steps, with the velocity v = t x and, unconditional, v = -x."""
    steps = tuple(step._replace(dt=step.dt / 2) for step in place_steps((4,), 1))
    made, x, taus = solver(steps), torch.randn(2, 1, 4, 4), solver(steps).taus()

    def velocity(x, step, at):
        assert at - step in (0, 1)
        return taus[at] * x if scale == 1.0 else torch.cat([taus[at] * x, -x])

    def guided(x, t):
        return t * x if scale == 1.0 else -x + scale * (t * x + x)

    given = torch.tensor(scale) if device_scale and scale != 1.0 else scale
    slope = made.slope(velocity, x, 2, given)
    found = made.advance(x, slope[0], 2, slope[1])
    h, expected = 1 / 8, guided(x, 1 / 2)
    if solver is Heun:
        expected = (expected + guided(x + h * expected, 3 / 4)) / 2
    assert (found - (x + h * expected)).abs().max() < 1e-5
    seeds = torch.tensor([3, 4])
    made.restart()
    end, start = made.jump(x, slope[0], 2, slope[1], time=0.5, stage=2, seeds=seeds)
    assert end.equal(found) and start.shape == (2, 1, 8, 8)


def test_a_grid_places_steps_closer_together_at_a_stages_beginning():
    placed = place_steps((3, 4), 2, 2.0)
    assert [step.tau for step in placed] == pytest.approx([0, 1 / 16, 1 / 4, 9 / 16])
    assert [step.dt for step in placed] == pytest.approx([1 / 16, 3 / 16, 5 / 16, 7 / 16])
    assert [step.ratio for step in placed] == pytest.approx([0, 3, 5 / 3, 7 / 5])
    own = check_grid([[0, 0.1], (0, 0.5, 0.75)], (2, 3))
    assert place_steps((2, 3), 1, own) == (Step(0, 0.1), Step(0.1, 0.9, 0.9 / 0.1))
    assert step_times((2, 3), 2, own) == pytest.approx([1 / 2, 3 / 4, 7 / 8])
    assert check_grid(1, (2,)) == 1.0


@pytest.mark.parametrize(
    ("grid", "error", "message"),
    [
        (0, ValueError, "a positive exponent, got 0"),
        (-1.5, ValueError, "a positive exponent, got -1.5"),
        (math.nan, ValueError, "a positive exponent, got nan"),
        (math.inf, ValueError, "a positive exponent, got inf"),
        (True, TypeError, "got bool"),
        ("1.5", TypeError, "got str"),
        ([[0, 0.5]], ValueError, "the times of each of 2 stages, got 1"),
        ([0, 0.5], ValueError, "2 times at stage 1, which has as many steps, got 0"),
        ([[0], [0, 0.5, 0.7]], ValueError, "2 times at stage 1, .* got \\[0\\]"),
        ([[0, "a"], [0, 0.5, 0.7]], ValueError, "2 times at stage 1"),
        ([[0, 0.5], [0.1, 0.5, 0.7]], ValueError, "increasing times from 0 on, .* at stage 2"),
        ([[0, 0.5], [0, 0.5, 0.5]], ValueError, "increasing times"),
        ([[0, 1], [0, 0.5, 0.7]], ValueError, "below 1, at stage 1"),
    ],
)
def test_grids_that_are_refused(model, grid, error, message):
    with pytest.raises(error, match=f"argument 'grid': expected .*{message}"):
        draw(model, steps=[2, 3], grid=grid)


@pytest.mark.parametrize("device_data", [False, True])
@pytest.mark.parametrize("jump", [False, True])
def test_ab2_remembers_the_guided_velocity_before(jump, device_data):
    """By hand, of unequal steps whose guidance changes and then ends; the last one alone leaves no
    velocity."""
    velocities, scales = torch.randn(3, 4, 1, 4, 4), [2.0, 3.0, 1.0]
    steps, x = place_steps((3,), 1, 2.0), torch.randn(2, 1, 4, 4)
    guided = [v[2:] + w * (v[:2] - v[2:]) for v, w in zip(velocities, scales, strict=True)]
    h, given = [step.dt for step in steps], scales
    expected = [
        guided[0],
        guided[1] + h[1] / h[0] / 2 * (guided[1] - guided[0]),
        guided[2] + h[2] / h[1] / 2 * (guided[2] - guided[1]),
    ]
    if device_data:
        steps = [Step(math.nan, *map(torch.tensor, step[1:])) for step in steps]
        given = [torch.tensor(2.0), torch.tensor(3.0), 1.0]
    made = AB2(steps)

    def velocity(x, step, at):
        assert at == step
        return velocities[step] if scales[step] != 1 else velocities[step, :2]

    def taken(step):
        slope, scale = made.slope(velocity, x, step, given[step])
        if jump and step == 2:
            seeds = torch.tensor([3, 4])
            return made.jump(x, slope, step, scale, time=0.5, stage=2, seeds=seeds)[0]
        return made.advance(x, slope, step, scale)

    for step in range(3):
        torch.testing.assert_close(taken(step), x + h[step] * expected[step])
    made.restart()
    torch.testing.assert_close(taken(1), x + h[1] * guided[1])
    torch.testing.assert_close(taken(2), x + h[2] * expected[2])


def test_a_step_for_each_stage_of_ab2_is_eulers(make_model):
    model = make_model(stage_sides=(4, 8, 16))
    images = [
        draw(model, steps=3, solver=solver, guidance_scale=2.0).latents
        for solver in ("euler", "ab2")
    ]
    assert torch.equal(*images)


@pytest.mark.parametrize("solver", SOLVERS)
def test_an_image_is_the_same_in_any_batch(model, solver):
    """Where steps are uneven and not all guided."""
    settings = {"steps": [4, 3], "solver": solver, "grid": 1.5, "guidance_interval": (0.0, 0.6)}
    labels, seeds = torch.tensor([1, 2, 3]), torch.tensor([5, 6, 7])
    together = sample(model, labels, seeds=seeds, guidance_scale=2.0, **settings).latents
    for row in range(3):
        pick = slice(row, row + 1)
        alone = sample(model, labels[pick], seeds=seeds[pick], guidance_scale=2.0, **settings)
        torch.testing.assert_close(alone.latents, together[pick], rtol=1e-3, atol=1e-3)


def test_a_state_that_a_callback_returns_begins_with_an_euler_step(make_model):
    """The velocity before is another trajectory's."""
    model = make_model(stage_sides=(8,))

    def drawn(solver, given=None):
        """The states after each step; after the second `given`, where there is one."""
        seen = []

        def callback(info):
            seen.append(info.latents.clone())
            return given if info.index == 1 else None

        draw(model, steps=3, solver=solver, callback=callback)
        return seen

    given = -drawn("ab2")[1]
    by_ab2, by_euler = drawn("ab2", given), drawn("euler", given)
    torch.testing.assert_close(by_ab2[2], by_euler[2], rtol=1e-3, atol=1e-3)
    assert not torch.allclose(drawn("ab2")[2], drawn("euler")[2], atol=1e-2)


def order_of_convergence(model, solver, grid, monkeypatch):
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
        (draw(model, steps=n, solver=solver, grid=grid).latents.double() - exact).abs().max().item()
        for n in (8, 16)
    ]
    return math.log2(errors[0] / errors[1])


@pytest.mark.parametrize("grid", [1.0, 1.5])
@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2), ("ab2", 2)])
def test_solvers_converge_with_their_order(make_model, solver, order, grid, monkeypatch):
    model = make_model(stage_sides=(8,))
    assert abs(order_of_convergence(model, solver, grid, monkeypatch) - order) < 0.2
