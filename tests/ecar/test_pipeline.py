"""ECARPipeline: labels and seeds in, pictures out, folders read and written."""

import json

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from ecar import pipeline, pipeline_mixin
from ecar.codec import AutoencoderKLCodec, IdentityCodec
from ecar.pipeline import ECARPipeline
from ecar.sampling import sample

from .conftest import tiny_model

NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


@pytest.fixture(scope="module")
def pipe():
    return ECARPipeline(tiny_model(), class_names=NAMES, defaults={"num_inference_steps": 4})


def draw(pipe, *arguments, **options):
    return pipe(*arguments, **{"progress": False, "output_type": "pt", **options})


def make_vae():
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
        scaling_factor=0.13025,
    )


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_output_types_agree(channels, mode):
    pipe = ECARPipeline(tiny_model(channels=channels), defaults={"num_inference_steps": 4})
    outputs = {
        kind: draw(pipe, [3, 4], seeds=[5, 6], output_type=kind).images
        for kind in ("latent", "pt", "np", "pil")
    }
    assert outputs["latent"].shape == outputs["pt"].shape == (2, channels, 8, 8)
    expected = (outputs["latent"] / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(outputs["pt"], expected)
    assert outputs["np"].dtype == np.float32
    np.testing.assert_array_equal(outputs["np"], expected.permute(0, 2, 3, 1).numpy())
    assert [picture.mode for picture in outputs["pil"]] == [mode] * 2
    levels = np.stack([np.asarray(picture) for picture in outputs["pil"]])
    expected = np.rint(outputs["np"] * 255).astype(np.uint8)
    assert np.array_equal(levels.reshape(expected.shape), expected)


def test_lone_labels_and_seeds_go_with_lists(pipe):
    one = draw(pipe, 7, seeds=11).images
    assert one.shape == (1, 1, 8, 8)
    by_seed = draw(pipe, 7, seeds=range(10, 13)).images
    by_class = draw(pipe, [6, 7, 8], seeds=11).images
    torch.testing.assert_close(by_seed[1:2], one, rtol=0, atol=1e-5)
    torch.testing.assert_close(by_class[1:2], one, rtol=0, atol=1e-5)
    assert not torch.allclose(by_seed[0], by_seed[1], atol=1e-3)
    assert not torch.allclose(by_class[0], by_class[1], atol=1e-3)


@pytest.mark.parametrize(
    "labels",
    [[2, 5], ("two", "five"), ["two", 5], torch.tensor([2, 5]), np.array([2, 5], dtype=np.int32)],
)
def test_labels_in_every_form(pipe, labels):
    expected = draw(pipe, [2, 5], seeds=[0, 1]).images
    assert torch.equal(draw(pipe, labels, seeds=torch.tensor([0, 1])).images, expected)


def test_graphs_and_tf32_reach_the_sampler_and_moving_drops_the_graphs(monkeypatch):
    pipe = ECARPipeline(tiny_model(), defaults={"num_inference_steps": 4}, graphs=False, tf32=True)
    seen, released = [], []
    monkeypatch.setattr(
        pipeline,
        "sample",
        lambda *given, **options: (
            seen.append((options["graphs"], options["tf32"])),
            sample(*given, **options),
        )[1],
    )
    monkeypatch.setattr(pipeline_mixin, "release_graphs", released.append)
    draw(pipe, 1)
    pipe.graphs, pipe.tf32 = "auto", None
    draw(pipe, 1)
    assert seen == [(False, True), ("auto", None)]
    pipe.graphs = True  # never quietly without
    with pytest.raises(RuntimeError, match="'graphs'"):
        draw(pipe, 1)
    pipe.to(torch.float32)
    assert released == [pipe.model]


def test_seeds_are_returned_and_make_the_picture_again(pipe):
    output = draw(pipe, [1, 2, 3])
    assert len(set(output.seeds)) == 3
    assert torch.equal(draw(pipe, [1, 2, 3], seeds=output.seeds).images, output.images)


def test_default_seeds_follow_torch_manual_seed(pipe):
    with torch.random.fork_rng():
        torch.manual_seed(99)
        first = draw(pipe, [1, 2]).seeds
        torch.manual_seed(99)
        assert draw(pipe, [1, 2]).seeds == first


def test_generator_draws_the_seeds(pipe):
    outputs = [draw(pipe, [1, 2], generator=torch.Generator().manual_seed(n)) for n in (3, 3, 4)]
    assert outputs[0].seeds == outputs[1].seeds != outputs[2].seeds
    assert torch.equal(outputs[0].images, outputs[1].images)


def test_guidance_and_steps_reach_the_sampler(pipe):
    plain = draw(pipe, 1, seeds=0).images
    assert torch.equal(draw(pipe, 1, [2, 2], 1.0, seeds=0).images, plain)
    for options in (
        {"guidance_scale": 3.0},
        {"num_inference_steps": [1, 3]},
        {"solver": "heun"},
        {"solver": "euler"},
        {"grid": 1.0},
        {"guidance_scale": 3.0, "guidance_schedule": "linear"},
        {"guidance_scale": 3.0, "guidance_interval": (0.5, 1.0)},
    ):
        assert not torch.equal(draw(pipe, 1, seeds=0, **options).images, plain), options


def test_defaults_are_used(pipe):
    defaults = {"num_inference_steps": [3, 2], "guidance_scale": 2.5}
    other = ECARPipeline(pipe.model, defaults=defaults)
    expected = draw(pipe, 1, [3, 2], 2.5, seeds=0).images
    assert torch.equal(draw(other, 1, seeds=0).images, expected)


def test_the_papers_protocol_is_one_argument(pipe):
    papers = draw(pipe, 1, [125, 125], seeds=0, solver="euler", grid=1.0).images
    assert torch.equal(draw(pipe, 1, "paper", seeds=0).images, papers)
    # As a default it is a whole: another number of steps has the usual solver and grid.
    other = ECARPipeline(pipe.model, defaults={"num_inference_steps": "paper"})
    assert (other.defaults["solver"], other.defaults["grid"]) == ("euler", 1.0)
    assert torch.equal(draw(other, 1, seeds=0).images, papers)
    assert torch.equal(draw(other, 1, 4, seeds=0).images, draw(pipe, 1, 4, seeds=0).images)
    with pytest.raises(ValueError, match=r"'solver'.*num_inference_steps='paper'.*got 'ab2'"):
        draw(other, 1, solver="ab2")


def test_stage_images(pipe):
    output = draw(pipe, [1, 2], seeds=0, return_stages=True)
    assert [stage.shape for stage in output.stage_images] == [(2, 1, 4, 4), (2, 1, 8, 8)]
    assert torch.equal(output.stage_images[-1], output.images)
    pictures = draw(pipe, 1, seeds=0, return_stages=True, output_type="pil").stage_images
    assert [stage[0].size for stage in pictures] == [(4, 4), (8, 8)]


def test_return_dict_false_is_a_tuple_with_images_first(pipe):
    images, seeds = draw(pipe, 1, seeds=4, return_dict=False)
    assert torch.equal(images, draw(pipe, 1, seeds=4).images)
    assert seeds == [4]
    assert len(draw(pipe, 1, seeds=4, return_dict=False, return_stages=True)) == 3


def test_callback_sees_every_step_and_may_change_the_state(pipe):
    calls = []

    def look(given, index, time, kwargs):
        assert given is pipe
        calls.append((index, time, kwargs["latents"].shape))
        return kwargs

    same = draw(pipe, [1, 2], seeds=0, callback_on_step_end=look, grid=1.0).images
    assert torch.equal(same, draw(pipe, [1, 2], seeds=0, grid=1.0).images)
    assert calls == [
        (0, 0.0, (2, 1, 4, 4)),
        (1, 0.25, (2, 1, 4, 4)),
        (2, 0.5, (2, 1, 8, 8)),
        (3, 0.75, (2, 1, 8, 8)),
    ]

    def blank(given, index, time, kwargs):
        return {"latents": torch.zeros_like(kwargs["latents"])} if index == 3 else {}

    assert (draw(pipe, 1, seeds=0, callback_on_step_end=blank).images == 0.5).all()


def test_callback_is_refused_where_it_comes_too_late(pipe):
    def late(given, index, time, kwargs):
        return {"latents": kwargs["latents"] * 2} if index == 1 else None

    with pytest.raises(ValueError, match="too late"):
        draw(pipe, 1, callback_on_step_end=late)


def test_no_pictures_at_all(pipe):
    assert draw(pipe, []).images.shape == (0, 1, 8, 8)
    assert draw(pipe, [], seeds=[], output_type="pil").images == []


def test_progress_bar_is_shown_on_request(pipe, capsys):
    draw(pipe, 1)
    assert capsys.readouterr().err == ""
    draw(pipe, 1, progress=True)
    assert "4/4" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"class_labels": 10}, ValueError, "'class_labels'.*0 to 9, got 10"),
        ({"class_labels": [0, -1]}, ValueError, "'class_labels'.*got -1"),
        ({"class_labels": 1.5}, TypeError, "'class_labels'.*1.5"),
        ({"class_labels": True}, TypeError, "'class_labels'.*True"),
        ({"class_labels": "sevn"}, ValueError, "'sevn'; near it: seven"),
        ({"seeds": [1, 2]}, ValueError, "'seeds'.*expected 3 seeds.*got 2"),
        ({"seeds": [1, 2, 3.5]}, TypeError, "'seeds'.*3.5"),
        ({"seeds": "abc"}, TypeError, "'seeds'.*'abc'"),
        ({"seeds": [1, 2, 2**63]}, ValueError, "'seeds'.*int64.*9223372036854775808"),
        ({"seeds": 0, "generator": torch.Generator()}, ValueError, "'generator'.*got both"),
        ({"generator": 7}, TypeError, "'generator'.*int"),
        ({"num_inference_steps": 0}, ValueError, "'num_inference_steps'.*got 0"),
        ({"num_inference_steps": -3}, ValueError, "'num_inference_steps'.*got -3"),
        ({"num_inference_steps": [1, 2, 3]}, ValueError, r"'num_inference_steps'.*\[1, 2, 3\]"),
        ({"num_inference_steps": 4.0}, TypeError, "'num_inference_steps'.*4.0"),
        ({"num_inference_steps": "papr"}, ValueError, "'num_inference_steps'.*got 'papr'"),
        ({"num_inference_steps": "paper", "grid": 2}, ValueError, "'grid'.*'paper'.*got 2"),
        ({"guidance_scale": float("nan")}, ValueError, "'guidance_scale'.*nan"),
        ({"guidance_schedule": "cosine"}, ValueError, "'guidance_schedule'.*'cosine'"),
        ({"guidance_interval": (0.5, 0.1)}, ValueError, "'guidance_interval'"),
        ({"solver": "rk4"}, ValueError, "'solver'.*'rk4'"),
        ({"grid": 0.0}, ValueError, "'grid'.*0.0"),
        ({"output_type": "jpg"}, ValueError, "'output_type'.*'jpg'"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, ValueError, "tensor_inputs.*noise"),
        ({"callback_on_step_end": lambda *given: 3}, TypeError, "'callback_on_step_end'.*int"),
    ],
)
def test_bad_input_is_named(pipe, arguments, error, message):
    with pytest.raises(error, match=message):
        draw(pipe, **{"class_labels": [0, 1, 2], **arguments})


def test_names_without_names_and_names_twice():
    pipe = ECARPipeline(tiny_model(), defaults={"num_inference_steps": 2})
    with pytest.raises(ValueError, match="have no names; got 'one'"):
        draw(pipe, "one")
    names = ["crane, bird", "crane", *NAMES[2:]]
    pipe = ECARPipeline(pipe.model, class_names=names)
    assert pipe.classes.numbers(["bird", "crane, bird", "two"]) == [0, 0, 2]
    with pytest.raises(ValueError, match=r"'crane' names the classes \[0, 1\]"):
        draw(pipe, "crane")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"model": torch.nn.Identity()}, TypeError, "'model'.*Identity"),
        ({"codec": "identity"}, TypeError, "'codec'.*str"),
        ({"class_names": NAMES[:3]}, ValueError, "'class_names'.*10 names, got 3"),
        ({"class_names": "abcdefghij"}, TypeError, "'class_names'"),
        ({"defaults": {"step": 3}}, ValueError, "'defaults'.*'step'"),
        ({"defaults": {"num_inference_steps": 1}}, ValueError, "'defaults'.*got 1"),
        (
            {"defaults": {"num_inference_steps": "paper", "solver": "ab2"}},
            ValueError,
            "'defaults'.*'solver'.*'paper'.*got 'ab2'",
        ),
        ({"defaults": [4]}, TypeError, "'defaults'"),
    ],
)
def test_bad_pipeline_is_named(pipe, arguments, error, message):
    with pytest.raises(error, match=message):
        ECARPipeline(**{"model": pipe.model, **arguments})


def test_latents_without_codec_are_no_pictures():
    pipe = ECARPipeline(tiny_model(channels=4))
    with pytest.raises(ValueError, match=r"'output_type'.*without a codec 4-channel"):
        draw(pipe, 1)
    assert draw(pipe, 1, 2, output_type="latent").images.shape == (1, 4, 8, 8)
    with pytest.raises(ValueError, match=r"'codec'.*1 latent channels, got 4"):
        ECARPipeline(tiny_model(), AutoencoderKLCodec(make_vae()))


def test_states_that_are_not_finite_are_refused(pipe):
    model = tiny_model()
    with torch.no_grad():
        model.heads[1].output.bias.fill_(torch.inf)
    with pytest.raises(FloatingPointError, match="not finite"):
        draw(ECARPipeline(model), 1, 4)


def test_round_trip_through_a_folder(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "model")
    # Accelerated, it would draw the same to rounding.
    loaded = ECARPipeline.from_pretrained(tmp_path / "model", accelerate=False)
    assert loaded.class_names == NAMES
    assert isinstance(loaded.codec, IdentityCodec)
    assert loaded.defaults["num_inference_steps"] == 4
    expected = draw(pipe, ["two", 5], seeds=[8, 9]).images
    assert torch.equal(draw(loaded, ["two", 5], seeds=[8, 9]).images, expected)
    assert {entry.suffix for entry in (tmp_path / "model").iterdir()} <= {
        ".json",
        ".safetensors",
        ".md",
    }


def test_the_papers_protocol_in_a_folder(pipe, tmp_path):
    defaults = {"num_inference_steps": "paper"}
    ECARPipeline(pipe.model, defaults=defaults).save_pretrained(tmp_path)
    loaded = ECARPipeline.from_pretrained(tmp_path).defaults
    assert (loaded["num_inference_steps"], loaded["solver"], loaded["grid"]) == (
        "paper",
        "euler",
        1,
    )


def test_a_folder_without_pipeline_json_has_the_identity_codec(pipe, tmp_path):
    pipe.model.save_pretrained(tmp_path)
    loaded = ECARPipeline.from_pretrained(tmp_path)
    assert loaded.class_names is None
    assert loaded.codec.kind == "identity"


def test_round_trip_with_a_vae(tmp_path):
    codec = AutoencoderKLCodec(make_vae())
    pipe = ECARPipeline(tiny_model(channels=4), codec, defaults={"num_inference_steps": 2})
    pipe.save_pretrained(tmp_path)
    loaded = ECARPipeline.from_pretrained(tmp_path, accelerate=False)
    first, second = (draw(p, range(10), seeds=3, return_stages=True) for p in (pipe, loaded))
    assert first.images.shape == (10, 3, 16, 16)
    assert first.stage_images[0].shape == (10, 3, 8, 8)
    assert torch.equal(first.images, second.images)
    latents = draw(pipe, range(10), seeds=3, output_type="latent").images
    expected = (pipe.codec.decode(latents) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(first.images, expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "expected an object"),
        (json.dumps({"codecs": "identity"}), "expected an object with codec"),
        (json.dumps({"codec": "vq"}), "got 'vq'"),
        (json.dumps({"class_names": ["a"]}), "10 names, got 1"),
        (json.dumps({"defaults": {"solver": "rk4"}}), "'solver'.*'rk4'"),
    ],
)
def test_bad_pipeline_json_is_named(pipe, tmp_path, settings, message):
    pipe.model.save_pretrained(tmp_path)
    (tmp_path / "pipeline.json").write_text(settings)
    with pytest.raises(ValueError, match=f"pipeline.json.*{message}"):
        ECARPipeline.from_pretrained(tmp_path)


def test_move_and_cast(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    loaded = ECARPipeline.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16
    assert draw(loaded, 1, seeds=0).images.dtype == torch.float32
    assert loaded.to("cpu", torch.float32) is loaded
    assert (loaded.device.type, loaded.dtype) == ("cpu", torch.float32)
    with pytest.raises(TypeError, match=r"'dtype'.*int64"):
        loaded.to(dtype=torch.int64)
    assert "stages 4/8" in repr(loaded)
    assert "zero, one, two" in repr(loaded)


def test_a_hub_repository_is_fetched_as_json_and_safetensors_only(pipe, tmp_path, monkeypatch):
    pipe.save_pretrained(tmp_path)
    asked = {}

    def fetch(name, *, allow_patterns, **options):
        asked.update(name=name, patterns=allow_patterns, **options)
        return str(tmp_path)

    monkeypatch.setattr("ecar.hub.snapshot_download", fetch)
    loaded = ECARPipeline.from_pretrained("someone/e-car", revision="v1")
    assert loaded.class_names == NAMES
    assert (asked["name"], asked["revision"]) == ("someone/e-car", "v1")
    assert all(pattern.endswith((".json", ".safetensors")) for pattern in asked["patterns"])
