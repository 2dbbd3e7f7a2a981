"""Codecs: the identity, and a small random AutoencoderKL saved and loaded by the test."""

import sys

import pytest
import torch
from diffusers import AutoencoderKL

from ecar.codec import CODECS, AutoencoderKLCodec, IdentityCodec, load_codec

CHANNELS, FACTOR = 4, 2


def make_vae(**changes):
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        latent_channels=CHANNELS,
        norm_num_groups=4,
        sample_size=16,
        **{"scaling_factor": 0.13025, **changes},
    ).eval()


def pictures(*shape):
    return torch.rand(shape or (2, 3, 16, 16)) * 2 - 1


def test_saved_vae_is_loaded_with_its_own_scaling_factor(tmp_path):
    vae = make_vae(scaling_factor=0.37)
    vae.save_pretrained(tmp_path / "vae", safe_serialization=True)
    codec = load_codec("autoencoder_kl", tmp_path / "vae")
    images = pictures()
    with torch.no_grad():
        mean = vae.encode(images).latent_dist.mode()
    latents = codec.encode(images, sample=False)
    assert latents.shape == (2, CHANNELS, 8, 8)
    assert codec.downscale == FACTOR
    torch.testing.assert_close(latents, mean * 0.37)
    with torch.no_grad():
        expected = vae.decode(mean).sample
    torch.testing.assert_close(codec.decode(latents), expected)


def test_shift_factor_is_honoured():
    vae = make_vae(shift_factor=0.116)
    images = pictures()
    mean = vae.encode(images).latent_dist.mode().detach()
    codec = AutoencoderKLCodec(vae)
    latents = codec.encode(images, sample=False)
    torch.testing.assert_close(latents, (mean - 0.116) * 0.13025)
    torch.testing.assert_close(codec.decode(latents), vae.decode(mean).sample)


def test_channel_statistics_are_honoured():
    shift, deviation = torch.randn(CHANNELS), torch.rand(CHANNELS) + 0.5
    vae = make_vae(latents_mean=shift.tolist(), latents_std=deviation.tolist())
    images = pictures()
    mean = vae.encode(images).latent_dist.mode().detach()
    codec = AutoencoderKLCodec(vae)
    latents = codec.encode(images, sample=False)
    expected = (mean - shift.view(1, -1, 1, 1)) / deviation.view(1, -1, 1, 1) * 0.13025
    torch.testing.assert_close(latents, expected)
    torch.testing.assert_close(codec.decode(latents), vae.decode(mean).sample)


def test_encode_draws_from_the_posterior_with_the_generator():
    codec = AutoencoderKLCodec(make_vae())
    images = pictures()
    seed = int(torch.randint(2**31, ()))
    first = codec.encode(images, torch.Generator().manual_seed(seed))
    again = codec.encode(images, torch.Generator().manual_seed(seed))
    other = codec.encode(images, torch.Generator().manual_seed(seed + 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    noise = torch.randn(first.shape, generator=torch.Generator().manual_seed(seed))
    posterior = codec.vae.encode(images).latent_dist
    torch.testing.assert_close(first, (posterior.mean + posterior.std * noise) * 0.13025)


@pytest.mark.parametrize(
    ("force_upcast", "asked", "used"),
    [
        (True, torch.float16, torch.float32),
        (True, torch.bfloat16, torch.bfloat16),
        (False, torch.float16, torch.float16),
    ],
)
def test_force_upcast_is_never_float16(force_upcast, asked, used):
    vae = make_vae(force_upcast=force_upcast)
    weight = vae.decoder.conv_in.weight.detach().clone()
    codec = AutoencoderKLCodec(vae).to(dtype=asked)
    assert codec.dtype == used
    if used == torch.float32:
        # The weights never took the detour through float16.
        assert torch.equal(codec.vae.decoder.conv_in.weight, weight)
        latents = torch.randn(1, CHANNELS, 4, 4).half()
        assert codec.decode(latents).dtype == torch.float32
        assert codec.encode(pictures().half()).dtype == torch.float16


def test_a_vae_already_in_float16_is_raised_to_float32():
    assert AutoencoderKLCodec(make_vae(force_upcast=True).half()).dtype == torch.float32


def test_vae_is_frozen_and_in_evaluation_mode():
    codec = AutoencoderKLCodec(make_vae().train())
    assert not codec.vae.training
    assert not codec.decode(torch.randn(1, CHANNELS, 4, 4)).requires_grad


def test_save_and_load_round_trip(tmp_path):
    codec = AutoencoderKLCodec(make_vae(shift_factor=0.05))
    codec.save(tmp_path / "vae")
    assert not list(tmp_path.rglob("*.bin"))
    loaded = AutoencoderKLCodec.load(tmp_path / "vae")
    latents = torch.randn(2, CHANNELS, 4, 4)
    assert torch.equal(loaded.decode(latents), codec.decode(latents))
    assert "scaling_factor=0.13025" in repr(loaded)


def test_cut_short_vae_is_refused_by_name(tmp_path):
    AutoencoderKLCodec(make_vae()).save(tmp_path)
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(OSError, match=str(tmp_path)):
        AutoencoderKLCodec.load(tmp_path)


def test_missing_vae_folder_is_refused_by_name(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        AutoencoderKLCodec.load(tmp_path / "nowhere")


def test_missing_diffusers_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ImportError, match=r"pip install ecar\[vae\]"):
        load_codec("autoencoder_kl", tmp_path)


def test_identity_returns_what_it_was_given(tmp_path):
    codec = load_codec("identity", tmp_path)
    images = pictures(2, 1, 5, 7)
    assert codec.encode(images) is images
    assert codec.decode(images) is images
    assert codec.to("cpu", torch.float16) is codec
    assert CODECS[codec.kind] is IdentityCodec


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: IdentityCodec().encode(torch.zeros(3, 8, 8)), ValueError, r"\[3, 8, 8\]"),
        (
            lambda: IdentityCodec().encode(torch.zeros(1, 1, 8, 8, dtype=torch.uint8)),
            TypeError,
            "'images'.*uint8",
        ),
        (
            lambda: IdentityCodec().encode(torch.full((1, 1, 8, 8), 255.0)),
            ValueError,
            r"'images'.*\[255, 255\]",
        ),
        (lambda: IdentityCodec().encode(torch.full((1, 1, 8, 8), torch.nan)), ValueError, "nan"),
        (lambda: IdentityCodec().decode([1]), TypeError, "'latents'.*list"),
        (
            lambda: AutoencoderKLCodec(make_vae()).encode(pictures(1, 3, 15, 16)),
            ValueError,
            "multiples of 2",
        ),
        (
            lambda: AutoencoderKLCodec(make_vae()).encode(pictures(1, 1, 16, 16)),
            ValueError,
            r"\[B, 3, h, w\].*\[1, 1, 16, 16\]",
        ),
        (
            lambda: AutoencoderKLCodec(make_vae()).decode(torch.zeros(1, 3, 4, 4)),
            ValueError,
            r"'latents'.*\[B, 4, h, w\]",
        ),
        (lambda: AutoencoderKLCodec(torch.nn.Identity()), TypeError, "'vae'.*Identity"),
        (lambda: load_codec("jpeg", "."), ValueError, "'kind'.*identity.*'jpeg'"),
    ],
)
def test_bad_input_is_named(make, error, message):
    with pytest.raises(error, match=message):
        make()
