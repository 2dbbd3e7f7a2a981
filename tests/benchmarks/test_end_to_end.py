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
    monkeypatch.setattr(ECARConfig, "preset", lambda size: TINY)
    monkeypatch.setattr(models, "compiled", lambda model, whole: model)
    row = end_to_end.measure("S", 0)
    products = sum(stage.total for stage in count_multiply_adds(TINY, steps="paper"))
    assert row["floor"]["seconds"] == max(products / 1e9, models.floors(TINY, RATES)["memory"])
    assert row["seconds"].keys() == {"eager", "compiled", "ours", "linears", "attention"}
    medians = {name: found["median"] for name, found in row["seconds"].items()}
    assert all(value > 0 for value in medians.values())
    text = end_to_end.render({"rows": [row]})
    assert f"| {row['floor']['seconds'] / medians['ours']:.0%} |" in " ".join(text.split())
    gemms = medians["linears"] + medians["attention"]
    assert f"| {medians['ours'] / gemms - 1:.0%} |" in " ".join(text.split())


# Of diffusers' scheduler with NumPy 2.
quiet = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@quiet
@needs_native
def test_each_protocol_of_ecar_and_of_dit_in_both_dtypes(monkeypatch):
    monkeypatch.setattr(ECARConfig, "preset", lambda size: TINY)
    monkeypatch.setitem(dit.SIZES, "B", dit.DiTSize(layers=1, width=16, heads=2, latent_side=8))
    rows = end_to_end.measure_protocols("S", 0)
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
        assert 0 < row["seconds_before_steps"]["median"] < row["seconds"]["median"]
    assert rows[2]["multiply_adds"] * 20 == rows[3]["multiply_adds"] * 250
    seconds = {"eager": 2.0, "compiled": 1.5, "ours": 1.0, "linears": 0.5, "attention": 0.3}
    row = {"size": "S", "seconds": {way: {"median": its} for way, its in seconds.items()}}
    record = {"rows": [row | {"floor": {"seconds": 0.6}}], "protocols": rows}
    text = " ".join(end_to_end.render(record).split())
    assert (
        "| E-CAR-S | 2.00 s | 1.50 s | 1.00 s | 2.00x | 1.50x | 800 ms | 25% | 600 ms | 60% |"
        in text
    )
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
