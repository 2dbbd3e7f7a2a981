"""The matrix products of one E-CAR image alone: the same shapes, weights and order, nothing else.

Linear layers are computed by the GEMM that the fused ops contain, with a neutral epilogue (see
`linears.ours`), on inputs that lie ready. Attention is its two products, without the softmax.
"""

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks import linears
from benchmarks.models import StageTime
from ecar.model import ECAR
from ecar.sampling import split_steps
from ecar_kernels import _native

Call = Callable[[], object]


class ImageGemms:
    """Ready to be timed; weights are packed here.

    Args:
        model: whose weights are used; those that were packed for it are shared.
        steps: of the image, over all stages.
    """

    def __init__(self, model: ECAR, steps: int) -> None:
        self.inputs: dict[tuple[int, int], Tensor] = {}
        config = model.config
        self.linears: list[tuple[list[Call], list[Call]]] = []
        self.attention: list[tuple[list[Call], list[Call]]] = []
        counts = split_steps(steps, config.num_stages)
        for stage, (head, rows, count) in enumerate(
            zip(model.heads, config.stage_tokens, counts, strict=True)
        ):
            inputs = [] if stage == 0 else [(model.ar.inputs[stage - 1], rows)]
            once = [
                *inputs,
                *((layer, rows) for block in model.ar.blocks for layer in _block_layers(block)),
                (head.condition.fc1, rows),
                (head.condition.fc2, rows),
                (head.modulation, rows),
                (head.time[0], count),
                (head.time[2], count),
                (head.modulation, count),
            ]
            step = [
                (head.embed, rows),
                *((layer, rows) for block in head.blocks for layer in _block_layers(block)),
                (head.output, rows),
            ]
            self.linears.append(
                ([self._linear(*layer) for layer in once], [self._linear(*layer) for layer in step])
            )
            keys = sum(config.stage_tokens[: stage + 1])
            self.attention.append(
                (
                    _products(config.heads, rows, keys, config.head_dim) * config.ar_layers,
                    _products(config.heads, rows, rows, config.head_dim) * config.flow_blocks,
                )
            )

    def _linear(self, layer: nn.Linear, rows: int) -> Call:
        x = self.inputs.setdefault(
            (rows, layer.in_features), torch.randn(1, rows, layer.in_features)
        )
        way = linears.ours(layer.weight, layer.bias, rows) if _native.why_not() is None else layer
        return lambda: way(x)

    def time(self, timed_steps: int) -> dict[str, list[StageTime]]:
        """Each stage's times: of "linears" and of "attention"."""
        with torch.no_grad():
            return {
                name: [
                    StageTime(
                        _seconds(once),
                        statistics.median(_seconds(step) for _ in range(max(2, timed_steps))),
                    )
                    for once, step in stages
                ]
                for name, stages in (("linears", self.linears), ("attention", self.attention))
            }


def _block_layers(block: nn.Module) -> tuple[nn.Linear, ...]:
    return block.qkv, block.proj, block.mlp.fc1, block.mlp.fc2


def _products(heads: int, queries: int, keys: int, head_dim: int) -> list[Call]:
    q, k, v = (torch.randn(heads, n, head_dim) for n in (queries, keys, keys))
    scores, output = torch.empty(heads, queries, keys), torch.empty_like(q)
    return [
        lambda: torch.bmm(q, k.transpose(1, 2), out=scores),
        lambda: torch.bmm(scores, v, out=output),
    ]


def _seconds(calls: list[Call]) -> float:
    begin = time.perf_counter()
    for call in calls:
        call()
    return time.perf_counter() - begin
