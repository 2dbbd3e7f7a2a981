"""What other libraries have for an op: PyTorch, flash-attn and xformers, for attention.

Each peer is a function with the op's signature, on any device. One that is not installed, or that
the device or the case is not for, raises when it is called, and `why_not` makes its reason a line.

A query of the newest stage sees every key, so attention needs no mask there and gets none. For the
queries of all stages, PyTorch's get the stages' mask, and flash-attn and xformers, which know no
such mask, a call for each stage. No library has adaLN with a modulation for each token.
"""

import functools
import importlib
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
REASON_LENGTH = 200
Stages = tuple[int, ...]


def functions(op: str, *, per_stage: bool = False) -> dict[str, Callable]:
    """Every peer of the op by name; none for ops that no library has anything like.

    per_stage: PyTorch's attention, too, in a call for each stage without a mask, which not all of
    its backends take.
    """
    if op != "stage_attention":
        return {}

    def sdpa(backend: SDPBackend) -> Callable:
        if per_stage:
            return functools.partial(by_stage, functools.partial(_dense_sdpa, backend))
        return functools.partial(_sdpa, backend)

    return {
        "FlexAttention": _flex(),
        **{f"SDPA {name}": sdpa(backend) for name, backend in SDPA.items()},
        "flash-attn": functools.partial(by_stage, _flash_attn),
        "xformers": functools.partial(by_stage, _xformers),
    }


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
            first = text.partition("\n")[0].partition(". ")[0].rstrip(".")
            reason = "; ".join([f"{name}: {first}", *_refusals(first, said)])
            return reason[:REASON_LENGTH].replace("|", "/")
    return None


def _refusals(error: str, said: list[warnings.WarningMessage]) -> list[str]:
    """PyTorch raises that there is no kernel, and says in warnings why it took none."""
    if "kernel" not in error.lower():
        return []
    texts = [str(warning.message).splitlines()[0] for warning in said]
    return [text for text in texts if "not used because" not in text and "disabled" not in text]


@functools.cache
def _load(package: str, module: str, name: str) -> Callable:
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        missing = getattr(error, "name", None) or module
        absent = module.startswith(missing)
        reason = "is not installed" if absent else f"does not load: {error}"
        raise ImportError(f"{package} {reason}") from None
    return getattr(found, name)


def _is_newest(q: Tensor, stage_lengths: Stages) -> bool:
    return q.shape[1] == stage_lengths[-1]


def _heads_first(*tensors: Tensor) -> list[Tensor]:
    return [tensor.transpose(1, 2) for tensor in tensors]


@functools.lru_cache(maxsize=4)  # of 5,440 tokens one takes 30 MB
def _mask(stage_lengths: Stages, queries: int, device: torch.device) -> Tensor:
    return block_causal_mask(stage_lengths, queries, device=device)


def _sdpa(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor, stage_lengths: Stages) -> Tensor:
    newest = _is_newest(q, stage_lengths)
    mask = None if newest else _mask(stage_lengths, q.shape[1], q.device)
    return _dense_sdpa(backend, q, k, v, mask)


def _dense_sdpa(
    backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None
) -> Tensor:
    with sdpa_kernel(backend):
        out = F.scaled_dot_product_attention(*_heads_first(q, k, v), attn_mask=mask)
    return out.transpose(1, 2)


@functools.lru_cache(maxsize=4)
def _block_mask(stage_lengths: Stages, queries: int, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    total = sum(stage_lengths)
    stage = torch.repeat_interleave(torch.tensor(stage_lengths, device=device))
    first = total - queries
    return create_block_mask(
        lambda b, h, q, k: stage[q + first] >= stage[k],
        None,
        None,
        queries,
        total,
        device=device.type,
    )


def _flex() -> Callable:
    from torch.nn.attention.flex_attention import flex_attention

    # A whole graph or an error: what falls back to eager is not FlexAttention's kernel.
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)

    def call(q: Tensor, k: Tensor, v: Tensor, stage_lengths: Stages) -> Tensor:
        newest = _is_newest(q, stage_lengths)
        mask = None if newest else _block_mask(stage_lengths, q.shape[1], q.device)
        return compiled(*_heads_first(q, k, v), block_mask=mask).transpose(1, 2)

    return call


def by_stage(attention: Callable, q: Tensor, k: Tensor, v: Tensor, stage_lengths: Stages) -> Tensor:
    """A dense call for each stage of the queries, over the keys up to its end."""
    if _is_newest(q, stage_lengths):
        return attention(q, k, v)
    ends = torch.tensor(stage_lengths).cumsum(0).tolist()
    parts = [
        attention(q[:, end - length : end], k[:, :end], v[:, :end])
        for length, end in zip(stage_lengths, ends, strict=True)
    ]
    return torch.cat(parts, dim=1)


def _flash_attn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _load("flash-attn", "flash_attn", "flash_attn_func")(q, k, v)


def _xformers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _load("xformers", "xformers.ops", "memory_efficient_attention")(q, k, v)
