"""Pictures from tensors, sheets, and files that are whole or absent."""

import os

import numpy as np
import pytest
import torch
from PIL import Image

from ecar.images import (
    check_output_file,
    check_output_folder,
    make_sheet,
    save_image,
    to_numpy,
    to_pil,
    to_unit,
)


def random_images(*shape):
    return torch.rand(shape) * 2 - 1


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_tensor_to_picture_and_array(channels, mode):
    images = random_images(3, channels, 5, 7)
    array = to_numpy(images)
    assert array.shape == (3, 5, 7, channels)
    assert array.dtype == np.float32
    np.testing.assert_allclose(array[1, 2, 3], (images[1, :, 2, 3].numpy() + 1) / 2, rtol=1e-6)
    pictures = to_pil(images)
    assert [picture.mode for picture in pictures] == [mode] * 3
    levels = np.asarray(pictures[2]).reshape(5, 7, channels)
    assert np.array_equal(levels, np.rint(array[2] * 255).astype(np.uint8))


def test_values_outside_are_clamped():
    values = torch.tensor([-7.0, -1.0, 0.0, 1.0, 9.0]).view(1, 1, 1, 5)
    assert to_unit(values).flatten().tolist() == [0, 0, 0.5, 1, 1]


def test_half_precision_gives_float32():
    assert to_unit(random_images(1, 1, 2, 2).bfloat16()).dtype == torch.float32


def test_sheet_places_pictures_row_by_row():
    pictures = to_pil(random_images(5, 1, 4, 6))
    sheet = np.asarray(make_sheet(pictures, 2, 3, padding=1, scale=2))
    assert sheet.shape == (2 * 9 + 1, 3 * 13 + 1)
    for index, picture in enumerate(pictures):
        row, column = divmod(index, 3)
        top, left = 1 + row * 9, 1 + column * 13
        cell = sheet[top : top + 8, left : left + 12]
        assert np.array_equal(cell, np.asarray(picture).repeat(2, 0).repeat(2, 1))
    assert not sheet[10:18, 27:39].any()
    assert not sheet[0].any()


@pytest.mark.parametrize("channels", [1, 3])
def test_sheet_has_its_rows_names_at_the_left(channels):
    pictures = to_pil(random_images(6, channels, 8, 8))
    plain = np.asarray(make_sheet(pictures, 2, 3, scale=4))
    names = ["robin", "a name that is longer than there is room for"]
    named = np.asarray(make_sheet(pictures, 2, 3, scale=4, names=names))
    margin = named.shape[1] - plain.shape[1]
    assert named.shape[0] == plain.shape[0] and 60 < margin < 250
    assert np.array_equal(named[:, margin:], plain)
    for row in range(2):  # something is written in the middle of each row, and not at its ends
        left = named[row * 34 : (row + 1) * 34, :margin]
        assert left[10:25].max() > 128 and left[:8].max() == 0 and left[28:].max() == 0


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([Image.new("L", (2, 2))], 1, 1, 0, 1, ["a", "b"]), ValueError, "'names'.*1.*got 2"),
        (([], 1, 1), ValueError, "'images'.*got 0"),
        ((["x"] * 5, 2, 2), ValueError, "'images'.*1 to 4.*got 5"),
        (([Image.new("L", (2, 2)), Image.new("L", (3, 2))], 1, 2), ValueError, "one mode and size"),
        (([Image.new("L", (2, 2))], 0, 2), ValueError, "'rows'.*got 0"),
        (([Image.new("L", (2, 2))], 1, 2.0), TypeError, "'columns'.*2.0"),
        (([Image.new("L", (2, 2))], 1, 1, -1), ValueError, "'padding'.*got -1"),
    ],
)
def test_bad_sheet_is_named(arguments, error, message):
    with pytest.raises(error, match=message):
        make_sheet(*arguments)


@pytest.mark.parametrize(
    ("images", "error"),
    [
        (torch.zeros(1, 2, 4, 4), ValueError),
        (torch.zeros(4, 4), ValueError),
        (torch.zeros(1, 1, 4, 4, dtype=torch.int64), TypeError),
        ([0.0], TypeError),
    ],
)
def test_bad_tensor_is_named(images, error):
    with pytest.raises(error, match="argument 'images'"):
        to_pil(images)


def test_save_replaces_the_file_and_leaves_nothing_else(tmp_path):
    first, second = to_pil(random_images(2, 3, 4, 4))
    path = tmp_path / "picture.png"
    save_image(first, path)
    assert save_image(second, path) == path
    assert [entry.name for entry in tmp_path.iterdir()] == ["picture.png"]
    assert np.array_equal(np.asarray(Image.open(path)), np.asarray(second))


def test_a_failed_save_keeps_the_file_from_before(tmp_path):
    path = tmp_path / "picture.jpg"
    save_image(Image.new("L", (4, 4), 77), path)
    before = path.read_bytes()
    with pytest.raises(OSError, match="RGBA"):  # JPEG has no transparency
        save_image(Image.new("RGBA", (4, 4)), path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["picture.jpg"]


@pytest.mark.parametrize("name", ["file/x.png", "file/further/x.png", "folder.png", "x.xyz", "x"])
def test_unwritable_file_is_named_and_nothing_written(tmp_path, name):
    (tmp_path / "file").write_text("no folder")
    (tmp_path / "folder.png").mkdir()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises((OSError, ValueError), match=name.split("/")[0]):
        check_output_file(tmp_path / name)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs a /proc file system")
def test_unwritable_folder_is_named_even_for_root():
    with pytest.raises(OSError, match=r"/proc/self.*not writable"):
        check_output_folder("/proc/self")


def test_writable_folder_is_left_as_it_was(tmp_path):
    assert check_output_folder(tmp_path) == tmp_path
    assert not list(tmp_path.iterdir())
