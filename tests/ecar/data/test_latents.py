"""Cached latents: what goes in comes out, lazily, and damage is named."""

import json
import pickle

import pytest
import torch
from safetensors.torch import save_file
from torch.utils.data import DataLoader

from ecar.data import InMemoryDataset, cache_latents, load_dataset


class Halve:
    """A codec: 2x2 average pooling."""

    def encode(self, images):
        return torch.nn.functional.avg_pool2d(images, 2)


def dataset(count=23, split="train"):
    pixels = torch.randint(0, 256, (count, 3, 8, 8), dtype=torch.uint8)
    return InMemoryDataset("toy", split, pixels, torch.randint(0, 4, (count,)), "abcd")


@pytest.mark.parametrize(("shard_size", "batch_size"), [(5, 4), (23, 7), (3, 23), (100, 5), (4, 4)])
def test_round_trip(tmp_path, shard_size, batch_size):
    source = dataset()
    out = tmp_path / "new" / "cache"
    cache_latents(
        source, Halve(), out, shard_size=shard_size, batch_size=batch_size, progress=False
    )
    latents = load_dataset("latents", root=out)
    images, labels = source.tensors()
    got, got_labels = latents.tensors()
    assert torch.equal(got, Halve().encode(images)) and torch.equal(got_labels, labels)
    assert latents.shape == (3, 4, 4) and latents.class_names == ("a", "b", "c", "d")
    assert len(list(out.glob("*.safetensors"))) == -(-len(source) // shard_size)
    assert {path.suffix for path in out.iterdir()} == {".safetensors", ".json"}


def test_half_precision_is_stored_and_read_back(tmp_path):
    source = dataset()
    cache_latents(source, Halve(), tmp_path, dtype=torch.bfloat16, progress=False)
    expected = Halve().encode(source.tensors()[0]).to(torch.bfloat16).float()
    got = load_dataset("latents", root=tmp_path).tensors()[0]
    assert got.dtype == torch.float32 and torch.equal(got, expected)


def test_worker_processes_and_pickling(tmp_path):
    cache_latents(dataset(), Halve(), tmp_path, shard_size=6, progress=False)
    latents = load_dataset("latents", root=tmp_path)
    expected = latents.tensors()[0]
    assert torch.equal(pickle.loads(pickle.dumps(latents)).tensors()[0], expected)
    batches = DataLoader(latents, batch_size=5, num_workers=1)
    assert torch.equal(torch.cat([batch for batch, _ in batches]), expected)


def test_splits(tmp_path):
    for split in ("train", "test"):
        cache_latents(dataset(9, split), Halve(), tmp_path / split, progress=False)
        assert load_dataset("latents", root=tmp_path, split=split).split == split
    with pytest.raises(ValueError, match="holds the split 'test', 'train' was asked for"):
        load_dataset("latents", root=tmp_path / "test")


def test_a_codec_that_fails_leaves_no_index(tmp_path):
    class Overflows(Halve):
        def encode(self, images):
            return super().encode(images) * float("inf")

    with pytest.raises(ValueError, match="NaN or infinity"):
        cache_latents(dataset(), Overflows(), tmp_path, progress=False)
    with pytest.raises(FileNotFoundError):
        load_dataset("latents", root=tmp_path, split="test")
    with pytest.raises(FileNotFoundError, match=r"index\.json"):
        load_dataset("latents", root=tmp_path)
    cache_latents(dataset(), Halve(), tmp_path, progress=False)
    with pytest.raises(FileExistsError, match=r"index\.json"):
        cache_latents(dataset(), Halve(), tmp_path, progress=False)


@pytest.mark.parametrize("bad", [{"shard_size": 0}, {"batch_size": 2.5}, {"dtype": torch.float64}])
def test_wrong_arguments(tmp_path, bad):
    with pytest.raises(ValueError, match=f"argument '{next(iter(bad))}'"):
        cache_latents(dataset(), Halve(), tmp_path / "x", progress=False, **bad)
    assert not (tmp_path / "x").exists()


def test_damage_is_named(tmp_path):
    cache_latents(dataset(), Halve(), tmp_path, shard_size=10, progress=False)
    second = tmp_path / "latents-00001.safetensors"
    whole = second.read_bytes()

    def refused(message):
        with pytest.raises((ValueError, OSError), match=message) as caught:
            load_dataset("latents", root=tmp_path)
        assert str(tmp_path) in str(caught.value)

    second.write_bytes(whole[:-7])
    refused("latents-00001.safetensors: not a readable")
    second.unlink()
    refused("latents-00001.safetensors: no such file")
    save_file({"latents": torch.rand(10, 3, 2, 2), "labels": torch.zeros(10).long()}, second)
    refused("expected latents F32")
    save_file({"latents": torch.rand(10, 3, 4, 4), "labels": torch.full((10,), 4)}, second)
    refused("labels outside 0..3")
    save_file({"latents": torch.rand(10, 3, 4, 4), "labels": torch.zeros(10)}, second)
    refused("int64 labels")
    second.write_bytes(whole)
    assert len(load_dataset("latents", root=tmp_path)) == 23

    index = tmp_path / "index.json"
    good = json.loads(index.read_text())
    for change, message in [
        ({"count": 22}, "count"),
        ({"format": "other"}, "not an index"),
        ({"shards": [{"file": "../x.safetensors", "count": 23}]}, "'shards' is damaged"),
        ({"shards": [7]}, "'shards' is damaged"),
        ({"shape": None}, "'shape'"),
    ]:
        index.write_text(json.dumps({**good, **change}))
        refused(message)
    index.write_text(index.read_text()[:20])
    refused("not valid JSON")


def test_a_codec_that_draws_is_reproducible(tmp_path):
    class Draws(Halve):
        def encode(self, images):
            pooled = super().encode(images)
            return pooled + torch.randn_like(pooled)

    source, before = dataset(), torch.random.get_rng_state()
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        cache_latents(source, Draws(), tmp_path / name, seed=seed, progress=False)
    a, b, c = (load_dataset("latents", root=tmp_path / name).tensors()[0] for name in "abc")
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert torch.equal(torch.random.get_rng_state(), before)
