"""`python -m benchmarks.gemm` runs and writes its records; paths to a linear layer agree."""

import pytest
import torch
import torch.nn.functional as F

from benchmarks import linears, rates, results, table
from tests.benchmarks.support import python
from tests.support.native import needs_native


@needs_native
def test_a_run_writes_its_records(tmp_path):
    out = python(
        "-m",
        "benchmarks.gemm",
        "--threads",
        "1",
        "--widths",
        "16",
        "--rows",
        "3",
        "--seconds",
        "0.01",
        "--results",
        str(tmp_path),
    )
    (file,) = tmp_path.glob("*/gemm.json")
    record = results.read(file)
    records = record["records"]
    assert [record["layer"] for record in records] == ["qkv", "proj", "fc1", "fc2"]
    assert all(record["rows"] == 3 and record["gflops"]["ours, fused"] > 0 for record in records)
    assert len(out.splitlines()) == 1 + len(records)
    assert len(table.render(record).split("\n\n")[0].splitlines()) == 2 + len(records)


@pytest.mark.parametrize("paths", [linears.libraries, linears.fastest_alone])
@torch.no_grad()
def test_paths_compute_the_same_layer(paths):
    weight, bias, x = torch.randn(40, 24), torch.randn(40), torch.randn(1, 5, 24)
    expected = F.linear(x.double(), weight.double(), bias.double())
    for name, path in paths(weight, bias, 5).items():
        torch.testing.assert_close(path(x).double(), expected, rtol=1e-5, atol=1e-5, msg=name)


def test_rates_are_the_best_of_what_was_tried():
    best, tried = rates.measure(seconds=0.02, copy_bytes=2**20, width=16)
    copies = [rate for name, rate in tried.items() if name.startswith("copy")]
    gemms = [rate for name, rate in tried.items() if name.startswith("GEMM")]
    assert best.bytes_per_second == max(copies) > 0
    assert best.multiply_adds_per_second == max(gemms) > 0
    assert len(copies) + len(gemms) == len(tried)
