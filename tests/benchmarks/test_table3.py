"""Table 3's pairs, with tiny models."""

from benchmarks import runtimes
from benchmarks.paper import dit, mar, table3
from ecar import ECARConfig

TINY = ECARConfig(
    stage_sides=(4, 8), channels=1, num_classes=3, width=16, heads=2, ar_layers=1, flow_blocks=1
)
MASKED = mar.MARSize(layers=1, width=16, heads=2, mlp_blocks=1, mlp_width=24, tokens=16, buffer=4)
PEER = dit.DiTSize(layers=1, width=16, heads=2, latent_side=8)


def test_a_row_has_its_peers_and_their_ratios(monkeypatch, tmp_path):
    monkeypatch.setattr(runtimes, "FILES", tmp_path)
    monkeypatch.setattr(runtimes, "RUNTIMES", {"another": runtimes.eager})
    monkeypatch.setattr(table3.ECARConfig, "preset", lambda size: TINY)
    monkeypatch.setitem(dit.SIZES, "B", PEER)
    monkeypatch.setitem(mar.SIZES, "B", MASKED)
    (row,) = table3.measure("S", 0)["rows"]
    peers = [peer for peer, *_ in table3.pairs(row)]
    assert peers == ["DiT-B/2", "MAR-B, 64 AR steps", "MAR-B, 256 AR steps"]
    assert all(value > 0 for *_, ratios in table3.pairs(row) for value in ratios.values())
    lines = [" ".join(line.split()) for line in table3.render({"rows": [row]}).splitlines()]
    assert "x (another) | " in lines[2] and lines[2].endswith("4.58x | 3.79x |")
    assert all(line.endswith("37.3x | 107x |") for line in lines[3:5])
