"""`ecar train`: train on digits, MNIST, images in a folder or in tar files, or cached latents.

The output folder gets the checkpoint (averaged weights), train.json, log.csv, sample sheets and
the state that --resume goes on from.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
import textwrap
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ecar.checkpoint import VAE_FOLDER, write_settings
from ecar.cli.parser import UsageError, positive, seconds
from ecar.cli.runtime import chosen_data
from ecar.codec import AutoencoderKLCodec
from ecar.config import PRESETS, ECARConfig
from ecar.data import LatentDataset
from ecar.data.load import IN_FILES, dataset_sizes
from ecar.files import read_json
from ecar.images import check_output_folder
from ecar.training import TrainConfig, Trainer

EXAMPLES = """\
examples:
  ecar train --preset emoji --dataset birds/ --output runs/birds
  ecar train --preset digits --dataset digits --output runs/digits --steps 3300 \\
      --batch-size 128 --learning-rate 1e-3 --warmup-steps 200 --schedule linear
  ecar train --config runs/digits/train.json --output runs/wide --model.width 256
  ecar train --resume runs/digits
      goes on after a kill, to the same weights, bit for bit
  ecar train --preset S --dataset latents/ --vae sdxl-vae/ --output runs/s \\
      --mixed-precision bf16 --tf32 --compile
  accelerate launch --num-processes 8 -m ecar train --config runs/s.json
"""
SHORTER = {"dataset": ("--data",), "output_dir": ("--output",)}
# Of fields whose values are given in another way on the command line.
HELP = {"dataset": "digits, mnist, emoji, or a path to images or latents"}


def _dashed(name: str) -> str:
    return "--" + name.replace("_", "-")


FIELD_FLAGS = {
    field.name: _dashed(field.name)
    for field in dataclasses.fields(TrainConfig)
    if field.name != "model"
}

MODEL_FLAGS = {field.name: f"--model.{field.name}" for field in dataclasses.fields(ECARConfig)}
# Fields of the model that have a flag without "model.", too.
SIZES = ("num_classes", "channels", "patch_size", "width", "heads", "ar_layers", "flow_blocks")

# What data sets and models say of their arguments, which the configuration gives.
FLAGS = {
    **FIELD_FLAGS,
    "name": "--dataset",
    "root": "--data-root",
    "image_size": "--dataset",
    "channels": "--dataset",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", choices=tuple(PRESETS), help="sizes of the model to start from")
    parser.add_argument(
        "--config", metavar="FILE", help="a train.json to start from; flags take its fields' place"
    )
    parser.add_argument("--resume", metavar="DIR", help="go on with the training in this folder")
    parser.add_argument(
        "--vae", metavar="DIR", help="the AutoencoderKL that encoded the latents, to decode sheets"
    )
    parser.add_argument(
        "--seconds", type=seconds, metavar="N", help="save and end after so long, to be resumed"
    )
    parser.add_argument(
        "--no-progress", action="store_true", help="say nothing of what is trained and how far"
    )
    group = parser.add_argument_group(
        "model (with --preset, classes, channels and size are by default those of the data)"
    )
    group.add_argument(
        "--image-size",
        type=positive,
        metavar="N",
        help="side of the last stage; each before it has half the side",
    )
    add_fields(group, ECARConfig, MODEL_FLAGS, {name: (_dashed(name),) for name in SIZES})
    group = parser.add_argument_group("training")
    add_fields(group, TrainConfig, FIELD_FLAGS, SHORTER)


def add_fields(
    group: Any, kind: type, flags: dict[str, str], others: Mapping[str, tuple[str, ...]]
) -> None:
    """A flag for each field of a configuration, with its other names; absent where not given."""
    hints, texts = typing.get_type_hints(kind), field_texts(kind) | HELP
    for field in dataclasses.fields(kind):
        if field.name not in flags:
            continue
        text = texts[field.name]
        if kind is TrainConfig and field.default is not dataclasses.MISSING:
            text += f" (default: {_written(field.default)})"
        dest = field.name if kind is TrainConfig else f"model.{field.name}"
        options: dict[str, Any] = {"dest": dest, "default": argparse.SUPPRESS, "help": text}
        if hints[field.name] is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options["type"] = _reader(hints[field.name])
            word = field.name.split("_")[-1].upper()
            options["metavar"] = {int: "N", float: "X"}.get(hints[field.name], word)
        group.add_argument(*others.get(field.name, ()), flags[field.name], **options)


def run(arguments: argparse.Namespace) -> int:
    """Returns: the exit code, 128 + the signal's number where SIGINT or SIGTERM ended it."""
    given = {name: value for name, value in vars(arguments).items() if name in FIELD_FLAGS}
    if "dataset" in given:
        given["dataset"], root = chosen_data(given["dataset"], given.get("data_root"))
        if root is not None:
            given["data_root"] = root
    vae = arguments.vae
    if vae is None and arguments.resume is not None:
        kept = Path(arguments.resume) / VAE_FOLDER
        vae = kept if kept.is_dir() else None
    codec = None if vae is None else AutoencoderKLCodec.load(vae)
    options: dict[str, Any] = {
        "decode": codec and codec.decode,
        "progress": not arguments.no_progress,
    }
    if arguments.resume is not None:
        others = {name: _dashed(name) for name in ("config", "preset", "image_size")}
        others |= {flag.removeprefix("--"): flag for flag in MODEL_FLAGS.values()}
        for name, flag in others.items():
            if getattr(arguments, name, None) is not None:
                raise UsageError(f"--resume: {flag} does not go with it")
        if "output_dir" in given:
            raise UsageError("--resume: names the folder; --output-dir does not go with it")
        trainer = Trainer.resume(arguments.resume, **options, **given)
    else:
        config = new_config(arguments, given)
        check_output_folder(config.output_dir)
        trainer = Trainer(config, **options)
    if codec is not None:
        latents = trainer.batches.dataset
        if isinstance(latents, LatentDataset) and latents.codec != codec.describe():
            raise UsageError(
                f"--vae: {vae} is not what encoded the latents in {trainer.config.data_root}"
            )
        codec.to(trainer.device)
    if trainer.accelerator.is_main_process:
        trainer.output.mkdir(parents=True, exist_ok=True)
        names = getattr(trainer.batches.dataset, "class_names", None)
        defaults = {"guidance_scale": float(trainer.config.sample_guidance)}
        write_settings(trainer.output, codec, names and list(names), defaults)
    result = trainer.run(arguments.seconds)
    if trainer.accelerator.is_main_process:
        losses = ", ".join(f"{loss:.4f}" for loss in result.losses)
        print(result.output_dir)
        print(f"{result.step} steps in {result.seconds:.3g} s; loss of each stage: {losses}")
    if result.step < trainer.config.steps and trainer.accelerator.is_main_process:
        cause = "--seconds" if result.stopped_by is None else result.stopped_by.name
        print(
            f"ecar: stopped by {cause} and saved at step {result.step} of "
            f"{trainer.config.steps}; go on with: ecar train --resume {result.output_dir}",
            file=sys.stderr,
        )
    return 0 if result.stopped_by is None else 128 + result.stopped_by


def new_config(arguments: argparse.Namespace, given: dict[str, Any]) -> TrainConfig:
    """The file's fields, then the preset's model, then the flags."""
    file: dict[str, Any] = {}
    if arguments.config is not None:
        file = read_json(arguments.config)
        if not isinstance(file, dict):
            raise UsageError(f"--config: {arguments.config} holds no object of fields")
    values = {**file, **given}
    if arguments.preset is not None:
        values["model"] = ECARConfig.preset(arguments.preset).to_dict()
        if values.get("dataset") in IN_FILES and values.get("data_root"):
            sizes = dataset_sizes(values["dataset"], values["data_root"])
            values["model"] = resized(values["model"], sizes)
    chosen = {name: getattr(arguments, f"model.{name}", None) for name in MODEL_FLAGS}
    sizes = {name: value for name, value in chosen.items() if value is not None}
    if isinstance(values.get("model"), dict):
        if arguments.image_size is not None:
            sizes["image_size"] = arguments.image_size
        values["model"] = resized(values["model"], sizes)
    if "model" not in values:
        raise UsageError("--preset: is needed for a new training, or a --config that has a model")
    if "output_dir" not in values:
        raise UsageError("--output: is needed for a new training")
    try:
        return TrainConfig.from_dict(values)
    except (TypeError, ValueError) as error:
        message = str(error)
        found = re.match(r"(argument|config|training config) '(\w+)", message)
        kind, name = found.groups() if found else ("", "")
        if kind == "config" and sizes:
            message = re.sub(r"^config '(\w+)'", r"--model.\1", message)
        elif arguments.config is not None and (kind != "argument" or name in file.keys() - given):
            message = f"--config: {arguments.config}: {message.removeprefix('argument ')}"
        raise UsageError(message) from None


def resized(model: dict[str, Any], sizes: dict[str, int]) -> dict[str, Any]:
    """The fields of an ECARConfig with others in their place; "image_size" sets "stage_sides".

    Raises:
        UsageError: the side is not that of as many stages, each twice the one before.
    """
    sizes, model = dict(sizes), dict(model)
    side = sizes.pop("image_size", None)
    if side is not None:
        stages = len(model.get("stage_sides", ECARConfig.stage_sides))
        if side % 2 ** (stages - 1):
            raise UsageError(
                f"--image-size: expected a multiple of {2 ** (stages - 1)} for {stages} stages, "
                f"got {side}"
            )
        model["stage_sides"] = [side >> (stages - 1 - stage) for stage in range(stages)]
    return {**model, **sizes}


def field_texts(kind: type) -> dict[str, str]:
    """The first clause of what a configuration's docstring says of each field."""
    section = textwrap.dedent(re.split(r"\n\s*(?:Args|Raises):\n", kind.__doc__ or "")[1])
    texts = {}
    for entry in re.split(r"\n(?=\S)", section.strip("\n")):
        names, _, text = entry.partition(":")
        text = " ".join(text.split()).replace("%", "%%").replace("`", "")
        text = re.split(r"[.;:](?: |$)", text)[0]
        texts.update({name.strip(): text for name in names.split(",")})
    return texts


def _reader(hint: Any) -> Any:
    """The function that reads a value of this type; of a union, the first member that can."""
    choices = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    # A string can be anything, so that it is tried last.
    members = sorted(choices, key=lambda member: member is str)
    wanted = " or ".join(_type_name(member) for member in members)

    def read(text: str) -> Any:
        for member in members:
            try:
                return _read(text, member)
            except ValueError:
                continue
        raise argparse.ArgumentTypeError(f"expected {wanted}, got {text!r}")

    return read


def _read(text: str, kind: Any) -> Any:
    if kind is types.NoneType:
        if text.lower() != "none":
            raise ValueError
        return None
    if typing.get_origin(kind) is tuple:
        return tuple(typing.get_args(kind)[0](part) for part in text.split(","))
    return kind(text)


def _type_name(kind: Any) -> str:
    if typing.get_origin(kind) is tuple:
        return "numbers with commas between"
    return {int: "a whole number", float: "a number", str: "a text"}.get(kind, "none")


def _written(value: Any) -> str:
    """A default as it would be typed."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (tuple, list)):
        return ",".join(map(str, value))
    return "none" if value is None else str(value)
