"""Latents computed once and kept in safetensors shards.

A folder holds `index.json` and `latents-00000.safetensors`, ... Each shard has "latents"
[n, C, H, W] and "labels" int64 [n]. The index is written last: a folder without one is the
remains of an interrupted run and is refused.
"""

from __future__ import annotations

import bisect
import itertools
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ecar.files import check_output_folder, read_json, write_json, write_tensors

from .base import ImageDataset, MissingSplitError, check_dataset, checked_labels
from .folder import split_folder

INDEX = "index.json"
_FORMAT = "ecar-latents-1"
_LOOK_AT_ALL_BELOW = 128 << 20  # bytes; of larger caches some latents of each shard
_LOOKED_AT = 32
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def cache_latents(
    dataset: ImageDataset,
    codec: Any,
    out_dir: str | os.PathLike[str],
    *,
    shard_size: int = 10_000,
    batch_size: int = 64,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    num_workers: int = 0,
    seed: int = 0,
    progress: bool = True,
) -> Path:
    """Encode every image of `dataset` and write shards that `load_dataset("latents")` reads.

    For mirrored copies as well, open the data set with `flip=True`.

    Args:
        dataset: an ImageDataset, or what has its attributes: images in [-1, 1], labels of classes.
        codec: has encode(images float32 [B, C, H, W] in [-1, 1]) -> latents [B, c, h, w].
        out_dir: made if needed. Must not hold a finished cache.
        shard_size: latents per file.
        device: where images are put before `codec.encode`; put the codec there yourself.
        dtype: float32, bfloat16 or float16, as stored; they are read back as float32.
        seed: of torch's default generators meanwhile, for a codec that draws its latents. Their
            state outside is left alone.

    Returns: the path of the index.
    Raises:
        FileExistsError: out_dir holds a finished cache.
        ValueError, TypeError: a wrong argument; images or labels that are not as documented; the
            codec returned NaN, infinity or a wrong shape.
    """
    for name, value in (("shard_size", shard_size), ("batch_size", batch_size)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"argument {name!r}: expected an int of at least 1, got {value!r}")
    if dtype not in _DTYPES:
        raise ValueError(f"argument 'dtype': expected float32, bfloat16 or float16, got {dtype}")
    if len(dataset) == 0:
        raise ValueError("argument 'dataset': it is empty")
    check_dataset(dataset, dataset.shape, dataset.num_classes, name="dataset", pixels=True)
    out_dir = Path(out_dir)
    if (out_dir / INDEX).exists():
        raise FileExistsError(f"{out_dir / INDEX}: exists; give another folder or remove it")
    out_dir.mkdir(parents=True, exist_ok=True)
    check_output_folder(out_dir)

    shards: list[dict[str, Any]] = []
    shape: tuple[int, ...] = ()
    waiting: list[tuple[Tensor, Tensor]] = []  # (latents, labels) of batches not yet written

    def write(count: int) -> None:
        """Move the first `count` latents that are waiting to a shard."""
        latents, labels = (torch.cat(parts) for parts in zip(*waiting, strict=True))
        name = f"latents-{len(shards):05d}.safetensors"
        write_tensors(out_dir / name, {"latents": latents[:count], "labels": labels[:count]})
        shards.append({"file": name, "count": count})
        # Cloned, or the rest of a batch would keep the written shard in memory.
        waiting[:] = [(latents[count:].clone(), labels[count:].clone())]

    left = 0
    loader = DataLoader(dataset, batch_size=batch_size, num_workers=num_workers)
    with (
        torch.random.fork_rng(),
        tqdm(total=len(dataset), desc="encoding", unit="image", disable=not progress) as bar,
    ):
        torch.manual_seed(seed)
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
            labels = checked_labels(labels, dataset.num_classes, name="dataset")
            waiting.append((latents, labels))
            left += len(labels)
            while left >= shard_size:
                write(shard_size)
                left -= shard_size
            bar.update(len(labels))
    if left:
        write(left)

    index = {
        "format": _FORMAT,
        "shape": list(shape),
        "dtype": _DTYPES[dtype],
        "count": len(dataset),
        "class_names": list(dataset.class_names),
        "split": dataset.split,
        "source": dataset.name,
        "source_shape": list(dataset.shape),
        "codec": repr(codec),
        "seed": seed,
        "shards": shards,
    }
    write_json(out_dir / INDEX, index)
    return out_dir / INDEX


class LatentDataset(ImageDataset):
    """Shards written by `cache_latents`, memory-mapped; a latent is read when it is asked for.

    Raises:
        FileNotFoundError: no folder, no index, no shard.
        ValueError: the index or a shard is damaged, or is not what the index says; latents that are
            not finite (of caches of 128 MiB or more some are looked at); labels of no class.
    """

    def __init__(self, root: str | os.PathLike[str], *, split: str = "train") -> None:
        folder = Path(root)
        if not (folder / INDEX).is_file():
            folder = split_folder(folder, split, lambda path: (path / INDEX).is_file())
        index = _read_index(folder / INDEX)
        if index.get("split") != split:
            raise MissingSplitError(
                f"{folder / INDEX}: holds the split {index.get('split')!r}, {split!r} was asked for"
            )
        super().__init__("latents", split, index["shape"], index["class_names"])
        self._paths = [str(folder / shard["file"]) for shard in index["shards"]]
        counts = [shard["count"] for shard in index["shards"]]
        self._ends = list(itertools.accumulate(counts))
        if self._ends[-1] != index["count"]:
            raise ValueError(f"{folder / INDEX}: shards hold {self._ends[-1]}, not count")
        self._open_shards: dict[int, Any] = {}
        sizes = (os.path.getsize(path) for path in self._paths if os.path.isfile(path))
        self._look_at_all = sum(sizes) < _LOOK_AT_ALL_BELOW
        self._labels = torch.cat(
            [
                self._check_shard(path, count, index["dtype"])
                for path, count in zip(self._paths, counts, strict=True)
            ]
        )

    def _check_shard(self, path: str, count: int, dtype: str) -> Tensor:
        if not os.path.isfile(path):
            raise FileNotFoundError(f"{path}: no such file, but {INDEX} lists it")
        try:
            with safe_open(path, framework="pt") as shard:
                latents = shard.get_slice("latents")
                found = (tuple(latents.get_shape()), latents.get_dtype())
                labels = shard.get_tensor("labels")
                step = 1 if self._look_at_all else -(-count // _LOOKED_AT)
                finite = found != ((count, *self.shape), dtype) or all(
                    latents[row : row + 1].isfinite().all() for row in range(0, count, step)
                )
        except SafetensorError as error:
            raise ValueError(f"{path}: not a readable safetensors shard ({error})") from error
        if found != ((count, *self.shape), dtype):
            raise ValueError(
                f"{path}: expected latents {dtype} {[count, *self.shape]}, "
                f"got {found[1]} {list(found[0])}"
            )
        if not finite:
            raise ValueError(f"{path}: latents hold NaN or infinite values")
        if labels.dtype != torch.int64 or labels.shape != (count,):
            raise ValueError(
                f"{path}: expected int64 labels [{count}], got {labels.dtype} {list(labels.shape)}"
            )
        wrong = labels[(labels < 0) | (labels >= self.num_classes)]
        if len(wrong):
            raise ValueError(
                f"{path}: labels outside 0..{self.num_classes - 1}, such as {int(wrong[0])}"
            )
        return labels

    @property
    def labels(self) -> Tensor:
        return self._labels

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        index = self._row(index)
        number = bisect.bisect_right(self._ends, index)
        if number not in self._open_shards:
            self._open_shards[number] = safe_open(self._paths[number], framework="pt")
        row = index - (self._ends[number - 1] if number else 0)
        latent = self._open_shards[number].get_slice("latents")[row : row + 1]
        return latent[0].to(torch.float32), int(self._labels[index])

    def __getstate__(self) -> dict[str, Any]:
        # Handles cannot go to a worker process; it opens its own.
        return {**self.__dict__, "_open_shards": {}}


def _read_index(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file; cached latents are written by ecar.data.cache_latents"
        )
    index = read_json(path)
    if not isinstance(index, dict) or index.get("format") != _FORMAT:
        raise ValueError(f"{path}: not an index of cached latents")
    wanted = {"shape": list, "dtype": str, "count": int, "class_names": list, "shards": list}
    for key, kind in wanted.items():
        if not isinstance(index.get(key), kind) or not index[key]:
            raise ValueError(f"{path}: {key!r} is missing or damaged")
    if index["dtype"] not in _DTYPES.values():
        raise ValueError(
            f"{path}: expected latents {', '.join(_DTYPES.values())}, got {index['dtype']!r}"
        )
    for shard in index["shards"]:
        name, count = (
            (shard.get("file"), shard.get("count")) if isinstance(shard, dict) else ("", 0)
        )
        if not name or Path(name).name != name or not isinstance(count, int) or count < 1:
            raise ValueError(f"{path}: 'shards' is damaged")
    return index
