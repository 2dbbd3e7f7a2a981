"""Memorising is found: copies are nearer to the training set than new pictures are."""

import pytest
import torch
from PIL import Image

from ecar.data import InMemoryDataset
from ecar.evaluation.neighbours import memorising, nearest_training, neighbour_sheet


def noise(count, side=16):
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8)


def dataset(pixels):
    return InMemoryDataset("folder", "train", pixels, torch.zeros(len(pixels)), "a")


@pytest.mark.parametrize("side", [16, 64])
def test_a_copy_finds_its_original(side, monkeypatch):
    monkeypatch.setattr("ecar.evaluation.neighbours._BLOCK", 7)  # several, the last cut short
    pixels = noise(30, side)
    rows = torch.randint(0, 30, (9,))
    images = pixels[rows].clone()
    index, distance = nearest_training(images, dataset(pixels))
    assert torch.equal(index, rows) and (distance == 0).all()
    # Another by 12 levels everywhere, which is what the distance says.
    brighter = torch.where(images < 128, images + 12, images - 12)
    index, distance = nearest_training(brighter, dataset(pixels))
    assert torch.equal(index, rows)
    if side == 16:
        assert torch.allclose(distance, torch.full((9,), 12.0, dtype=torch.float64))


def test_distance_is_that_of_the_nearest():
    pixels, images = noise(40), noise(5)
    index, distance = nearest_training(images, dataset(pixels))
    exact = (images[:, None].double() - pixels[None].double()).square().flatten(2).mean(2).sqrt()
    assert torch.equal(index, exact.argmin(1))
    assert torch.allclose(distance, exact.amin(1), rtol=1e-6)


def test_copies_are_told_from_new_pictures():
    pixels, held_out = noise(50), noise(20)
    train = dataset(pixels)
    copied, _ = memorising(pixels[:10], held_out, train)
    assert copied["generated"]["median"] == 0 and copied["nearer_than_95 %_of_held_out"] == 1
    new, index = memorising(noise(200), held_out, train)
    assert 0.8 < new["generated"]["median"] / new["held_out"]["median"] < 1.2
    assert new["nearer_than_95 %_of_held_out"] < 0.5 and len(index) == 200


@pytest.mark.parametrize(
    ("images", "message"),
    [(torch.zeros(2, 3, 16, 16), "expected uint8"), (noise(2, 8), r"expected \['N', 3, 16, 16\]")],
)
def test_other_images_are_refused(images, message):
    with pytest.raises(ValueError, match=f"argument 'images': {message}"):
        nearest_training(images, dataset(noise(4)))


def test_the_sheet_has_both(tmp_path):
    pixels = noise(5)
    neighbour_sheet(tmp_path / "x.png", pixels, torch.arange(5).flip(0), dataset(pixels))
    with Image.open(tmp_path / "x.png") as sheet:
        assert sheet.size == (5 * 66 + 2, 2 * 66 + 2)
        colours = [sheet.getpixel((2 + 4 * 66, 2)), sheet.getpixel((2, 2 + 66))]
    # The last sample, and below the first its neighbour, which is the last picture.
    assert colours == [tuple(pixels[4, :, 0, 0].tolist())] * 2
