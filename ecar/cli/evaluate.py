"""`ecar evaluate`: measure a checkpoint's samples against a data set.

Fréchet distance, Inception Score, precision and recall, and the share of images that are read as
their class; the report holds the protocol with every number. Without --classifier and --inception
they are measured in the features of the project's own classifier of the data set. Only figures of
--inception compare to published ones. --neighbours tells whether anything is memorised.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ecar.cli.parser import (
    UsageError,
    add_checkpoint,
    add_device,
    add_dtype,
    add_sampling,
    positive,
)
from ecar.cli.runtime import (
    chosen_backend,
    chosen_data,
    chosen_device,
    chosen_dtype,
    chosen_settings,
)
from ecar.evaluation import Classifier, InceptionExtractor, evaluate, summary
from ecar.evaluation.provenance import describe_device
from ecar.files import read_json
from ecar.hub import checkpoint_folder

EXAMPLES = """\
examples:
  ecar evaluate --checkpoint checkpoints/mnist --dataset mnist --output evaluation.json
  ecar evaluate --checkpoint runs/birds --dataset folder --data-root birds/ --samples 50000 \\
      --inception weights-inception-2015-12-05-6726825d.pth --npz samples.npz
  ecar evaluate --checkpoint runs/birds --dataset folder --data-root birds/ --classifier train \
      --save-classifier birds.safetensors --neighbours memorised.png
  ecar evaluate --checkpoint runs/birds --npz samples.npz
      draws, and measures nothing if there is nothing to measure in or to compare with
"""
FLAGS = {
    "dataset": "--dataset",
    "name": "--dataset",
    "root": "--data-root",
    "image_size": "--dataset",
    "channels": "--dataset",
    "num_images": "--samples",
    "first_seed": "--seed",
    "report": "--output",
    "samples": "--npz",
    "classifier": "--save-classifier",
    "neighbours": "--neighbours",
    "extractor": "--classifier",
    "test": "--dataset",
    "train": "--dataset",
    "skip_broken": "--skip-broken",
    "background": "--background",
    "num_inference_steps": "--steps",
    "guidance_scale": "--guidance",
    "guidance_interval": "--guidance-interval",
    "solver": "--solver",
    "grid": "--grid",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_checkpoint(parser)
    parser.add_argument(
        "--dataset",
        metavar="NAME|PATH",
        help="digits, mnist, emoji, or a path to images (default: the training's)",
    )
    parser.add_argument("--data-root", metavar="PATH", help="where it lies, if --dataset is a name")
    parser.add_argument(
        "--skip-broken",
        action="store_true",
        help="go on without files that are no images, and say how many",
    )
    parser.add_argument(
        "--background",
        metavar="COLOUR",
        help="colour under transparent images (default: as in training, else white)",
    )
    parser.add_argument(
        "--samples",
        type=positive,
        default=5000,
        metavar="N",
        help="images to draw, of classes as frequent as in training (default: 5000)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="of the first image; image i has seed N + i (default: 0)",
    )
    parser.add_argument(
        "--batch-size",
        type=positive,
        default=100,
        metavar="N",
        help="images drawn at once (default: 100)",
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--classifier",
        metavar="FILE|train",
        help="measure in its features, or in those of one trained first (default: ours)",
    )
    which.add_argument(
        "--inception",
        metavar="FILE",
        help="measure in Inception's features: torch-fidelity's weights",
    )
    parser.add_argument(
        "--save-classifier", metavar="FILE", help="write what --classifier train trained"
    )
    parser.add_argument(
        "--neighbours",
        metavar="FILE",
        help="write samples, below each the nearest training picture",
    )
    parser.add_argument("--output", metavar="FILE", help="write the report as JSON")
    parser.add_argument(
        "--npz", metavar="FILE", help="write the samples in the format of ADM's evaluator"
    )
    add_sampling(parser)
    add_device(parser)
    add_dtype(parser, "float32")
    parser.add_argument("--no-progress", action="store_true", help="show no progress bar")


def run(arguments: argparse.Namespace) -> None:
    dataset, root, background = chosen_dataset(arguments)
    device = chosen_device(arguments.device)
    extractor: Any = None
    if arguments.inception is not None:
        extractor = InceptionExtractor(arguments.inception)
    elif arguments.classifier is not None:
        train = arguments.classifier == "train"
        extractor = "train" if train else Classifier.load(arguments.classifier)
    if arguments.save_classifier is not None and extractor != "train":
        raise UsageError("--save-classifier: goes with --classifier train")
    with chosen_backend(arguments.backend):
        report = evaluate(
            arguments.checkpoint,
            dataset,
            root=root,
            num_images=arguments.samples,
            first_seed=arguments.seed,
            batch_size=arguments.batch_size,
            extractor=extractor,
            device=device,
            dtype=chosen_dtype(arguments.dtype, device),
            report=arguments.output,
            samples=arguments.npz,
            classifier=arguments.save_classifier,
            neighbours=arguments.neighbours,
            skip_broken=arguments.skip_broken,
            background=background,
            progress=not arguments.no_progress,
            **chosen_settings(arguments),
        )
    print(summary(report))
    print(f"drawn on {describe_device(device)}")
    outputs = (arguments.output, arguments.npz, arguments.neighbours, arguments.save_classifier)
    for path in outputs:
        if path is not None:
            print(path)


def chosen_dataset(arguments: argparse.Namespace) -> tuple[str | None, str | None, str]:
    """The data set given, or the one that the checkpoint was trained on; where it lies; what
    transparent images lie on, which is as in training if nothing else is said. For --npz alone
    there need be none."""
    name, root, background = arguments.dataset, arguments.data_root, arguments.background
    if name is not None:
        name, root = chosen_data(name, root)
    # Without --dataset or with a folder of images, the training's settings are looked at.
    if name in (None, "folder") and None in (name, background):
        measures = (arguments.classifier, arguments.inception, arguments.output)
        alone = arguments.npz is not None and {*measures, arguments.neighbours} == {None}
        path = _trained_settings(arguments, needed=name is None and not alone)
        trained = {} if path is None else read_json(path)
        if name is None:
            if isinstance(trained, dict) and "dataset" in trained:
                name, root = trained["dataset"], root or trained.get("data_root")
            elif not alone:
                raise UsageError(f"--dataset: is needed, {path} names none")
        if background is None and isinstance(trained, dict):
            background = trained.get("background")
    return name, root, background or "white"


def _trained_settings(arguments: argparse.Namespace, *, needed: bool) -> Path | None:
    """The checkpoint's train.json; None where there is none and it is not needed."""
    path = checkpoint_folder(arguments.checkpoint, files=("train.json",)) / "train.json"
    if path.is_file():
        return path
    if needed:
        raise UsageError(f"--dataset: is needed, {arguments.checkpoint!r} holds no train.json")
    return None
