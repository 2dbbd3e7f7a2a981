"""What a training starts from: its processes, its data, its model."""

from __future__ import annotations

import contextlib
import ctypes
import math
import re
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ecar.data import ImageDataset, LatentDataset, load_dataset
from ecar.data.base import check_dataset
from ecar.data.folder import PictureDataset
from ecar.evaluation.provenance import describe_device
from ecar.info import backends_in_use
from ecar.model import ECAR
from ecar.training.config import TrainConfig
from ecar.training.gradnorm import GradNorm
from ecar.training.stage_weights import FixedWeights, Uncertainty

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = [
    "describe",
    "held_out_data",
    "initial_model",
    "keep_freed_memory",
    "make_accelerator",
    "make_balance",
    "make_optimizer",
    "training_data",
]

_KEPT = 1 << 30  # bytes: images in files that take less as pixels are decoded once
_CLASSES = "ar.class_embedding.weight"
_MODULATION = re.compile(r"heads\.[0-9]+\.modulation\.(weight|bias)")
# glibc's mallopt: what is asked of the kernel block by block, and what is given back to it.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _NEVER = -1, -3, 2**31 - 1


def make_accelerator(config: TrainConfig) -> Accelerator:
    """The processes, device and precision that the configuration asks for.

    Raises:
        ImportError: accelerate is not installed.
    """
    try:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState, PartialState
        from accelerate.utils import (
            DistributedDataParallelKwargs,
            DistributedType,
            GradientAccumulationPlugin,
        )
    except ImportError as error:
        raise ImportError("training needs accelerate: pip install 'ecar[train]'") from error
    cpu = config.device == "cpu" or not torch.accelerator.is_available()
    if config.mixed_precision == "fp16" and (cpu or not torch.cuda.is_available()):
        raise ValueError("argument 'mixed_precision': 'fp16' needs CUDA; use 'bf16' or 'no'")
    # accelerate holds device and precision process-wide: a second training may want others. A
    # process group, once there, stays.
    alone = not PartialState._shared_state or PartialState().distributed_type == DistributedType.NO
    AcceleratorState._reset_state(reset_partial_state=alone)
    return Accelerator(
        cpu=cpu,
        mixed_precision=config.mixed_precision,
        # Accumulation is the loop's: accelerate's would follow an environment variable.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
    )


def keep_freed_memory() -> None:
    """Let the C library keep what a step frees for the next one, where it is glibc.

    It would give large blocks back to the kernel, which fills them with zeros when they are asked
    for again: in a step of the MNIST preset 9,000 pages, a fifteenth of its time. The peak is the
    same.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        for option in (_TRIM_THRESHOLD, _MMAP_THRESHOLD):
            mallopt(option, _NEVER)


def training_data(
    config: TrainConfig, dataset: Dataset | None, decode: Callable[[Tensor], Tensor] | None
) -> Dataset:
    """The data set given, or the configuration's, checked. A small folder of images is decoded.

    Raises:
        TypeError, ValueError: naming the argument. OSError: files are missing.

    Warns:
        UserWarning: classes without an image.
    """
    dataset = _open(config, "train") if dataset is None else dataset
    classes = getattr(dataset, "num_classes", config.model.num_classes)
    if classes != config.model.num_classes:
        raise ValueError(
            f"argument 'dataset': expected {config.model.num_classes} classes for this model, got "
            f"{classes}"
        )
    labels = _check(config, dataset, decode, "dataset")
    if labels is not None and len(unseen := set(range(classes)) - set(labels.tolist())):
        warnings.warn(
            f"{len(unseen)} of {classes} classes have no image in the training data, such as "
            f"class {min(unseen)}: the model will not learn them",
            stacklevel=4,
        )
    if isinstance(dataset, PictureDataset) and len(dataset) * math.prod(dataset.shape) <= _KEPT:
        return dataset.decoded()
    return dataset


def held_out_data(
    config: TrainConfig, dataset: Dataset | None, decode: Callable[[Tensor], Tensor] | None
) -> Dataset | None:
    """The data set given, or the held-out split of the configuration's; None if it has none.

    Raises:
        TypeError, ValueError, OSError: as `training_data`, for a split that is there.
    """
    if dataset is None:
        try:
            dataset = _open(config, "test")
        except FileNotFoundError:
            return None
    _check(config, dataset, decode, "held_out")
    return dataset


def _open(config: TrainConfig, split: str) -> ImageDataset:
    model = config.model
    size: dict[str, Any] = (
        {}
        if config.dataset == "latents"
        else {"image_size": model.latent_shape[1], "channels": model.channels}
    )
    return load_dataset(
        config.dataset,
        root=config.data_root,
        split=split,
        skip_broken=config.skip_broken,
        background=config.background,
        **size,
    )


def _check(
    config: TrainConfig, dataset: Dataset, decode: Callable[[Tensor], Tensor] | None, name: str
) -> Tensor | None:
    model = config.model
    # Where nothing decodes them, items of 1 or 3 channels are pictures.
    pixels = decode is None and model.channels in (1, 3) and not isinstance(dataset, LatentDataset)
    return check_dataset(dataset, model.latent_shape, model.num_classes, name=name, pixels=pixels)


def initial_model(config: TrainConfig) -> tuple[ECAR, str]:
    """The model that a new training starts from, on the CPU, and in words what it is.

    A checkpoint of another number of classes gives all but the class embeddings: those are the
    seed's, but the null class's, which is the checkpoint's. Flow blocks that a checkpoint lacks
    come after its own, unmodulated: with adaLN-zero, such a block is the identity, so the model
    computes what the checkpoint's does.

    Raises:
        ValueError: `init_from` is of another configuration.
    """
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        model = ECAR(config.model)
    if config.init_from is None:
        return model, f"fresh weights of seed {config.seed}"
    given = ECAR.from_pretrained(config.init_from)
    sizes, wanted = ({**c.to_dict(), "class_dropout": 0} for c in (given.config, config.model))
    classes, blocks = sizes["num_classes"], sizes["flow_blocks"]
    added = wanted["flow_blocks"] - blocks
    same = {**sizes, "num_classes": wanted["num_classes"], "flow_blocks": blocks + max(added, 0)}
    if same != wanted:
        raise ValueError(
            f"argument 'init_from': {config.init_from} holds another configuration, {given.config}"
        )
    weights, fresh = given.state_dict(), model.state_dict()
    origin = f"weights of {config.init_from}"
    if classes != wanted["num_classes"]:
        embeddings = fresh[_CLASSES].clone()
        embeddings[config.model.null_class] = weights[_CLASSES][given.config.null_class]
        weights[_CLASSES] = embeddings
        origin += (
            f", but embeddings of {wanted['num_classes']} classes in place of its {classes}: "
            f"fresh ones of seed {config.seed}"
        )
    if added:
        for name in (name for name in weights if _MODULATION.fullmatch(name)):
            # Six parts a block, then the final layer's two.
            before, last = weights[name].split(
                [6 * blocks * given.config.width, 2 * given.config.width]
            )
            between = before.new_zeros(6 * added * given.config.width, *before.shape[1:])
            weights[name] = torch.cat((before, between, last))
        origin += f", and {added} more flow blocks in each head, which begin as the identity"
    model.load_state_dict({**fresh, **weights})
    return model, origin


def make_optimizer(config: TrainConfig, parameters: tuple[nn.Parameter, ...]) -> torch.optim.AdamW:
    """AdamW, fused where the device has it."""
    return torch.optim.AdamW(
        parameters,
        lr=config.learning_rate,
        betas=config.betas,
        weight_decay=config.weight_decay,
        fused=parameters[0].device.type in ("cpu", "cuda"),
    )


def make_balance(
    config: TrainConfig, device: torch.device
) -> GradNorm | Uncertainty | FixedWeights:
    """What holds the stages' weights, and moves them."""
    stages, rate = config.model.num_stages, config.gradnorm_lr
    if config.stage_weights == "gradnorm":
        alpha = config.gradnorm_alpha
        return GradNorm(stages, alpha=alpha, learning_rate=rate, device=device)
    if config.stage_weights == "uncertainty":
        return Uncertainty(stages, learning_rate=rate, device=device)
    return FixedWeights(torch.tensor(config.stage_weights, device=device))


def describe(
    model: ECAR, config: TrainConfig, images: int, held_out: int, processes: int, origin: str
) -> list[str]:
    """The header of a training: what, on what, where, and from where it goes on, in some lines."""
    sizes, device = model.config, model.device
    count = sum(parameter.numel() for parameter in model.parameters())
    side = " x ".join(map(str, sizes.latent_shape))
    backends = sorted(set(backends_in_use(sizes, device, model.dtype).values()))
    return [
        f"model: {count / 1e6:.1f} M parameters, {sizes.num_stages} stages up to {side}, "
        f"{sizes.num_classes} classes",
        f"data: {images:,} training images of {config.dataset}, {held_out:,} for validation",
        f"run: {processes} x {describe_device(device)}, mixed precision {config.mixed_precision}, "
        f"ops by {', '.join(backends)}",
        f"steps: {config.steps:,} of {config.batch_size} images, {config.schedule} learning rate",
        f"from: {origin}",
    ]
