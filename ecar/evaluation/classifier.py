"""A small classifier: in whose features the evaluation measures, and by which samples are read.

    python -m ecar.evaluation.classifier --dataset mnist --out mnist.safetensors

trains it; the same command gives the same weights on the same machine and torch version. The
project's own are in checkpoints/classifiers; `ecar evaluate --classifier train` trains one for any
data set of images.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from ecar.data import ImageDataset, load_dataset
from ecar.files import read_tensors, require_weights, write_tensors

__all__ = [
    "Classifier",
    "ClassifierConfig",
    "default_config",
    "find_classifier",
    "train_and_test",
    "train_classifier",
]


@dataclass(frozen=True)
class ClassifierConfig:
    """Sizes of a Classifier: a stem, then 3x3 convolutions, pooled down to 4 x 4 pixels.

    Args:
        reduce: images are averaged over squares of this side first.
    """

    image_size: int = 32
    channels: int = 1
    num_classes: int = 10
    stem_kernel: int = 5
    stem_stride: int = 2
    widths: tuple[int, ...] = (24, 48, 64, 96)
    features: int = 64
    reduce: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "widths", tuple(self.widths))


PRESETS = {
    "mnist": ClassifierConfig(),
    "digits": ClassifierConfig(image_size=8, stem_kernel=3, stem_stride=1, widths=(32, 64, 64)),
    "emoji": ClassifierConfig(channels=3, num_classes=28, widths=(32, 64, 96, 128)),
}
EPOCHS = {"mnist": 6, "digits": 100, "emoji": 40}
_SIDE = 64  # larger images are averaged down to at most this
_SEEN = 300_000  # images that a training sees, where nothing else is said


def default_config(dataset: ImageDataset) -> ClassifierConfig:
    """The preset of this data set, or sizes that suit its images.

    Raises:
        ValueError: for items that are not square pictures.
    """
    if dataset.name in PRESETS:
        return PRESETS[dataset.name]
    channels, height, width = dataset.shape
    if channels not in (1, 3) or height != width:
        raise ValueError(
            "argument 'dataset': expected square images of 1 or 3 channels for a classifier, got "
            f"{list(dataset.shape)}"
        )
    sizes: dict[str, Any] = {
        "image_size": height,
        "channels": channels,
        "num_classes": dataset.num_classes,
    }
    if height <= 16:
        small = PRESETS["digits"]
        return dataclasses.replace(small, **sizes)
    return ClassifierConfig(**sizes, widths=(32, 64, 96, 128), reduce=-(-height // _SIDE))


def default_epochs(dataset: ImageDataset) -> int:
    """Passes over the training images."""
    return EPOCHS.get(dataset.name, min(max(_SEEN // len(dataset), 2), 100))


class Classifier(nn.Module):
    """images [B, C, H, W] in [-1, 1] -> (features [B, F], logits [B, K]).

    Features are the last hidden layer before its nonlinearity, normalised by batch norm to about
    unit variance on the training set, so that no few of them rule a Fréchet distance.
    """

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__()
        self.config = config
        self.name = "Classifier"
        self.sha256: str | None = None
        self.metadata: dict[str, str] = {}
        stem, *rest = config.widths
        side = -(-(config.image_size // config.reduce) // config.stem_stride)
        layers = _convolution(config.channels, stem, config.stem_kernel, config.stem_stride)
        for before, after in zip(config.widths, rest, strict=False):
            layers += _convolution(before, after, 3, 1)
            if side > 4:
                layers.append(nn.MaxPool2d(2))
                side //= 2
        self.body = nn.Sequential(*layers, nn.Flatten())
        self.hidden = nn.Sequential(
            nn.Linear(config.widths[-1] * side * side, config.features, bias=False),
            nn.BatchNorm1d(config.features),
        )
        self.head = nn.Linear(config.features, config.num_classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        if self.config.reduce > 1:
            images = F.avg_pool2d(images, self.config.reduce)
        features = self.hidden(self.body(images))
        return features, self.head(F.gelu(features))

    def save(self, path: str | os.PathLike[str], **facts: object) -> None:
        """Write weights as safetensors; the configuration and `facts` go into its metadata."""
        metadata = {name: str(value) for name, value in facts.items()}
        metadata["config"] = json.dumps(dataclasses.asdict(self.config))
        write_tensors(path, self.state_dict(), metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Classifier:
        """Read what `save` wrote, or one of the project's own, by the data set's name. Frozen.

        Raises:
            FileNotFoundError: no such file.
            ValueError: the file is damaged or holds something else.
        """
        path = find_classifier(path) if path in PRESETS else Path(path)
        tensors, metadata = read_tensors(path)
        try:
            model = cls(ClassifierConfig(**json.loads(metadata["config"])))
            require_weights(path, tensors, model.state_dict())
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            reason = str(error).splitlines()[0].removeprefix(f"{path}: ")
            raise ValueError(f"{path}: not the weights of a Classifier ({reason})") from None
        model.load_state_dict(tensors)
        model.metadata = metadata
        model.sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        return model.eval().requires_grad_(False)


def _convolution(inputs: int, outputs: int, kernel: int, stride: int) -> list[nn.Module]:
    return [
        nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    ]


def find_classifier(name: str) -> Path:
    """checkpoints/classifiers/NAME.safetensors in the project or below the current folder."""
    places = [Path(__file__).resolve().parents[2], Path()]
    candidates = [place / "checkpoints" / "classifiers" / f"{name}.safetensors" for place in places]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(
        f"classifier {name!r} not found (tried {', '.join(map(str, candidates))}); give the path "
        f"of its weights, or train one: ecar evaluate --classifier train"
    )


def background(images: Tensor) -> Tensor:
    """The median of the pixels along the border of all images [N, C, H, W], [C, 1, 1]."""
    sides = (images[:, :, 0], images[:, :, -1], images[:, :, :, 0], images[:, :, :, -1])
    border = torch.cat(sides, dim=2).transpose(0, 1).flatten(1)
    return border.median(dim=1).values[:, None, None]


def augment(
    images: Tensor,
    generator: torch.Generator,
    *,
    noise: float = 0.1,
    outside: Tensor | float = -1.0,
) -> Tensor:
    """Move and roughen each image a little, [B, C, H, W] in [-1, 1].

    Turned by up to 10 degrees, scaled by 0.9 .. 1.1, sheared by up to 0.15, shifted by up to 1/16
    of its side, where `outside` (a number, or one for each channel [C, 1, 1]) is what lies around
    it; then Gaussian noise of deviation up to `noise`. In the features of an MNIST
    classifier trained without the noise, a background lighter by 4 / 255, which nobody sees, was
    three times as far from real digits as a 30 % blend with a 3x3 blur; with it, less than half.
    """
    count = len(images)

    def uniform(limit: float) -> Tensor:
        return (torch.rand(count, generator=generator) * 2 - 1) * limit

    angle, scale, shear = uniform(torch.pi / 18), 1 + uniform(0.1), uniform(0.15)
    cos, sin = angle.cos() * scale, angle.sin() * scale
    theta = torch.stack(
        [cos, shear * cos - sin, uniform(1 / 8), sin, shear * sin + cos, uniform(1 / 8)], 1
    )
    grid = F.affine_grid(theta.view(count, 2, 3), list(images.shape), align_corners=False)
    # Shifted so that zero padding means what lies outside.
    moved = F.grid_sample(images - outside, grid, align_corners=False) + outside
    deviation = uniform(noise).view(count, 1, 1, 1)
    return (moved + deviation * torch.randn(moved.shape, generator=generator)).clamp(-1, 1)


def train_classifier(
    train: ImageDataset,
    config: ClassifierConfig | None = None,
    *,
    epochs: int | None = None,
    batch_size: int = 128,
    learning_rate: float = 3e-3,
    seed: int = 0,
    progress: bool = True,
) -> Classifier:
    """Train on `train` with augmentation; AdamW, one-cycle. Held-out images play no part.

    Args:
        config, epochs: by default those of this data set, see `default_config`.
    """
    config = default_config(train) if config is None else config
    epochs = default_epochs(train) if epochs is None else epochs
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Classifier(config)
    # A third faster on the CPU. torch's overloads of `to` lack the memory format alone.
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    images, labels = train.tensors()
    outside = background(images)
    steps = -(-len(images) // batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, total_steps=epochs * steps, pct_start=0.2
    )
    model.train()
    with tqdm(total=epochs * steps, unit="step", disable=not progress) as bar:
        for _ in range(epochs):
            for rows in torch.randperm(len(images), generator=generator).split(batch_size):
                _, logits = model(augment(images[rows], generator, outside=outside))
                loss = F.cross_entropy(logits, labels[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
                bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
    # In the usual layout again, as it will be loaded: the two differ in rounding.
    model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    model.metadata = {
        "dataset": train.name,
        "train_images": str(len(train)),
        "epochs": str(epochs),
        "seed": str(seed),
        "torch": torch.__version__,
    }
    return model.eval().requires_grad_(False)


@torch.no_grad()
def accuracy(model: Classifier, dataset: ImageDataset, batch_size: int = 500) -> float:
    """Share of `dataset` that is read as its label."""
    images, labels = dataset.tensors()
    read = torch.cat([model(rows)[1].argmax(1) for rows in images.split(batch_size)])
    return (read == labels).double().mean().item()


def train_and_test(
    train: ImageDataset, test: ImageDataset, path: str | os.PathLike[str] | None, **options: Any
) -> Classifier:
    """A classifier trained on `train`, with its share of `test` in its metadata.

    Args:
        path: safetensors file to write; None: none.
        options: of `train_classifier`.
    """
    model = train_classifier(train, **options)
    share = accuracy(model, test)
    model.metadata |= {"held_out_images": str(len(test)), "held_out_accuracy": f"{share:.4f}"}
    if path is not None:
        model.save(path, **model.metadata)
        model.sha256 = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    return model


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m ecar.evaluation.classifier",
        description="Train a classifier to measure models of a data set with.",
    )
    parser.add_argument("--dataset", choices=(*sorted(PRESETS), "folder"), required=True)
    parser.add_argument("--out", type=Path, required=True, help="safetensors file to write")
    parser.add_argument("--data-root", type=Path, help="where the data set lies")
    parser.add_argument("--image-size", type=int, help="side in pixels, for a folder")
    parser.add_argument("--channels", type=int, help="1 or 3, for a folder (3)")
    parser.add_argument("--epochs", type=int, help=f"as many as see {_SEEN:,} images, or so")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="results depend on it")
    arguments = parser.parse_args(argv)

    torch.set_num_threads(arguments.threads)
    train, test = (
        load_dataset(
            arguments.dataset,
            root=arguments.data_root,
            split=split,
            image_size=arguments.image_size,
            channels=arguments.channels,
        )
        for split in ("train", "test")
    )
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    model = train_and_test(train, test, arguments.out, epochs=arguments.epochs, seed=arguments.seed)
    share = float(model.metadata["held_out_accuracy"])
    print(f"{arguments.out}: reads {share:.2%} of {len(test):,} held-out images")


if __name__ == "__main__":
    main()
