"""Random arguments of the adaLN family, in every layout that a user may have."""

import torch
from hypothesis import strategies as st

from ecar_kernels.registry import KERNEL_DTYPES

MODULATION = {
    "adaln": ("shift", "scale"),
    "gated_residual": ("gate",),
    "gated_residual_adaln": ("gate", "shift", "scale"),
}
LAYOUTS = ("contiguous", "chunk", "transposed", "expanded", "sliced")


def tokens(batch, count, channels, dtype, layout, device="cpu"):
    """Random [batch, count, channels] in memory as asked."""

    def normal(*shape):
        return torch.randn(*shape, device=device).to(dtype)

    if layout == "chunk":
        return normal(batch, count, 6 * channels).chunk(6, -1)[4]
    if layout == "transposed":
        return normal(count, batch, channels).transpose(0, 1)
    if layout == "expanded":
        return normal(1, 1, channels).expand(batch, count, channels)
    if layout == "sliced":
        return normal(batch + 2, 2 * count + 1, channels + 3)[1:-1, 1::2, 1:-2]
    return normal(batch, count, channels)


def call_of(
    op,
    batch,
    count,
    channels,
    dtype=torch.float32,
    layouts=("contiguous",) * 8,
    whole=(True,) * 3,
    steps=("one",) * 3,
    device="cpu",
):
    """Arguments; the lists are for each tensor, modulation or step in turn.

    whole: whether a modulation is for each token. steps: None, "one" or "rows" (an image's).
    """
    layout = iter(layouts)
    call = {"x": tokens(batch, count, channels, dtype, next(layout), device)}
    if op != "adaln":
        call["branch"] = tokens(batch, count, channels, dtype, next(layout), device)
    for name, each, step in zip(MODULATION[op], whole, steps, strict=False):
        call[name] = tokens(batch, count if each else 1, channels, dtype, next(layout), device)
        if step is not None:
            rows = batch if step == "rows" else 1
            call[f"step_{name}"] = tokens(rows, 1, channels, dtype, next(layout), device)
    return call


@st.composite
def calls(draw, op, channels, images=4, most=40, device="cpu"):
    """Of up to so many images, and tokens of each."""
    three = {"min_size": 3, "max_size": 3}
    shape = (draw(st.integers(0, images)), draw(st.integers(0, most)), draw(channels))
    dtype = draw(st.sampled_from(KERNEL_DTYPES))
    layouts = draw(st.lists(st.sampled_from(LAYOUTS), min_size=8, max_size=8))
    whole = draw(st.lists(st.booleans(), **three))
    steps = draw(st.lists(st.sampled_from([None, "one", "rows"]), **three))
    torch.manual_seed(draw(st.integers(0, 2**32)))
    return call_of(op, *shape, dtype, layouts, whole, steps, device)
