"""Images measured against a data set: every number with the protocol that it is of."""

from __future__ import annotations

import datetime
import sys
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ecar.data import ImageDataset
from ecar.data.base import check_dataset, checked_images, checked_labels

from .extractors import Extractor, extract, to_bytes
from .metrics import frechet_distance_of_features, inception_score, precision_recall
from .provenance import versions
from .sampling import order, require_positive

__all__ = ["NEIGHBOURS", "RealSets", "checked_samples", "evaluate_images", "now", "pixels"]

NEIGHBOURS = 3
INCEPTION_SPLITS = 10
# A distance between real sets that is smaller than this share of their spread is rounding: the sets
# are equal, and nothing can be measured by it.
_ZERO = 1e-9


def evaluate_images(
    images: Tensor,
    labels: Tensor | None,
    train: ImageDataset,
    test: ImageDataset,
    extractor: Extractor,
    *,
    sampling: dict[str, Any] | None = None,
    batch_size: int = 250,
    device: str | torch.device = "cpu",
    seed: int = 0,
    progress: bool = True,
) -> dict[str, Any]:
    """Measure generated images against the held-out set, and real training images likewise.

    Generated and real images alike are compared as 8-bit pictures. As many training images are
    drawn as there are generated ones, or all if there are fewer; then the distances whose ratio is
    reported are both of that number, because a Fréchet distance depends on it.

    Args:
        images: uint8, or floats in [-1, 1]; [N, C, H, W] as the data set's.
        labels: int64 [N], the classes asked for; None leaves out the accuracy.
        train, test: the data set's splits.
        extractor: see `ecar.evaluation.extractors`. Without logits, what needs them is None.
        sampling: how the images were made; goes into the report as it is.
        batch_size, device: of the extractor.
        seed: picks the real training images, those for precision and recall, and the Inception
            Score's splits.

    Returns: {"metrics": ..., "real": the same of the training images, "protocol": ...}; all of it
        can be written as JSON.
    """
    images, labels = checked_samples(images, labels, train)
    real = RealSets(
        train, test, extractor, len(images), batch_size=batch_size, device=device, seed=seed,
        progress=progress,
    )  # fmt: skip
    return real.report(images, labels, sampling)


class RealSets:
    """The real images, measured; all that can be wrong with them is found before sampling begins.

    Args: as `evaluate_images`.
        count: of the images that will be generated.
    """

    def __init__(
        self,
        train: ImageDataset,
        test: ImageDataset,
        extractor: Extractor,
        count: int,
        *,
        batch_size: int,
        device: str | torch.device,
        seed: int,
        progress: bool,
    ) -> None:
        require_positive("batch_size", batch_size)
        for name, dataset in (("train", train), ("test", test)):
            if len(dataset) <= NEIGHBOURS:
                raise ValueError(
                    f"argument {name!r}: expected at least {NEIGHBOURS + 1} images, got "
                    f"{len(dataset)}"
                )
            check_dataset(dataset, train.shape, train.num_classes, name=name, pixels=True)
        self.train, self.test, self.extractor, self.seed = train, test, extractor, seed
        self.options = {"batch_size": batch_size, "device": device, "progress": progress}
        chosen = order(len(train), seed)[:count]
        images = pixels(train, chosen, progress)
        self.training = self._measured(images, train.labels[chosen], "training")
        images = pixels(test, torch.arange(len(test)), progress)
        self.held_out = self._measured(images, test.labels, "held-out")
        self.floor = self.training.against(self.held_out, seed)
        self.floor["held_out_label_accuracy"] = self.held_out.label_accuracy()
        size = self.held_out.features.shape[1]
        counts = {"generated": count, "training": len(chosen), "held-out": len(test)}
        self.singular = [kind for kind, images in counts.items() if images <= size]
        if self.singular and progress:
            few = ", ".join(f"{counts[kind]} {kind}" for kind in self.singular)
            tqdm.write(
                f"{size} features of {few} images: the covariance is singular and Fréchet "
                f"distances come out too large; take more than {size} of each", file=sys.stderr,
            )  # fmt: skip

    def _measured(self, images: Tensor, labels: Tensor | None, kind: str) -> _Measured:
        classes = self.train.num_classes
        return _Measured(self.extractor, images, labels, classes, kind, self.options)

    def report(
        self, images: Tensor, labels: Tensor | None, sampling: dict[str, Any] | None
    ) -> dict[str, Any]:
        """What `evaluate_images` returns, of checked images."""
        generated = self._measured(images, labels, "generated")
        metrics = generated.against(self.held_out, self.seed)
        matched = len(self.training.features)
        metrics["frechet_distance_matched"] = frechet_distance_of_features(
            generated.features[:matched], self.held_out.features
        )
        floor = self.floor["frechet_distance"]
        zero = floor <= _ZERO * self.held_out.features.double().var(0).sum().item()
        metrics["frechet_ratio"] = None if zero else metrics["frechet_distance_matched"] / floor
        protocol = self._protocol(generated, matched, sampling)
        return {"metrics": metrics, "real": self.floor, "protocol": protocol}

    def _protocol(
        self, generated: _Measured, matched: int, sampling: dict[str, Any] | None
    ) -> dict[str, Any]:
        train, test, extractor = self.train, self.test, self.extractor
        count = len(generated.features)
        name = getattr(extractor, "name", None) or getattr(extractor, "__name__", None)
        return {
            "dataset": train.name,
            "image_shape": list(train.shape),
            "train_images_available": len(train),
            "generated_images": count,
            "real_train_images": matched,
            "held_out_images": len(test),
            "frechet_ratio": f"of {matched} generated to {matched} training images, "
            f"both against all {len(test)} held-out ones",
            "precision_recall": {
                "neighbours": NEIGHBOURS,
                "images_of_each_set": {
                    "metrics": min(count, len(test)),
                    "real": min(matched, len(test)),
                },
            },
            "inception_score_splits": INCEPTION_SPLITS,
            "images_compared_as": "8-bit",
            "singular_covariances": self.singular,
            "selection_seed": self.seed,
            "extractor": {
                "name": name or type(extractor).__name__,
                "sha256": getattr(extractor, "sha256", None),
                "features": generated.features.shape[1],
                "metadata": dict(getattr(extractor, "metadata", None) or {}),
                "device": str(self.options["device"]),
            },
            "sampling": sampling,
            "versions": versions(),
            "date": now(),
        }


class _Measured:
    """Features and logits of one set of images."""

    def __init__(
        self,
        extractor: Extractor,
        images: Tensor,
        labels: Tensor | None,
        num_classes: int,
        kind: str,
        options: dict[str, Any],
    ) -> None:
        self.features, self.logits = extract(extractor, images, description=kind, **options)
        self.labels, self.num_classes = labels, num_classes

    def label_accuracy(self) -> float | None:
        """Share of images that are read as their label; None where the logits are of others."""
        if self.logits is None or self.labels is None:
            return None
        if self.logits.shape[1] != self.num_classes:
            return None
        return (self.logits.argmax(1) == self.labels).double().mean().item()

    def against(self, held_out: _Measured, seed: int) -> dict[str, Any]:
        score: tuple[float | None, float | None] = (None, None)
        if self.logits is not None and len(self.logits) >= INCEPTION_SPLITS:
            probabilities = self.logits.double().softmax(1)
            score = inception_score(probabilities, INCEPTION_SPLITS, seed=seed)
        count = min(len(self.features), len(held_out.features))
        some = held_out.features[order(len(held_out.features), seed)[:count]]
        precision, recall = precision_recall(some, self.features[:count], NEIGHBOURS)
        return {
            "label_accuracy": self.label_accuracy(),
            "frechet_distance": frechet_distance_of_features(self.features, held_out.features),
            "inception_score": score[0],
            "inception_score_deviation": score[1],
            "precision": precision,
            "recall": recall,
        }


def pixels(dataset: ImageDataset, rows: Tensor, progress: bool) -> Tensor:
    """uint8 images [N, C, H, W] of a data set."""
    pixels = torch.empty(len(rows), *dataset.shape, dtype=torch.uint8)
    title = f"reading {dataset.split}"
    for i, row in enumerate(tqdm(rows.tolist(), title, unit="image", disable=not progress)):
        pixels[i] = to_bytes(dataset[row][0])
    return pixels


def checked_samples(
    images: Tensor, labels: Tensor | None, train: ImageDataset
) -> tuple[Tensor, Tensor | None]:
    if not isinstance(images, Tensor) or tuple(images.shape[1:]) != train.shape:
        came = list(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(
            f"argument 'images': expected {['N', *train.shape]} as the data set's, got {came}"
        )
    if len(images) <= NEIGHBOURS:
        raise ValueError(
            f"argument 'images': expected at least {NEIGHBOURS + 1} images, got {len(images)}"
        )
    if images.is_floating_point():
        images = to_bytes(checked_images(images, train.shape, name="images", pixels=True))
    if images.dtype != torch.uint8:
        raise TypeError(f"argument 'images': expected uint8 or floats, got {images.dtype}")
    if labels is not None:
        if labels.dtype != torch.int64 or labels.shape != (len(images),):
            raise ValueError(
                f"argument 'labels': expected int64 [{len(images)}], "
                f"got {labels.dtype} {list(labels.shape)}"
            )
        labels = checked_labels(labels.cpu(), train.num_classes)
    return images.cpu(), labels


def now() -> str:
    """Date and time in UTC, ISO 8601."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
