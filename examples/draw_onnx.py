"""An image from the ONNX programs that `ecar export` writes; needs numpy and onnxruntime alone.

It is the image that `ECARPipeline` draws with the same class, seed and settings, to rounding:

    ecar export --checkpoint checkpoints/digits --format onnx --output digits-onnx
    python -m examples.draw_onnx digits-onnx --label 7 --seed 3 --output seven.npy

Another runtime, or a program of another format, needs another `load` and nothing else.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray
Program = Callable[..., Sequence[Array]]


def load(file: Path) -> Program:
    """The program of a file, as a function of its inputs in their order."""
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    names = [node.name for node in session.get_inputs()]
    return lambda *inputs: session.run(None, dict(zip(names, inputs, strict=True)))


def normals(seed: int, stage: int, count: int) -> Array:
    """[count, 4] standard normals of Philox4x32-10, whose key is the seed and whose counter is
    (0 .. count - 1, stage, 0, 0); by Box-Muller (docs/maths.md)."""
    low, seed = np.uint64(0xFFFFFFFF), seed % 2**64
    a, b = np.arange(count, dtype=np.uint64), np.full(count, stage, np.uint64)
    c, d = np.zeros((2, count), np.uint64)
    k0, k1 = np.uint64(seed % 2**32), np.uint64(seed >> 32)
    for _ in range(10):
        p, q = np.uint64(0xD2511F53) * a, np.uint64(0xCD9E8D57) * c
        a, b, c, d = (q >> np.uint64(32)) ^ b ^ k0, q & low, (p >> np.uint64(32)) ^ d ^ k1, p & low
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & low, (k1 + np.uint64(0xBB67AE85)) & low
    uniform = ((np.stack([a, b, c, d], axis=1) + 0.5) / 2**32).astype(np.float32)
    radius = np.sqrt(-2 * np.log(uniform[:, 0::2]))
    angle = np.float32(2 * np.pi) * uniform[:, 1::2]
    pairs = [radius * np.cos(angle), radius * np.sin(angle)]
    return np.stack(pairs, axis=2).reshape(count, 4)


def up(x: Array) -> Array:
    return x.repeat(2, axis=-2).repeat(2, axis=-1)


def jump(end: Array, time: float, seed: int, stage: int) -> Array:
    """The start of a stage [C, 2h, 2w] from the end of the one before [C, h, w]: enlarged, with
    the noise that is missing there."""
    one, two, three = np.moveaxis(normals(seed, stage, end.size)[:, :3], 1, 0).reshape(
        3, *end.shape
    )
    noise = np.empty_like(up(end))
    noise[:, 0::2, 0::2] = (one + two + three) / 2
    noise[:, 0::2, 1::2] = (one - two - three) / 2
    noise[:, 1::2, 0::2] = (two - one - three) / 2
    noise[:, 1::2, 1::2] = (three - one - two) / 2
    return np.float32((1 + time) / 2) * up(end) + np.float32(1 - time) * noise


class Drawer:
    """The programs of a folder.

    Args:
        folder: that `ecar export` wrote.
        load: reads a program.
    """

    def __init__(self, folder: Path, load: Callable[[Path], Program] = load) -> None:
        self.facts: dict[str, Any] = json.loads((folder / "export.json").read_text("utf-8"))
        self.programs = [
            (load(folder / row["begin"]), load(folder / row["step"]))
            for row in self.facts["stages"]
        ]

    def draw(self, labels: Sequence[int], seeds: Sequence[int]) -> Array:
        """Latents [B, C, H, W] of as many classes and seeds, by the settings in export.json."""
        rows, cache, count = self.facts["stages"], [], len(labels)
        guided = any(scale != 1 for row in rows for scale in row["guidance_scale"])
        classes = np.array([*labels, *[self.facts["null_class"]] * count * guided], np.int64)
        shape = rows[0]["shape"]
        calls = -(-int(np.prod(shape)) // 4)
        x = np.stack([normals(s, 1, calls).ravel()[: np.prod(shape)].reshape(shape) for s in seeds])
        for number, (row, (begin, step)) in enumerate(zip(rows, self.programs, strict=True)):
            source = classes
            if number:
                source = np.concatenate([x] * (1 + guided))
                pairs = zip(x, seeds, strict=True)
                time, stage = row["start_time"], number + 1
                x = np.stack([jump(end, time, seed, stage) for end, seed in pairs])
            times = np.array(row["times"], np.float32)
            modulation, modulations, *cache = begin(source, times, *cache)
            modulation = modulation.reshape(1 + guided, count, *modulation.shape[1:])
            velocity = np.zeros_like(x)
            numbers = np.array([row["dt"], row["ratio"], row["guidance_scale"]], np.float32)
            for own, of_step in zip(modulations, numbers.T, strict=True):
                dt, ratio, scale = map(np.asarray, of_step)
                parts = modulation if scale != 1 else modulation[:1]
                x, velocity = step(x, parts, own, dt, ratio, velocity, scale)
        return x


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="that `ecar export` wrote")
    parser.add_argument("--label", type=int, default=0, help="the class (0)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("latent.npy"))
    options = parser.parse_args(arguments)
    np.save(options.output, Drawer(options.folder).draw([options.label], [options.seed])[0])
    print(options.output)


if __name__ == "__main__":
    main()
