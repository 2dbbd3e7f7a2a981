"""What turns images into features.

An extractor is any callable: images float32 [B, C, H, W] in [-1, 1] -> (features [B, F], logits
[B, K] or None). The attributes `name`, `sha256` (of its weights) and `metadata` go into reports if
it has them.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .classifier import PRESETS, Classifier

__all__ = ["Extractor", "InceptionExtractor", "default_extractor", "extract", "to_bytes"]

Extractor = Callable[[Tensor], tuple[Tensor, Tensor | None]]

# Published FIDs are all in the features of these weights, converted from TensorFlow's by
# torch-fidelity; the name bears the first digits of their sha256.
_INCEPTION_SHA256 = "6726825d"
_INCEPTION_NAME = f"weights-inception-2015-12-05-{_INCEPTION_SHA256}.pth"


class NoExtractorError(ValueError):
    """The project has no classifier for this data set."""


class InceptionExtractor(nn.Module):
    """torch-fidelity's InceptionV3: 2,048 pooled features and unbiased logits, for images of any
    size with 1 or 3 channels. FIDs measured with it compare to published ones.

    Args:
        weights: the file weights-inception-2015-12-05-6726825d.pth of torch-fidelity's release
            v0.2.0. It is not fetched.

    Raises:
        ImportError: torch-fidelity is not installed.
        FileNotFoundError: there is no such file.
        ValueError: it is another file.
    """

    name = "InceptionV3 (torch-fidelity)"

    def __init__(self, weights: str | os.PathLike[str]) -> None:
        super().__init__()
        weights = Path(weights)
        if not weights.is_file():
            raise FileNotFoundError(
                f"{weights}: no such file; it takes {_INCEPTION_NAME} from torch-fidelity's "
                "release v0.2.0"
            )
        # Checked first: torch-fidelity reads it with pickle.
        self.sha256 = hashlib.sha256(weights.read_bytes()).hexdigest()
        if not self.sha256.startswith(_INCEPTION_SHA256):
            raise ValueError(
                f"{weights}: not {_INCEPTION_NAME}, its sha256 begins with {self.sha256[:8]}"
            )
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ImportError as error:
            raise ImportError(
                "Inception features need torch-fidelity: pip install ecar[inception]"
            ) from error
        self.network = FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048", "logits_unbiased"], os.fspath(weights)
        )

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.network(to_bytes(images).expand(-1, 3, -1, -1))


def default_extractor(dataset_name: str) -> Classifier:
    """The project's classifier for "mnist", "digits" or "emoji".

    Raises:
        NoExtractorError: there is none for this data set.
        FileNotFoundError: its weights are not here.
    """
    if dataset_name not in PRESETS:
        raise NoExtractorError(
            f"argument 'extractor': there is none for {dataset_name!r} by default; give 'train', "
            "which trains one, or such as ecar.evaluation.InceptionExtractor(weights)"
        )
    return Classifier.load(dataset_name)


def to_bytes(images: Tensor) -> Tensor:
    """Float images in [-1, 1] -> uint8, as a picture file holds them; what lies outside is cut."""
    return (images.float().clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8)


@torch.no_grad()
def extract(
    extractor: Extractor,
    images: Tensor,
    *,
    batch_size: int = 250,
    device: str | torch.device = "cpu",
    progress: bool = False,
    description: str = "features",
) -> tuple[Tensor, Tensor | None]:
    """uint8 images [N, C, H, W] -> features float32 [N, F], logits [N, K] or None, on the CPU.

    Images reach the extractor as float32 in [-1, 1] on `device`, where it is expected to be.

    Raises:
        ValueError, TypeError: the extractor returned something else, NaN or infinity.
    """
    if not isinstance(images, Tensor) or images.dtype != torch.uint8 or images.dim() != 4:
        came = f"{images.dtype} {list(images.shape)}" if isinstance(images, Tensor) else images
        raise ValueError(f"argument 'images': expected uint8 [N, C, H, W], got {came}")
    features, logits = [], []
    with tqdm(total=len(images), desc=description, unit="image", disable=not progress) as bar:
        for batch in images.split(batch_size):
            returned = extractor(batch.to(device) / 127.5 - 1)
            if not isinstance(returned, tuple) or len(returned) != 2:
                raise TypeError(
                    "argument 'extractor': expected it to return (features, logits or None), got "
                    f"{type(returned).__name__}"
                )
            new_features, new_logits = returned
            if new_features.dim() != 2 or len(new_features) != len(batch):
                raise ValueError(
                    f"argument 'extractor': expected features [{len(batch)}, F], "
                    f"got {list(new_features.shape)}"
                )
            if not new_features.isfinite().all():
                raise ValueError("argument 'extractor': features hold NaN or infinity")
            features.append(new_features.float().cpu())
            if new_logits is not None:
                if new_logits.dim() != 2 or len(new_logits) != len(batch):
                    raise ValueError(
                        f"argument 'extractor': expected logits [{len(batch)}, K], "
                        f"got {list(new_logits.shape)}"
                    )
                if not new_logits.isfinite().all():
                    raise ValueError("argument 'extractor': logits hold NaN or infinity")
                logits.append(new_logits.float().cpu())
            bar.update(len(batch))
    return torch.cat(features), torch.cat(logits) if logits else None
