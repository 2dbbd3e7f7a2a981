"""Evaluation reports: every number with the protocol that it was measured under."""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ecar.data import ImageDataset, load_dataset
from ecar.files import write_json
from ecar.images import check_output_folder
from ecar.model import ECAR
from ecar.pipeline import ECARPipeline

from .export import save_npz
from .extractors import Extractor, default_extractor, extract, to_bytes
from .metrics import frechet_distance_of_features, inception_score, precision_recall
from .provenance import device_name, versions, weights_sha256

__all__ = ["draw_labels", "evaluate", "evaluate_images", "generate", "summary"]

NEIGHBOURS = 3
INCEPTION_SPLITS = 10


def draw_labels(train: ImageDataset, count: int, *, seed: int = 0) -> Tensor:
    """Classes to ask for, int64 [count]: labels of the training set in a random order, repeated if
    they do not suffice. So the samples have the class frequencies of the real ones."""
    order = _order(len(train), seed)
    return train.labels[order.repeat(-(-count // len(order)))[:count]]


def _order(count: int, seed: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def generate(
    source: ECARPipeline | ECAR,
    labels: Tensor,
    seeds: Tensor,
    *,
    batch_size: int = 100,
    progress: bool = True,
    **settings: Any,
) -> Tensor:
    """Sample uint8 images [N, C, H, W], one for each class and seed, in batches.

    Args:
        source: a pipeline, or a model whose latents are pixels.
        labels, seeds: int64 [N].
        settings: of the pipeline's call: num_inference_steps, guidance_scale, guidance_schedule,
            guidance_interval, solver. What is left out is the pipeline's default.
    """
    _require_positive("batch_size", batch_size)
    if labels.shape != seeds.shape or labels.dim() != 1 or len(labels) == 0:
        raise ValueError(
            "argument 'seeds': expected [N] as the labels and N > 0, got "
            f"{list(seeds.shape)} for labels {list(labels.shape)}"
        )
    batches = []
    with (
        _as_pipeline(source) as pipeline,
        tqdm(
            total=len(labels), desc="sampling", unit="image", miniters=0, disable=not progress
        ) as bar,
    ):

        def show(_: ECARPipeline, step: int, *__: Any) -> None:
            bar.set_postfix_str(f"step {step + 1} of a batch", refresh=False)
            bar.update(0)

        for rows in torch.arange(len(labels)).split(batch_size):
            images = pipeline(
                labels[rows],
                seeds=seeds[rows],
                output_type="pt",
                progress=False,
                callback_on_step_end=show,
                **settings,
            ).images
            batches.append(to_bytes(images * 2 - 1).cpu())
            bar.update(len(rows))
    return torch.cat(batches)


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
    _require_positive("batch_size", batch_size)
    options = {"batch_size": batch_size, "device": device, "progress": progress}
    chosen = _order(len(train), seed)[: len(images)]
    real_images = _pixels(train, chosen, progress)
    test_images = _pixels(test, torch.arange(len(test)), progress)
    generated = _Measured(extractor, images, labels, "generated", options)
    real = _Measured(extractor, real_images, train.labels[chosen], "training", options)
    held_out = _Measured(extractor, test_images, test.labels, "held-out", options)

    metrics, floor = (kind.against(held_out, seed) for kind in (generated, real))
    matched = len(real.features)
    metrics["frechet_distance_matched"] = frechet_distance_of_features(
        generated.features[:matched], held_out.features
    )
    metrics["frechet_ratio"] = metrics["frechet_distance_matched"] / floor["frechet_distance"]
    floor["held_out_label_accuracy"] = held_out.label_accuracy()
    name = getattr(extractor, "name", None) or getattr(extractor, "__name__", None)
    protocol = {
        "dataset": train.name,
        "image_shape": list(train.shape),
        "train_images_available": len(train),
        "generated_images": len(images),
        "real_train_images": matched,
        "held_out_images": len(test),
        "frechet_ratio": f"of {matched} generated to {matched} training images, "
        f"both against all {len(test)} held-out ones",
        "precision_recall": {
            "neighbours": NEIGHBOURS,
            "images_of_each_set": {
                "metrics": min(len(images), len(test)),
                "real": min(matched, len(test)),
            },
        },
        "inception_score_splits": INCEPTION_SPLITS,
        "images_compared_as": "8-bit",
        "selection_seed": seed,
        "extractor": {
            "name": name or type(extractor).__name__,
            "sha256": getattr(extractor, "sha256", None),
            "features": generated.features.shape[1],
            "metadata": dict(getattr(extractor, "metadata", None) or {}),
            "device": str(device),
        },
        "sampling": sampling,
        "versions": versions(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    return {"metrics": metrics, "real": floor, "protocol": protocol}


class _Measured:
    """Features and logits of one set of images."""

    def __init__(
        self,
        extractor: Extractor,
        images: Tensor,
        labels: Tensor | None,
        kind: str,
        options: dict[str, Any],
    ) -> None:
        self.features, self.logits = extract(extractor, images, description=kind, **options)
        self.labels = labels

    def label_accuracy(self) -> float | None:
        """Share of images that are read as their label."""
        if self.logits is None or self.labels is None:
            return None
        return (self.logits.argmax(1) == self.labels).double().mean().item()

    def against(self, held_out: _Measured, seed: int) -> dict[str, float | None]:
        score: tuple[float | None, float | None] = (None, None)
        if self.logits is not None and len(self.logits) >= INCEPTION_SPLITS:
            probabilities = self.logits.double().softmax(1)
            score = inception_score(probabilities, INCEPTION_SPLITS, seed=seed)
        count = min(len(self.features), len(held_out.features))
        some = held_out.features[_order(len(held_out.features), seed)[:count]]
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
        settings: of the pipeline's call, such as num_inference_steps=40, guidance_scale=2.

    Returns: see `evaluate_images`.
    Raises:
        ValueError, TypeError: naming the argument. OSError: naming the file. Arguments, data set
        and outputs are checked before sampling begins.
    """
    _require_positive("num_images", num_images, least=NEIGHBOURS + 1)
    _require_positive("batch_size", batch_size)
    for output in (report, samples):
        if output is not None:
            check_output_folder(Path(output).parent)
            if Path(output).is_dir():
                raise IsADirectoryError(f"{output}: is a folder, expected a file's name")
    if samples is not None and Path(samples).suffix != ".npz":
        raise ValueError(f"argument 'samples': expected a name that ends in .npz, got {samples}")
    if dataset == "latents":
        raise ValueError("argument 'dataset': 'latents' has no images; give the folder of images")
    where = None
    if isinstance(source, (str, os.PathLike)):
        source, where = ECARPipeline.from_pretrained(source), Path(source).name
    with _as_pipeline(source) as pipeline:
        if device is not None:
            pipeline.to(device)
        train, test = (
            _open_split(pipeline, dataset, root=root, split=split) for split in ("train", "test")
        )
        if pipeline.model.config.num_classes < train.num_classes:
            raise ValueError(
                f"argument 'dataset': {dataset!r} has {train.num_classes} classes, the model "
                f"{pipeline.model.config.num_classes}"
            )
        extractor = default_extractor(dataset) if extractor is None else extractor
        if isinstance(extractor, torch.nn.Module):
            extractor = extractor.to(pipeline.device)

        labels = draw_labels(train, num_images, seed=first_seed)
        seeds = torch.arange(first_seed, first_seed + num_images)
        images = generate(
            pipeline, labels, seeds, batch_size=batch_size, progress=progress, **settings
        )
        if samples is not None:
            save_npz(samples, images.permute(0, 2, 3, 1), labels)
        result = evaluate_images(
            images,
            labels,
            train,
            test,
            extractor,
            sampling={
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
            },
            device=pipeline.device,
            seed=first_seed,
            progress=progress,
        )
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
    lines.append(f"{'ratio of Fréchet distances':30}{ratio:>12.3f}")
    lines.append(
        f"against {protocol['held_out_images']:,} held-out images of {protocol['dataset']}, "
        f"features of {protocol['extractor']['name']}"
    )
    return "\n".join(lines)


@contextlib.contextmanager
def _as_pipeline(source: ECARPipeline | ECAR) -> Iterator[ECARPipeline]:
    """A pipeline around a model, which goes back to training afterwards if it was."""
    if not isinstance(source, (ECARPipeline, ECAR)):
        raise TypeError(
            f"argument 'source': expected an ECARPipeline or an ECAR, got {type(source).__name__}"
        )
    training = isinstance(source, ECAR) and source.training
    try:
        yield ECARPipeline(source) if isinstance(source, ECAR) else source
    finally:
        if training:
            source.train()


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
        if not images.isfinite().all():
            raise ValueError("argument 'images': holds NaN or infinity")
        images = to_bytes(images)
    if images.dtype != torch.uint8:
        raise TypeError(f"argument 'images': expected uint8 or floats, got {images.dtype}")
    if labels is not None:
        if labels.dtype != torch.int64 or labels.shape != (len(images),):
            raise ValueError(
                f"argument 'labels': expected int64 [{len(images)}], "
                f"got {labels.dtype} {list(labels.shape)}"
            )
        labels = labels.cpu()
    return images.cpu(), labels


def _require_positive(name: str, value: object, least: int = 1) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"argument {name!r}: expected an integer, got {value!r}")
    if value < least:
        raise ValueError(f"argument {name!r}: expected at least {least}, got {value}")
