"""`ecar info`: tokens, parameters, multiply-adds and backends of a preset or a checkpoint.

Parameters and multiply-adds are counted from the modules: the sampler runs on shapes alone, and
torch's FlopCounterMode counts its matrix products and attention. Units are powers of 1000. An
image is counted as the checkpoint or the options say, and by the paper's protocol of 250 steps.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch

from ecar.checkpoint import BUILT_IN_DEFAULTS, checkpoint_config, merge_settings
from ecar.cli.parser import add_device, add_sampling
from ecar.cli.runtime import chosen_backend, chosen_device, chosen_settings
from ecar.config import PRESETS, ECARConfig
from ecar.files import read_json
from ecar.info import (
    StageCost,
    backends_in_use,
    count_multiply_adds,
    count_parameters,
    count_training_multiply_adds,
)
from ecar.sampling.guidance import PAPER

EXAMPLES = """\
examples:
  ecar info --preset S
      E-CAR-S of the paper
  ecar info --checkpoint checkpoints/mnist --steps 10,20,30 --json
  ecar info --config runs/birds/train.json
"""
FLAGS = {
    "steps": "--steps",
    "num_inference_steps": "--steps",
    "guidance_scale": "--guidance",
    "guidance_interval": "--guidance-interval",
    "solver": "--solver",
    "grid": "--grid",
}
PARTS = {"ar": "AR", "modulation": "modulation", "flow": "steps"}
STEPS = "num_inference_steps"
SHOWN_GUIDANCE = 2.0  # any scale but 1 costs the same


def add_arguments(parser: argparse.ArgumentParser) -> None:
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--preset", choices=tuple(PRESETS), help="sizes of a model")
    which.add_argument(
        "--checkpoint", metavar="DIR|OWNER/NAME", help="only its configuration is read"
    )
    which.add_argument(
        "--config", metavar="FILE", help="a training's train.json, or a model's config.json"
    )
    add_sampling(parser)
    add_device(parser)
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")


def run(arguments: argparse.Namespace) -> None:
    if arguments.preset is not None:
        config, settings = ECARConfig.preset(arguments.preset), BUILT_IN_DEFAULTS
        name = f"preset {arguments.preset}"
    elif arguments.config is not None:
        config, settings = read_config(arguments.config), BUILT_IN_DEFAULTS
        name = arguments.config
    else:
        config, settings = checkpoint_config(arguments.checkpoint)
        name = str(arguments.checkpoint)
    settings = merge_settings(settings, chosen_settings(arguments), config.num_stages)
    with chosen_backend(arguments.backend):
        backends = backends_in_use(config, chosen_device(arguments.device), torch.float32)
    report = make_report(name, config, settings, backends)
    print(json.dumps(report, indent=2) if arguments.json else describe(report))


def read_config(path: str) -> ECARConfig:
    """The model's configuration in a train.json or a config.json.

    Raises:
        OSError, ValueError: naming the file.
    """
    values = read_json(path)
    if isinstance(values, dict) and "model" in values:
        values = values["model"]
    try:
        return ECARConfig.from_dict(values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None


def make_report(
    name: str, config: ECARConfig, settings: dict[str, Any], backends: dict[str, str]
) -> dict[str, Any]:
    """All figures, as JSON can hold them."""
    parameters = count_parameters(config)
    guidance = {key: value for key, value in settings.items() if key.startswith("guidance_")}
    papers = merge_settings({**BUILT_IN_DEFAULTS, **guidance}, {STEPS: PAPER}, config.num_stages)
    return {
        "name": name,
        "config": config.to_dict(),
        "parameters": parameters,
        **_image(config, settings),
        "paper": _image(config, papers),
        "training_multiply_adds": count_training_multiply_adds(config),
        "backends": backends,
    }


def _image(config: ECARConfig, settings: dict[str, Any]) -> dict[str, Any]:
    """One image's steps and multiply-adds."""
    settings = dict(settings)
    steps, scale = (settings.pop(key) for key in (STEPS, "guidance_scale"))
    plain = count_multiply_adds(config, steps=steps, **settings)
    guided = count_multiply_adds(
        config, steps=steps, guidance_scale=SHOWN_GUIDANCE if scale == 1 else scale, **settings
    )
    return {
        "sampling": {"steps": [stage.steps for stage in plain], **settings},
        "multiply_adds_per_image": {
            "without_guidance": _costs(plain),
            "with_guidance": _costs(guided),
        },
    }


def _costs(stages: list[StageCost]) -> dict[str, Any]:
    rows = [
        {
            "stage": stage.stage,
            "side": stage.side,
            "tokens": stage.tokens,
            "steps": stage.steps,
            **{part: getattr(stage, part) for part in PARTS},
            "total": stage.total,
        }
        for stage in stages
    ]
    total = sum(stage.total for stage in stages)
    shares = {part: sum(row[part] for row in rows) / total for part in PARTS}
    return {"stages": rows, "total": total, "shares": shares}


def describe(report: dict[str, Any]) -> str:
    """The report as tables."""
    config = report["config"]
    lines = [
        f"{report['name']}: width {config['width']}, {config['heads']} heads, "
        f"{config['ar_layers']} AR layers, {config['flow_blocks']} flow blocks a stage, "
        f"{config['channels']} channels, patch {config['patch_size']}, "
        f"{config['num_classes']} classes",
        "",
        f"{'parameters':<16}{'':>10}",
    ]
    lines += [
        f"  {part.replace('_', ' '):<16}{_short(count):>10}"
        for part, count in report["parameters"].items()
    ]
    plain, guided = report["multiply_adds_per_image"].values()
    sampling = report["sampling"]
    columns = ("stage", "side", "tokens", "steps", "AR", "modulation", "flow", "unguided", "guided")
    lines += [
        "",
        f"multiply-adds of one image, {_protocol(sampling)}",
        "".join(
            f"{column:>12}" if index > 3 else f"{column:>8}" for index, column in enumerate(columns)
        ),
    ]
    for row, with_guidance in zip(plain["stages"], guided["stages"], strict=True):
        lines.append(
            "".join(f"{row[key]:>8}" for key in ("stage", "side", "tokens", "steps"))
            + "".join(f"{_short(row[key]):>12}" for key in ("ar", "modulation", "flow", "total"))
            + f"{_short(with_guidance['total']):>12}"
        )
    tokens, steps = (sum(row[key] for row in plain["stages"]) for key in ("tokens", "steps"))
    lines.append(
        f"{'all':>8}{'':>8}{tokens:>8}{steps:>8}{'':>36}{_short(plain['total']):>12}"
        f"{_short(guided['total']):>12}"
    )
    lines += ["", "multiply-adds of one image without guidance, by part"]
    shown = {_protocol(image["sampling"]): image for image in (report, report["paper"])}
    width = max(map(len, shown))
    for protocol, image in shown.items():
        costs = image["multiply_adds_per_image"]["without_guidance"]
        parts = ", ".join(f"{PARTS[part]} {share:.1%}" for part, share in costs["shares"].items())
        lines.append(f"  {protocol:<{width}}{_short(costs['total']):>10}: {parts}")
    training = _short(report["training_multiply_adds"])
    lines += ["", f"multiply-adds of one training image, forward and backward: {training}"]
    lines += ["", "backends"]
    lines += [f"  {op:<24}{backend}" for op, backend in report["backends"].items()]
    return "\n".join(lines)


def _protocol(sampling: dict[str, Any]) -> str:
    """ "13 + 10 + 7 steps of ab2, grid 1.6"."""
    grid = sampling["grid"]
    placed = f"grid {grid:g}" if isinstance(grid, (int, float)) else "a grid of its own"
    return f"{' + '.join(map(str, sampling['steps']))} steps of {sampling['solver']}, {placed}"


def _short(count: int) -> str:
    """1234567 -> "1.23 M"."""
    value = float(count)
    for unit in ("", " k", " M", " G"):
        if value < 999.5:
            return f"{value:.0f}" if not unit else f"{value:.{2 if value < 100 else 1}f}{unit}"
        value /= 1000
    return f"{value:.2f} T"
