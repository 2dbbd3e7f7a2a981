"""MAR (Li et al., 2024), the peer of the paper's Table 3, of the published sizes, accelerated.

A masked autoencoder draws 256 tokens of 16 channels in some AR steps, in random order: each step
encodes the tokens that are known (behind 64 buffer tokens that hold the class), decodes all, and
denoises the latents of the next few tokens by 100 steps of a small adaLN MLP. How many are next
follows a cosine. Sizes are those with which the authors evaluate; weights are random.
"""

import functools
import math
import statistics
from typing import NamedTuple

import torch
from torch import Tensor, nn

import ecar_kernels
from benchmarks.copied import SimpleMLPAdaLN
from benchmarks.timing import seconds_of
from ecar_kernels import Linear, StageBlock

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
        self.mlp = SimpleMLPAdaLN(CHANNELS, size.mlp_width, width, size.mlp_blocks)

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
        z, x = torch.randn(len(new), size.width), torch.randn(len(new), CHANNELS)
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
