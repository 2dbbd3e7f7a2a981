"""Picture files of every kind, read to the values that a viewer shows."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from ecar.data import load_dataset
from ecar.images import BadImageError, check_image, parse_background, read_image

SIDE = 12
LEVEL = 1.01  # of 255: what 16 bits and floats lose on their way to 8


def ramp():
    """Grey from 0 to 1, [SIDE, SIDE] float64, no two rows nor columns alike."""
    return np.linspace(0, 1, SIDE * SIDE).reshape(SIDE, SIDE) ** 0.7


def colours():
    """RGB, uint8 [SIDE, SIDE, 3]."""
    return np.random.default_rng().integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)


def grey(values):
    """RGB levels 0 .. 255 of grey values in 0 .. 1."""
    return np.repeat(255 * values[..., None], 3, -1)


def over(rgb, alpha, background):
    """Levels of colours with alpha 0 .. 255 on a background."""
    share = alpha[..., None] / 255
    return rgb * share + np.asarray(background) * (1 - share)


def png(path, depth, colour_type, rows, *chunks):
    """A PNG by hand, for depths that Pillow does not write. rows: bytes of each."""

    def chunk(kind, data):
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    head = struct.pack(">IIBBBBB", SIDE, SIDE, depth, colour_type, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    parts = [chunk(b"IHDR", head), *(chunk(*c) for c in chunks), chunk(b"IDAT", data)]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts) + chunk(b"IEND", b""))


def grey_16_png(path):
    Image.fromarray(np.rint(ramp() * 65535).astype(np.uint16)).save(path.with_suffix(".png"))
    return grey(ramp())


def grey_16_tiff(path):
    Image.fromarray(np.rint(ramp() * 65535).astype(np.uint16)).save(path.with_suffix(".tif"))
    return grey(ramp())


def grey_16_big_endian_tiff(path):
    Image.fromarray(np.rint(ramp() * 65535).astype(">u2")).save(path.with_suffix(".tiff"))
    return grey(ramp())


def grey_32_tiff(path):
    Image.fromarray(np.rint(ramp() * 65535).astype(np.int32)).save(path.with_suffix(".tif"))
    return grey(ramp())


def grey_16_png_with_a_key(path):
    values = np.rint(ramp() * 65535).astype(np.uint16)
    key = struct.pack(">H", int(values[3, 4]))
    rows = [row.astype(">u2").tobytes() for row in values]
    png(path.with_suffix(".png"), 16, 0, rows, (b"tRNS", key))
    expected = grey(ramp())
    expected[3, 4] = 255
    return expected


def grey_4_png_with_a_key(path):
    values = np.arange(SIDE * SIDE).reshape(SIDE, SIDE) % 16
    packed = (values[:, ::2] << 4 | values[:, 1::2]).astype(np.uint8)
    rows = [row.tobytes() for row in packed]
    png(path.with_suffix(".png"), 4, 0, rows, (b"tRNS", struct.pack(">H", 5)))
    return grey(np.where(values == 5, 1.0, values / 15))


def rgb_16_png(path):
    values = np.random.default_rng().integers(0, 65536, (SIDE, SIDE, 3))
    png(path.with_suffix(".png"), 16, 2, [row.astype(">u2").tobytes() for row in values])
    return values / 257


def rgb_16_png_with_a_key(path):
    values = np.random.default_rng().integers(0, 65536, (SIDE, SIDE, 3))
    key = values[5, 6].astype(">u2").tobytes()
    rows = [row.astype(">u2").tobytes() for row in values]
    png(path.with_suffix(".png"), 16, 2, rows, (b"tRNS", key))
    expected = values / 257
    expected[5, 6] = 255
    return expected


def rgba_16_png(path):
    values = np.random.default_rng().integers(0, 65536, (SIDE, SIDE, 4))
    png(path.with_suffix(".png"), 16, 6, [row.astype(">u2").tobytes() for row in values])
    return over(values[..., :3] / 257, values[..., 3] / 257, (255, 255, 255))


def float_tiff(path):
    Image.fromarray(ramp().astype(np.float32)).save(path.with_suffix(".tif"))
    return grey(ramp())


def one_bit(path):
    values = ramp() > 0.5
    Image.fromarray(values).save(path.with_suffix(".png"))
    return grey(values.astype(float))


def grey_8(path):
    values = np.rint(ramp() * 255).astype(np.uint8)
    Image.fromarray(values).save(path.with_suffix(".bmp"))
    return grey(values / 255)


def grey_alpha(path):
    values = np.rint(ramp() * 255).astype(np.uint8)
    Image.fromarray(np.stack([values, values.T], -1)).save(path.with_suffix(".png"))
    return over(grey(values / 255), values.T, (255, 255, 255))


def rgb(path):
    values = colours()
    Image.fromarray(values).save(path.with_suffix(".tif"))
    return values


def rgba(suffix, **options):
    def write(path):
        values = np.concatenate([colours(), colours()[..., :1]], -1)
        Image.fromarray(values).save(path.with_suffix(suffix), **options)
        return over(values[..., :3].astype(float), values[..., 3], (255, 255, 255))

    write.__name__ = f"rgba_{suffix[1:]}"
    return write


def palette(path):
    image = Image.fromarray(colours()).quantize(16)
    image.save(path.with_suffix(".png"))
    return np.asarray(image.convert("RGB"))


def palette_with_a_transparent_entry(path):
    image = Image.fromarray(colours()).quantize(16)
    expected = np.array(image.convert("RGB"))
    index = int(np.asarray(image)[0, 0])
    image.save(path.with_suffix(".gif"), transparency=index)
    expected[np.asarray(image) == index] = 255
    return expected


def palette_with_alpha(path):
    image = Image.fromarray(colours()).quantize(16)
    alpha = np.arange(0, 256, 16, dtype=np.uint8)
    image.save(path.with_suffix(".png"), transparency=alpha.tobytes())
    indices = np.asarray(image)
    return over(np.asarray(image.convert("RGB")).astype(float), alpha[indices], (255, 255, 255))


def rgb_with_a_key(path):
    values = colours()
    Image.fromarray(values).save(
        path.with_suffix(".png"), transparency=tuple(map(int, values[2, 3]))
    )
    expected = values.copy()
    expected[2, 3] = 255
    return expected


def cmyk(path):
    values = colours()
    inks = np.concatenate([255 - values, np.zeros_like(values[..., :1])], -1)
    Image.fromarray(inks, "CMYK").save(path.with_suffix(".tif"))
    return values


def cmyk_jpeg(path):
    values = np.full((SIDE, SIDE, 3), (200, 100, 50), np.uint8)
    inks = np.concatenate([255 - values, np.zeros_like(values[..., :1])], -1)
    Image.fromarray(inks, "CMYK").save(path.with_suffix(".jpg"), quality=100)
    return values + np.zeros(3)


def ycbcr_jpeg(path):
    values = np.full((SIDE, SIDE, 3), (200, 100, 50), np.uint8)
    Image.fromarray(values).convert("YCbCr").save(path.with_suffix(".jpg"), quality=100)
    return values


def damaged_exif(path):
    values = colours()
    Image.fromarray(values).save(path.with_suffix(".png"), exif=b"Exif\0\0 nonsense")
    return values


KINDS = [
    grey_16_png, grey_16_tiff, grey_16_big_endian_tiff, grey_32_tiff, grey_16_png_with_a_key,
    grey_4_png_with_a_key, rgb_16_png, rgb_16_png_with_a_key, rgba_16_png, float_tiff, one_bit,
    grey_8, grey_alpha, rgb, rgba(".png"), rgba(".webp", lossless=True, exact=True), rgba(".tif"),
    palette, palette_with_a_transparent_entry, palette_with_alpha, rgb_with_a_key, cmyk, cmyk_jpeg,
    ycbcr_jpeg, damaged_exif,
]  # fmt: skip


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_read_as_a_viewer_shows_it(kind, channels, tmp_path):
    """By the data set as well, which every part of the product reads folders through."""
    (tmp_path / "class").mkdir()
    expected = kind(tmp_path / "class" / "picture")
    (path,) = (tmp_path / "class").iterdir()
    allowed = 3 if "jpeg" in kind.__name__ else LEVEL
    allowed += kind is rgba_16_png  # the colour's loss and that of its opacity
    if channels == 1:
        expected = expected @ np.array([0.299, 0.587, 0.114])
        expected, allowed = expected[..., None], allowed + 1
    got = np.asarray(read_image(path, channels), dtype=float).reshape(SIDE, SIDE, channels)
    assert np.abs(got - expected).max() <= allowed
    dataset = load_dataset("folder", root=tmp_path, image_size=SIDE, channels=channels)
    levels = (dataset[0][0].permute(1, 2, 0).numpy() + 1) * 127.5
    np.testing.assert_allclose(levels, got, atol=1e-3)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", ["RGB", "L", "I;16"])
def test_turned_as_exif_says(orientation, suffix, mode, tmp_path):
    corners = np.kron(np.array([[0, 90, 180], [255, 40, 130]]), np.ones((8, 8)))  # 16 x 24
    if mode == "RGB":
        image = Image.fromarray(np.repeat(corners[..., None], 3, -1).astype(np.uint8))
    elif mode == "I;16" and suffix in (".png", ".tif"):  # the others have 8 bits
        image = Image.fromarray((corners * 257).astype(np.uint16))
    else:
        image = Image.fromarray(corners.astype(np.uint8))
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(tmp_path / f"x{suffix}", exif=exif)
    # EXIF 2.32, table "Orientation": where the 0th row and column of the stored picture are.
    shown = {
        1: corners, 2: corners[:, ::-1], 3: corners[::-1, ::-1], 4: corners[::-1],
        5: corners.T, 6: corners[::-1].T, 7: corners[::-1, ::-1].T, 8: corners[:, ::-1].T,
    }[orientation]  # fmt: skip
    got = np.asarray(read_image(tmp_path / f"x{suffix}", 1), dtype=float)
    assert got.shape == shown.shape
    assert np.abs(got - shown).mean() < 12  # JPEG and WebP blur the edges


@pytest.mark.parametrize(
    ("background", "levels"),
    [("white", (255,) * 3), ("black", (0,) * 3), ("#102030", (16, 32, 48)), ((9, 8, 7), (9, 8, 7))],
)
def test_what_is_transparent_lies_on_the_background(background, levels, tmp_path):
    values = np.concatenate([colours(), colours()[..., :1]], -1)
    (tmp_path / "a").mkdir()
    Image.fromarray(values).save(tmp_path / "a" / "x.png")
    dataset = load_dataset("folder", root=tmp_path, image_size=SIDE, background=background)
    got = (dataset[0][0].permute(1, 2, 0).numpy() + 1) * 127.5
    assert np.abs(got - over(values[..., :3].astype(float), values[..., 3], levels)).max() <= LEVEL


@pytest.mark.parametrize(
    "bad", ["glass", "#12", "#0000", (1, 2), (1, 2, 256), (0.5, 0.5, 0.5), None]
)
def test_a_background_that_is_no_colour(bad):
    with pytest.raises(ValueError, match="argument 'background'"):
        parse_background(bad)


@pytest.mark.parametrize(
    ("values", "what"),
    [
        (np.linspace(0, 255, 64, dtype=np.float32), "floats from 0 to 255, expected 0 to 1"),
        (np.linspace(-1, 1, 64, dtype=np.float32), "floats from -1 to 1, expected 0 to 1"),
        (np.array([np.nan] * 64, dtype=np.float32), "NaN"),
        (np.array([np.inf] * 64, dtype=np.float32), "NaN or infinite"),
        (np.arange(-1, 63, dtype=np.int32), "integers from -1 to 62"),
        (np.arange(64, dtype=np.int32) * 2000, "integers from 0 to 126000, expected 0 to 65535"),
    ],
)
def test_another_range_is_refused(values, what, tmp_path):
    (tmp_path / "a").mkdir()
    Image.fromarray(values.reshape(8, 8)).save(tmp_path / "a" / "x.tif")
    assert what in check_image(tmp_path / "a" / "x.tif", decode=False)
    for error in (OSError, ValueError):
        with pytest.raises(error, match=f"x.tif: not a readable image .*{what}"):
            load_dataset("folder", root=tmp_path, image_size=8)


def test_errors_can_be_caught_either_way():
    error = BadImageError([("a.png", "the file is empty")])
    assert isinstance(error, OSError) and isinstance(error, ValueError)
    assert error.files == [("a.png", "the file is empty")]
