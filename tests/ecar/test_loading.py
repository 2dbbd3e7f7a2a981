"""What is loaded: weights of quantized types are refused by name, and so are unknown options."""

import json

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ecar import ECAR, ECARPipeline
from ecar.codec import AutoencoderKLCodec, load_codec
from ecar.evaluation.classifier import Classifier, ClassifierConfig
from ecar.hub import recommended_dtype
from ecar.training import TrainConfig, Trainer
from ecar.training.state import state_path

from .conftest import tiny_config, tiny_model

MODEL = tiny_model()
QUANTIZED = [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool,
             torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64]  # fmt: skip


def checkpoint(folder):
    MODEL.save_pretrained(folder)
    return folder / "model.safetensors", "ar.norm.weight", lambda: ECAR.from_pretrained(folder)


def pipeline(folder):
    path, name, _ = checkpoint(folder)
    return path, name, lambda: ECARPipeline.from_pretrained(folder)


def classifier(folder):
    config = ClassifierConfig(image_size=8, widths=(4, 4), features=4)
    Classifier(config).save(folder / "c.safetensors")
    path = folder / "c.safetensors"
    return path, "head.weight", lambda: Classifier.load(path)


def autoencoder(folder):
    AutoencoderKLCodec(AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)).save(folder)
    path = folder / "diffusion_pytorch_model.safetensors"
    return path, "encoder.conv_in.weight", lambda: load_codec("autoencoder_kl", folder)


READERS = [checkpoint, pipeline, classifier, autoencoder]
CASES = [(checkpoint, dtype) for dtype in QUANTIZED] + [
    (reader, dtype) for reader in READERS[1:] for dtype in (torch.int8, torch.float8_e4m3fn)
]


def rewrite(path, change):
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file(change(load_file(path)), path, metadata)


@pytest.mark.parametrize(
    ("reader", "dtype"), CASES, ids=[f"{reader.__name__}-{dtype}" for reader, dtype in CASES]
)
def test_quantized_weights_are_refused_by_name(reader, dtype, tmp_path):
    """Also where they come with scales, as quantizers write them."""
    path, name, load = reader(tmp_path)
    load()
    for more in ({}, {f"{name}_scale": torch.ones(1)}):
        rewrite(path, lambda tensors, more=more: {
            **tensors, name: tensors[name].to(dtype), **more})  # fmt: skip
        with pytest.raises(ValueError, match=f"{path.name}.*'{name}' is .*expected float32") as got:
            load()
        assert "\n" not in str(got.value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.__name__)
def test_plain_floats_are_read(reader, dtype, tmp_path):
    path, name, load = reader(tmp_path)
    rewrite(path, lambda tensors: {**tensors, name: tensors[name].to(dtype)})
    load()


@pytest.mark.parametrize("dtype", [*QUANTIZED, torch.bfloat16], ids=str)
def test_a_state_of_another_type(dtype, tmp_path):
    """A training goes on from the very numbers it stopped at: types are exact there."""
    config = TrainConfig(model=tiny_config(), output_dir=str(tmp_path), steps=1, batch_size=2,
                         sample_every=0, device="cpu", num_workers=0)  # fmt: skip
    Trainer(config, progress=False).run()
    name = "ema/ar.norm.weight"
    rewrite(state_path(tmp_path), lambda tensors: {**tensors, name: tensors[name].to(dtype)})
    with pytest.raises(ValueError, match=f"{name}' is {dtype} .*expected torch.float32"):
        Trainer.resume(str(tmp_path), progress=False)


@pytest.mark.parametrize("cls", [ECAR, ECARPipeline])
@pytest.mark.parametrize("where", ["folder", "hub"])
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"torch_dtpye": torch.bfloat16}, TypeError, "did you mean 'torch_dtype'"),
        ({"dtyp": torch.bfloat16}, TypeError, "'dtyp': .* did you mean 'dtype'"),
        ({"device_map": "auto"}, TypeError, "'device_map': from_pretrained has no such option"),
        ({"variant": "fp16"}, TypeError, "'variant'"),
        ({"acelerate": False}, TypeError, "'acelerate'"),
        ({"low_cpu_mem_usage": True}, TypeError, "expected one of dtype, torch_dtype, "),
        ({"dtype": torch.int8}, TypeError, "'dtype': expected torch.float32"),
        ({"torch_dtype": "bfloat16"}, TypeError, "'torch_dtype': expected .* got 'bfloat16'"),
        ({"dtype": torch.float16, "torch_dtype": torch.bfloat16}, ValueError, "same as 'dtype'"),
    ],
)
def test_options_that_are_refused(cls, where, options, error, message, tmp_path, monkeypatch):
    monkeypatch.delattr("ecar.hub.snapshot_download")  # before anything is fetched
    with pytest.raises(error, match=message) as caught:
        cls.from_pretrained(str(tmp_path) if where == "folder" else "some/one", **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("cls", [ECAR, ECARPipeline])
@pytest.mark.parametrize("names", [["dtype"], ["torch_dtype"], ["dtype", "torch_dtype"]])
@pytest.mark.parametrize("where", ["folder", "hub"])
def test_both_names_of_the_dtype_serve(cls, names, where, tmp_path, monkeypatch):
    MODEL.save_pretrained(tmp_path)
    seen = {}

    def fetch(name, **options):
        seen.update(options)
        return str(tmp_path)

    monkeypatch.setattr("ecar.hub.snapshot_download", fetch)
    hub = {} if where == "folder" else {"revision": "v1", "local_files_only": True}
    loaded = cls.from_pretrained(
        tmp_path if where == "folder" else "some/one", **dict.fromkeys(names, torch.bfloat16), **hub
    )
    assert loaded.dtype == torch.bfloat16
    assert {name: seen[name] for name in hub} == hub
    assert json.loads((tmp_path / "config.json").read_text())["width"] == MODEL.config.width


@pytest.mark.parametrize("cls", [ECAR, ECARPipeline])
@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_auto_is_the_recommended_dtype(cls, name, tmp_path, monkeypatch):
    MODEL.save_pretrained(tmp_path)
    for reason, chosen in ((None, torch.bfloat16), ("it widens it", torch.float32)):
        monkeypatch.setattr("ecar.hub.why_not_bfloat16", lambda reason=reason: reason)
        assert recommended_dtype() == chosen
        assert recommended_dtype("cuda") == torch.float32
        assert cls.from_pretrained(tmp_path, **{name: "auto"}).dtype == chosen
