"""Evaluation reports: sample a checkpoint, measure the images, write it all down."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ecar.checkpoint import BUILT_IN_DEFAULTS, merge_settings
from ecar.data import ImageDataset, load_dataset
from ecar.files import check_output_folder, check_target, weights_sha256, write_json
from ecar.images import check_output_file
from ecar.model import ECAR
from ecar.pipeline import ECARPipeline
from ecar.sampling import split_steps

from .classifier import train_and_test
from .dtypes import cast_and_compare
from .export import save_npz
from .extractors import Extractor, NoExtractorError, default_extractor
from .measure import NEIGHBOURS, RealSets, checked_samples, now, pixels
from .neighbours import memorising, neighbour_sheet
from .provenance import device_name, versions
from .sampling import as_pipeline, draw_labels, generate, image_seeds, require_positive

__all__ = ["evaluate", "summary"]

LATENTS = 64  # compared before and after a cast


def evaluate(
    source: ECARPipeline | ECAR | str | os.PathLike[str],
    dataset: str | None,
    *,
    root: str | os.PathLike[str] | None = None,
    num_images: int = 5000,
    first_seed: int = 0,
    batch_size: int = 100,
    extractor: Extractor | str | None = None,
    classifier: str | os.PathLike[str] | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    report: str | os.PathLike[str] | None = None,
    samples: str | os.PathLike[str] | None = None,
    neighbours: str | os.PathLike[str] | None = None,
    skip_broken: bool = False,
    background: str | tuple[int, int, int] = "white",
    progress: bool = True,
    **settings: Any,
) -> dict[str, Any]:
    """Sample, measure, and write the report.

    Where `samples` is the only output and there are no features to measure in, or no data set to
    compare with, the images are drawn and written all the same; "metrics" is None then. Without
    the data set all classes are equally frequent.

    Args:
        source: a pipeline, a model whose latents are pixels, or a checkpoint's folder.
        dataset: "mnist", "digits", "emoji" or "folder"; it needs a held-out split. None: to write
            `samples` and no more.
        root: of the data set.
        num_images: how many to sample. Classes are as frequent as in the training set.
        first_seed: image i has seed first_seed + i.
        extractor: by default the project's classifier for "mnist", "digits" and "emoji"; "train"
            trains one on the training split first.
        classifier: safetensors file to write what "train" trained.
        device: where to sample and to extract features; None leaves the source where it is.
        dtype: to sample in, and to leave the source in; None is the source's own. Where it is
            another, the images are drawn and measured in both, and the report gets
            "before_cast": {"dtype", "metrics", "latents" (see ``cast_and_compare``)}.
        report: JSON file to write.
        samples: .npz file to write, in the ADM evaluator's format.
        neighbours: picture to write: samples, below each the nearest training picture. The report
            gets the distances (see `ecar.evaluation.neighbours`).
        skip_broken, background: of a folder of images, see `ecar.data.load_dataset`.
        settings: of the pipeline's call, such as num_inference_steps=40, guidance_scale=2.

    Returns: see `evaluate_images`.
    Raises:
        ValueError, TypeError: naming the argument. OSError: naming the file. Arguments, data set
        and outputs are checked, and the real images measured, before sampling begins.
    """
    require_positive("num_images", num_images, least=NEIGHBOURS + 1)
    require_positive("batch_size", batch_size)
    seeds = image_seeds(first_seed, num_images)
    for output in (report, samples, classifier):
        if output is not None:
            check_output_folder(Path(output).parent)
            check_target(output)
    if neighbours is not None:
        check_output_file(neighbours)
    if samples is not None and Path(samples).suffix != ".npz":
        raise ValueError(f"argument 'samples': expected a name that ends in .npz, got {samples}")
    if dataset == "latents":
        raise ValueError("argument 'dataset': 'latents' has no images; give the folder of images")
    if isinstance(extractor, str) and extractor != "train":
        raise ValueError(f"argument 'extractor': expected 'train' or a callable, got {extractor!r}")
    if classifier is not None and extractor != "train":
        raise ValueError("argument 'classifier': only extractor 'train' makes one to write")
    if unknown := sorted(settings.keys() - BUILT_IN_DEFAULTS.keys()):
        raise TypeError(
            f"argument {unknown[0]!r}: expected settings out of {', '.join(BUILT_IN_DEFAULTS)}"
        )
    alone = samples is not None and report is None and neighbours is None and extractor is None
    if dataset is None and not alone:
        raise ValueError("argument 'dataset': expected a name unless only 'samples' is written")
    where: str | None = None
    if isinstance(source, (str, os.PathLike)):
        where = Path(source).name
        source = ECARPipeline.from_pretrained(source)
    with as_pipeline(source) as pipeline:
        if device is not None:
            pipeline.to(device)
        config = pipeline.model.config
        settings = merge_settings(pipeline.defaults, settings, config.num_stages)
        train = real = None
        try:
            if dataset is not None:
                options = {"root": root, "skip_broken": skip_broken, "background": background}
                train, test = (
                    _open_split(pipeline, dataset, split=split, **options)
                    for split in ("train", "test")
                )
                if extractor is None:
                    extractor = default_extractor(dataset)
        except (FileNotFoundError, NoExtractorError) as error:
            if not alone:
                raise
            if progress:
                tqdm.write(f"nothing will be measured: {error}", file=sys.stderr)
        if train is not None and config.num_classes < train.num_classes:
            raise ValueError(
                f"argument 'dataset': {dataset!r} has {train.num_classes} classes, the model "
                f"{config.num_classes}"
            )
        if train is not None and extractor is not None:
            if isinstance(extractor, str):
                extractor = train_and_test(train, test, classifier, progress=progress)
            if isinstance(extractor, torch.nn.Module):
                extractor = extractor.to(pipeline.device)
            real = RealSets(
                train, test, extractor, num_images, batch_size=250, device=pipeline.device,
                seed=first_seed, progress=progress,
            )  # fmt: skip

        labels, how = _labels(train, num_images, first_seed, config.num_classes)
        drawing = {"batch_size": batch_size, "progress": progress, **settings}
        before = None
        if real is not None and dtype not in (None, pipeline.dtype):
            drawn = checked_samples(
                generate(pipeline, labels, seeds, **drawing), labels, real.train
            )
            before = {"dtype": str(pipeline.dtype), "metrics": real.report(*drawn, None)["metrics"]}
            before["latents"] = cast_and_compare(
                pipeline,
                dtype,
                images=min(LATENTS, num_images),
                first_seed=first_seed,
                progress=progress,
                **settings,
            )
        elif dtype is not None:
            pipeline.to(dtype)
        images = generate(pipeline, labels, seeds, **drawing)
        if samples is not None:
            save_npz(samples, images.permute(0, 2, 3, 1), labels)
        sampling = {
            "checkpoint": where,
            "weights_sha256": weights_sha256(pipeline.model),
            "model": pipeline.model.config.to_dict(),
            "codec": str(pipeline.codec),
            "labels": how,
            "seeds": [first_seed, first_seed + num_images - 1],
            "batch_size": batch_size,
            **settings,
            "steps_of_each_stage": split_steps(settings["num_inference_steps"], config.num_stages),
            "dtype": str(pipeline.dtype),
            "device": device_name(pipeline.device),
        }
        if real is None:
            protocol = {
                "dataset": dataset, "generated_images": num_images, "sampling": sampling,
                "versions": versions(), "date": now(),
            }  # fmt: skip
            return {"metrics": None, "real": None, "protocol": protocol}
        result = real.report(*checked_samples(images, labels, real.train), sampling)
        if before is not None:
            result["before_cast"] = before
    if neighbours is not None:
        held_out = pixels(test, torch.arange(len(test)), progress)
        result["nearest_training"], index = memorising(
            images, held_out, real.train, progress=progress
        )
        neighbour_sheet(neighbours, images, index, real.train)
    if report is not None:
        write_json(report, result)
    return result


def _labels(
    train: ImageDataset | None, count: int, seed: int, num_classes: int
) -> tuple[Tensor, str]:
    """The classes to ask for, and in which words the protocol has them."""
    if train is None:
        return torch.arange(count) % num_classes, "one class after the other"
    return draw_labels(train, count, seed=seed), (
        f"as frequent as in the training set, order of seed {seed}"
    )


def summary(report: dict[str, Any]) -> str:
    """A report's numbers as a small table: generated images beside real ones."""
    rows = [
        ("read as the class asked for", "label_accuracy", "{:.2%}"),
        ("Fréchet distance", "frechet_distance", "{:.3f}"),
        ("Inception Score", "inception_score", "{:.3f}"),
        ("precision", "precision", "{:.4f}"),
        ("recall", "recall", "{:.4f}"),
    ]
    protocol, before = report["protocol"], report.get("before_cast")
    if report["metrics"] is None:
        return f"{protocol['generated_images']:,} images, not measured"
    columns, titles = [report["metrics"], report["real"]], ["generated", "real"]
    counts = [protocol["generated_images"], protocol["real_train_images"]]
    if before is not None:
        columns.insert(1, before["metrics"])
        titles.insert(1, f"in {before['dtype'].removeprefix('torch.')}")
        counts.insert(1, counts[0])
    lines = [f"{'':30}" + "".join(f"{title:>12}" for title in titles)]
    lines.append(f"{'images':30}" + "".join(f"{count:>12,}" for count in counts))
    for title, key, form in rows:
        values = ("-" if column[key] is None else form.format(column[key]) for column in columns)
        lines.append(f"{title:30}" + "".join(f"{value:>12}" for value in values))
    ratios = (column["frechet_ratio"] for column in columns[:-1])
    cells = ("-" if ratio is None else f"{ratio:.3f}" for ratio in ratios)
    lines.append(f"{'ratio of Fréchet distances':30}" + "".join(f"{cell:>12}" for cell in cells))
    if before is not None:
        latents = before["latents"]
        errors = "".join(f"{latents[name]:>12.4f}" for name in ("error", "error_before"))
        lines.append(f"{'error of the latents':30}{errors}  ({latents['distance']:.4f} apart)")
    if nearest := report.get("nearest_training"):
        medians = (nearest[kind]["median"] for kind in ("generated", "held_out"))
        line = "".join(f"{median:>12.2f}" for median in medians)
        lines.append(f"{'to nearest training image':30}{line}  (held-out)")
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
