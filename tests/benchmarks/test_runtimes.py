"""Rows of tiny models by every runtime that is installed; what is not says why."""

import sys

import pytest

from benchmarks import gemm, runtimes
from benchmarks.paper.dit import DiTSize
from ecar import ECARConfig

TINY = ECARConfig(
    stage_sides=(4, 8, 16), channels=1, num_classes=3, width=16, heads=2, ar_layers=1, flow_blocks=1
)


@pytest.fixture(autouse=True)
def tiny(monkeypatch, tmp_path):
    monkeypatch.setattr(runtimes, "FILES", tmp_path / "files")
    monkeypatch.setattr(runtimes.ECARConfig, "preset", lambda name: TINY)
    monkeypatch.setitem(runtimes.dit.SIZES, runtimes.PEER, DiTSize(1, 16, 2, latent_side=8))
    monkeypatch.setattr(runtimes, "TURN", 0.0)
    # Which takes minutes to compile.
    monkeypatch.setitem(runtimes.RUNTIMES, "torch.compile", runtimes.eager)


@pytest.mark.parametrize("case", ["block-16", "step-64", "image", "DiT-B-call"])
def test_every_way_has_the_same_result(case):
    row = runtimes.measure(f"{case}-float32", 0.0)["rows"][0]
    ways = {"eager", "torch.compile", "OpenVINO", "ONNX Runtime", runtimes.OURS}
    assert row["seconds"].keys() | row["absent"].keys() == ways
    assert {"eager", "torch.compile"} <= row["seconds"].keys()
    assert all(error < 1e-5 for error in row["errors"].values()), row["errors"]
    assert (runtimes.OURS in row["seconds"]) == (case != "DiT-B-call")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_products_by_every_library(monkeypatch, dtype):
    monkeypatch.setitem(gemm.LAYERS, "16x768x3072", (3, 32, 48))
    (row,) = gemm.measure(name := f"16x768x3072-{dtype}", 0.0)["rows"]
    assert row["name"] == name and row["seconds"].keys() | row["absent"].keys() == set(gemm.WAYS)
    assert {gemm.OURS, "oneDNN"} <= row["seconds"].keys()
    assert ("MKL" in row["seconds"]) == (dtype == "float32")
    bound = 1e-6 if dtype == "float32" else 0.02
    assert all(error < bound for error in row["errors"].values()), row["errors"]
    row["seconds"][gemm.OURS]["median"] = 2 * 3 * 32 * 48 * 1e-9 / 50
    text = gemm.render({"rows": [row]})
    assert text.splitlines()[2].startswith("| 3    | 32 to 48 |") and " 50 |" in text


def test_sixteen_bits_are_compared_with_float32():
    errors = runtimes.measure("step-16-bfloat16", 0.0)["rows"][0]["errors"]
    assert {"eager", runtimes.OURS} <= errors.keys()
    assert all(0 < error < 0.1 for error in errors.values())


def test_what_is_not_installed_says_so(monkeypatch):
    for package in ("openvino", "onnxruntime", "onnxscript"):
        monkeypatch.setitem(sys.modules, package, None)
    (row,) = runtimes.measure("block-16-int8", 0.0)["rows"]
    assert row["seconds"] == {}
    assert "openvino" in row["absent"]["OpenVINO"]
    text = runtimes.render({"rows": [row]})
    assert "- OpenVINO: ModuleNotFoundError: import of openvino" in text
    assert "| block-16-int8 |            - |" in text


def test_rows_are_chosen_by_name(capsys):
    assert runtimes.main(arguments=["--list", "-k", "step", "int8"]) == 0
    assert capsys.readouterr().out.splitlines() == [f"step-{n}-int8" for n in (16, 64, 256)]


def test_a_wrong_selection_is_refused(capsys):
    with pytest.raises(SystemExit):
        runtimes.main(arguments=["-k", "nothing"])
    assert "no row's name contains all of nothing" in capsys.readouterr().err
