"""Data sets of images (or latents) with class labels.

    from ecar.data import load_dataset
    train = load_dataset("mnist")                    # float32 [1, 32, 32] in [-1, 1], int label
    images, labels = train.tensors()
    photos = load_dataset("folder", root="photos", image_size=256, flip=True)

"shards" reads images where they lie in tar files. `cache_latents` runs any data set through a codec
once and writes safetensors shards, which `load_dataset("latents", root=...)` reads lazily.
"""

from .base import ImageDataset, InMemoryDataset
from .folder import FolderDataset
from .latents import LatentDataset, cache_latents
from .load import DATASETS, load_dataset
from .shards import ShardDataset

__all__ = [
    "DATASETS",
    "FolderDataset",
    "ImageDataset",
    "InMemoryDataset",
    "LatentDataset",
    "ShardDataset",
    "cache_latents",
    "load_dataset",
]
