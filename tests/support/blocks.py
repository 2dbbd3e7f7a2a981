"""Blocks of other libraries, as small as they are built, their calls, and what comes of them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from diffusers.models.attention import BasicTransformerBlock, JointTransformerBlock
from diffusers.models.transformers.transformer_flux import (
    FluxSingleTransformerBlock,
    FluxTransformerBlock,
)
from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformerBlock
from torch import Tensor, nn

from benchmarks.copied import AdaLNSelfAttn, DiTBlock, SimpleMLPAdaLN
from ecar_kernels import report
from ecar_kernels.foreign import Foreign
from ecar_kernels.registry import record
from ecar_kernels.stage_attention.reference import block_causal_mask

WIDTH, HEADS, HEAD_DIM = 32, 2, 16
BATCH, TOKENS, TEXT = 2, 9, 5


class Block(NamedTuple):
    make: Callable[[], nn.Module]
    # Of the number of images: the arguments of a call by name.
    arguments: Callable[[int], dict[str, Any]]
    # What the block, or a forward of it, makes of the arguments, as tensors alone.
    call: Callable[[Any, dict[str, Any]], Any] = lambda block, given: block(**given)


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


def qwen_arguments(batch: int) -> dict[str, Any]:
    angles = torch.randn(TOKENS + TEXT, HEAD_DIM // 2)
    turns = torch.polar(torch.ones_like(angles), angles).split([TOKENS, TEXT])
    return streams(batch) | {"encoder_hidden_states_mask": None, "image_rotary_emb": turns}


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


def image_alone(block: Any, given: dict[str, Any]) -> Any:
    return block(**given)[1]


STAGES = (1, 3, 5)


def masked(block: Any, given: dict[str, Any]) -> Tensor:
    """VAR's block over all stages."""
    x = given["x"]
    mask = block_causal_mask(STAGES, TOKENS, device=x.device)
    bias = torch.zeros(mask.shape, device=x.device).masked_fill(~mask, -torch.inf)
    return block(**given, attn_bias=bias[None, None].to(x.dtype))


def stage_by_stage(block: Any, given: dict[str, Any]) -> Tensor:
    """With the cache."""
    attention = getattr(block, "__self__", block).attn
    attention.kv_caching(True)
    try:
        return torch.cat(
            [
                block(**given | {"x": x}, attn_bias=None)
                for x in given["x"].tensor_split((STAGES[0], sum(STAGES[:2])), dim=1)
            ],
            dim=1,
        )
    finally:
        attention.kv_caching(False)


def var_arguments(batch: int) -> dict[str, Any]:
    return {"x": tokens(batch), "cond_BD": torch.randn(batch, WIDTH)}


def mar_arguments(batch: int) -> dict[str, Any]:
    return {"x": torch.randn(batch, 5), "t": torch.rand(batch), "c": torch.randn(batch, 24)}


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
    "Qwen": Block(lambda: QwenImageTransformerBlock(WIDTH, HEADS, HEAD_DIM), qwen_arguments),
    "DiT's own": Block(
        lambda: DiTBlock(WIDTH, HEADS),
        lambda batch: {"x": tokens(batch), "c": torch.randn(batch, WIDTH)},
    ),
    "VAR": Block(lambda: AdaLNSelfAttn(WIDTH, HEADS), var_arguments, masked),
    "VAR shared": Block(
        lambda: AdaLNSelfAttn(WIDTH, HEADS, shared=True, cosine=False, drop_path=0.0),
        lambda batch: {"x": tokens(batch), "cond_BD": torch.randn(batch, 1, 6, WIDTH)},
        masked,
    ),
    "VAR by stages": Block(lambda: AdaLNSelfAttn(WIDTH, HEADS), var_arguments, stage_by_stage),
    "MAR": Block(lambda: SimpleMLPAdaLN(5, WIDTH, 24, 2), mar_arguments),
}


def made(
    name: str, batch: int = BATCH, std: float = 0.2
) -> tuple[nn.Module, dict[str, Any], Callable]:
    """A block with weights of which each counts, arguments, and the call (block, arguments)."""
    block = BLOCKS[name].make().eval()
    with torch.no_grad():
        for parameter in block.parameters():
            nn.init.normal_(parameter, std=std)
    return block, BLOCKS[name].arguments(batch), BLOCKS[name].call


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
    return isinstance(block, Foreign) and not row.left and set(row.served) == set(block.uses)
