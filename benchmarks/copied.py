"""Blocks of code that is copied rather than installed, in our words: DiT's, VAR's and MAR's.

They compute what the originals do, under the same names: after models.py of facebookresearch/DiT,
models/basic_var.py of FoundationVision/VAR (MIT licence, commit 2236c79) and models/diffloss.py of
LTH14/mar (MIT licence, commit 2641b89).
"""

import importlib.util
import math
import sys
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import nn


def timm(name: str) -> ModuleType:
    """A module of timm; where timm is not installed this one, which has the class that is needed,
    stands for it."""
    if importlib.util.find_spec("timm") is not None:
        return importlib.import_module(name)
    return sys.modules.setdefault(name, sys.modules[__name__])


class Attention(nn.Module):
    """timm's."""

    def __init__(self, dim, num_heads, qkv_bias):
        super().__init__()
        self.num_heads, self.scale = num_heads, (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.q_norm, self.k_norm = nn.Identity(), nn.Identity()
        self.attn_drop = nn.Dropout(0.0)
        self.proj, self.proj_drop = nn.Linear(dim, dim), nn.Dropout(0.0)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q), self.k_norm(k)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.proj_drop(self.proj(y.transpose(1, 2).flatten(2)))


class Mlp(nn.Module):
    """timm's."""

    def __init__(self, dim, hidden, act_layer):
        super().__init__()
        self.fc1, self.act, self.drop1 = nn.Linear(dim, hidden), act_layer(), nn.Dropout(0.0)
        self.norm, self.fc2, self.drop2 = nn.Identity(), nn.Linear(hidden, dim), nn.Dropout(0.0)

    def forward(self, x):
        return self.drop2(self.fc2(self.norm(self.drop1(self.act(self.fc1(x))))))


def modulate(x, shift, scale):
    return x * (1 + scale) + shift


class DiTBlock(nn.Module):
    """DiT's and SiT's."""

    def __init__(self, width, heads):
        super().__init__()
        attention, mlp = timm("timm.layers.attention").Attention, timm("timm.layers.mlp").Mlp
        self.norm1, self.norm2 = (
            nn.LayerNorm(width, elementwise_affine=False, eps=1e-6) for _ in range(2)
        )
        self.attn = attention(width, num_heads=heads, qkv_bias=True)
        self.mlp = mlp(width, 4 * width, act_layer=lambda: nn.GELU(approximate="tanh"))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, c):
        b1, s1, g1, b2, s2, g2 = (p[:, None] for p in self.adaLN_modulation(c).chunk(6, dim=-1))
        x = g1 * self.attn(modulate(self.norm1(x), b1, s1)) + x
        return x + g2 * self.mlp(modulate(self.norm2(x), b2, s2))


class DropPath(nn.Module):
    """Stochastic depth: a branch is left out of an image at random."""

    def __init__(self, drop_prob):
        super().__init__()
        self.drop_prob, self.scale_by_keep = drop_prob, True

    def forward(self, x):
        return dropped(x, self.drop_prob, self.training, self.scale_by_keep)


def dropped(x, probability, training, rescale):
    if probability == 0.0 or not training:
        return x
    kept = 1 - probability
    factor = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(kept)
    if kept > 0.0 and rescale:
        factor.div_(kept)
    return x * factor


class SelfAttention(nn.Module):
    """Of one stage over the cache of those before, or of all stages with a mask."""

    def __init__(self, width, heads, cosine):
        super().__init__()
        self.num_heads, self.head_dim, self.attn_l2_norm = heads, width // heads, cosine
        if cosine:
            self.scale, self.max_scale_mul = 1, math.log(100)
            self.scale_mul_1H11 = nn.Parameter(torch.full((1, heads, 1, 1), math.log(4)))
        else:
            self.scale = 0.25 / math.sqrt(self.head_dim)
        self.mat_qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias, self.v_bias = (nn.Parameter(torch.zeros(width)) for _ in range(2))
        self.register_buffer("zero_k_bias", torch.zeros(width))
        self.proj, self.proj_drop = nn.Linear(width, width), nn.Identity()
        self.attn_drop, self.using_flash, self.using_xform = 0.0, False, False
        self.kv_caching(False)

    def kv_caching(self, enable):
        self.caching, self.cached_k, self.cached_v = enable, None, None

    def forward(self, x, attn_bias):
        batch, count, width = x.shape
        bias = torch.cat((self.q_bias, self.zero_k_bias, self.v_bias))
        packed = F.linear(input=x, weight=self.mat_qkv.weight, bias=bias)
        packed = packed.view(batch, count, 3, self.num_heads, self.head_dim)
        q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(dim=0)
        if self.attn_l2_norm:
            q = F.normalize(q, dim=-1).mul(self.scale_mul_1H11.clamp_max(self.max_scale_mul).exp())
            k = F.normalize(k, dim=-1)
        if self.caching:
            if self.cached_k is not None:
                k, v = torch.cat((self.cached_k, k), dim=2), torch.cat((self.cached_v, v), dim=2)
            self.cached_k, self.cached_v = k, v
        y = F.scaled_dot_product_attention(
            query=q,
            key=k,
            value=v,
            scale=self.scale,
            attn_mask=attn_bias,
            dropout_p=self.attn_drop if self.training else 0.0,
        )
        return self.proj_drop(self.proj(y.transpose(1, 2).reshape(batch, count, width)))


class FFN(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.fused_mlp_func = None
        self.fc1, self.act = nn.Linear(width, hidden), nn.GELU(approximate="tanh")
        self.fc2, self.drop = nn.Linear(hidden, width), nn.Identity()

    def forward(self, x):
        return self.drop(self.fc2(self.act(self.fc1(x))))


class AdaLNSelfAttn(nn.Module):
    """VAR's block; shared: its modulation comes of a layer that all blocks share."""

    def __init__(self, width, heads, *, shared=False, cosine=True, drop_path=0.1):
        super().__init__()
        self.C, self.shared_aln = width, shared
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.attn, self.ffn = SelfAttention(width, heads, cosine), FFN(width, 4 * width)
        self.ln_wo_grad = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        if shared:
            self.ada_gss = nn.Parameter(torch.randn(1, 1, 6, width) / width**0.5)
        else:
            self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, cond_BD, attn_bias):
        if self.shared_aln:
            parts = self.ada_gss + cond_BD
        else:
            parts = self.ada_lin(cond_BD).view(-1, 1, 6, self.C)
        g1, g2, s1, s2, b1, b2 = parts.unbind(2)
        y = self.attn(self.ln_wo_grad(x).mul(s1.add(1)).add_(b1), attn_bias=attn_bias)
        x = x + self.drop_path(y.mul_(g1))
        return x + self.drop_path(self.ffn(self.ln_wo_grad(x).mul(s2.add(1)).add_(b2)).mul(g2))


class TimestepEmbedder(nn.Module):
    def __init__(self, width, frequencies=128):
        super().__init__()
        self.frequencies = frequencies
        self.mlp = nn.Sequential(
            nn.Linear(2 * frequencies, width), nn.SiLU(), nn.Linear(width, width)
        )

    def forward(self, t):
        rates = torch.exp(torch.arange(self.frequencies, device=t.device) * -math.log(10000.0))
        angles = t[:, None] * rates / self.frequencies
        found = torch.cat((angles.cos(), angles.sin()), dim=-1)
        return self.mlp(found.to(self.mlp[0].weight.dtype))


class ResBlock(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.in_ln = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 3 * width))

    def forward(self, x, y):
        shift, scale, gate = self.adaLN_modulation(y).chunk(3, dim=-1)
        return x + gate * self.mlp(modulate(self.in_ln(x), shift, scale))


class FinalLayer(nn.Module):
    def __init__(self, width, outputs):
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, outputs)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=-1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class SimpleMLPAdaLN(nn.Module):
    """MAR's diffusion MLP, of tokens [N, inputs]."""

    def __init__(self, inputs, width, condition, blocks):
        super().__init__()
        self.model_channels, self.grad_checkpointing = width, False
        self.time_embed, self.cond_embed = TimestepEmbedder(width), nn.Linear(condition, width)
        self.input_proj = nn.Linear(inputs, width)
        self.res_blocks = nn.ModuleList(ResBlock(width) for _ in range(blocks))
        self.final_layer = FinalLayer(width, 2 * inputs)

    def forward(self, x, t, c):
        x, y = self.input_proj(x), self.time_embed(t) + self.cond_embed(c)
        for block in self.res_blocks:
            x = block(x, y)
        return self.final_layer(x, y)
