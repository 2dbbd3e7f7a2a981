"""A small digit classifier: whose features the evaluation measures in, and who reads the samples.

    python -m ecar.evaluation.classifier --dataset mnist --out mnist.safetensors

trains it; the same command gives the same weights on the same machine and torch version. The
project's own are in checkpoints/classifiers.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from ecar.data import ImageDataset, load_dataset
from ecar.files import read_tensors, require_weights, write_tensors

__all__ = ["ClassifierConfig", "DigitClassifier", "find_classifier", "train_classifier"]


@dataclass(frozen=True)
class ClassifierConfig:
    """Sizes of a DigitClassifier: a stem, then 3x3 convolutions, pooled down to 4 x 4 pixels."""

    image_size: int = 32
    channels: int = 1
    num_classes: int = 10
    stem_kernel: int = 5
    stem_stride: int = 2
    widths: tuple[int, ...] = (24, 48, 64, 96)
    features: int = 64

    def __post_init__(self) -> None:
        object.__setattr__(self, "widths", tuple(self.widths))


PRESETS = {
    "mnist": ClassifierConfig(),
    "digits": ClassifierConfig(image_size=8, stem_kernel=3, stem_stride=1, widths=(32, 64, 64)),
}


class DigitClassifier(nn.Module):
    """images [B, C, H, W] in [-1, 1] -> (features [B, F], logits [B, K]).

    Features are the last hidden layer before its nonlinearity, normalised by batch norm to about
    unit variance on the training set, so that no few of them rule a Fréchet distance.
    """

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__()
        self.config = config
        self.name = "DigitClassifier"
        self.sha256: str | None = None
        self.metadata: dict[str, str] = {}
        stem, *rest = config.widths
        side = -(-config.image_size // config.stem_stride)
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
        features = self.hidden(self.body(images))
        return features, self.head(F.gelu(features))

    def save(self, path: str | os.PathLike[str], **facts: object) -> None:
        """Write weights as safetensors; the configuration and `facts` go into its metadata."""
        metadata = {name: str(value) for name, value in facts.items()}
        metadata["config"] = json.dumps(dataclasses.asdict(self.config))
        write_tensors(path, self.state_dict(), metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> DigitClassifier:
        """Read what `save` wrote, or one of the project's own: "mnist", "digits". Frozen.

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
            raise ValueError(f"{path}: not the weights of a DigitClassifier ({reason})") from None
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
        f"of its weights, or train it: python -m ecar.evaluation.classifier --dataset {name}"
    )


def augment(images: Tensor, generator: torch.Generator, *, noise: float = 0.1) -> Tensor:
    """Move and roughen each image a little, [B, C, H, W] in [-1, 1].

    Turned by up to 10 degrees, scaled by 0.9 .. 1.1, sheared by up to 0.15, shifted by up to 1/16
    of its side; then Gaussian noise of deviation up to `noise`. In the features of an MNIST
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
    # Outside is black, which is -1: shift by one so that zero padding means that.
    moved = F.grid_sample(images + 1, grid, align_corners=False) - 1
    deviation = uniform(noise).view(count, 1, 1, 1)
    return (moved + deviation * torch.randn(moved.shape, generator=generator)).clamp(-1, 1)


def train_classifier(
    train: ImageDataset,
    config: ClassifierConfig,
    *,
    epochs: int,
    batch_size: int = 128,
    learning_rate: float = 3e-3,
    seed: int = 0,
    progress: bool = True,
) -> DigitClassifier:
    """Train on `train` with augmentation; AdamW, one-cycle. Held-out images play no part."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DigitClassifier(config)
    # A third faster on the CPU. torch's overloads of `to` lack the memory format alone.
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    images, labels = train.tensors()
    steps = -(-len(images) // batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, total_steps=epochs * steps, pct_start=0.2
    )
    model.train()
    with tqdm(total=epochs * steps, unit="step", disable=not progress) as bar:
        for _ in range(epochs):
            for rows in torch.randperm(len(images), generator=generator).split(batch_size):
                _, logits = model(augment(images[rows], generator))
                loss = F.cross_entropy(logits, labels[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
                bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
    # In the usual layout again, as it will be loaded: the two differ in rounding.
    model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    return model.eval().requires_grad_(False)


@torch.no_grad()
def accuracy(model: DigitClassifier, dataset: ImageDataset, batch_size: int = 500) -> float:
    """Share of `dataset` that is read as its label."""
    images, labels = dataset.tensors()
    read = torch.cat([model(rows)[1].argmax(1) for rows in images.split(batch_size)])
    return (read == labels).double().mean().item()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m ecar.evaluation.classifier",
        description="Train the classifier that the evaluation of digit models measures with.",
    )
    parser.add_argument("--dataset", choices=sorted(PRESETS), required=True)
    parser.add_argument("--out", type=Path, required=True, help="safetensors file to write")
    parser.add_argument("--data-root", type=Path, help="where mnist.npz is")
    parser.add_argument("--epochs", type=int, help="default: 6 for mnist, 100 for digits")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="results depend on it")
    arguments = parser.parse_args(argv)

    torch.set_num_threads(arguments.threads)
    name = arguments.dataset
    epochs = arguments.epochs or {"mnist": 6, "digits": 100}[name]
    train = load_dataset(name, root=arguments.data_root, split="train")
    test = load_dataset(name, root=arguments.data_root, split="test")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    model = train_classifier(train, PRESETS[name], epochs=epochs, seed=arguments.seed)
    share = accuracy(model, test)
    model.save(
        arguments.out,
        dataset=name,
        train_images=len(train),
        held_out_images=len(test),
        held_out_accuracy=f"{share:.4f}",
        epochs=epochs,
        seed=arguments.seed,
        torch=torch.__version__,
    )
    print(f"{arguments.out}: reads {share:.2%} of {len(test):,} held-out images")


if __name__ == "__main__":
    main()
