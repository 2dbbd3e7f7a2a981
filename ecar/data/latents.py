"""Latents computed once and kept in safetensors shards.

A folder holds `index.json` and `latents-00000.safetensors`, ... Each shard has "latents"
[n, C, H, W] and "labels" int64 [n]. The index is written first, and says what the shards will be
made from; each shard names it, so that an interrupted run goes on and several processes share the
work.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
import os
import reprlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm.auto import tqdm

from ecar.files import check_output_folder, check_target, read_json, write_json, write_tensors

from .base import ImageDataset, MissingSplitError, check_dataset, checked_labels, load_batches
from .folder import split_folder

INDEX = "index.json"
_FORMAT = "ecar-latents-1"
_LOOK_AT_ALL_BELOW = 128 << 20  # bytes; of larger caches some latents of each shard
_LOOKED_AT = 32
_DIGESTED = 16  # images of a data set, to know it again
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
    rank: int = 0,
    world: int = 1,
) -> Path:
    """Encode every image of `dataset` and write shards that `load_dataset("latents")` reads.

    Called again with the same arguments it goes on where it was interrupted: shards that are there
    are kept. For mirrored copies as well, open the data set with `flip=True`.

    Args:
        dataset: an ImageDataset, or what has its attributes: images in [-1, 1], labels of classes.
        codec: has encode(images float32 [B, C, H, W] in [-1, 1]) -> latents [B, c, h, w], and
            where it can tell, describe() -> what it is, as JSON.
        out_dir: made if needed. Must hold no other cache.
        shard_size: latents per file.
        device: where images are put before `codec.encode`; put the codec there yourself.
        dtype: float32, bfloat16 or float16, as stored; they are read back as float32.
        seed: for a codec that draws its latents: torch's default generators are seeded by it and
            the shard's number. Their state outside is left alone.
        rank, world: of `world` processes that share the work, without a word to each other, this
            one encodes the shards rank, rank + world, .. .

    Returns: the path of the index. It has "mean" and "std" of each channel once all shards are
        there.
    Raises:
        ValueError, TypeError: a wrong argument; out_dir holds a cache of other images, of another
            codec or of other settings; images or labels that are not as documented; the codec
            returned NaN, infinity or a wrong shape.
    """
    for name, value in (("shard_size", shard_size), ("batch_size", batch_size), ("world", world)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"argument {name!r}: expected an int of at least 1, got {value!r}")
    if not isinstance(rank, int) or not 0 <= rank < world:
        raise ValueError(f"argument 'rank': expected an int from 0 to {world - 1}, got {rank!r}")
    if dtype not in _DTYPES:
        raise ValueError(f"argument 'dtype': expected float32, bfloat16 or float16, got {dtype}")
    if len(dataset) == 0:
        raise ValueError("argument 'dataset': it is empty")
    check_dataset(dataset, dataset.shape, dataset.num_classes, name="dataset", pixels=True)
    out_dir, device = Path(out_dir), torch.device(device)
    check_output_folder(out_dir)

    def encode(images: Tensor) -> Tensor:
        with torch.no_grad():
            latents = codec.encode(images.to(device)).to("cpu", dtype)
        expected = (len(images), *shape) if shape else (len(images), *latents.shape[1:])
        if latents.dim() != 4 or tuple(latents.shape) != expected:
            raise ValueError(
                f"argument 'codec': expected latents {list(expected)}, got {list(latents.shape)}"
            )
        if not latents.isfinite().all():
            raise ValueError(
                "argument 'codec': latents hold NaN or infinity "
                f"(encoded on {device}, stored as {dtype})"
            )
        return latents

    # Of a codec that draws, a generator's state goes with its device.
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        shape: tuple[int, ...] = ()
        shape = tuple(encode(dataset[0][0][None]).shape[1:])
        starts = range(0, len(dataset), shard_size)
        spans = [range(first, min(first + shard_size, len(dataset))) for first in starts]
        files = [out_dir / f"latents-{number:05d}.safetensors" for number in range(len(spans))]
        plan = {
            "format": _FORMAT,
            "split": dataset.split,
            "count": len(dataset),
            "source": dataset.name,
            "source_shape": list(dataset.shape),
            "source_sha256": _digest(dataset),
            "class_names": list(dataset.class_names),
            "codec": describe_codec(codec),
            "shape": list(shape),
            "dtype": _DTYPES[dtype],
            "seed": seed,
            "shard_size": shard_size,
            "shards": [
                {"file": file.name, "count": len(span)}
                for file, span in zip(files, spans, strict=True)
            ],
        }
        key = hashlib.sha256(json.dumps(plan).encode()).hexdigest()
        _claim(out_dir / INDEX, plan)
        mine = range(rank, len(spans), world)
        todo = [number for number in mine if _moments(files[number], key) is None]
        for number in todo:
            check_target(files[number])
        if not (out_dir / INDEX).exists():
            write_json(out_dir / INDEX, plan)
        batches = [
            spans[number][first : first + batch_size]
            for number in todo
            for first in range(0, len(spans[number]), batch_size)
        ]
        loader = load_batches(dataset, batches, workers=num_workers)
        total = sum(len(spans[number]) for number in mine)
        with tqdm(
            total=total,
            initial=total - sum(map(len, batches)),
            desc=f"encoding {dataset.split}",
            unit="image",
            disable=not progress,
        ) as bar:
            for number in todo:
                torch.manual_seed(shard_seed(seed, number))
                parts = []
                for images, labels in itertools.islice(
                    loader, -(-len(spans[number]) // batch_size)
                ):
                    labels = checked_labels(labels, dataset.num_classes, name="dataset")
                    parts.append((encode(images), labels))
                    bar.update(len(labels))
                latents, labels = (torch.cat(part) for part in zip(*parts, strict=True))
                values = latents.double()
                moments = [values.sum((0, 2, 3)).tolist(), (values**2).sum((0, 2, 3)).tolist()]
                write_tensors(
                    files[number],
                    {"latents": latents, "labels": labels},
                    {"cache": json.dumps([key, *moments])},
                )
    done = [_moments(file, key) for file in files]
    if None not in done:
        pixels = len(dataset) * shape[1] * shape[2]
        mean, square = np.sum(np.array(done), 0) / pixels
        deviation = np.sqrt(np.maximum(square - mean**2, 0))
        write_json(out_dir / INDEX, {**plan, "mean": mean.tolist(), "std": deviation.tolist()})
    return out_dir / INDEX


def describe_codec(codec: Any) -> dict[str, Any]:
    """What a codec says of itself, to know it again: of a VAE its weights, shift and scale."""
    return codec.describe() if hasattr(codec, "describe") else {"kind": type(codec).__name__}


def _digest(dataset: ImageDataset) -> str:
    """Of a data set's labels and names, and of some images spread over it."""
    digest = hashlib.sha256(json.dumps(list(dataset.class_names)).encode())
    rows = np.linspace(0, len(dataset) - 1, min(len(dataset), _DIGESTED)).round().astype(int)
    if isinstance(dataset, ImageDataset):
        digest.update(dataset.labels.numpy().tobytes())
    for row in rows.tolist():
        image, label = dataset[row]
        digest.update(np.asarray(image, dtype=np.float32).tobytes())
        digest.update(str(int(label)).encode())
    return digest.hexdigest()


def _claim(index: Path, plan: dict[str, Any]) -> None:
    """ValueError naming what differs, where another cache is there."""
    if not index.exists():
        return
    there = _read_index(index)
    for name, value in plan.items():
        if there.get(name) != value:
            raise ValueError(
                f"{index}: of another cache: {name!r} is {reprlib.repr(there.get(name))} there, "
                f"{reprlib.repr(value)} here; give another folder, or remove it"
            )


def _moments(file: Path, key: str) -> list[list[float]] | None:
    """Each channel's sum and sum of squares, as the shard names them; None if it is not there, or
    of another cache."""
    if not file.is_file():
        return None
    try:
        with safe_open(file, framework="numpy") as shard:
            found, *moments = json.loads((shard.metadata() or {}).get("cache", "[null]"))
    except SafetensorError:
        return None
    return moments if found == key else None


def shard_seed(seed: int, number: int) -> int:
    """What torch's generators are seeded by before a shard is encoded."""
    return int(np.random.SeedSequence([seed, number]).generate_state(1, np.uint64)[0] >> 1)


class LatentDataset(ImageDataset):
    """Shards written by `cache_latents`, memory-mapped; a latent is read when it is asked for.

    Attributes:
        codec: what encoded them, as `describe_codec` has it.

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
        self.codec = index.get("codec")
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
            raise FileNotFoundError(
                f"{path}: no such file, but {INDEX} lists it; where `ecar cache` was interrupted, "
                "the same command goes on"
            )
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
        raise FileNotFoundError(f"{path}: no such file; cached latents are written by `ecar cache`")
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
