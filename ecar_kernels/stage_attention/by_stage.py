"""Stage attention by a library's dense attention: one call for each stage, without a mask.

The queries of stage s see all keys of the stages up to s, a contiguous prefix, so that a library
keeps its fast kernels, which a mask would rule out, and stages are exact at their boundaries.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ecar_kernels import _numbers
from ecar_kernels.stage_attention import autograd

NAMESPACE = "ecar_libraries"
_library = torch.library.Library(NAMESPACE, "FRAGMENT")


@dataclass(frozen=True)
class Dense:
    """A library's attention without a mask over q [B, Nq, H, D], k and v [B, N, H, D].

    forward: (q, k, v, scale) -> out. training: the same -> (out, lse), or (out, lse, seed, offset)
    where `seeded`: the logsumexp is [B, H, Nq] in float32, and without dropout the last two, which
    are kept for their types, mean nothing. backward: (grad, q, k, v, and these, scale) -> the
    gradients of q, k and v. scale is at least 0, rows begin at multiples of 16 bytes, and no tensor
    is empty.
    """

    forward: Callable[..., Tensor]
    training: Callable[..., tuple[Tensor, ...]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    seeded: bool = False

    def run_forward(
        self, q: Tensor, k: Tensor, v: Tensor, stage_lengths: Sequence[int], scale: float
    ) -> Tensor:
        if not q.numel():
            return q.new_empty(q.shape)
        q, k, v, scale = _prepared(q, k, v, scale)
        return _joined(
            [
                self.forward(q[:, queries], k[:, keys], v[:, keys], scale)
                for queries, keys in _stages(stage_lengths, q.shape[1])
            ]
        )

    def run_training(
        self, q: Tensor, k: Tensor, v: Tensor, stage_lengths: Sequence[int], scale: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The output, the logsumexp, the seed and the offset."""
        if not q.numel():
            return q.new_empty(q.shape), _fake_lse(q), *_unseeded(q)
        q, k, v, scale = _prepared(q, k, v, scale)
        outputs, sums, seed = [], [], []
        for queries, keys in _stages(stage_lengths, q.shape[1]):
            out, lse, *seed = self.training(q[:, queries], k[:, keys], v[:, keys], scale)
            outputs.append(out)
            sums.append(lse)
        return _joined(outputs), torch.cat(sums, dim=2), *(seed if self.seeded else _unseeded(q))

    def run_backward(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        seed: Tensor,
        offset: Tensor,
        stage_lengths: Sequence[int],
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Sums over stages are in float32, and rounded once."""
        if not q.numel():
            return q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
        sign = -1 if scale < 0 else 1
        q, k, v, scale = _prepared(q, k, v, scale)
        grad, grad_q = _aligned(grad), q.new_empty(q.shape)
        seeds = (seed, offset) if self.seeded else ()
        sums: list[Tensor] = []
        for queries, keys in reversed(list(_stages(stage_lengths, q.shape[1]))):
            seen = grad[:, queries], q[:, queries], k[:, keys], v[:, keys]
            kept = out[:, queries], lse[:, :, queries].contiguous(), *seeds
            grad_q[:, queries], *of_keys = self.backward(*seen, *kept, scale)
            if not sums:  # the newest stage, which sees all keys
                sums = [x.float() for x in of_keys]
                continue
            for total, x in zip(sums, of_keys, strict=True):
                total[:, keys] += x
        grad_k, grad_v = (x.to(k.dtype, memory_format=torch.contiguous_format) for x in sums)
        return sign * grad_q, grad_k, grad_v


def stage_attention(name: str, dense: Dense) -> Callable:
    """The op, served by a library; `name` is the backend's.

    It is three ops to torch.compile, which looks into none of them. Of what a library keeps it says
    itself which shapes it has.
    """
    arguments = "Tensor q, Tensor k, Tensor v, int[] stage_lengths, float scale"

    def fake_training(q, k, v, stage_lengths, scale):
        seeded = dense.seeded and q.numel()
        seed = dense.training(q, k, v, 1.0)[2:] if seeded else _unseeded(q)
        return _fake_forward(q), _fake_lse(q), *seed

    forward = _register(f"{name}({arguments}) -> Tensor", dense.run_forward, _fake_forward)
    training = _register(
        f"{name}_training({arguments}) -> (Tensor, Tensor, Tensor, Tensor)",
        dense.run_training,
        fake_training,
    )
    backward = _register(
        f"{name}_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
        "Tensor seed, Tensor offset, int[] stage_lengths, float scale) -> (Tensor, Tensor, Tensor)",
        dense.run_backward,
        _fake_backward,
    )

    return autograd.stage_attention(forward, training, backward)


def _fake_forward(q: Tensor, *_: Any) -> Tensor:
    return q.new_empty(q.shape)


def _fake_lse(q: Tensor) -> Tensor:
    batch, queries, heads, _ = q.shape
    return q.new_empty((batch, heads, queries), dtype=torch.float32)


def _unseeded(q: Tensor) -> tuple[Tensor, Tensor]:
    return q.new_empty(0), q.new_empty(0)


def _fake_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _register(schema: str, function: Callable, fake: Callable) -> Callable:
    name = schema.partition("(")[0]
    _library.define(schema)
    _library.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    return _numbers.twin(getattr(getattr(torch.ops, NAMESPACE), name).default)


def _stages(stage_lengths: Sequence[int], queries: int) -> Iterator[tuple[slice, slice]]:
    """Of each stage that has queries: those among all queries, and the keys that they see."""
    before = sum(stage_lengths) - queries  # tokens of the stages in the cache
    for length, end in zip(stage_lengths, itertools.accumulate(stage_lengths), strict=True):
        if end > before:
            yield slice(end - length - before, end - before), slice(0, end)


def positive(q: Tensor, scale: float) -> tuple[Tensor, float]:
    """Queries and a scale of the same scores, the scale at least 0.

    Libraries look for the largest score before they scale, so that under a scale below 0 the
    weights' exponents would overflow. In q a sign is exact.
    """
    return (-q, -scale) if scale < 0 else (q, scale)


def _prepared(
    q: Tensor, k: Tensor, v: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, float]:
    """As `Dense` has them."""
    q, scale = positive(q, scale)
    return _aligned(q), _aligned(k), _aligned(v), scale


def _aligned(x: Tensor) -> Tensor:
    """Libraries load 16 bytes at once, and do not all check that they may: else a copy."""
    size = x.element_size()
    places = (*x.stride()[:-1], x.storage_offset())
    if x.stride(-1) == 1 and all([place * size % 16 == 0 for place in places]):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _joined(outputs: list[Tensor]) -> Tensor:
    return outputs[0].contiguous() if len(outputs) == 1 else torch.cat(outputs, dim=1)
