"""Block-causal attention over stages: a token sees every token of its own and earlier stages."""

from collections.abc import Sequence

from torch import Tensor

from ecar_kernels import registry
from ecar_kernels._validation import (
    autocast_low,
    check_count,
    check_leading,
    check_like,
    check_number,
    shape_error,
)


@autocast_low
def stage_attention(
    q: Tensor, k: Tensor, v: Tensor, stage_lengths: Sequence[int], *, scale: float | None = None
) -> Tensor:
    """softmax(scale q k^T) v, where a query of stage s sees the keys of stages 1 .. s.

    k, v: [B, N, H, D], N = sum(stage_lengths). q: [B, Nq, H, D], the queries of all stages
    (Nq = N) or of the newest ones (Nq = the sum of a suffix of stage_lengths), over a KV cache.
    stage_lengths: tokens of each stage, a tuple or list of integers >= 1. scale: None for
    1/sqrt(D). Returns [B, Nq, H, D].

    float32, bfloat16 or float16 (float64: by the reference), of one type on one device, the last
    dimension contiguous, other strides free (q, k, v of a packed projection are not copied).
    Softmax and accumulation are in float32, the output in the input's type. Gradients flow to q,
    k and v. Under torch.autocast, arguments are cast to its type. Raises ValueError for a shape,
    layout or value, TypeError for a type, naming the argument; BackendUnavailableError where the
    backend in force cannot serve.
    """
    check_leading("q", q, "[B, Nq, H, D]")
    batch, queries, heads, head_dim = q.shape
    _check_stages(stage_lengths, queries)
    tokens = sum(stage_lengths)
    for name, value in (("k", k), ("v", v)):
        check_like(name, value, "q", q)
        if value.shape != (batch, tokens, heads, head_dim):
            raise shape_error(name, value, "[B, N, H, D]", B=batch, N=tokens, H=heads, D=head_dim)
    if head_dim == 0:
        raise shape_error("q", q, "[B, Nq, H, D] with D >= 1")
    if scale is not None:
        check_number("scale", scale)
    run = registry.implementation("stage_attention", q.device.type, q.dtype, head_dim).function
    return run(q, k, v, stage_lengths, scale=scale)


def _check_stages(stage_lengths: object, queries: int) -> None:
    if not isinstance(stage_lengths, (tuple, list)):
        raise TypeError(
            "argument 'stage_lengths': expected a tuple or list of integers, "
            f"got {type(stage_lengths).__name__}"
        )
    if not stage_lengths:
        raise ValueError("argument 'stage_lengths': expected at least one stage, got none")
    for index, length in enumerate(stage_lengths):
        check_count(f"stage_lengths[{index}]", length)
    covered = 0
    for length in reversed(stage_lengths):
        covered += length
        if covered == queries:
            return
    raise ValueError(
        "argument 'q': expected as many queries as a suffix of stage_lengths="
        f"{list(stage_lengths)} has tokens, got {queries}"
    )
