"""`ecar info`, as tables and as JSON."""

import json
import re

import pytest

from ecar.config import ECARConfig


def test_info_of_a_checkpoint_as_tables(folder, run, pipe):
    code, output, errors = run("info --checkpoint model --steps 1,3")
    assert (code, errors) == (0, "")
    assert "width 32, 2 heads, 2 AR layers, 2 flow blocks a stage" in output
    thousands = sum(parameter.numel() for parameter in pipe.model.parameters()) / 1000
    assert re.search(rf"^ +total +{thousands:.1f} k$", output, re.MULTILINE)
    assert re.search(r"^ +1 +4 +4 +1 ", output, re.MULTILINE)
    assert re.search(r"^ +2 +8 +16 +3 ", output, re.MULTILINE)
    assert re.search(r"^ +all +20 +4 ", output, re.MULTILINE)
    assert re.search(r"^ +stage_attention +(cpp|reference|triton)$", output, re.MULTILINE)


def test_presets(run):
    code, output, _ = run("info --preset digits --steps 2 --json")
    assert code == 0
    assert json.loads(output)["config"] == ECARConfig.preset("digits").to_dict()


def test_info_of_a_checkpoint_as_json(folder, run, pipe):
    (folder / "model" / "model.safetensors").unlink()  # only the configuration is read
    code, output, _ = run("info --checkpoint model --json")
    report = json.loads(output)
    assert code == 0
    assert report["config"] == pipe.model.config.to_dict()
    assert report["parameters"]["total"] == sum(p.numel() for p in pipe.model.parameters())
    assert report["sampling"]["steps"] == [2, 2]
    plain, guided = report["multiply_adds_per_image"].values()
    assert plain["total"] == sum(stage["total"] for stage in plain["stages"])
    assert plain["total"] < guided["total"] < 2 * plain["total"] + 1
    assert guided["stages"][1]["flow"] == 2 * plain["stages"][1]["flow"]
    assert sum(plain["shares"].values()) == pytest.approx(1)
    for part, share in plain["shares"].items():
        assert share * plain["total"] == pytest.approx(sum(s[part] for s in plain["stages"]))
    assert (report["sampling"]["solver"], report["sampling"]["grid"]) == ("ab2", 1.6)
    paper = report["paper"]
    assert paper["sampling"]["steps"] == [125, 125]
    assert (paper["sampling"]["solver"], paper["sampling"]["grid"]) == ("euler", 1.0)
    paper = paper["multiply_adds_per_image"]["without_guidance"]
    assert paper["stages"][1]["ar"] == plain["stages"][1]["ar"]
    assert 2 * paper["stages"][1]["flow"] == 125 * plain["stages"][1]["flow"]


def test_the_papers_protocol_is_told_once(folder, run):
    code, output, _ = run("info --checkpoint model --steps paper")
    assert code == 0
    assert re.search(
        r"^  125 \+ 125 steps of euler, grid 1 .* AR .*%, modulation", output, re.MULTILINE
    )
    assert output.count("125 + 125 steps of euler") == 2  # over the table, and of the parts
    _, output, _ = run("info --checkpoint model")
    assert "  2 + 2 steps of ab2, grid 1.6 " in output
    assert output.count("125 + 125 steps of euler") == 1
