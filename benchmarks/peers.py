"""What other libraries have for an op: PyTorch, flash-attn and xformers, for attention.

Each peer is a function with the op's signature, on any device. One that is not installed, or that
the device or the case is not for, raises when it is called, and `why_not` makes its reason a line.
"""

import functools
import importlib
import itertools
import re
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ecar_kernels.stage_attention.reference import block_causal_mask

SDPA = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
PACKAGES = {
    "flash-attn": ("flash_attn", "flash_attn_func"),
    "xformers": ("xformers.ops", "memory_efficient_attention"),
}
REASON_LENGTH = 200
Stages = tuple[int, ...]


def functions(op: str, *, per_stage: bool = False) -> dict[str, Callable]:
    """Every peer of the op by name; none for ops that no library has anything like.

    per_stage: PyTorch's attention, too, in a call for each stage without a mask, which not all of
    its backends take.
    """
    if op != "stage_attention":
        return {}
    partial = functools.partial
    sdpa = {f"SDPA {name}": partial(_sdpa, backend) for name, backend in SDPA.items()}
    if per_stage:
        sdpa = {name: partial(by_stage, call) for name, call in sdpa.items()}
    others = {name: partial(by_stage, partial(_packages, name)) for name in PACKAGES}
    return {"FlexAttention": _flex(), **sdpa, **others}


def why_not(call: Callable[[], object]) -> str | None:
    """Why the call fails, in a line; None if it does not."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            call()
        except Exception as error:  # whatever a peer raises is its reason
            name, text = type(error).__name__, str(error)
            # torch.compile reports an error in what it compiles in a text of its own.
            if (inner := re.search(r"raised exception (\w+)\(['\"](.+?)['\"]\)", text)) is not None:
                name, text = inner.groups()
            reasons = [f"{name}: {text.partition(chr(10))[0].partition('. ')[0].rstrip('.')}"]
            if "kernel" in reasons[0].lower():  # PyTorch has none, and warns why it took none
                lines = [str(warning.message).splitlines()[0] for warning in said]
                reasons += [s for s in lines if "not used because" not in s and "disabled" not in s]
            return "; ".join(reasons)[:REASON_LENGTH].replace("|", "/")
    return None


def by_stage(attention: Callable, q: Tensor, k: Tensor, v: Tensor, stage_lengths: Stages) -> Tensor:
    """A dense call for each stage of the queries, over the keys up to its end."""
    before = k.shape[1] - q.shape[1]  # tokens before the first query
    parts = [
        attention(q[:, end - length - before : end - before], k[:, :end], v[:, :end])
        for length, end in zip(stage_lengths, itertools.accumulate(stage_lengths), strict=True)
        if end > before
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _heads_first(*tensors: Tensor) -> list[Tensor]:
    return [tensor.transpose(1, 2) for tensor in tensors]


_mask = functools.lru_cache(maxsize=4)(block_causal_mask)  # of 5,440 tokens one takes 30 MB


def _sdpa(
    backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor, stage_lengths: Stages | None = None
) -> Tensor:
    newest = stage_lengths is None or q.shape[1] == stage_lengths[-1]
    mask = None if newest else _mask(stage_lengths, q.shape[1], device=q.device)
    with sdpa_kernel(backend):
        out = F.scaled_dot_product_attention(*_heads_first(q, k, v), attn_mask=mask)
    return out.transpose(1, 2)


def _flex() -> Callable:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    # A whole graph or an error: what falls back to eager is not FlexAttention's kernel.
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)

    @functools.lru_cache(maxsize=4)
    def block_mask(stage_lengths: Stages, queries: int, device: torch.device) -> Any:
        total = sum(stage_lengths)
        stage = torch.repeat_interleave(torch.tensor(stage_lengths, device=device))

        def sees(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return stage[q + total - queries] >= stage[k]

        return create_block_mask(sees, None, None, queries, total, device=device.type)

    def call(q: Tensor, k: Tensor, v: Tensor, stage_lengths: Stages) -> Tensor:
        newest = q.shape[1] == stage_lengths[-1]
        mask = None if newest else block_mask(stage_lengths, q.shape[1], q.device)
        return compiled(*_heads_first(q, k, v), block_mask=mask).transpose(1, 2)

    return call


def _packages(name: str, *tensors: Tensor) -> Tensor:
    """A package's attention; it is loaded when it is called."""
    return _load(name)(*tensors)


@functools.cache
def _load(name: str) -> Callable:
    module, function = PACKAGES[name]
    try:
        return getattr(importlib.import_module(module), function)
    except ImportError as error:
        absent = module.startswith(error.name or module)
        reason = "is not installed" if absent else f"does not load: {error}"
        raise ImportError(f"{name} {reason}") from None
