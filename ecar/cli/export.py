"""`ecar export`: write a checkpoint's networks for other runtimes: torch.export, ONNX, AOTInductor.

Two programs for each stage, of plain PyTorch ops, for any number of images, and export.json with
the steps and all else that a loop around them needs. Each is loaded again, and compared with the
model.
"""

from __future__ import annotations

import argparse

from ecar.cli.parser import add_checkpoint, add_device, add_sampling
from ecar.cli.runtime import chosen_device, chosen_settings
from ecar.export import FORMATS, export
from ecar.files import check_output_folder
from ecar.pipeline import ECARPipeline

EXAMPLES = """\
examples:
  ecar export --checkpoint checkpoints/digits --format onnx --output digits-onnx
      for ONNX Runtime, OpenVINO, TensorRT ..; needs pip install 'ecar[onnx]'
  ecar export --checkpoint runs/birds --format aoti --device cuda --steps 20 --output birds-aoti
      compiled for this GPU, to run without Python
"""
FLAGS = {
    "format": "--format",
    "pipe": "--checkpoint",
    "num_inference_steps": "--steps",
    "guidance_scale": "--guidance",
    "guidance_schedule": "--guidance-schedule",
    "guidance_interval": "--guidance-interval",
    "solver": "--solver",
    "grid": "--grid",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_checkpoint(parser)
    parser.add_argument(
        "--format",
        choices=FORMATS,
        required=True,
        help="torch: programs of torch.export.load; onnx; aoti: compiled by AOTInductor",
    )
    parser.add_argument("--output", required=True, metavar="FOLDER", help="made if needed")
    add_sampling(parser)
    add_device(parser, backends=False)


def run(arguments: argparse.Namespace) -> None:
    output = check_output_folder(arguments.output)
    pipe = ECARPipeline.from_pretrained(arguments.checkpoint)
    pipe.to(chosen_device(arguments.device))
    for path in export(pipe, output, format=arguments.format, **chosen_settings(arguments)):
        print(path)
