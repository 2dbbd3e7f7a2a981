"""The examples run at a small size; each judges its own output by the accuracy rule."""

import json

import pytest

from examples import accelerate_dit, accelerate_var


@pytest.mark.parametrize(
    ("example", "sizes"),
    [(accelerate_dit, {"S": (1, 2, 72)}), (accelerate_var, {"d12": 2})],
    ids=["dit", "var"],
)
def test_example(example, sizes, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(example, "SIZES" if hasattr(example, "SIZES") else "DEPTHS", sizes)
    output = tmp_path / "result.json"
    result = example.main(
        ["--size", next(iter(sizes)), "--seconds", "0", "--batch", "2", "--output", str(output)]
    )
    assert "times as fast" in capsys.readouterr().out
    written = json.loads(output.read_text("utf-8"))
    assert written["kind"] == "example"
    assert written["speedup"] == result["speedup"] > 0


def test_a_wrong_answer_is_seen(monkeypatch, capsys):
    monkeypatch.setattr(accelerate_var, "DEPTHS", {"d12": 1})

    def wrong(self, x, condition):
        return 1.001 * accelerate_var.VARBlock.forward(self, x, condition)

    monkeypatch.setattr(accelerate_var.FastVARBlock, "forward", wrong)
    with pytest.raises(SystemExit, match="not right"):
        accelerate_var.main(["--size", "d12", "--seconds", "0"])
