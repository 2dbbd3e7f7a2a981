"""One image end to end, with a tiny model."""

import pytest

from benchmarks import end_to_end, models, timing
from benchmarks.paper import dit
from ecar import ECARConfig, split_steps
from ecar.info import count_multiply_adds
from ecar_kernels.costs import Rates
from tests.support.native import needs_native

TINY = ECARConfig(
    stage_sides=(4, 8), channels=1, num_classes=3, width=16, heads=2, ar_layers=1, flow_blocks=1
)
RATES = Rates(1e9, 1e9)


@needs_native
def test_a_row_has_every_way_the_gemms_and_the_floor(monkeypatch):
    monkeypatch.setattr(timing, "measure_rates", lambda: (RATES, {}))
    row = end_to_end.measure("S", TINY, 0, compile=None)
    products = sum(stage.total for stage in count_multiply_adds(TINY, steps="paper"))
    assert row["floor"]["seconds"] == max(products / 1e9, models.floors(TINY, RATES)["memory"])
    assert row["seconds"].keys() == {"eager", "ours", "linears", "attention"}
    medians = {name: found["median"] for name, found in row["seconds"].items()}
    assert all(value > 0 for value in medians.values())
    text = end_to_end.render({"rows": [row]})
    assert f"| {row['floor']['seconds'] / medians['ours']:.0%} |" in " ".join(text.split())
    gemms = medians["linears"] + medians["attention"]
    assert f"| {medians['ours'] / gemms - 1:.0%} |" in " ".join(text.split())
    del row["floor"]
    assert "| - |" in " ".join(end_to_end.render({"rows": [row]}).split())


# Of diffusers' scheduler with NumPy 2.
quiet = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@quiet
@needs_native
def test_each_protocol_of_ecar_and_of_dit_in_both_dtypes():
    peer = dit.DiTSize(layers=1, width=16, heads=2, latent_side=8)
    rows = end_to_end.measure_protocols("S", TINY, 0, peer=peer)
    found = [(row["model"], row["dtype"], row["solver"], row["steps"]) for row in rows]
    assert found == [
        (model, dtype, solver, steps)
        for dtype in ("float32", "bfloat16")
        for model, solver, steps in (
            ("E-CAR-S", "euler", split_steps("paper", 2)),
            ("E-CAR-S", "ab2", split_steps(30, 2)),
            ("DiT-B/2", "ddim", [250]),
            ("DiT-B/2", "dpmsolver++", [20]),
        )
    ]
    for row in rows:
        assert row["seconds"]["median"] > 0 and row["seconds"]["rounds"] == 3
    assert rows[0]["speedup"]["median"] == 1
    for row, protocol in zip(rows, ("paper", 30), strict=False):
        stages = count_multiply_adds(TINY, steps=protocol)
        assert row["multiply_adds"] == sum(stage.total for stage in stages)
        assert 0 < row["multiply_adds_before_steps"] < row["multiply_adds"]
        assert 0 < row["seconds_before_steps"]["median"] < row["seconds"]["median"]
    assert rows[2]["multiply_adds"] * 20 == rows[3]["multiply_adds"] * 250
    ways = {"eager": {"median": 2.0}, "ours": {"median": 1.0}}
    ways |= {"linears": {"median": 0.5}, "attention": {"median": 0.3}}
    record = {"rows": [{"size": "S", "seconds": ways}], "protocols": rows}
    text = " ".join(end_to_end.render(record).split())
    assert "| E-CAR-S | 2.00 s | - | 1.00 s | 2.00x | - | 800 ms | 25% | - | - |" in text
    assert "| E-CAR-S | bfloat16 | 17 + 13 | ab2, grid 1.6 |" in text
    assert "| DiT-B/2 | float32 | 20 | dpmsolver++ |" in text


@quiet
def test_dpm_solver_takes_dits_users_twenty_steps():
    """Of order 2 at one network call a step, from noise to the end of its schedule."""
    config = dit.scheduler("dpmsolver++").config
    assert (config.algorithm_type, config.solver_order) == ("dpmsolver++", 2)
    assert (config.beta_start, config.beta_schedule) == (0.0001, "linear")  # as DDIM's
    model, calls = dit.DiTSize(layers=1, width=16, heads=2, latent_side=8).build(), []
    model.register_forward_hook(lambda *_: calls.append(1))
    assert dit.step_seconds(model, 20, "dpmsolver++", timed_steps=100) > 0
    assert len(calls) == 20
