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


class Counts(Halve):
    """Counts the images it encodes, and fails at one of its calls."""

    def __init__(self, fails_at=None):
        self.calls, self.images, self.fails_at = 0, 0, fails_at

    def encode(self, images):
        self.calls += 1
        if self.calls == self.fails_at:
            raise KeyboardInterrupt
        self.images += len(images)
        return super().encode(images) + 0.1 * torch.randn(len(images), 3, 4, 4)

    def describe(self):
        return {"kind": "counts"}


def test_an_interrupted_run_goes_on_to_the_same_cache(tmp_path):
    source = dataset()
    options = {"shard_size": 5, "batch_size": 2, "progress": False}
    cache_latents(source, Counts(), tmp_path / "whole", **options)
    first, second, third = Counts(fails_at=9), Counts(), Counts()
    with pytest.raises(KeyboardInterrupt):
        cache_latents(source, first, tmp_path / "cut", **options)
    assert first.images == 1 + 12  # the first tells the shape; two shards, and some of the third
    with pytest.raises(FileNotFoundError, match="`ecar cache` was interrupted"):
        load_dataset("latents", root=tmp_path / "cut")
    cache_latents(source, second, tmp_path / "cut", **options)
    assert second.images == 1 + len(source) - 10
    cache_latents(source, third, tmp_path / "cut", **options)
    assert third.images == 1
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "cut" / path.name).read_bytes() == path.read_bytes()


def test_processes_share_the_shards(tmp_path):
    source, codecs = dataset(), [Counts() for _ in range(3)]
    for rank, codec in enumerate(codecs):
        assert "mean" not in json.loads((tmp_path / "a" / "index.json").read_text()) if rank else 1
        cache_latents(
            source, codec, tmp_path / "a", shard_size=5, progress=False, rank=rank, world=3
        )
    assert [codec.images - 1 for codec in codecs] == [10, 8, 5]
    cache_latents(source, Counts(), tmp_path / "b", shard_size=5, progress=False)
    for path in (tmp_path / "a").iterdir():
        assert (tmp_path / "b" / path.name).read_bytes() == path.read_bytes()


def test_the_index_has_mean_and_deviation_of_each_channel(tmp_path):
    index = json.loads(cache_latents(dataset(), Halve(), tmp_path, progress=False).read_text())
    latents = load_dataset("latents", root=tmp_path).tensors()[0].double()
    deviation, mean = torch.std_mean(latents, (0, 2, 3), correction=0)
    torch.testing.assert_close(torch.tensor(index["mean"]).double(), mean, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(torch.tensor(index["std"]).double(), deviation, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("source_sha256", {"dataset": dataset()}),
        ("count", {"dataset": dataset(22)}),
        ("split", {"dataset": dataset(split="test")}),
        ("codec", {"codec": Counts()}),
        ("dtype", {"dtype": torch.float16}),
        ("seed", {"seed": 1}),
        ("shard_size", {"shard_size": 6}),
    ],
)
def test_another_cache_is_refused(tmp_path, name, change):
    arguments = {"dataset": dataset(), "codec": Halve(), "shard_size": 5, "progress": False}
    index = cache_latents(**arguments, out_dir=tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=f"of another cache: '{name}' is .* there, .* here") as e:
        cache_latents(**arguments | change, out_dir=tmp_path)
    assert str(index) in str(e.value) and len(str(e.value)) < 300 + len(str(index))
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_shard_of_another_cache_is_written_again(tmp_path):
    """As where an interrupted one's index was removed."""
    source = dataset()
    cache_latents(source, Halve(), tmp_path, seed=1, shard_size=10, progress=False)
    (tmp_path / "index.json").unlink()
    (tmp_path / "latents-00002.safetensors").write_bytes(b"cut")
    cache_latents(source, Halve(), tmp_path, seed=2, shard_size=10, progress=False)
    images, _ = source.tensors()
    assert torch.equal(load_dataset("latents", root=tmp_path).tensors()[0], Halve().encode(images))


@pytest.mark.parametrize(
    "bad",
    [{"shard_size": 0}, {"batch_size": 2.5}, {"dtype": torch.float64}, {"world": 0}, {"rank": 1}],
)
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
