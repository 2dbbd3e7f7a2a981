"""AMX's tiles: the tests of products and attention on them, and the order of a tile's sums.

Where the CPU has none, of the library in which functions do what the instructions do.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from ecar_kernels import _native, stage_attention
from ecar_kernels.registry import resolve
from tests.support.native import needs_native

ROOT = Path(__file__).parent.parent.parent
FILES = [
    f"tests/ecar_kernels/test_{name}.py"
    for name in (
        "amx",
        "flow_block",
        "flow_block_ops",
        "flow_block_whole",
        "stage_attention",
        "stage_attention_backward",
    )
]
LEAST = float(np.finfo("f").tiny)
needs_tiles = pytest.mark.skipif(
    _native.why_not() is not None or _native.instruction_set() != "amx",
    reason="the kernels use no tiles in this process",
)


@pytest.mark.slow
@needs_native
def test_the_families_on_tiles(tmp_path):
    environment = os.environ | {
        "ECAR_CPU_ISA": "amx", "OMP_NUM_THREADS": "1", "PYTEST_ADDOPTS": ""
    }  # fmt: skip
    if not _native.multiplies_bfloat16():
        pytest.skip("this CPU has no AVX512_BF16, which the kernels with tiles use, too")
    if _native.instruction_set() != "amx":
        folder, own = tmp_path / "build", {"CMAKE_ARGS": "-DECAR_AMX_STAND_IN=ON"}
        command = [sys.executable, "setup.py", "build_ext"]
        command += ["--build-lib", tmp_path, "--build-temp", folder]
        subprocess.run(command, cwd=ROOT, check=True, env=os.environ | own)
        environment["ECAR_LIBRARY"] = str(tmp_path / "ecar_kernels" / "libecar_cpu.so")
    code = (
        "import sys, pytest; from ecar_kernels import _native; "
        "assert _native.instruction_set() == 'amx'; "
        "options = ['-q', '-k', 'not triton and not flex and not instruction and not on_tiles', "
        "'-p', 'no:xdist', '-p', 'no:cacheprovider']; "
        f"sys.exit(pytest.main([*options, *{FILES}]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


def flushed(value):
    return np.where(np.abs(value) < LEAST, np.float32(0), value.astype("f"))


def product_of_tiles(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x @ weight.T by TDPBF16PS, as Intel's manual has it: in each 32 elements the products of even
    ones and those of odd ones are summed apart, then added, then added to what was before. Each sum
    is rounded to float32; subnormals are zeros."""
    x, weight = (flushed(t.float().numpy()).astype("d") for t in (x, weight))
    total = np.zeros((len(x), len(weight)), "f")
    for begin in range(0, x.shape[1], 32):
        parts = []
        for first in (begin, begin + 1):
            part = np.zeros_like(total)
            for k in range(first, min(begin + 32, x.shape[1]), 2):
                part = flushed((part + np.outer(x[:, k], weight[:, k])).astype("f"))
            parts.append(part)
        total = flushed(total + flushed(parts[0] + parts[1]))
    return torch.from_numpy(total)


def numbers(*shape: int) -> torch.Tensor:
    """Of which sums are rounded."""
    return torch.randn(*shape) * 2.0 ** torch.randint(0, 12, shape)


@needs_tiles
@pytest.mark.parametrize("depth", [64, 128, 40, 21, 1])
@pytest.mark.parametrize("kind", ["any", "pairs", "halves", "small"])
def test_the_order_of_a_tiles_sums(kind, depth):
    """Bit for bit. Where a tile's last odd elements are the negatives of its first even ones, or
    the second half those of the first, another order leaves rounding errors where there is nothing.
    """
    x, weight = numbers(37, depth), numbers(50, depth)
    if kind == "pairs":
        for begin in range(0, depth, 32):
            half = (min(begin + 32, depth) - begin) // 4 * 2
            even, odd = slice(begin, begin + half, 2), slice(begin + half + 1, begin + 2 * half, 2)
            x[:, odd], weight[:, odd] = -x[:, even], weight[:, even]
            x[:, begin + 1 : begin + half : 2] = x[:, begin + half : begin + 32 : 2] = 0
    elif kind == "halves":
        half = depth // 2
        x[:, depth - half :], weight[:, depth - half :] = -x[:, :half], weight[:, :half]
    elif kind == "small":  # subnormal factors, and subnormal products of normal ones
        x[::2] *= 2.0**-140
        x[1::2] *= 2.0**-70
        weight[::2] *= 2.0**100
        weight[1::2] *= 2.0**-75
    x, weight = x.bfloat16(), weight.bfloat16()
    run = resolve("linear_gated_residual", device="cpu", dtype=torch.bfloat16, backend="cpp")
    gate = torch.ones(1, 1, 50, dtype=torch.bfloat16)
    found = run(x[None], weight, None, gate, torch.zeros(1, 37, 50, dtype=torch.bfloat16))
    assert found[0].equal(product_of_tiles(x, weight).bfloat16())


@needs_tiles
def test_attention_takes_tiles():
    """Its scores are sums that are zero in a tile's order alone; then all keys weigh the same."""
    q, k = numbers(1, 24, 2, 64), numbers(1, 32, 2, 64)
    q[..., 32:], k[..., 32:] = -q[..., :32], k[..., :32]
    v = torch.ones(1, 32, 2, 64)
    v[:, ::2] = -1
    run = resolve("stage_attention", device="cpu", dtype=torch.bfloat16, backend="cpp", width=64)
    found = run(*(x.bfloat16() for x in (q, k, v)), (8, 24))
    assert found.count_nonzero() == 0


@needs_tiles
def test_attentions_gradients_take_tiles():
    """As above; then all values have the same gradient."""
    q, k = numbers(1, 200, 2, 64), numbers(1, 200, 2, 64)
    q[..., 32:], k[..., 32:] = -q[..., :32], k[..., :32]
    q, k, v = (x.bfloat16().requires_grad_() for x in (q, k, torch.randn(1, 200, 2, 64)))
    out = stage_attention(q, k, v, (200,))
    out.backward(torch.randn_like(out))
    assert v.grad.equal(v.grad[:, :1].expand_as(v)) and v.grad.count_nonzero() > 0
