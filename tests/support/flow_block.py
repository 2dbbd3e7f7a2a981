"""Random arguments of the fused GEMMs, in every layout that a user may have."""

import torch
from hypothesis import strategies as st

from ecar_kernels.registry import KERNEL_DTYPES
from tests.support.adaln import LAYOUTS, tokens

OPS = ("adaln_linear", "linear_gated_residual")
OFFSETS = (1.0, 0.0, -2.5)
CONTIGUOUS = ("contiguous",) * 6


def call_of(
    op,
    batch,
    count,
    depth,
    outputs,
    dtype=torch.float32,
    *,
    layouts=CONTIGUOUS,
    whole=(True, True),
    steps=("one", "one"),
    sliced=False,
    bias=True,
    gelu=True,
    scale_offset=1.0,
    device="cpu",
):
    """Arguments; the lists are for each tensor, modulation or step in turn.

    whole: whether a modulation is for each token. steps: None, "one" or "rows" (an image's).
    sliced: whether the weight's rows lie apart. Outputs keep the inputs' scale.
    """

    def random(tokens_, width, rows=batch):
        return tokens(rows, tokens_, width, dtype, next(layout), device)

    layout = iter(layouts)
    first, names, width = (
        ("x", ("shift", "scale"), depth) if op == "adaln_linear" else ("h", ("gate",), outputs)
    )
    weight = (torch.randn(outputs, depth + 5, device=device) / max(depth, 1) ** 0.5).to(dtype)
    weight = weight[:, 2:-3]
    call = {
        first: random(count, depth),
        "weight": weight if sliced else weight.contiguous(),
        "bias": torch.randn(outputs, device=device).to(dtype) if bias else None,
    }
    for name, every, step in zip(names, whole, steps, strict=False):
        call[name] = random(count if every else 1, width)
        if step is not None:
            call[f"step_{name}"] = random(1, width, batch if step == "rows" else 1)
    if op == "adaln_linear":
        return call | {"activation": "gelu_tanh" if gelu else None, "scale_offset": scale_offset}
    return call | {"residual": random(count, outputs)}


@st.composite
def calls(draw, op, device="cpu"):
    two = {"min_size": 2, "max_size": 2}
    shape = [
        draw(st.integers(0, 3)),
        draw(st.integers(0, 40)),
        draw(st.integers(1, 300)),
        draw(st.integers(1, 120)),
    ]
    kinds = {
        "dtype": draw(st.sampled_from(KERNEL_DTYPES)),
        "layouts": draw(st.lists(st.sampled_from(LAYOUTS), min_size=6, max_size=6)),
        "whole": draw(st.lists(st.booleans(), **two)),
        "steps": draw(st.lists(st.sampled_from([None, "one", "rows"]), **two)),
        "sliced": draw(st.booleans()),
        "bias": draw(st.booleans()),
        "gelu": draw(st.booleans()),
        "scale_offset": draw(st.sampled_from(OFFSETS)),
    }
    torch.manual_seed(draw(st.integers(0, 2**32)))
    return call_of(op, *shape, **kinds, device=device)


def positional(op, arguments):
    """As a backend's registered op and launchers take them."""
    if op == "adaln_linear":
        return (
            *(arguments[name] for name in ("x", "shift", "scale", "weight", "bias")),
            arguments.get("step_shift"),
            arguments.get("step_scale"),
            arguments["activation"] is not None,
            1e-6,
            arguments["scale_offset"],
        )
    return (
        *(arguments[name] for name in ("h", "weight", "bias", "gate", "residual")),
        arguments.get("step_gate"),
    )
