"""Feature extraction over any extractor, and the .npz export."""

import sys

import numpy as np
import pytest
import torch

from ecar.evaluation import InceptionExtractor, extract, save_npz
from ecar.evaluation.extractors import default_extractor, to_bytes


def mean_color(images):
    return images.mean((2, 3)), None


def test_features_of_batches_are_those_of_the_whole():
    images = torch.randint(0, 256, (23, 3, 5, 4), dtype=torch.uint8)
    features, logits = extract(mean_color, images, batch_size=7)
    assert logits is None and features.shape == (23, 3)
    expected = images.double().mean((2, 3)) / 127.5 - 1
    assert torch.allclose(features.double(), expected, atol=1e-6)


def test_bytes():
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.equal(to_bytes(levels / 127.5 - 1), levels)
    assert to_bytes(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]


def test_a_bad_extractor_is_named():
    images = torch.zeros(6, 1, 4, 4, dtype=torch.uint8)
    for bad in (lambda x: (x, None), lambda x: (x[:1].flatten(1), None)):
        with pytest.raises(ValueError, match="argument 'extractor': expected features"):
            extract(bad, images)
    with pytest.raises(ValueError, match="NaN"):
        extract(lambda x: (x.flatten(1) / 0, None), images + 128)
    with pytest.raises(ValueError, match="argument 'images'"):
        extract(mean_color, images.float())


def test_default_extractors():
    assert default_extractor("digits").config.image_size == 8
    with pytest.raises(ValueError, match="argument 'extractor': there is none for 'folder'"):
        default_extractor("folder")


def test_inception_weights_are_checked_before_they_are_read(tmp_path, monkeypatch):
    path = tmp_path / "weights.pth"
    with pytest.raises(FileNotFoundError, match=r"weights-inception-2015-12-05-6726825d\.pth"):
        InceptionExtractor(path)
    path.write_bytes(b"anything")
    with pytest.raises(ValueError, match=r"weights\.pth: not weights-inception"):
        InceptionExtractor(path)
    monkeypatch.setattr("ecar.evaluation.extractors._INCEPTION_SHA256", "")
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(ImportError, match=r"pip install ecar\[inception\]"):
        InceptionExtractor(path)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("as_tensor", [True, False])
def test_npz(tmp_path, channels, as_tensor):
    images = torch.randint(0, 256, (6, 5, 4, channels), dtype=torch.uint8)
    labels = torch.randint(0, 1000, (6,))
    given = (images, labels) if as_tensor else (images.numpy(), labels.numpy())
    path = save_npz(tmp_path / "samples.npz", *given)
    with np.load(path, allow_pickle=False) as archive:
        assert set(archive) == {"arr_0", "arr_1"}
        assert archive["arr_0"].dtype == np.uint8 and archive["arr_1"].dtype == np.int64
        assert np.array_equal(archive["arr_0"], images.expand(-1, -1, -1, 3).numpy())
        assert np.array_equal(archive["arr_1"], labels.numpy())
    save_npz(path, images, None)
    with np.load(path, allow_pickle=False) as archive:
        assert set(archive) == {"arr_0"}
    assert [p.name for p in tmp_path.iterdir()] == ["samples.npz"]


def test_npz_refuses(tmp_path):
    images = torch.zeros(2, 4, 4, 3, dtype=torch.uint8)
    for bad, error, message in [
        (("x.npy", images, None), ValueError, "argument 'path'"),
        (("x.npz", images.float(), None), TypeError, "argument 'images'"),
        (("x.npz", images[0], None), ValueError, "argument 'images'"),
        (("x.npz", images.permute(0, 3, 1, 2), None), ValueError, "argument 'images'"),
        (("x.npz", images, torch.zeros(2)), TypeError, "argument 'labels'"),
        (("x.npz", images, torch.zeros(3).long()), ValueError, "argument 'labels'"),
    ]:
        with pytest.raises(error, match=message):
            save_npz(tmp_path / bad[0], *bad[1:])
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        save_npz(tmp_path / "file" / "x.npz", images, None)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
