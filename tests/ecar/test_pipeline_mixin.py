"""What diffusers' pipelines have, on ECARPipeline; the hub is never asked here."""

import json
from pathlib import Path

import pytest
import torch

from ecar import ECARPipeline, pipeline_mixin
from ecar.codec import AutoencoderKLCodec
from ecar.sampling import sampler

from .conftest import tiny_model
from .test_pipeline import NAMES, draw, make_vae


@pytest.fixture(scope="module")
def pipe():
    return ECARPipeline(tiny_model(), class_names=NAMES, defaults={"num_inference_steps": 4})


@pytest.fixture
def latent_pipe():
    return ECARPipeline(
        tiny_model(channels=4), AutoencoderKLCodec(make_vae()), defaults={"num_inference_steps": 4}
    )


def test_images_of_one_class_follow_each_other(pipe):
    output = draw(pipe, ["two", 5], num_images_per_prompt=2, seeds=[0, 1, 2, 3])
    assert output.class_labels == [2, 2, 5, 5]
    assert output.class_names == ["two", "two", "five", "five"]
    assert output.seeds == [0, 1, 2, 3]
    assert torch.equal(output.images, draw(pipe, [2, 2, 5, 5], seeds=[0, 1, 2, 3]).images)
    assert len(set(draw(pipe, "two", num_images_per_prompt=3).seeds)) == 3


def test_a_model_without_names_gives_none():
    output = draw(ECARPipeline(tiny_model()), 7, 4)
    assert (output.class_labels, output.class_names) == ([7], None)


@pytest.mark.parametrize(
    ("count", "seeds", "error", "words"),
    [
        (0, None, ValueError, "'num_images_per_prompt': expected a positive integer, got 0"),
        (1.5, None, TypeError, "'num_images_per_prompt': expected an integer, got 1.5"),
        (True, None, TypeError, "'num_images_per_prompt': expected an integer, got True"),
        (3, 7, ValueError, "'seeds': expected 3 seeds, one for each image, got 1"),
        (2, [1, 2, 3], ValueError, "'seeds': expected 2 seeds, one for each image, got 3"),
    ],
)
def test_a_wrong_number_of_images_is_named(pipe, count, seeds, error, words):
    with pytest.raises(error, match=words):
        draw(pipe, 1, num_images_per_prompt=count, seeds=seeds)


def test_components_make_another_pipeline(latent_pipe):
    other = ECARPipeline(**latent_pipe.components)
    assert other.model is latent_pipe.model and other.codec is latent_pipe.codec
    assert other.defaults == latent_pipe.defaults
    assert torch.equal(draw(other, 1, seeds=0).images, draw(latent_pipe, 1, seeds=0).images)


def test_the_bar_is_configured(monkeypatch):
    bars, tqdm = [], sampler.tqdm
    monkeypatch.setattr(
        sampler, "tqdm", lambda **options: (bars.append(options), tqdm(**options))[1]
    )
    pipe = ECARPipeline(tiny_model(), defaults={"num_inference_steps": 4})
    pipe.set_progress_bar_config(disable=True, desc="birds")
    draw(pipe, 1, progress=True)
    pipe.set_progress_bar_config()
    draw(pipe, 1, progress=False)
    assert bars == [
        {"total": 4, "desc": "birds", "unit": "step", "disable": True},
        {"total": 4, "desc": "sampling", "unit": "step", "disable": True},
    ]


def test_the_bar_is_shown(pipe, capsys):
    draw(pipe, 1, progress=True)
    assert "sampling: 100%" in capsys.readouterr().err


class Hub:
    """Stands in for huggingface_hub's API."""

    def __init__(self, token=None):
        self.token, self.made, self.uploaded = token, [], []

    def create_repo(self, repo_id, **options):
        self.made.append((repo_id, options))
        return type("Repository", (), {"repo_id": f"me/{repo_id}"})

    def upload_folder(self, *, folder_path, **options):
        files = {path.name for path in Path(folder_path).iterdir()}
        names = json.loads((Path(folder_path) / "pipeline.json").read_text())["class_names"]
        self.uploaded.append((files, names, options))
        return "commit"


@pytest.fixture
def hub(monkeypatch):
    made = []
    monkeypatch.setattr(pipeline_mixin, "HfApi", lambda token: made.append(Hub(token)) or made[-1])
    return made


def test_everything_is_uploaded(pipe, hub):
    assert pipe.push_to_hub("birds", private=True, token="secret", create_pr=True) == "commit"
    assert hub[0].token == "secret"
    assert hub[0].made == [("birds", {"private": True, "exist_ok": True})]
    options = {"commit_message": "Upload ECARPipeline", "create_pr": True, "repo_id": "me/birds"}
    files = {"config.json", "model.safetensors", "pipeline.json", "README.md"}
    assert hub[0].uploaded == [(files, NAMES, options)]


def test_saving_uploads_where_asked(pipe, hub, tmp_path):
    assert pipe.save_pretrained(tmp_path / "birds") is None
    assert not hub
    done = pipe.save_pretrained(tmp_path / "birds", push_to_hub=True, commit_message="Better birds")
    assert done == "commit"
    assert hub[0].made[0][0] == "birds"
    assert hub[0].uploaded[0][2]["commit_message"] == "Better birds"
    pipe.save_pretrained(tmp_path, push_to_hub=True, repo_id="wrens")
    assert hub[1].made[0][0] == "wrens"


def test_parts_are_on_the_device_only_while_they_work(latent_pipe, monkeypatch):
    """With the CPU for the accelerator; where the parts are moved is written down."""
    expected = draw(latent_pipe, [1, 2], seeds=[0, 1]).images
    moves = []
    for name, part in (("model", latent_pipe.model), ("vae", latent_pipe.codec)):
        plain = part.to

        def to(*given, name=name, plain=plain, **options):
            if device := options.get("device", given[0] if given else None):
                moves.append((name, str(device)))
            return plain(*given, **options)

        monkeypatch.setattr(part, "to", to)
    drawn = []
    monkeypatch.setattr(
        "ecar.pipeline.sample",
        lambda *given, **options: (
            moves.append("draw"),
            drawn.append(options["graphs"]),
            sampler.sample(*given, **options),
        )[-1],
    )
    decode = latent_pipe.codec.decode
    monkeypatch.setattr(
        latent_pipe.codec, "decode", lambda x: (moves.append("decode"), decode(x))[1]
    )
    latent_pipe.enable_model_cpu_offload(device="cpu")
    assert moves == [("model", "cpu"), ("vae", "cpu")]
    latent_pipe._offload_device = torch.device("cpu", 0)  # to tell it from the CPU itself
    del moves[:]
    assert torch.equal(draw(latent_pipe, [1, 2], seeds=[0, 1]).images, expected)
    assert moves == [
        ("model", "cpu:0"), "draw", ("model", "cpu"), ("vae", "cpu:0"), "decode", ("vae", "cpu"),
    ]  # fmt: skip
    assert drawn == [False]  # a graph would be captured at every call
    latent_pipe.to("cpu")
    del moves[:]
    draw(latent_pipe, 1)
    assert moves == ["draw", "decode"]


def test_a_part_goes_back_after_an_error(latent_pipe, monkeypatch):
    def fail(*given, **options):
        raise KeyboardInterrupt

    moved = []
    monkeypatch.setattr("ecar.pipeline.sample", fail)
    latent_pipe.enable_model_cpu_offload(device="cpu")
    monkeypatch.setattr(latent_pipe.model, "to", moved.append)
    with pytest.raises(KeyboardInterrupt):
        draw(latent_pipe, 1)
    assert moved == [torch.device("cpu"), "cpu"]


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator here")
def test_without_an_accelerator_offloading_says_so(latent_pipe):
    with pytest.raises(RuntimeError, match="needs an accelerator, and there is none"):
        latent_pipe.enable_model_cpu_offload()


def test_the_accelerator_has_one_number(latent_pipe):
    with pytest.raises(ValueError, match="'gpu_id': expected none with device='cuda:1', got 2"):
        latent_pipe.enable_model_cpu_offload(2, "cuda:1")


@pytest.mark.gpu
def test_offloading_draws_the_same_on_a_gpu(latent_pipe):
    expected = draw(latent_pipe.to("cuda"), [1, 2], seeds=[0, 1]).images
    latent_pipe.enable_model_cpu_offload()
    for _ in range(2):
        images = draw(latent_pipe, [1, 2], seeds=[0, 1]).images
        assert (images - expected).abs().max() < 1e-5
        assert latent_pipe.device.type == latent_pipe.codec.device.type == "cpu"
