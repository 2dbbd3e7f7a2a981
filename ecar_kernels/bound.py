"""Sampling on the CPU by C++ calls of whole blocks: a flow step, and a stage of the AR.

At 16 tokens a step is a millisecond or two, of which Python's way from op to op would be a good
part. So a step is one call for each flow block and one for the boundary, and all steps of a head
are laid out before the first, with their views, packed weights and outputs. Those are buffers that
are allocated once; nothing is allocated in a step. The residual stream is written over in place,
and so is the state, which stays in the token layout.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from ecar_kernels import _transforms, registry
from ecar_kernels._written import is_plain, why_not
from ecar_kernels.acceleration import PUBLIC
from ecar_kernels.modules import MLP, FlowBlock, StageBlock

__all__ = ["BoundFlowStep", "BoundStageBlocks"]

Call = Callable[[], object]
_BLOCK_LAYERS: tuple[tuple[str, type[nn.Module]], ...] = (
    ("mlp", MLP),
    ("qkv", nn.Linear),
    ("proj", nn.Linear),
    ("mlp.fc1", nn.Linear),
    ("mlp.fc2", nn.Linear),
)
_NORMS: tuple[tuple[str, type[nn.Module]], ...] = (("norm1", nn.LayerNorm), ("norm2", nn.LayerNorm))
BLOCK_OPS = ("adaln_linear", "stage_attention", "linear_gated_residual")


class BoundFlowStep:
    """The Euler steps of flow heads on the CPU, one head after the other, on the same buffers.

    A head is an embedding of patches, `FlowBlock`s, and a projection back to patches. Its steps
    are laid out by `bind` and one `add` each, and then run by number:

        steps = BoundFlowStep(batch=1, rows=2, tokens=256, width=768, hidden=3072, values=16,
                              dtype=torch.float32)
        steps.bind(blocks, output, embed, positions, spatial)
        for time in modulations:
            steps.add(time, rows=2, dt=0.1, guidance_scale=1.5)
        steps.state.copy_(x)
        steps.stream.copy_(embed(x) + positions)
        for step in range(len(modulations)):
            steps.run(step)

    Args:
        batch: images B.
        rows: rows R of the network at most: B, or 2 B where steps are guided, conditional first.
        tokens: tokens N of an image at most.
        width: channels C.
        hidden: the MLPs' width.
        values: numbers V of a patch.
        dtype: float32, bfloat16 or float16, of the network. The state is float32.
        history: keep the velocity of each step for the next, as a solver of several steps needs.

    Attributes:
        state: [B, N, V] of the bound head: patches before and after a step.
        stream: [R, N, C] of the bound head: before a step the embedded tokens of its rows.

    Raises:
        ImportError: the C++ library is missing. `why_not` says so without an error.
    """

    state: Tensor
    stream: Tensor

    def __init__(
        self,
        *,
        batch: int,
        rows: int,
        tokens: int,
        width: int,
        hidden: int,
        values: int,
        dtype: torch.dtype,
        history: bool = False,
    ) -> None:
        from ecar_kernels.flow_block import cpp

        def buffer(size: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(size, dtype=dtype, device="cpu")

        self._batch = batch
        self._stream = buffer(rows * tokens * width, dtype)
        # Queries, keys, values and what attention makes of them; later the MLP's hidden tokens.
        self._wide = buffer(rows * tokens * max(4 * width, hidden), dtype)
        self._state = buffer(batch * tokens * values)
        self._velocity = buffer(batch * tokens * values if history else 0)
        self._history = history
        self._workspace = buffer(
            max(cpp.workspace_size(rows * tokens, depth) for depth in (width, hidden))
        )
        # Of each step the blocks' calls, the boundary's, and that of a step without a history.
        self._steps: list[tuple[list[Call], Call, Call]] = []

    @staticmethod
    def why_not(
        blocks: Iterable[nn.Module],
        output: nn.Module,
        embed: nn.Module,
        positions: Tensor,
        dtype: torch.dtype,
    ) -> str | None:
        """None where every op of the steps would be served by C++ on the CPU and every layer is as
        its class is written; else the reason, in words."""
        blocks = list(blocks)
        if (reason := _why_not_now()) is not None:
            return reason
        ends = ("output", output, nn.Linear), ("embed", embed, nn.Linear)
        if (reason := _why_not_written((*ends, *_layers(blocks, FlowBlock)))) is not None:
            return reason
        if not is_plain(positions):
            return f"the positions are a {type(positions).__name__} of {positions.dtype}"
        return _why_not_served(blocks, dtype, flow_boundary=positions.shape[-1])

    def bind(
        self,
        blocks: Iterable[nn.Module],
        output: nn.Linear,
        embed: nn.Linear,
        positions: Tensor,
        spatial: Tensor,
        *,
        eps: float = 1e-6,
    ) -> None:
        """Take up a head, without steps yet.

        Args:
            blocks, output, embed: its layers, of which `why_not` is None.
            positions: [N, C], added to embedded tokens.
            spatial: [R, N, (6 L + 2) C], the modulation's part of the tokens: six of each of the L
                blocks (`FlowBlock.infer`), then the shift and scale before the output.
            eps: of the norm before the output.
        """
        from ecar_kernels.flow_block import cpp
        from ecar_kernels.flow_boundary.cpp import flow_boundary_out

        (rows, tokens, _), width, values = spatial.shape, output.in_features, output.out_features
        batch = self._batch
        size = batch * tokens * values
        self.state = self._state[:size].view(batch, tokens, values)
        self._kept = self._velocity[:size].view(batch, tokens, values) if self._history else None
        self.stream = self._stream[: rows * tokens * width].view(rows, tokens, width)
        self._spatial, self._width, self._steps = spatial, width, []
        # What follows a block's modulations among its arguments, its weights packed.
        self._blocks = [
            (
                *(tensor for pair in _weights(block) for tensor in pair),
                block.heads,
                block.mlp.fc1.out_features,
                block.eps,
                self._wide,
                self._workspace,
            )
            for block in cast("Iterable[FlowBlock]", blocks)
        ]
        # Turned, as the boundary reads the embedding's weight: [C, V] of memory [V, C].
        turned = embed.weight.t().contiguous().t()
        self._ends = output.weight, output.bias, turned, embed.bias, positions
        self._eps = eps
        self._flow_block, self._flow_boundary = cpp.flow_block_, flow_boundary_out
        self._rows = rows
        for op in (*BLOCK_OPS, "flow_boundary"):
            registry.note(op, "cpp")

    def add(
        self, time: Tensor, *, rows: int, dt: float, ratio: float = 0.0, guidance_scale: float = 1.0
    ) -> None:
        """Lay out the next step.

        Args:
            time: [1, 1, (6 L + 2) C], the modulation's part of the time.
            rows: B, or 2 B where the step is guided.
            dt: the step's length.
            ratio: of `euler_step`; 0 for an Euler step.
            guidance_scale: of `euler_step`.

        Raises:
            ValueError: a ratio other than 0, without a history or of the head's first step.
        """
        if ratio and (not self._history or not self._steps):
            why = "of the first step" if self._history else "without a history"
            raise ValueError(f"argument 'ratio': expected 0 {why}, got {ratio}")
        calls: list[Call] = []
        x, spatial = self.stream[:rows], self._spatial[:rows]
        if self._steps and self._rows < rows:  # unconditional rows begin as the others
            half = rows // 2
            calls.append(partial(x[half:].copy_, x[:half]))
        calls += [
            partial(self._flow_block, x, spatial, time, 6 * index, *block)
            for index, block in enumerate(self._blocks)
        ]
        (shift, scale), (step_shift, step_scale) = (
            part[..., -2 * self._width :].chunk(2, dim=-1) for part in (spatial, time)
        )
        modulated = x, self.state, shift, scale, *self._ends, dt, step_shift, step_scale
        results = self._eps, self.state, x
        euler = partial(
            self._flow_boundary, *modulated, guidance_scale, 0.0, *results, None, self._kept
        )
        boundary = euler
        if ratio:  # the velocity takes the place of that before
            history = self._kept, self._kept
            boundary = partial(
                self._flow_boundary, *modulated, guidance_scale, ratio, *results, *history
            )
        self._rows = rows
        self._steps.append((calls, boundary, euler))

    def run(self, step: int, *, restart: bool = False) -> None:
        """Take a step that was laid out; restart: an Euler step, of a state of another history."""
        calls, boundary, euler = self._steps[step]
        for call in calls:
            call()
        (euler if restart else boundary)()

    @staticmethod
    def jump(end: Tensor, start: Tensor, *, time: float, stage: int, seeds: Tensor) -> None:
        """From a stage's end to the start of the next one, at once.

        Args:
            end: [B, C, h, w], float32.
            start: [B, C, 2 h, 2 w], float32, written to.
            time, stage, seeds: of `upsample_renoise_euler`.
        """
        from ecar_kernels.flow_step.cpp import jump_out

        registry.note("upsample_renoise_euler", "cpp")
        # An Euler step of no length: the step itself is done.
        jump_out(end, end, 0.0, 1.0, time, stage, seeds, end, start)


class BoundStageBlocks:
    """`StageBlock`s one after the other on the CPU, over a cache of keys and values.

    A block is one call, whose projection writes keys and values where the cache has them:

        layers, begin = BoundStageBlocks(blocks, keys, values), 0
        for x in stages:                  # [R, n, C] each
            maps.append(layers.run(x, begin))
            begin += x.shape[1]

    Args:
        blocks: L of them, of which `why_not` is None.
        keys, values: [L, R, N, H, D], of the blocks' type: room for N tokens of R rows.

    Raises:
        ImportError: the C++ library is missing. `why_not` says so without an error.
    """

    def __init__(self, blocks: Iterable[nn.Module], keys: Tensor, values: Tensor) -> None:
        # What a call is given before and after a block's keys and values, its weights packed.
        self._blocks = []
        self._hidden = 0
        for block in cast("Iterable[StageBlock]", blocks):
            (qkv, proj, fc1, fc2), norm1, norm2 = _weights(block), block.norm1, block.norm2
            first, second = (norm1.weight, norm1.bias), (norm2.weight, norm2.bias)
            hidden = block.mlp.fc1.out_features
            sizes = block.heads, hidden, norm1.eps, norm2.eps
            self._blocks.append((*first, *qkv, *proj, *second, *fc1, *fc2, *sizes))
            self._hidden = max(self._hidden, hidden)
        self._keys, self._values = keys, values

    @staticmethod
    def why_not(blocks: Iterable[nn.Module], x: Tensor) -> str | None:
        """None where every op of the blocks over tokens x [R, n, C] would be served by C++ on the
        CPU and every layer is as its class is written; else the reason, in words."""
        blocks = list(blocks)
        if x.device.type != "cpu":
            return f"the tokens are on {x.device}"
        if (reason := _why_not_now()) is not None:
            return reason
        if (reason := _why_not_written(_layers(blocks, StageBlock))) is not None:
            return reason
        for index, block in enumerate(cast("list[StageBlock]", blocks)):
            for name, _ in _NORMS:
                norm = cast("nn.LayerNorm", block.get_submodule(name))
                if norm.weight is None or norm.bias is None or norm.weight.numel() != block.width:
                    return f"blocks.{index}.{name}: it has no weight and bias of {block.width}"
                if norm.weight.dtype is not x.dtype or norm.bias.dtype is not x.dtype:
                    return f"blocks.{index}.{name}: it is not of the tokens' {x.dtype}"
        return _why_not_served(blocks, x.dtype)

    @staticmethod
    def why_not_now() -> str | None:
        """What of `why_not` depends on where it is called: autocast, gradients and transforms."""
        return _why_not_now()

    def run(self, x: Tensor, begin: int) -> Tensor:
        """The next tokens through all blocks.

        Args:
            x: [R, n, C], or of fewer rows: the first of the cache's.
            begin: tokens that the cache holds; after it come those of x.

        Returns:
            [R, n, C].
        """
        from ecar_kernels.flow_block import cpp

        (rows, tokens, width), x = x.shape, x.clone(memory_format=torch.contiguous_format)
        # The queries and what attention makes of them; later the MLP's hidden tokens.
        wide = x.new_empty(rows * tokens * max(2 * width, self._hidden))
        sizes = (cpp.workspace_size(rows * tokens, depth) for depth in (width, self._hidden))
        workspace = x.new_empty(max(sizes), dtype=torch.float32)
        cache = zip(self._keys[:, :rows], self._values[:, :rows], strict=True)
        for block, (keys, values) in zip(self._blocks, cache, strict=True):
            cpp.stage_block_(x, *block, keys, values, begin, wide, workspace)
        for op in BLOCK_OPS:
            registry.note(op, "cpp")
        return x


def _weights(block: FlowBlock | StageBlock) -> list[tuple[Tensor, Tensor | None]]:
    """The weight of each linear layer, packed, with its bias."""
    from ecar_kernels.flow_block import cpp

    layers = block.qkv, block.proj, block.mlp.fc1, block.mlp.fc2
    return [(cpp.packed_weight(layer.weight), layer.bias) for layer in layers]


def _layers(
    blocks: Iterable[nn.Module], kind: type[nn.Module]
) -> Iterator[tuple[str, nn.Module, type[nn.Module]]]:
    """Every module whose parameters a block reads, a block before its layers."""
    names = _BLOCK_LAYERS if kind is FlowBlock else (*_NORMS, *_BLOCK_LAYERS)
    for index, block in enumerate(blocks):
        yield f"blocks.{index}", block, kind
        for name, layer in names:
            yield f"blocks.{index}.{name}", block.get_submodule(name), layer


def _why_not_now() -> str | None:
    """What inference in C++ has nothing of."""
    if torch.is_autocast_enabled("cpu"):
        return "torch.autocast is active"
    if torch.is_grad_enabled():
        return "a gradient may be asked for"
    if _transforms.active():
        return "a transform of torch.func or forward-mode AD is active"
    return None


def _why_not_written(layers: Iterable[tuple[str, nn.Module, type[nn.Module]]]) -> str | None:
    for name, layer, kind in layers:
        # Compiled, a flow block's `infer` is what it was; a stage block is called.
        if (reason := why_not(layer, kind, compiled=kind is FlowBlock)) is not None:
            return f"{name}: {reason}"
    return None


def _why_not_served(blocks: Iterable[nn.Module], dtype: torch.dtype, **others: int) -> str | None:
    """others: ops beside those of the blocks, and their widths."""
    try:
        for op, run in _functions(blocks, dtype, others):
            if run.backend != "cpp":
                return f"{op} is served by {run.backend}"
    except registry.BackendUnavailableError as error:
        return str(error)
    return None


def _functions(
    blocks: Iterable[nn.Module], dtype: torch.dtype, others: dict[str, int]
) -> Iterator[tuple[str, registry.BoundOp]]:
    """Those that the same blocks would call op by op."""

    def public(op: str, width: int) -> registry.BoundOp:
        return registry.resolve(op, device="cpu", dtype=dtype, width=width)

    for op, width in others.items():
        yield op, public(op, width)
    for block in cast("Iterable[FlowBlock | StageBlock]", blocks):
        ops = block.ops(torch.empty(0, block.width, dtype=dtype, device="cpu"))
        for op in BLOCK_OPS:
            width = block.head_dim if op == "stage_attention" else block.width
            yield op, public(op, width) if ops is PUBLIC else getattr(ops, op)
