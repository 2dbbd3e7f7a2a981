"""A checkpoint's folder: where it is, and what it holds beside the model.

config.json, model.safetensors   the model
pipeline.json                    codec, class names, default settings; may be missing
vae/                             diffusers' AutoencoderKL, where that is the codec
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub.constants import CONFIG_NAME, SAFETENSORS_SINGLE_FILE

from ecar.codec import CODECS, AutoencoderKLCodec, IdentityCodec
from ecar.config import ECARConfig
from ecar.files import read_json, write_json
from ecar.hub import checkpoint_folder
from ecar.sampling.guidance import (
    DEFAULT_GRID,
    DEFAULT_SOLVER,
    DEFAULT_STEPS,
    Guidance,
    is_paper,
    plan_steps,
)

__all__ = [
    "BUILT_IN_DEFAULTS",
    "CHECKPOINT_FILES",
    "PIPELINE_FILE",
    "VAE_FOLDER",
    "checkpoint_config",
    "complete_settings",
    "merge_settings",
    "read_settings",
    "write_settings",
]

PIPELINE_FILE = "pipeline.json"
VAE_FOLDER = "vae"
CHECKPOINT_FILES = (
    CONFIG_NAME,
    SAFETENSORS_SINGLE_FILE,
    PIPELINE_FILE,
    f"{VAE_FOLDER}/{CONFIG_NAME}",
    f"{VAE_FOLDER}/*.safetensors",
)
BUILT_IN_DEFAULTS = {
    "num_inference_steps": DEFAULT_STEPS,
    "guidance_scale": 1.0,
    "guidance_schedule": "constant",
    "guidance_interval": (0.0, 1.0),
    "solver": DEFAULT_SOLVER,
    "grid": DEFAULT_GRID,
}


def checkpoint_config(name: str | os.PathLike[str]) -> tuple[ECARConfig, dict[str, Any]]:
    """The configuration of a checkpoint and the defaults of its pipeline, without its weights.

    Raises:
        OSError, ValueError: as ``ECARPipeline.from_pretrained``.
    """
    folder = checkpoint_folder(name, files=(CONFIG_NAME, PIPELINE_FILE))
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {os.fspath(name)!r}: no file {CONFIG_NAME}")
    config = ECARConfig.from_json(path)
    defaults = read_settings(folder).get("defaults") or {}
    try:
        return config, complete_settings(defaults, config.num_stages)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder / PIPELINE_FILE}: {error}") from None


def complete_settings(defaults: dict[str, Any], num_stages: int) -> dict[str, Any]:
    """The pipeline's defaults over the built-in ones, validated."""
    if not isinstance(defaults, dict):
        raise TypeError(f"argument 'defaults': expected settings by name, got {defaults!r}")
    unknown = sorted(defaults.keys() - BUILT_IN_DEFAULTS.keys())
    if unknown:
        raise ValueError(
            f"argument 'defaults': expected settings out of {', '.join(BUILT_IN_DEFAULTS)}, got "
            f"{unknown[0]!r}"
        )
    try:
        return merge_settings(BUILT_IN_DEFAULTS, defaults, num_stages)
    except (TypeError, ValueError) as error:
        raise type(error)(f"argument 'defaults': {error}") from None


def merge_settings(
    defaults: dict[str, Any], given: dict[str, Any], num_stages: int
) -> dict[str, Any]:
    """``given`` over the complete ``defaults``, by the pipeline's names; validated as the sampler
    does.

    The solver and the grid belong to the paper's protocol: where ``num_inference_steps`` becomes
    "paper", or is no longer, those of ``defaults`` are not taken over.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    settings = {**defaults, **given}
    steps = settings["num_inference_steps"]
    if is_paper(steps) != is_paper(defaults["num_inference_steps"]):
        settings |= {name: given.get(name) for name in ("solver", "grid")}
    plan = plan_steps(
        steps, settings["solver"], settings["grid"], num_stages, name="num_inference_steps"
    )
    Guidance(*(settings[f"guidance_{name}"] for name in ("scale", "schedule", "interval")))
    settings["solver"] = plan.solver
    if settings["grid"] is None:
        settings["grid"] = plan.grid
    return settings


def write_settings(
    folder: str | os.PathLike[str],
    codec: IdentityCodec | AutoencoderKLCodec | None,
    class_names: Sequence[str] | None,
    defaults: dict[str, Any],
) -> None:
    """Write what a checkpoint's folder holds beside the model: pipeline.json, and vae/ if any."""
    codec = IdentityCodec() if codec is None else codec
    if codec.kind != IdentityCodec.kind:
        codec.save(Path(folder) / VAE_FOLDER)
    settings = {"codec": codec.kind, "class_names": class_names, "defaults": defaults}
    write_json(Path(folder) / PIPELINE_FILE, settings)


def read_settings(folder: Path) -> dict[str, Any]:
    """What pipeline.json holds, or nothing where there is none."""
    path = folder / PIPELINE_FILE
    if not path.exists():
        return {}
    settings = read_json(path)
    if not isinstance(settings, dict) or settings.keys() - {"codec", "class_names", "defaults"}:
        raise ValueError(f"{path}: expected an object with codec, class_names and defaults")
    if settings.get("codec", IdentityCodec.kind) not in CODECS:
        raise ValueError(
            f"{path}: expected a codec out of {', '.join(CODECS)}, got {settings['codec']!r}"
        )
    return settings
