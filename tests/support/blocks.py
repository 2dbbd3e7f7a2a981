"""Blocks of other libraries, as small as they are built, their calls, and what comes of them."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers.models.attention import BasicTransformerBlock, JointTransformerBlock
from diffusers.models.transformers.transformer_flux import (
    FluxSingleTransformerBlock,
    FluxTransformerBlock,
)
from torch import Tensor, nn

from ecar_kernels import report
from ecar_kernels.foreign import Foreign
from ecar_kernels.registry import record

WIDTH, HEADS, HEAD_DIM = 32, 2, 16
BATCH, TOKENS, TEXT = 2, 9, 5
FUSED = {"adaln_linear", "stage_attention", "linear_gated_residual"}


def timm(name: str) -> Any:
    """A module of timm, or what stands for it where timm is not installed."""
    if importlib.util.find_spec("timm") is not None:
        return importlib.import_module(name)
    if name not in sys.modules:
        path = Path(__file__).with_name("timm_parts.py")
        spec = importlib.util.spec_from_file_location(name, path)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


class DiTBlock(nn.Module):
    """As in DiT's own code, but for names that do not matter."""

    def __init__(self) -> None:
        super().__init__()
        attention, mlp = timm("timm.layers.attention").Attention, timm("timm.layers.mlp").Mlp
        self.norm1 = nn.LayerNorm(WIDTH, elementwise_affine=False, eps=1e-6)
        self.attn = attention(WIDTH, num_heads=HEADS, qkv_bias=True)
        self.norm2 = nn.LayerNorm(WIDTH, elementwise_affine=False, eps=1e-6)
        self.mlp = mlp(WIDTH, 4 * WIDTH, act_layer=lambda: nn.GELU(approximate="tanh"))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, 6 * WIDTH))

    def forward(self, x, c):
        b1, w1, g1, b2, w2, g2 = self.adaLN_modulation(c).chunk(6, dim=-1)
        x = g1[:, None] * self.attn(modulated(self.norm1(x), b1, w1)) + x
        return x + g2.unsqueeze(1) * self.mlp(modulated(self.norm2(x), b2, w2))


def modulated(x, shift, scale):
    return x * (scale.unsqueeze(1) + 1) + shift.unsqueeze(1)


class Block(NamedTuple):
    make: Callable[[], nn.Module]
    # Of the number of images: the arguments of a call by name.
    arguments: Callable[[int], dict[str, Any]]
    # What the block returns, as tensors alone.
    outputs: Callable[[Any], Any] = lambda result: result


def tokens(batch: int, count: int = TOKENS) -> Tensor:
    return torch.randn(batch, count, WIDTH)


def streams(batch: int, count: int = TOKENS) -> dict[str, Tensor]:
    """Of image and text, with their embedding."""
    return {
        "hidden_states": tokens(batch, count),
        "encoder_hidden_states": tokens(batch, TEXT),
        "temb": torch.randn(batch, WIDTH),
    }


def rotary() -> tuple[Tensor, Tensor]:
    angles = torch.randn(TEXT + TOKENS, HEAD_DIM // 2).repeat_interleave(2, -1)
    return angles.cos(), angles.sin()


def flux_streams(batch: int) -> dict[str, Any]:
    return streams(batch) | {"image_rotary_emb": rotary()}


def dit(**options: Any) -> BasicTransformerBlock:
    return BasicTransformerBlock(
        WIDTH,
        HEADS,
        HEAD_DIM,
        **{
            "activation_fn": "gelu-approximate",
            "attention_bias": True,
            "norm_elementwise_affine": False,
            "norm_type": "ada_norm_zero",
            "num_embeds_ada_norm": 10,
        }
        | options,
    )


def pixart(**options: Any) -> BasicTransformerBlock:
    return dit(
        norm_type="ada_norm_single", **{"cross_attention_dim": WIDTH, "norm_eps": 1e-6} | options
    )


def dit_arguments(batch: int) -> dict[str, Any]:
    return {
        "hidden_states": tokens(batch),
        "timestep": torch.randint(1000, (batch,)),
        "class_labels": torch.randint(10, (batch,)),
    }


def pixart_arguments(batch: int) -> dict[str, Any]:
    """With text of unequal lengths."""
    mask = torch.zeros(batch, 1, TEXT)
    mask[0, :, TEXT // 2 :] = -10000.0
    return {
        "hidden_states": tokens(batch),
        "encoder_hidden_states": tokens(batch, TEXT),
        "encoder_attention_mask": mask,
        "timestep": torch.randn(batch, 6 * WIDTH),
    }


def joint(**options: Any) -> JointTransformerBlock:
    return JointTransformerBlock(WIDTH, HEADS, HEAD_DIM, **options)


def image_alone(result: Any) -> Any:
    return result[1]


BLOCKS = {
    "DiT": Block(dit, dit_arguments),
    "PixArt": Block(pixart, pixart_arguments),
    "Latte": Block(
        lambda: pixart(cross_attention_dim=None),
        lambda batch: {"hidden_states": tokens(batch), "timestep": torch.randn(batch, 6 * WIDTH)},
    ),
    "SD3": Block(joint, streams),
    "SD3.5": Block(lambda: joint(qk_norm="rms_norm", use_dual_attention=True), streams),
    "SD3 last": Block(lambda: joint(context_pre_only=True), streams, image_alone),
    "Flux": Block(lambda: FluxTransformerBlock(WIDTH, HEADS, HEAD_DIM), flux_streams),
    "Flux single": Block(lambda: FluxSingleTransformerBlock(WIDTH, HEADS, HEAD_DIM), flux_streams),
    "DiT's own": Block(
        DiTBlock, lambda batch: {"x": tokens(batch), "c": torch.randn(batch, WIDTH)}
    ),
}


def made(
    name: str, batch: int = BATCH, std: float = 0.2
) -> tuple[nn.Module, dict[str, Any], Callable]:
    """A block with weights of which each counts, arguments, and the call (block, arguments)."""
    block, outputs = BLOCKS[name].make().eval(), BLOCKS[name].outputs
    with torch.no_grad():
        for parameter in block.parameters():
            nn.init.normal_(parameter, std=std)
    return block, BLOCKS[name].arguments(batch), lambda block, given: outputs(block(**given))


def flat(result: Any) -> tuple[Any, ...]:
    """A block's results, one or several."""
    return (result,) if isinstance(result, Tensor) else tuple(result)


def near(got: Tensor, right: Tensor) -> bool:
    return not right.numel() or bool(
        (got - right).abs().max() <= 1e-4 * max(1, right.abs().max().item())
    )


def agree(got: Any, right: Any) -> bool:
    return all(map(near, flat(got), flat(right)))


def ops_of(call: Callable[[], Any]) -> set[str]:
    """The ops that a call calls."""
    with record() as log:
        call()
    return set(log)


def is_served(block: nn.Module) -> bool:
    """Was it swapped, and does the report leave nothing of it out?"""
    (row,) = report(block)
    return isinstance(block, Foreign) and not row.left and set(row.served) == FUSED
