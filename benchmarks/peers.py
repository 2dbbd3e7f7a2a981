"""What other libraries have for an op: PyTorch, for attention. The backends of the ops that call
flash-attn's, xformers' and PyTorch's kernels are ecar_kernels' own.

Each peer is a function with the op's signature, on any device. One that the device or the case is
not for raises when it is called, and `why_not` makes its reason a line.
"""

import functools
import re
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ecar_kernels.stage_attention import sdpa
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

    per_stage: PyTorch's attention in a call for each stage without a mask, which not all of its
    kernels take.
    """
    if op != "stage_attention":
        return {}
    attention = sdpa.stage_attention if per_stage else _masked
    by_kernel = {f"SDPA {name}": functools.partial(_sdpa, SDPA[name], attention) for name in SDPA}
    return {"FlexAttention": _flex(), **by_kernel}


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


def _heads_first(*tensors: Tensor) -> list[Tensor]:
    return [tensor.transpose(1, 2) for tensor in tensors]


_mask = functools.lru_cache(maxsize=4)(block_causal_mask)  # of 5,440 tokens one takes 30 MB


def _sdpa(kernel: SDPBackend, attention: Callable, **arguments: Any) -> Tensor:
    with sdpa_kernel(kernel):
        return attention(**arguments)


def _masked(q: Tensor, k: Tensor, v: Tensor, stage_lengths: Stages) -> Tensor:
    newest = q.shape[1] == stage_lengths[-1]
    mask = None if newest else _mask(stage_lengths, q.shape[1], device=q.device)
    q, k, v = _heads_first(q, k, v)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


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
