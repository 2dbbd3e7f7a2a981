"""Codecs between pictures and latents: the identity, and diffusers' AutoencoderKL.

Pictures are [B, C, H, W] in [-1, 1]. A codec's ``kind`` is its name in a checkpoint's
pipeline.json.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ecar.files import atomic_folder, require_floats, weights_sha256

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

__all__ = ["CODECS", "AutoencoderKLCodec", "IdentityCodec", "load_codec"]

RANGE_TOLERANCE = 1e-2  # half-precision and resampling overshoot; [0, 255] is far outside


class IdentityCodec:
    """Latents are the pixels."""

    kind = "identity"
    downscale = 1

    def encode(
        self, images: Tensor, generator: torch.Generator | None = None, *, sample: bool = True
    ) -> Tensor:
        """Pictures [B, C, H, W] in [-1, 1] as they are; nothing is drawn."""
        _check_images(images, None, 1)
        return images

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, C, H, W] as they are."""
        _check_tensor("latents", latents, None)
        return latents

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> IdentityCodec:
        return self

    def describe(self) -> dict[str, Any]:
        return {"kind": self.kind}

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Nothing to write."""

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> IdentityCodec:
        return cls()

    def __repr__(self) -> str:
        return "IdentityCodec()"


class AutoencoderKLCodec:
    """Latents of a diffusers ``AutoencoderKL``, such as SDXL's (paper, section 4.1).

    latents = (z - shift_factor) * scaling_factor, both from the VAE's own configuration; where
    it holds per-channel statistics, latents = (z - latents_mean) * scaling_factor / latents_std.

    A VAE whose configuration says ``force_upcast`` is never run in float16, which overflows in
    SDXL's decoder: asked for float16, it stays in float32.

    Args:
        vae: the autoencoder; frozen and put in evaluation mode.
    """

    kind = "autoencoder_kl"

    def __init__(self, vae: AutoencoderKL) -> None:
        if not isinstance(vae, _autoencoder_class()):
            raise TypeError(
                f"argument 'vae': expected a diffusers AutoencoderKL, got {type(vae).__name__}"
            )
        self.vae = vae.eval().requires_grad_(False)
        self.downscale = 2 ** (len(vae.config.block_out_channels) - 1)
        self.to()

    @property
    def dtype(self) -> torch.dtype:
        return next(self.vae.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.vae.parameters()).device

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> AutoencoderKLCodec:
        """Move the VAE; under ``force_upcast`` float16 means float32."""
        dtype = dtype or self.dtype
        if dtype == torch.float16 and self.vae.config.force_upcast:
            dtype = torch.float32
        # Not diffusers' own `to`, which warns at every cast of modules that it may not cast.
        torch.nn.Module.to(self.vae, device=device, dtype=dtype)
        return self

    @torch.no_grad()
    def encode(
        self, images: Tensor, generator: torch.Generator | None = None, *, sample: bool = True
    ) -> Tensor:
        """Pictures [B, C, H, W] in [-1, 1] -> latents [B, c, H/f, W/f] in the pictures' dtype.

        Args:
            generator: draws the latents; None is torch's default one.
            sample: draw from the posterior; False takes its mean.

        Raises:
            TypeError, ValueError: for another shape, dtype or range, or sides that the VAE's
                factor f (``downscale``) does not divide.
        """
        _check_images(images, self.vae.config.in_channels, self.downscale)
        posterior = self.vae.encode(images.to(self.device, self.dtype)).latent_dist
        z = posterior.sample(generator) if sample else posterior.mode()
        shift, scale = self.statistics()
        return ((z - shift) * scale).to(images.dtype)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, c, h, w] -> pictures [B, C, f h, f w] around [-1, 1], in the VAE's dtype."""
        _check_tensor("latents", latents, self.vae.config.latent_channels)
        shift, scale = self.statistics()
        z = latents.to(self.device, self.dtype) / scale + shift
        return self.vae.decode(z).sample

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Shift and scale, each [1, c or 1, 1, 1]."""
        config = self.vae.config
        values = config.latents_mean, config.latents_std
        if None in values:
            values = config.shift_factor or 0.0, 1.0
        shift, deviation = (
            torch.as_tensor(value, dtype=self.dtype, device=self.device).view(1, -1, 1, 1)
            for value in values
        )
        return shift, config.scaling_factor / deviation

    def describe(self) -> dict[str, Any]:
        """What its latents depend on, as JSON: the weights' digest, shift and scale."""
        shift, scale = (statistic.flatten().tolist() for statistic in self.statistics())
        weights = weights_sha256(self.vae)
        return {"kind": self.kind, "weights": weights, "shift": shift, "scale": scale}

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the VAE as diffusers does, safetensors only; OSError naming the file."""
        with atomic_folder(folder) as scratch:
            self.vae.save_pretrained(scratch, safe_serialization=True)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> AutoencoderKLCodec:
        """Read a VAE from a folder that diffusers wrote, safetensors only.

        Raises:
            OSError: naming the folder, where it holds no VAE.
            ValueError: naming the file and the tensor, where weights are quantized.
            ImportError: where diffusers is missing.
        """
        autoencoder_class = _autoencoder_class()
        if not (Path(folder) / "config.json").is_file():
            raise FileNotFoundError(f"VAE folder {os.fspath(folder)}: holds no config.json")
        for file in sorted(Path(folder).glob("*.safetensors")):
            require_floats(file)
        try:
            vae = autoencoder_class.from_pretrained(folder, use_safetensors=True)
        except Exception as error:  # diffusers raises half a dozen classes for a bad file
            raise OSError(f"VAE folder {os.fspath(folder)}: {error}") from error
        return cls(vae)

    def __repr__(self) -> str:
        config = self.vae.config
        return (
            f"AutoencoderKLCodec(downscale={self.downscale}, "
            f"latent_channels={config.latent_channels}, scaling_factor={config.scaling_factor}, "
            f"dtype={self.dtype})"
        )


CODECS = {codec.kind: codec for codec in (IdentityCodec, AutoencoderKLCodec)}


def load_codec(kind: str, folder: str | os.PathLike[str]) -> IdentityCodec | AutoencoderKLCodec:
    """The codec named ``kind`` (a key of ``CODECS``), with its weights from ``folder``."""
    if kind not in CODECS:
        raise ValueError(f"argument 'kind': expected one of {', '.join(CODECS)}, got {kind!r}")
    return CODECS[kind].load(folder)


def _autoencoder_class() -> type[AutoencoderKL]:
    try:
        from diffusers import AutoencoderKL
    except ImportError as error:
        raise ImportError(
            "codec 'autoencoder_kl': needs diffusers (pip install ecar[vae])"
        ) from error
    return AutoencoderKL


def _check_tensor(name: str, value: Tensor, channels: int | None) -> None:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"argument {name!r}: expected a floating-point tensor, got {got}")
    if value.ndim != 4 or channels not in (None, value.shape[1]):
        expected = "C" if channels is None else channels
        raise ValueError(
            f"argument {name!r}: expected a tensor of shape [B, {expected}, h, w], got "
            f"{list(value.shape)}"
        )


def _check_images(images: Tensor, channels: int | None, factor: int) -> None:
    _check_tensor("images", images, channels)
    if images.shape[2] % factor or images.shape[3] % factor:
        raise ValueError(
            f"argument 'images': expected sides that are multiples of {factor}, got "
            f"{list(images.shape)}"
        )
    if images.numel() and not images.is_meta:
        low, high = (value.item() for value in images.aminmax())
        if not -1 - RANGE_TOLERANCE <= low <= high <= 1 + RANGE_TOLERANCE:
            raise ValueError(
                f"argument 'images': expected values in [-1, 1], got [{low:.3g}, {high:.3g}]"
            )
