import json

import pytest

from ecar.config import PRESETS, ECARConfig


@pytest.mark.parametrize("name", PRESETS)
def test_json_round_trip(name, tmp_path):
    path = tmp_path / "config.json"
    ECARConfig.preset(name).to_json(path)
    assert ECARConfig.from_json(path) == ECARConfig.preset(name)
    assert list(tmp_path.iterdir()) == [path]


def test_paper_sizes():
    config = ECARConfig.preset("L")
    assert config.stage_tokens == (16, 64, 256)
    assert config.num_tokens == 336
    assert config.latent_shape == (4, 32, 32)
    assert config.head_dim == 72
    assert config.null_class == 1000


def test_one_stage_and_a_changed_preset():
    assert ECARConfig(stage_sides=(32,)).stage_tokens == (256,)
    assert ECARConfig.preset("S", num_classes=10).null_class == 10


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("stage_sides", (), ValueError),
        ("stage_sides", (8, 12), ValueError),
        ("stage_sides", (8, 16.0), TypeError),
        ("stage_sides", "816", TypeError),
        ("stage_sides", (0, 0), ValueError),
        ("channels", 0, ValueError),
        ("channels", True, TypeError),
        ("patch_size", 3, ValueError),
        ("patch_size", 16, ValueError),
        ("num_classes", -1, ValueError),
        ("heads", 7, ValueError),
        ("width", 10, ValueError),
        ("ar_layers", 1.5, TypeError),
        ("ar_layers", -1, ValueError),
        ("flow_blocks", 0, ValueError),
        ("mlp_ratio", 0, ValueError),
        ("mlp_ratio", float("nan"), ValueError),
        ("class_dropout", 1.0, ValueError),
        ("class_dropout", "0.1", TypeError),
    ],
)
def test_an_impossible_value_is_refused_by_name(field, value, error):
    values = {**PRESETS["digits"].to_dict(), "heads": 1, field: value}
    with pytest.raises(error, match=field):
        ECARConfig.from_dict(values)


def test_an_unknown_field_a_bad_preset_and_a_bad_file_are_refused(tmp_path):
    with pytest.raises(ValueError, match="depth"):
        ECARConfig.from_dict({"depth": 3})
    with pytest.raises(TypeError, match="object"):
        ECARConfig.from_dict([1])
    with pytest.raises(ValueError, match="XL"):
        ECARConfig.preset("XL")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(PRESETS["S"].to_dict())[:-5])
    with pytest.raises(ValueError, match=r"config\.json: not valid JSON"):
        ECARConfig.from_json(path)
