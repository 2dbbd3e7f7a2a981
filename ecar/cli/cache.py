"""`ecar cache`: encode a data set's images by a VAE, once, for `ecar train --dataset latents`.

The output folder gets a folder for each split, of safetensors shards and an index. Shards that are
there are kept: the same command goes on after an interruption. Several processes share the work.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path
from typing import Any

import torch

from ecar.cli.parser import UsageError, not_negative, positive
from ecar.cli.runtime import chosen_data, own_device, process_share
from ecar.codec import AutoencoderKLCodec
from ecar.data import ImageDataset, cache_latents, load_dataset
from ecar.files import check_output_folder, read_json

EXAMPLES = """\
examples:
  ecar cache --dataset birds/ --image-size 256 --vae sdxl-vae/ --output latents/
  torchrun --nproc-per-node 8 -m ecar cache --dataset 'imagenet/train-{0000..1023}.tar' \\
      --image-size 256 --vae sdxl-vae/ --flip --dtype float16 --output latents/
      by eight GPUs; the same command goes on after an interruption
"""
FLAGS = {
    "dataset": "--dataset",
    "name": "--dataset",
    "root": "--data-root",
    "images": "--image-size",
    "image_size": "--image-size",
    "channels": "--vae",
    "codec": "--vae",
    "flip": "--flip",
    "skip_broken": "--skip-broken",
    "background": "--background",
    "dtype": "--dtype",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--vae", required=True, metavar="DIR", help="a folder that diffusers' AutoencoderKL wrote"
    )
    parser.add_argument(
        "--output", required=True, metavar="DIR", help="gets train/ and, of held-out images, test/"
    )
    group = parser.add_argument_group("data")
    group.add_argument(
        "--dataset",
        required=True,
        metavar="NAME|PATH",
        help="digits, mnist, emoji, or a path to images: a folder, or tar files",
    )
    group.add_argument("--data-root", metavar="PATH", help="where it lies, if --dataset is a name")
    group.add_argument(
        "--image-size", type=positive, metavar="N", help="side in pixels, of images in files"
    )
    group.add_argument(
        "--flip", action="store_true", help="also encode each training image mirrored"
    )
    group.add_argument(
        "--skip-broken", action="store_true", help="go on without files that are no images"
    )
    group.add_argument(
        "--background",
        default="white",
        metavar="COLOUR",
        help="what transparent images lie on (default: white)",
    )
    group = parser.add_argument_group("latents")
    group.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        default="float32",
        help="as they are stored (default: float32)",
    )
    group.add_argument(
        "--shard-size",
        type=positive,
        default=10_000,
        metavar="N",
        help="latents of a file (default: 10000)",
    )
    group.add_argument(
        "--seed", type=not_negative, default=0, metavar="N", help="of their draws (default: 0)"
    )
    group = parser.add_argument_group("running")
    group.add_argument(
        "--device", default="auto", metavar="DEVICE", help="cpu, cuda, cuda:1, .. (default: auto)"
    )
    group.add_argument(
        "--batch-size",
        type=positive,
        default=64,
        metavar="N",
        help="images encoded at once (default: 64)",
    )
    group.add_argument(
        "--num-workers",
        type=not_negative,
        default=4,
        metavar="N",
        help="processes that read images (default: 4)",
    )
    group.add_argument("--no-progress", action="store_true", help="show no progress bar")


def run(arguments: argparse.Namespace) -> None:
    arguments.dataset, arguments.data_root = chosen_data(arguments.dataset, arguments.data_root)
    if arguments.dataset == "latents":
        raise UsageError("--dataset: holds latents already; give the images")
    output = check_output_folder(arguments.output)
    rank, processes = process_share()
    device = own_device(arguments.device)
    codec = AutoencoderKLCodec.load(arguments.vae)
    splits = {"train": open_split(arguments, codec, "train")}
    with contextlib.suppress(FileNotFoundError):  # has no held-out images
        splits["test"] = open_split(arguments, codec, "test")
    codec.to(device)
    try:
        for split, dataset in splits.items():
            index = cache_latents(
                dataset,
                codec,
                output / split,
                shard_size=arguments.shard_size,
                batch_size=arguments.batch_size,
                device=device,
                dtype=getattr(torch, arguments.dtype),
                num_workers=arguments.num_workers,
                seed=arguments.seed,
                progress=rank == 0 and not arguments.no_progress,
                rank=rank,
                world=processes,
            )
            if rank == 0:
                print(describe(index))
    except KeyboardInterrupt:
        print(f"ecar: shards in {output} are kept; the same command goes on", file=sys.stderr)
        raise


def open_split(
    arguments: argparse.Namespace, codec: AutoencoderKLCodec, split: str
) -> ImageDataset:
    return load_dataset(
        arguments.dataset,
        root=arguments.data_root,
        split=split,
        image_size=arguments.image_size,
        channels=codec.vae.config.in_channels,
        flip=arguments.flip and split == "train",
        skip_broken=arguments.skip_broken,
        background=arguments.background,
    )


def describe(index: Path) -> str:
    """What a split's cache holds, or that other processes are still at it."""
    values: dict[str, Any] = read_json(index)
    text = f"{index.parent}: {values['count']:,} latents {' x '.join(map(str, values['shape']))}"
    if "mean" not in values:
        return f"{text}; other processes are still encoding"
    mean, deviation = (" ".join(f"{value:.3f}" for value in values[k]) for k in ("mean", "std"))
    return f"{text}, mean {mean}, standard deviation {deviation}"
