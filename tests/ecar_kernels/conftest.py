"""Triton's interpreter, made to round as a GPU does, and stage attention's tiles made small.

What a fixture does to Triton is for the tests that have it in their name; others may ask for it.
"""

import numpy as np
import pytest
import torch

from ecar_kernels.stage_attention import launch


def of_triton(request):
    """Is it a test of Triton's kernels? Others need no Triton."""
    return "triton" in request.node.nodeid


@pytest.fixture(autouse=True)
def bfloat16_rounds_to_nearest(request, monkeypatch):
    """The interpreter of Triton 3.6 to 3.9 rounds to bfloat16 towards zero: of a weight that is 1
    but for an ulp of float32 it makes 1 - 2^-8, an error that no kernel can mend."""
    if not of_triton(request):
        return
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    convert, tl = interpreter._convert_float, interpreter.tl

    def rounded(data, source, target, rounding_mode):
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(data, source, target, rounding_mode)
        # A copy: its own are read-only views, some with strides of zero.
        bits = torch.from_numpy(np.array(data, dtype=np.float32)).to(torch.bfloat16)
        return bits.view(torch.int16).numpy().view(np.uint16)

    monkeypatch.setattr(interpreter, "_convert_float", rounded)


@pytest.fixture
def products_sum_in_order(request, monkeypatch):
    """A GPU's float32 product adds one column after another to its sum, in blocks of any size the
    same bits. numpy's does not; and it rounds a product before it adds it, as here."""
    if not of_triton(request):
        return
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    dot = interpreter.InterpreterBuilder.create_dot

    def in_order(self, a, b, d, *precision):
        if (a.dtype, b.dtype, a.data.ndim) != (interpreter.tl.float32,) * 2 + (2,):
            return dot(self, a, b, d, *precision)
        terms = np.empty((a.data.shape[1] + 1, *d.data.shape), np.float32)
        terms[0] = d.data
        np.multiply(a.data.T[:, :, None], b.data[:, None, :], out=terms[1:])
        # Over the slowest axis numpy adds in turn.
        return interpreter.TensorHandle(np.add.reduce(terms, axis=0), d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", in_order)


@pytest.fixture
def fma_rounds_once(request, monkeypatch):
    """As on a GPU. Triton 3.6's interpreter rounds the product, too."""
    if not of_triton(request):
        return
    interpreter = pytest.importorskip("triton.runtime.interpreter")

    def create_fma(self, x, y, z):
        exact = x.data.astype(np.float64) * y.data + z.data
        return interpreter.TensorHandle(exact.astype(z.data.dtype), z.dtype.scalar)

    if not hasattr(interpreter._interpreter, "fma_fp32"):
        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_fma", create_fma)


@pytest.fixture
def programs_in_any_order(request, monkeypatch):
    """The interpreter runs a launch's programs one after another in a random order, a new one for
    each launch: a list of them. A GPU has no order of its own."""
    launches: list[tuple[tuple[int, ...], torch.Tensor]] = []
    if torch.cuda.is_available() or not of_triton(request):
        return launches
    builder = pytest.importorskip("triton.runtime.interpreter").InterpreterBuilder
    set_dim, set_index = builder.set_grid_dim, builder.set_grid_idx

    def draw(self, *sizes):
        launches.append((sizes, torch.randperm(int(np.prod(sizes)))))
        set_dim(self, *sizes)

    def take(self, *index):
        sizes, order = launches[-1]
        turn = int(order[int(np.ravel_multi_index(index, sizes))])
        set_index(self, *map(int, np.unravel_index(turn, sizes)))

    monkeypatch.setattr(builder, "set_grid_dim", draw)
    monkeypatch.setattr(builder, "set_grid_idx", take)
    return launches


@pytest.fixture
def small_tiles(monkeypatch):
    """Stage attention's in Triton, so that a few tokens make whole and partial blocks on both
    sides."""
    monkeypatch.setattr(launch, "default", lambda *_: launch.Settings(16, 16, 4, 1))
