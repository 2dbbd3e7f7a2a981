"""Latents computed once and kept in safetensors shards.

A folder holds `index.json` and `latents-00000.safetensors`, ... Each shard has "latents"
[n, C, H, W] and "labels" int64 [n]. The index is written last: a folder without one is the
remains of an interrupted run and is refused.
"""

import bisect
import itertools
import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from .base import ImageDataset
from .folder import split_folder

INDEX = "index.json"
_FORMAT = "ecar-latents-1"
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def cache_latents(
    dataset,
    codec,
    out_dir,
    *,
    shard_size=10_000,
    batch_size=64,
    device="cpu",
    dtype=torch.float32,
    num_workers=0,
    progress=True,
):
    """Encode every image of `dataset` and write shards that `load_dataset("latents")` reads.

    For mirrored copies as well, open the data set with `flip=True`.

    Args:
        dataset: an ImageDataset.
        codec: has encode(images float32 [B, C, H, W] in [-1, 1]) -> latents [B, c, h, w].
        out_dir: made if needed. Must not hold a finished cache.
        shard_size: latents per file.
        device: where images are put before `codec.encode`; put the codec there yourself.
        dtype: float32, bfloat16 or float16, as stored; they are read back as float32.

    Returns: the path of the index.
    Raises:
        FileExistsError: out_dir holds a finished cache.
        ValueError: a wrong argument; the codec returned NaN, infinity or a wrong shape.
    """
    for name, value in (("shard_size", shard_size), ("batch_size", batch_size)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"argument {name!r}: expected an int of at least 1, got {value!r}")
    if dtype not in _DTYPES:
        raise ValueError(f"argument 'dtype': expected float32, bfloat16 or float16, got {dtype}")
    if len(dataset) == 0:
        raise ValueError("argument 'dataset': it is empty")
    out_dir = Path(out_dir)
    if (out_dir / INDEX).exists():
        raise FileExistsError(f"{out_dir / INDEX}: exists; give another folder or remove it")
    out_dir.mkdir(parents=True, exist_ok=True)
    if not os.access(out_dir, os.W_OK):
        raise PermissionError(f"{out_dir}: not writable")

    shards, shape = [], None
    kept_latents, kept_labels, kept = [], [], 0

    def write(count):
        nonlocal kept_latents, kept_labels, kept
        latents, labels = torch.cat(kept_latents), torch.cat(kept_labels)
        path = out_dir / f"latents-{len(shards):05d}.safetensors"
        temporary = path.with_name(path.name + ".tmp")
        part = {"latents": latents[:count].contiguous(), "labels": labels[:count].contiguous()}
        save_file(part, temporary)
        os.replace(temporary, path)
        shards.append({"file": path.name, "count": count})
        kept_latents, kept_labels = [latents[count:]], [labels[count:]]
        kept -= count

    loader = DataLoader(dataset, batch_size=batch_size, num_workers=num_workers)
    with tqdm(total=len(dataset), unit="image", disable=not progress) as bar:
        for images, labels in loader:
            with torch.no_grad():
                latents = codec.encode(images.to(device)).to("cpu", dtype)
            shape = shape or tuple(latents.shape[1:])
            if latents.dim() != 4 or tuple(latents.shape) != (len(images), *shape):
                raise ValueError(
                    f"argument 'codec': expected latents {[len(images), *shape]}, "
                    f"got {list(latents.shape)}"
                )
            if not latents.isfinite().all():
                raise ValueError(
                    "argument 'codec': latents hold NaN or infinity "
                    f"(encoded on {device}, stored as {dtype})"
                )
            kept_latents.append(latents)
            kept_labels.append(labels)
            kept += len(labels)
            while kept >= shard_size:
                write(shard_size)
            bar.update(len(labels))
    if kept:
        write(kept)

    index = {
        "format": _FORMAT,
        "shape": list(shape),
        "dtype": _DTYPES[dtype],
        "count": len(dataset),
        "class_names": list(dataset.class_names),
        "split": dataset.split,
        "source": dataset.name,
        "source_shape": list(dataset.shape),
        "codec": type(codec).__name__,
        "shards": shards,
    }
    temporary = out_dir / (INDEX + ".tmp")
    temporary.write_text(json.dumps(index, indent=2) + "\n")
    os.replace(temporary, out_dir / INDEX)
    return out_dir / INDEX


class LatentDataset(ImageDataset):
    """Shards written by `cache_latents`, memory-mapped; a latent is read when it is asked for.

    Raises:
        FileNotFoundError: no folder, no index, no shard.
        ValueError: the index or a shard is damaged, or is not what the index says.
    """

    def __init__(self, root, *, split="train"):
        folder = Path(root)
        if not (folder / INDEX).is_file():
            folder = split_folder(folder, split, lambda path: (path / INDEX).is_file())
        index = _read_index(folder / INDEX)
        if index.get("split") != split:
            raise ValueError(
                f"{folder / INDEX}: holds the split {index.get('split')!r}, {split!r} was asked for"
            )
        super().__init__("latents", split, index["shape"], index["class_names"])
        self._paths = [str(folder / shard["file"]) for shard in index["shards"]]
        counts = [shard["count"] for shard in index["shards"]]
        self._ends = list(itertools.accumulate(counts))
        if self._ends[-1] != index["count"]:
            raise ValueError(f"{folder / INDEX}: shards hold {self._ends[-1]}, not count")
        self._open_shards = {}
        self._labels = torch.cat(
            [
                self._check_shard(path, count, index["dtype"])
                for path, count in zip(self._paths, counts, strict=True)
            ]
        )

    def _check_shard(self, path, count, dtype):
        if not os.path.isfile(path):
            raise FileNotFoundError(f"{path}: no such file, but {INDEX} lists it")
        try:
            with safe_open(path, framework="pt") as shard:
                latents = shard.get_slice("latents")
                found = (tuple(latents.get_shape()), latents.get_dtype())
                labels = shard.get_tensor("labels")
        except SafetensorError as error:
            raise ValueError(f"{path}: not a readable safetensors shard ({error})") from error
        if found != ((count, *self.shape), dtype):
            raise ValueError(
                f"{path}: expected latents {dtype} {[count, *self.shape]}, "
                f"got {found[1]} {list(found[0])}"
            )
        if labels.dtype != torch.int64 or labels.shape != (count,):
            raise ValueError(
                f"{path}: expected int64 labels [{count}], got {labels.dtype} {list(labels.shape)}"
            )
        if labels.min() < 0 or labels.max() >= self.num_classes:
            raise ValueError(f"{path}: labels outside 0..{self.num_classes - 1}")
        return labels

    @property
    def labels(self):
        return self._labels

    def __getitem__(self, index):
        index = self._index(index)
        number = bisect.bisect_right(self._ends, index)
        if number not in self._open_shards:
            self._open_shards[number] = safe_open(self._paths[number], framework="pt")
        row = index - (self._ends[number - 1] if number else 0)
        latent = self._open_shards[number].get_slice("latents")[row : row + 1]
        return latent[0].to(torch.float32), int(self._labels[index])

    def __getstate__(self):
        # Handles cannot go to a worker process; it opens its own.
        return {**self.__dict__, "_open_shards": {}}


def _read_index(path):
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file; cached latents are written by ecar.data.cache_latents"
        )
    try:
        index = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    if not isinstance(index, dict) or index.get("format") != _FORMAT:
        raise ValueError(f"{path}: not an index of cached latents")
    wanted = {"shape": list, "dtype": str, "count": int, "class_names": list, "shards": list}
    for key, kind in wanted.items():
        if not isinstance(index.get(key), kind) or not index[key]:
            raise ValueError(f"{path}: {key!r} is missing or damaged")
    return index
