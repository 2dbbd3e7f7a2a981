"""The AR transformer: a pre-LN ViT over the token maps of all stages (paper, section 3.2)."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ecar.config import ECARConfig
from ecar_kernels import Accelerated, BoundStageBlocks, StageBlock, recompute
from ecar_kernels.inspection import as_written, why_not_as_written

__all__ = ["ARTransformer", "KVCache", "patchify", "unpatchify"]


def patchify(x: Tensor, patch: int) -> Tensor:
    """Cut images into row-major tokens: [B, C, h, w] -> [B, (h/p)(w/p), C p p]."""
    b, c, h, w = x.shape
    x = x.reshape(b, c, h // patch, patch, w // patch, patch)
    count = (h // patch) * (w // patch)  # not -1, which an empty batch leaves open
    return x.permute(0, 2, 4, 1, 3, 5).reshape(b, count, c * patch * patch)


def unpatchify(tokens: Tensor, patch: int, shape: tuple[int, int, int]) -> Tensor:
    """The inverse of ``patchify``: [B, N, C p p] -> [B, C, h, w], with shape = (C, h, w)."""
    b, (c, h, w) = tokens.shape[0], shape
    x = tokens.reshape(b, h // patch, w // patch, c, patch, patch)
    return x.permute(0, 3, 1, 4, 2, 5).reshape(b, c, h, w)


def embedded(layer: nn.Module, values: Tensor, positions: Tensor) -> Tensor:
    """layer(values) + positions, in the type of the positions; computed in that of the values
    where the layer is as written."""
    if values.dtype == positions.dtype:
        return layer(values) + positions
    if not as_written(layer, nn.Linear):
        return layer(values.to(positions.dtype)) + positions
    weight, bias = (parameter.to(values.dtype) for parameter in (layer.weight, layer.bias))
    return (F.linear(values, weight, bias) + positions).to(positions.dtype)


class KVCache:
    """Keys and values of the stages seen so far, in buffers allocated once.

    Args:
        config: the model's configuration.
        batch: rows.

    Shapes: keys and values [layers, B, N, H, D], N = tokens of all stages.
    """

    def __init__(
        self, config: ECARConfig, batch: int, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        shape = (config.ar_layers, batch, config.num_tokens, config.heads, config.head_dim)
        self.keys = torch.empty(shape, device=device, dtype=dtype)
        self.values = torch.empty(shape, device=device, dtype=dtype)
        self.stage_tokens = config.stage_tokens
        self.stages = 0
        self.bound: BoundStageBlocks | None = None  # the layers over it, where C++ serves them

    @property
    def length(self) -> int:
        """Tokens held."""
        return sum(self.stage_tokens[: self.stages])

    def write(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store the next stage's [R, n, H, D] of one layer, of the first R rows; views of all of
        its stages so far."""
        keys, values = self.room(layer, *key.shape[:2])
        keys[:, self.length :] = key
        values[:, self.length :] = value
        return keys, values

    def room(self, layer: int, rows: int, count: int) -> tuple[Tensor, Tensor]:
        """The same views, of which the next stage's `count` tokens are not written yet."""
        keys, values = (
            kept[layer, :rows, : self.length + count] for kept in (self.keys, self.values)
        )
        return keys, values


class ARTransformer(nn.Module):
    """Token maps M_1 .. M_S from the class and the flows' end states.

    Stage 1's input tokens are the class embedding at every position; stage s's, the end state
    of stage s - 1's flow embedded at stage s's grid. A token sees all tokens of its own stage
    and of those before it. Without layers it sees itself alone, and every stage's input tokens
    have the class embedding added.
    """

    def __init__(self, config: ECARConfig) -> None:
        super().__init__()
        self.config = config
        # With patch p, one token of stage s covers (p/2)^2 pixels of stage s - 1; with patch 1,
        # one nearest-upsampled pixel.
        self.input_patch = max(config.patch_size // 2, 1)
        patch_values = config.channels * self.input_patch**2
        self.class_embedding = nn.Embedding(config.num_classes + 1, config.width)
        self.inputs = nn.ModuleList(
            nn.Linear(patch_values, config.width) for _ in range(config.num_stages - 1)
        )
        self.positions = nn.Parameter(torch.empty(config.num_tokens, config.width))
        self.blocks = nn.ModuleList(
            StageBlock(config.width, config.heads, config.mlp_width)
            for _ in range(config.ar_layers)
        )
        self.norm = nn.LayerNorm(config.width, eps=1e-6)
        self.gradient_checkpointing = False
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.class_embedding.weight, std=0.02)
        nn.init.normal_(self.positions, std=0.02)

    @property
    def last_mlp_output(self) -> nn.Linear:
        """The last layer shared by all stages, whose weight GradNorm looks at."""
        return cast("StageBlock", self.blocks[-1]).mlp.fc2

    def embed_class(self, labels: Tensor) -> Tensor:
        """Stage 1's input tokens: labels [B] -> [B, N_1, width]."""
        count = self.config.stage_tokens[0]
        return self.class_embedding(labels).unsqueeze(1) + self.positions[:count]

    def embed_end(self, end: Tensor, stage: int) -> Tensor:
        """Stage s > 1's input tokens [B, N_s, width], from stage s - 1's end state [B, C, h, w]; in
        float32 where the state is and the layer is of 16 bits, whose rounding of the state alone
        would move an image by more than the solver errs."""
        if self.config.patch_size == 1:
            end = F.interpolate(end, scale_factor=2, mode="nearest")
        begin = sum(self.config.stage_tokens[: stage - 1])
        positions = self.positions[begin : begin + self.config.stage_tokens[stage - 1]]
        return embedded(self.inputs[stage - 2], patchify(end, self.input_patch), positions)

    def with_class(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """The input tokens of a stage s > 1 [B, N_s, width], told the class if no layer does."""
        if self.config.ar_layers:
            return tokens
        return tokens + self.class_embedding(labels).unsqueeze(1)

    def forward(
        self, labels: Tensor, ends: list[Tensor], return_shared: bool = False
    ) -> tuple[tuple[Tensor, ...], Tensor | None, Tensor | None]:
        """All stages at once, for training.

        Args:
            labels: int64 [B], the null class included.
            ends: the end states of stages 1 .. S-1, [B, C, h_s, w_s] each.
            return_shared: for GradNorm, which looks inside the last block.

        Returns:
            The maps M_s [B, N_s, width]; with ``return_shared``, the last MLP's hidden tokens
            before their GELU, and its output.

        Raises:
            ValueError: ``return_shared``, and the last block has hooks, is another module, or
                there is none.
        """
        tokens = [self.embed_class(labels)]
        for stage, end in enumerate(ends, start=2):
            tokens.append(self.with_class(self.embed_end(end, stage), labels))
        x = torch.cat(tokens, dim=1)
        lengths = self.config.stage_tokens
        for block in self.blocks[:-1] if return_shared else self.blocks:
            if self.gradient_checkpointing and self.training:
                x = checkpoint(block, x, lengths, use_reentrant=False)
            else:
                x = block(x, lengths)
        if not return_shared:
            return self.norm(x).split(lengths, dim=1), None, None
        if not self.config.ar_layers:
            raise ValueError(
                "argument 'return_shared': expected False without AR layers, of which GradNorm "
                "looks inside the last, got True"
            )
        last = cast("StageBlock", self.blocks[-1])
        if (reason := why_not_as_written(last, StageBlock)) is not None:
            raise ValueError(f"GradNorm cannot look inside the last AR block: {reason}")
        x = x + last.attention(x, lengths, None, 0)
        hidden = recompute.linear(last.mlp.fc1, *recompute.layer_norm(last.norm2, x))
        output = last.mlp.project(hidden)
        return self.norm(x + output).split(lengths, dim=1), hidden, output

    def stage(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """The next stage's map from its input tokens [B, N_s, width] and the cache: M_s."""
        lengths = self.config.stage_tokens[: cache.stages + 1]
        if cache.stages == 0:  # asked once for all stages
            cache.bound = None
            if len(self.blocks) and BoundStageBlocks.why_not(self.blocks, tokens) is None:
                cache.bound = BoundStageBlocks(self.blocks, cache.keys, cache.values)
        if cache.bound is not None and cache.bound.why_not_now() is None:
            tokens = cache.bound.run(tokens, cache.length)
        else:
            statistics, last = None, len(self.blocks) - 1
            block: Any  # StageBlocks, or what took their place
            for layer, block in enumerate(self.blocks):
                given = lengths, cache, layer
                if isinstance(block, Accelerated) and as_written(block, StageBlock):
                    run: Any = block.forward_chained
                    tokens, statistics = run(tokens, statistics, *given, leaves=layer < last)
                else:
                    tokens, statistics = block(tokens, *given), None
        cache.stages += 1
        return self.norm(tokens)
