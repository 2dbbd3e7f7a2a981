"""What is known of Triton's interpreter, which stands for the compiler in the other tests here."""

import pytest
import torch

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")


@triton.jit
def product(x, y, copy, out, WIDEN: tl.constexpr):
    at = tl.arange(0, 16)
    at = at[:, None] * 16 + at[None, :]
    a, b = tl.load(x + at), tl.load(y + at)
    tl.store(copy + at, a)
    if WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    tl.store(out + at, tl.dot(a, b, input_precision="ieee"))


def run(dtype, *, widen):
    """(copied, product, what it ought to be) of small whole numbers, which every type holds."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, y = torch.randint(-4, 5, (2, 16, 16), device=device).to(dtype)
    copy, out = torch.empty(2, 16, 16, device=device)
    product[(1,)](x, y, copy, out, widen)
    assert torch.equal(copy, x.float())
    return out, x.float() @ y.float()


@pytest.mark.parametrize("widen", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_products_of_other_types_are_right(dtype, widen):
    out, expected = run(dtype, widen=widen)
    assert torch.equal(out, expected)


def test_products_of_widened_bfloat16_are_right():
    out, expected = run(torch.bfloat16, widen=True)
    assert torch.equal(out, expected)


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled where a GPU is")
def test_products_of_bfloat16_are_still_wrong():
    """Once they are right, `_INTERPRETED` and what it widens can go from the families' kernels."""
    out, expected = run(torch.bfloat16, widen=False)
    assert not torch.equal(out, expected), f"Triton {triton.__version__} multiplies bfloat16 right"
