"""MAR (Li et al., 2024), the peer of the paper's Table 3, of the published sizes, on our ops.

A masked autoencoder draws 256 tokens of 16 channels in some AR steps, in random order: each step
encodes the tokens that are known (behind 64 buffer tokens that hold the class), decodes all, and
denoises the latents of the next few tokens by 100 steps of a small adaLN MLP. How many are next
follows a cosine. Sizes are those with which the authors evaluate; weights are random, and the
MLP's norms have none of their own (they could be folded into the modulation).
"""

import functools
import math
import statistics
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ecar_kernels
from benchmarks.timing import seconds_of
from ecar.flow import TIME_CHANNELS, time_frequencies
from ecar_kernels import Accelerated, Linear, OpsModule, StageBlock, accelerates

CLASSES = 1000
CHANNELS, DIFFUSION_STEPS = 16, 100
AR_STEPS = (64, 256)  # the authors' faster setting, and the one of their results


class MARSize(NamedTuple):
    """Encoder and decoder have `layers` each; the MLP has `mlp_blocks` of `mlp_width`."""

    layers: int
    width: int
    heads: int
    mlp_blocks: int
    mlp_width: int
    tokens: int = 256  # one a latent pixel of 16 x 16
    buffer: int = 64


SIZES = {
    "B": MARSize(12, 768, 12, 6, 1024),
    "L": MARSize(16, 1024, 16, 8, 1280),
    "H": MARSize(20, 1280, 16, 12, 1536),
}


class ResidualBlock(OpsModule):
    """x + gate W2 SiLU(W1 adaLN(x)); shift, scale and gate of each token from its condition."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.modulation = Linear(width, 3 * width)
        self.fc1, self.fc2 = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """x, condition (SiLU applied): [1, n, width]."""
        ops = self.ops(x)
        shift, scale, gate = self.modulation(condition).chunk(3, dim=-1)
        hidden = F.silu(ops.adaln_linear(x, shift, scale, self.fc1.weight, self.fc1.bias))
        return ops.linear_gated_residual(hidden, self.fc2.weight, self.fc2.bias, gate, x)


@accelerates(ResidualBlock)
class AcceleratedResidualBlock(Accelerated, ResidualBlock):
    uses = ("adaln_linear", "linear_gated_residual")
    weights = ("fc1.weight", "fc2.weight")


class DiffusionMLP(OpsModule):
    """Noise and variance of a token's latent: [1, n, 16] -> [1, n, 32]."""

    def __init__(self, size: MARSize) -> None:
        super().__init__()
        width = self.width = size.mlp_width
        self.time = nn.Sequential(Linear(TIME_CHANNELS, width), nn.SiLU(), Linear(width, width))
        self.condition = Linear(size.width, width)
        self.embed = Linear(CHANNELS, width)
        self.blocks = nn.ModuleList(ResidualBlock(width) for _ in range(size.mlp_blocks))
        self.modulation = Linear(width, 2 * width)
        self.output = nn.Linear(width, 2 * CHANNELS)

    def forward(self, x: Tensor, t: Tensor, z: Tensor) -> Tensor:
        """t: time in [0, 1], [n]. z: the decoder's tokens [1, n, width of the decoder]."""
        condition = F.silu(self.time(time_frequencies(t).to(x.dtype)) + self.condition(z))
        x = self.embed(x)
        for block in self.blocks:
            x = block(x, condition)
        shift, scale = self.modulation(condition).chunk(2, dim=-1)
        return self.ops(x).adaln_linear(x, shift, scale, self.output.weight, self.output.bias)


@accelerates(DiffusionMLP)
class AcceleratedDiffusionMLP(Accelerated, DiffusionMLP):
    uses = ("adaln_linear",)
    weights = ("output.weight",)


class MAR(nn.Module):
    """The whole model; one image at a time."""

    def __init__(self, size: MARSize) -> None:
        super().__init__()
        width, places = size.width, size.buffer + size.tokens
        self.size = size

        def blocks() -> nn.ModuleList:
            return nn.ModuleList(StageBlock(width, size.heads) for _ in range(size.layers))

        def learned(*counts: int) -> list[nn.Parameter]:
            return [nn.Parameter(torch.randn(1, count, width)) for count in counts]

        self.label = nn.Embedding(CLASSES, width)
        self.mask_token, self.diffusion_positions = learned(1, size.tokens)
        self.embed, self.decoder_embed = Linear(CHANNELS, width), Linear(width, width)
        self.encoder_positions, self.decoder_positions = learned(places, places)
        self.encoder, self.decoder = blocks(), blocks()
        self.embed_norm, self.encoder_norm, self.decoder_norm = (
            nn.LayerNorm(width, eps=1e-6) for _ in range(3)
        )
        self.mlp = DiffusionMLP(size)

    def condition(self, label: Tensor, latents: Tensor, known: Tensor, drawn: Tensor) -> Tensor:
        """What the latents of some tokens are denoised with: [1, drawn, width].

        label: [1]. latents: of all tokens [1, 256, 16]; those that are not known are not read.
        known, drawn: indices of tokens.
        """
        buffer = self.size.buffer
        label = self.label(label)[:, None].expand(-1, buffer, -1)
        x = torch.cat([label, self.embed(latents[:, known])], dim=1)
        places = torch.cat([torch.arange(buffer, device=known.device), buffer + known])
        x = self.embed_norm(x + self.encoder_positions[:, places])
        for block in self.encoder:
            x = block(x)
        all_tokens = self.mask_token.expand(1, buffer + self.size.tokens, -1).clone()
        all_tokens[:, places] = self.decoder_embed(self.encoder_norm(x))
        x = all_tokens + self.decoder_positions
        for block in self.decoder:
            x = block(x)
        return (self.decoder_norm(x)[:, buffer:] + self.diffusion_positions)[:, drawn]


def next_tokens(steps: int, tokens: int = 256) -> list[int]:
    """How many tokens each AR step draws: a cosine, at least one, all in the end."""
    left, found = tokens, []
    for step in range(1, steps):
        rest = math.floor(tokens * math.cos(math.pi / 2 * step / steps))
        found.append(left - max(1, min(left - 1, rest)))
        left -= found[-1]
    return [*found, left]


def build(size: MARSize) -> MAR:
    """An accelerated model with random weights."""
    model = MAR(size).eval()
    ecar_kernels.accelerate(model)
    return model


@torch.no_grad()
def image_seconds(model: MAR, ar_steps: int, timed_ar_steps: int, timed_steps: int) -> float:
    """Of an image without guidance, by a few AR steps, evenly spread, and a few diffusion steps of
    each: the network's calls alone.

    The mean over the timed AR steps times all; in each, the median diffusion step times 100.
    """
    size = model.size
    drawn = next_tokens(ar_steps, size.tokens)
    label, latents = torch.randint(CLASSES, (1,)), torch.randn(1, size.tokens, CHANNELS)
    total = 0.0
    for step in (int((i + 0.5) * ar_steps / timed_ar_steps) for i in range(timed_ar_steps)):
        order, known = torch.randperm(size.tokens), sum(drawn[:step])
        new = order[known : known + drawn[step]]
        z, x = torch.randn(1, len(new), size.width), torch.randn(1, len(new), CHANNELS)
        denoise = functools.partial(model.mlp, x, torch.rand(len(new)), z)
        total += (
            statistics.median([seconds_of(denoise) for _ in range(timed_steps)]) * DIFFUSION_STEPS
        )
        total += seconds_of(functools.partial(model.condition, label, latents, order[:known], new))
    return total / timed_ar_steps * ar_steps


def multiply_adds(size: MARSize, ar_steps: int) -> int:
    """Of one image's matrix products, without guidance."""
    with torch.device("meta"):
        model = MAR(size)

    def weights(module: nn.Module) -> int:
        return sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))

    def layers(blocks: nn.ModuleList, rows: int) -> int:
        return rows * weights(blocks) + len(blocks) * 2 * rows * rows * size.width

    total, known = 0, 0
    for drawn in next_tokens(ar_steps, size.tokens):
        rows = size.buffer + known
        total += known * weights(model.embed) + layers(model.encoder, rows)
        total += rows * weights(model.decoder_embed)
        total += layers(model.decoder, size.buffer + size.tokens)
        total += drawn * DIFFUSION_STEPS * weights(model.mlp)
        known += drawn
    return total
