"""VAR's and MAR's own code: the cache, masks, stochastic depth, and parts that are others."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.copied import AdaLNSelfAttn, SelfAttention, SimpleMLPAdaLN
from ecar_kernels import accelerate, report, restore
from ecar_kernels.foreign import Foreign
from tests.support.blocks import BATCH, HEADS, TOKENS, WIDTH, agree, made, ops_of


@pytest.mark.parametrize("others", [(0, 1), (1, 0)])
@torch.no_grad()
def test_a_cache_goes_on_in_another_block(others):
    """It is kept as VAR keeps it: what the plain block began the accelerated one ends, and back."""
    plain, arguments, _ = made("VAR")
    fast = copy.deepcopy(plain)
    accelerate(fast)
    x, condition = arguments["x"], arguments["cond_BD"]
    blocks = [(plain, fast)[index] for index in (*others, 0)]
    plain.attn.kv_caching(True)
    right = [plain(stage, condition, None) for stage in x.split(3, dim=1)]
    kept = plain.attn.cached_k, plain.attn.cached_v
    plain.attn.kv_caching(True)
    before = plain.attn
    for block, stage, expected in zip(blocks, x.split(3, dim=1), right, strict=True):
        block.attn.caching = True
        block.attn.cached_k, block.attn.cached_v = before.cached_k, before.cached_v
        assert agree(block(stage, condition, None), expected)
        before = block.attn
    assert agree((before.cached_k, before.cached_v), kept)
    assert before.cached_k.shape == kept[0].shape == (BATCH, HEADS, TOKENS, WIDTH // HEADS)


def mask(seen):
    return torch.zeros(seen.shape).masked_fill(~seen, -math.inf)[None, None]


SEEN = torch.ones(TOKENS, TOKENS, dtype=torch.bool)
MASKS = {
    "each token a stage": (mask(SEEN.tril()), True),
    "one stage": (mask(SEEN), True),
    "a window": (mask(SEEN.tril().triu(-3)), False),
    "later stages alone": (mask(SEEN.triu()), False),
    "one number off": (mask(SEEN.tril()).index_fill(3, torch.tensor([2]), -0.5), False),
    "one for each image": (mask(SEEN.tril()).repeat(BATCH, 1, 1, 1), False),
    "booleans": (SEEN.tril()[None, None], False),
    "learned": (mask(SEEN).requires_grad_(), False),
}


@pytest.mark.parametrize("name", MASKS)
@torch.no_grad()
def test_masks(name):
    """Those of stages are served without the mask, others by the plain block with it."""
    given, served = MASKS[name]
    plain, arguments, _ = made("VAR")
    fast = copy.deepcopy(plain)
    accelerate(fast)
    right = plain(**arguments, attn_bias=given)
    assert agree(fast(**arguments, attn_bias=given), right)
    assert ("stage_attention" in ops_of(lambda: fast(**arguments, attn_bias=given))) is served


def test_a_mask_that_was_written_to_is_seen():
    plain, arguments, _ = made("VAR")
    fast, given = copy.deepcopy(plain), mask(SEEN.tril())
    accelerate(fast)
    with torch.no_grad():
        fast(**arguments, attn_bias=given)
        given.data[..., 4, 2] = -1.0
        right = plain(**arguments, attn_bias=given)
        assert agree(fast(**arguments, attn_bias=given), right)


@pytest.mark.parametrize("training", [False, True])
def test_stochastic_depth(training):
    """The same images lose the same branches; gradients too."""
    plain, arguments, call = made("VAR", batch=8)
    plain.drop_path.drop_prob = 0.5
    fast = copy.deepcopy(plain).train(training)
    plain.train(training)
    accelerate(fast)
    found = []
    for block in (plain, fast):
        torch.manual_seed(4)
        result = call(block, arguments)
        gradient = torch.autograd.grad(result.square().sum(), block.ffn.fc1.weight)[0]
        found.append((result, gradient / gradient.norm()))
    assert agree(*found)
    assert ops_of(lambda: call(fast, arguments))
    assert training is not agree(call(plain, arguments), call(plain, arguments))


class Rotated(SelfAttention):
    """Another attention of the same parts."""

    def forward(self, x, attn_bias):
        return super().forward(x.roll(1, 1), attn_bias)


class Centred(SelfAttention):
    def forward(self, x, attn_bias):
        batch, count, width = x.shape
        bias = torch.cat((self.q_bias, self.zero_k_bias, self.v_bias))
        packed = F.linear(input=x, weight=self.mat_qkv.weight, bias=bias)
        packed = packed.view(batch, count, 3, self.num_heads, self.head_dim)
        q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(dim=0)
        y = F.scaled_dot_product_attention(
            query=q, key=k, value=v, scale=self.scale, attn_mask=attn_bias, dropout_p=0.0
        )
        return self.proj_drop(self.proj(y.transpose(1, 2).reshape(batch, count, width)))


def var():
    return AdaLNSelfAttn(WIDTH, HEADS)


def mar():
    return SimpleMLPAdaLN(5, WIDTH, 24, 2)


def with_attribute(block, part, **values):
    for name, value in values.items():
        setattr(block.get_submodule(part), name, value)
    return block


OTHERS = {
    "flash-attn": (
        lambda: with_attribute(var(), "attn", using_flash=True),
        "attn: its using_flash is True, not False",
    ),
    "a fused MLP": (
        lambda: with_attribute(var(), "ffn", fused_mlp_func=print),
        "ffn: its fused_mlp_func is <built-in function print>, not None",
    ),
    "attention's dropout": (
        lambda: with_attribute(var(), "attn", attn_drop=0.1).train(),
        "attn: it is training with a dropout of 0.1",
    ),
    "an affine norm": (
        lambda: with_attribute(var(), "", ln_wo_grad=nn.LayerNorm(WIDTH)),
        "ln_wo_grad: a LayerNorm with a weight or a bias",
    ),
    "another GELU": (
        lambda: with_attribute(var(), "ffn", act=nn.GELU()),
        "ffn.act: its approximate is 'none'",
    ),
    "an attention that calls VAR's": (
        lambda: with_attribute(var(), "", attn=Rotated(WIDTH, HEADS, True)),
        "attn: its forward is not that of VAR's attention",
    ),
    "an attention without a cache": (
        lambda: with_attribute(var(), "", attn=Centred(WIDTH, HEADS, False)),
        "attn: its forward is not that of VAR's attention",
    ),
    "dropout in stochastic depth's place": (
        lambda: with_attribute(var(), "", drop_path=nn.Dropout(0.1)),
        "drop_path: its forward is not that of stochastic depth",
    ),
    "checkpoints": (
        lambda: with_attribute(mar(), "", grad_checkpointing=True),
        "it checkpoints its blocks",
    ),
    "another activation": (
        lambda: with_attribute(mar(), "res_blocks.1.mlp", **{"1": nn.GELU()}),
        "res_blocks.1.mlp.1: a GELU in the place of a SiLU",
    ),
    "another last layer": (
        lambda: with_attribute(mar(), "", final_layer=nn.Bilinear(WIDTH, WIDTH, 10)),
        "final_layer: its forward is not that of MAR's last layer",
    ),
}


@pytest.mark.parametrize("other", OTHERS)
def test_another_part_is_told(other):
    make, reason = OTHERS[other]
    block = make()
    with pytest.warns(UserWarning, match="was swapped") as caught:
        accelerate(block)
    assert reason in str(caught[0].message) and reason in str(report(block))
    assert not isinstance(block, Foreign)


def test_a_norm_is_called_where_it_is_another():
    """Of MAR's blocks, whose norms have weights."""
    block, arguments, call = made("MAR")
    block.res_blocks[1].in_ln.register_forward_hook(lambda norm, inputs, result: 2 * result)
    with torch.no_grad():
        right = call(block, arguments)
        accelerate(block)
        assert agree(call(block, arguments), right)
        assert report(block)[0].left == ("res_blocks.1.in_ln: it has forward hooks",)
        assert agree(call(restore(block), arguments), right)
