"""`export`: programs of every format draw the pipeline's images; what can't be exported is said."""

import json

import numpy as np
import pytest
import torch

from ecar import ECARPipeline, sample
from ecar.codec import AutoencoderKLCodec
from ecar.export import EXPORT_FILE, ONNX_PACKAGES, Begin, Step, describe, export
from ecar_kernels import accelerate, initial_noise, use_backend
from ecar_kernels.flow_step import reference
from ecar_kernels.testing import verdicts
from examples import draw_onnx

from .conftest import tiny_model
from .test_pipeline import make_vae

LABELS, SEEDS = [3, 4], [7, -8]
SETTINGS = {
    "num_inference_steps": [3, 2],
    "guidance_scale": 2.0,
    "guidance_interval": (0.1, 1.0),  # so that not every step is guided
}


@pytest.fixture(scope="module")
def pipe():
    return ECARPipeline(tiny_model(), defaults={"num_inference_steps": 4})


def by_torch(program):
    """A program of torch as a function of arrays."""

    def run(*arrays):
        with torch.no_grad():
            return [x.numpy() for x in program(*map(torch.as_tensor, arrays))]

    return run


def assert_draws(drawer, pipe, **settings):
    """The pipeline's images, by the accuracy rule."""
    settings = {**pipe.defaults, **settings}
    steps = settings.pop("num_inference_steps")

    def plain(dtype):
        labels, seeds = torch.tensor(LABELS), torch.tensor(SEEDS)
        with use_backend("reference"):
            model = tiny_model(stage_sides=pipe.model.config.stage_sides)
            model.load_state_dict(pipe.model.state_dict())
            return sample(model.to(dtype), labels, seeds=seeds, steps=steps, **settings).latents

    drawn = torch.from_numpy(drawer.draw(LABELS, SEEDS))
    for verdict in verdicts([drawn], [plain(torch.float32)], [plain(torch.float64).double()]):
        assert verdict.ok, verdict


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"solver": "euler", "grid": 1.0},
        SETTINGS,
        {"guidance_scale": 3.0, "guidance_schedule": "linear"},
    ],
    ids=["default", "euler", "interval", "linear"],
)
def test_the_networks_are_the_sampler_s(pipe, settings, tmp_path):
    """Driven by the example's loop, without an exporter between."""
    facts = describe(pipe, "onnx", settings)
    (tmp_path / EXPORT_FILE).write_text(json.dumps(facts))
    networks = {
        f"{name}{stage}.onnx": kind(pipe.model, stage)
        for stage in (1, 2)
        for name, kind in (("begin", Begin), ("step", Step))
    }
    with use_backend("reference"):
        drawer = draw_onnx.Drawer(tmp_path, lambda file: by_torch(networks[file.name]))
        assert_draws(drawer, pipe, **settings)


def test_torch_programs_draw_the_image(pipe, tmp_path):
    written = export(pipe, tmp_path / "new", **SETTINGS)
    assert sorted(written) == sorted((tmp_path / "new").iterdir())
    drawer = draw_onnx.Drawer(
        tmp_path / "new", lambda file: by_torch(torch.export.load(file).module())
    )
    assert_draws(drawer, pipe, **SETTINGS)


@pytest.mark.slow
def test_onnx_programs_draw_the_image(pipe, tmp_path, monkeypatch, capsys):
    for package in ONNX_PACKAGES:
        pytest.importorskip(package)
    export(pipe, tmp_path, format="onnx", **SETTINGS)
    assert_draws(draw_onnx.Drawer(tmp_path), pipe, **SETTINGS)
    import onnxruntime

    session = onnxruntime.InferenceSession(tmp_path / "step2.onnx")
    assert [x.name for x in session.get_outputs()] == list(Step.outputs)
    shapes = {x.name: x.shape for x in session.get_inputs()}
    assert shapes["modulation"][:3] == ["guided", "images", 16]
    assert shapes["x"] == ["images", 1, 8, 8]
    monkeypatch.chdir(tmp_path)
    draw_onnx.main([".", "--label", "3", "--seed", "7"])
    latent = pipe(3, seeds=7, output_type="latent", progress=False, **SETTINGS).images[0]
    assert np.abs(np.load("latent.npy") - latent.numpy()).max() < 1e-4
    assert capsys.readouterr().out == "latent.npy\n"


@pytest.mark.slow
def test_compiled_programs_draw_the_image(tmp_path):
    """Of one stage: each of them is a minute of compiling."""
    pipe = ECARPipeline(tiny_model(stage_sides=(4,)), defaults={"num_inference_steps": 3})
    export(pipe, tmp_path, format="aoti")
    load = torch._inductor.aoti_load_package
    assert_draws(draw_onnx.Drawer(tmp_path, lambda file: by_torch(load(str(file)))), pipe)


def test_a_program_holds_no_weight_that_it_does_not_use(pipe):
    names = {name.split(".")[1] for name, _ in Step(pipe.model, 1).named_parameters()}
    assert names == {"embed", "blocks", "output"}
    model = pipe.model
    assert Begin(model, 1).ar.positions is model.ar.positions  # and copies none
    assert model.heads[0].condition is not None


def test_the_example_s_noise_is_the_sampler_s():
    noise = initial_noise(torch.tensor([-3]), (1, 4, 4), device="cpu", dtype=torch.float32)
    drawn = draw_onnx.normals(-3, 1, 4).reshape(1, 1, 4, 4)
    assert np.abs(drawn - noise.numpy()).max() < 1e-6
    end = torch.randn(1, 2, 4, 4)
    _, start = reference.upsample_renoise_euler(
        end, torch.zeros_like(end), 0.0, time=0.3, stage=2, seeds=torch.tensor([2**40 + 5])
    )
    drawn = draw_onnx.jump(end[0].numpy(), 0.3, 2**40 + 5, 2)
    assert np.abs(drawn - start[0].numpy()).max() < 1e-5


def test_a_wrong_program_is_not_written(pipe, tmp_path, monkeypatch):
    load = torch.export.load

    class Wrong:
        def __init__(self, file):
            self.program = load(file).module()

        def module(self):
            return lambda *inputs: [1.001 * x for x in self.program(*inputs)]

    monkeypatch.setattr(torch.export, "load", Wrong)
    with pytest.raises(RuntimeError, match=r"begin1\.pt2: the program's results are not right"):
        export(pipe, tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_codec_s_scale_is_told():
    codec = AutoencoderKLCodec(make_vae())
    facts = describe(ECARPipeline(tiny_model(channels=4), codec), "onnx", {})
    assert facts["codec"] == {
        "kind": "autoencoder_kl",
        "shift": [0.0],
        "scale": [pytest.approx(0.13025)],
    }


def accelerated():
    pipe = ECARPipeline(tiny_model(flow_blocks=1, ar_layers=1))
    accelerate(pipe.model)
    return pipe


@pytest.mark.parametrize(
    ("make", "options", "error", "words"),
    [
        (tiny_model, {}, TypeError, "'pipe'.*an ECARPipeline, got ECAR"),
        (None, {"format": "tflite"}, ValueError, "'format'.*torch, onnx, aoti, got 'tflite'"),
        (None, {"solver": "heun"}, ValueError, "'solver'.*euler or ab2, got 'heun'"),
        (None, {"num_inference_steps": 1}, ValueError, "'num_inference_steps'"),
        (lambda: ECARPipeline(tiny_model().bfloat16()), {}, ValueError, "float32, got torch.bf"),
        (lambda: ECARPipeline(tiny_model(ar_layers=0)), {}, ValueError, "AR layers"),
        (accelerated, {}, ValueError, r"ecar_kernels\.restore\(pipe\.model\)"),
    ],
)
def test_what_cannot_be_exported_is_named(pipe, make, options, error, words, tmp_path):
    with pytest.raises(error, match=words):
        export(make() if make else pipe, tmp_path, **options)
    assert not list(tmp_path.iterdir())
