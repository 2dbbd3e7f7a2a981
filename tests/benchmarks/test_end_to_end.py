"""One image end to end, with a tiny model."""

from benchmarks import end_to_end
from benchmarks.roofline import Roofline
from ecar import ECARConfig
from ecar_kernels.costs import Rates
from tests.support.native import needs_native

TINY = ECARConfig(
    stage_sides=(4, 8), channels=1, num_classes=3, width=16, heads=2, ar_layers=1, flow_blocks=1
)


@needs_native
def test_a_row_has_every_way_the_gemms_and_the_floor():
    row = end_to_end.measure(
        "S", TINY, 0, steps=8, timed_steps=3, compile=None, best=Rates(1e9, 1e9)
    )
    work = Roofline(TINY, steps=8, itemsize=4).total()
    assert row["floor"]["seconds"] == max(work.bytes, work.multiply_adds) / 1e9
    assert row["seconds"].keys() == {"eager", "ours", "linears", "attention"}
    medians = {name: found["median"] for name, found in row["seconds"].items()}
    assert all(value > 0 for value in medians.values())
    text = end_to_end.render({"rows": [row]})
    assert f"| {row['floor']['seconds'] / medians['ours']:.0%} |" in " ".join(text.split())
    gemms = medians["linears"] + medians["attention"]
    assert f"| {medians['ours'] / gemms - 1:.0%} |" in " ".join(text.split())
    assert "3 steps of each stage were run and scaled to 8" in text
    del row["floor"]
    assert "| - |" in " ".join(end_to_end.render({"rows": [row]}).split())
