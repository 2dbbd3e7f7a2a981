"""Evaluation reports: every number with the protocol that it was measured under."""

from __future__ import annotations

import datetime
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ecar.checkpoint import BUILT_IN_DEFAULTS, check_settings
from ecar.data import ImageDataset, load_dataset
from ecar.data.base import check_dataset, checked_images, checked_labels
from ecar.files import check_output_folder, check_target, write_json
from ecar.model import ECAR
from ecar.pipeline import ECARPipeline

from .export import save_npz
from .extractors import Extractor, default_extractor, extract, to_bytes
from .metrics import frechet_distance_of_features, inception_score, precision_recall
from .provenance import device_name, versions, weights_sha256
from .sampling import as_pipeline, draw_labels, generate, order, require_positive

__all__ = ["draw_labels", "evaluate", "evaluate_images", "generate", "summary"]

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
    images, labels = _checked_images(images, labels, train)
    real = _RealSets(
        train, test, extractor, len(images), batch_size=batch_size, device=device, seed=seed,
        progress=progress,
    )  # fmt: skip
    return real.report(images, labels, sampling)


class _RealSets:
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
        images = _pixels(train, chosen, progress)
        self.training = self._measured(images, train.labels[chosen], "training")
        images = _pixels(test, torch.arange(len(test)), progress)
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
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
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


def evaluate(
    source: ECARPipeline | ECAR | str | os.PathLike[str],
    dataset: str,
    *,
    root: str | os.PathLike[str] | None = None,
    num_images: int = 5000,
    first_seed: int = 0,
    batch_size: int = 100,
    extractor: Extractor | None = None,
    device: str | torch.device | None = None,
    report: str | os.PathLike[str] | None = None,
    samples: str | os.PathLike[str] | None = None,
    skip_broken: bool = False,
    background: str | tuple[int, int, int] = "white",
    progress: bool = True,
    **settings: Any,
) -> dict[str, Any]:
    """Sample, measure, and write the report.

    Args:
        source: a pipeline, a model whose latents are pixels, or a checkpoint's folder.
        dataset: "mnist", "digits" or "folder"; it needs a held-out split.
        root: of the data set.
        num_images: how many to sample. Classes are as frequent as in the training set.
        first_seed: image i has seed first_seed + i.
        extractor: by default the project's classifier for "mnist" and "digits".
        device: where to sample and to extract features; None leaves the source where it is.
        report: JSON file to write.
        samples: .npz file to write, in the ADM evaluator's format.
        skip_broken, background: of a folder of images, see `ecar.data.load_dataset`.
        settings: of the pipeline's call, such as num_inference_steps=40, guidance_scale=2.

    Returns: see `evaluate_images`.
    Raises:
        ValueError, TypeError: naming the argument. OSError: naming the file. Arguments, data set
        and outputs are checked, and the real images measured, before sampling begins.
    """
    require_positive("num_images", num_images, least=NEIGHBOURS + 1)
    require_positive("batch_size", batch_size)
    for output in (report, samples):
        if output is not None:
            check_output_folder(Path(output).parent)
            check_target(output)
    if samples is not None and Path(samples).suffix != ".npz":
        raise ValueError(f"argument 'samples': expected a name that ends in .npz, got {samples}")
    if dataset == "latents":
        raise ValueError("argument 'dataset': 'latents' has no images; give the folder of images")
    if unknown := sorted(settings.keys() - BUILT_IN_DEFAULTS.keys()):
        raise TypeError(
            f"argument {unknown[0]!r}: expected settings out of {', '.join(BUILT_IN_DEFAULTS)}"
        )
    where: str | None = None
    if isinstance(source, (str, os.PathLike)):
        where = Path(source).name
        source = ECARPipeline.from_pretrained(source)
    with as_pipeline(source) as pipeline:
        if device is not None:
            pipeline.to(device)
        config = pipeline.model.config
        check_settings({**pipeline.defaults, **settings}, config.num_stages)
        options = {"root": root, "skip_broken": skip_broken, "background": background}
        train, test = (
            _open_split(pipeline, dataset, split=split, **options) for split in ("train", "test")
        )
        if config.num_classes < train.num_classes:
            raise ValueError(
                f"argument 'dataset': {dataset!r} has {train.num_classes} classes, the model "
                f"{config.num_classes}"
            )
        extractor = default_extractor(dataset) if extractor is None else extractor
        if isinstance(extractor, torch.nn.Module):
            extractor = extractor.to(pipeline.device)
        real = _RealSets(
            train, test, extractor, num_images, batch_size=250, device=pipeline.device,
            seed=first_seed, progress=progress,
        )  # fmt: skip

        labels = draw_labels(train, num_images, seed=first_seed)
        seeds = torch.arange(first_seed, first_seed + num_images)
        images = generate(
            pipeline, labels, seeds, batch_size=batch_size, progress=progress, **settings
        )
        if samples is not None:
            save_npz(samples, images.permute(0, 2, 3, 1), labels)
        sampling = {
            "checkpoint": where,
            "weights_sha256": weights_sha256(pipeline.model),
            "model": pipeline.model.config.to_dict(),
            "codec": str(pipeline.codec),
            "labels": f"as frequent as in the training set, order of seed {first_seed}",
            "seeds": [first_seed, first_seed + num_images - 1],
            "batch_size": batch_size,
            **{**pipeline.defaults, **settings},
            "dtype": str(pipeline.dtype),
            "device": device_name(pipeline.device),
        }
        result = real.report(*_checked_images(images, labels, train), sampling)
    if report is not None:
        write_json(report, result)
    return result


def summary(report: dict[str, Any]) -> str:
    """A report's numbers as a small table: generated images beside real ones."""
    rows = [
        ("read as the class asked for", "label_accuracy", "{:.2%}"),
        ("Fréchet distance", "frechet_distance", "{:.3f}"),
        ("Inception Score", "inception_score", "{:.3f}"),
        ("precision", "precision", "{:.4f}"),
        ("recall", "recall", "{:.4f}"),
    ]
    protocol, columns = report["protocol"], (report["metrics"], report["real"])
    lines = [f"{'':30}{'generated':>12}{'real':>12}"]
    counts = (protocol["generated_images"], protocol["real_train_images"])
    lines.append(f"{'images':30}{counts[0]:>12,}{counts[1]:>12,}")
    for title, key, form in rows:
        values = ("-" if column[key] is None else form.format(column[key]) for column in columns)
        lines.append(f"{title:30}" + "".join(f"{value:>12}" for value in values))
    ratio = report["metrics"]["frechet_ratio"]
    ratio = "-" if ratio is None else f"{ratio:.3f}"
    lines.append(f"{'ratio of Fréchet distances':30}{ratio:>12}")
    if few := protocol.get("singular_covariances"):
        lines.append(f"too few images for the number of features: {', '.join(few)}")
    lines.append(
        f"against {protocol['held_out_images']:,} held-out images of {protocol['dataset']}, "
        f"features of {protocol['extractor']['name']}"
    )
    return "\n".join(lines)


def _open_split(pipeline: ECARPipeline, name: str, **where: Any) -> ImageDataset:
    """The data set at the size of the images that the pipeline makes."""
    channels, side = pipeline.model.config.latent_shape[:2]
    if pipeline.codec.kind != "identity":
        channels, side = 3, side * pipeline.codec.downscale
    return load_dataset(name, image_size=side, channels=channels, **where)


def _pixels(dataset: ImageDataset, rows: Tensor, progress: bool) -> Tensor:
    """uint8 images [N, C, H, W] of a data set."""
    pixels = torch.empty(len(rows), *dataset.shape, dtype=torch.uint8)
    title = f"reading {dataset.split}"
    for i, row in enumerate(tqdm(rows.tolist(), title, unit="image", disable=not progress)):
        pixels[i] = to_bytes(dataset[row][0])
    return pixels


def _checked_images(
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
