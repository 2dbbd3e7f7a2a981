"""DiT's block by its own name: only code that computes what DiT's does is served."""

import inspect

import pytest
import torch
from torch import nn

from benchmarks.copied import DiTBlock
from ecar_kernels import accelerate, report
from ecar_kernels.foreign import Foreign
from tests.support.blocks import HEADS, WIDTH


def modulated(x, shift, scale):
    return x * (scale.unsqueeze(1) + 1) + shift.unsqueeze(1)


def shifted(x, shift, scale):
    return torch.add(x * (1 + scale.unsqueeze(1)), shift.unsqueeze(1))


def other_order(self, x, c):
    s1, b1, g1, s2, b2, g2 = self.adaLN_modulation(c).chunk(6, dim=1)
    x = x + g1.unsqueeze(1) * self.attn(modulated(self.norm1(x), b1, s1))
    return x + g2.unsqueeze(1) * self.mlp(modulated(self.norm2(x), b2, s2))


def one_norm(self, x, c):
    b1, s1, g1, b2, s2, g2 = self.adaLN_modulation(c).chunk(6, dim=1)
    x = x + g1.unsqueeze(1) * self.attn(modulated(self.norm1(x), b1, s1))
    return x + g2.unsqueeze(1) * self.mlp(modulated(self.norm1(x), b2, s2))


def no_residual(self, x, c):
    b1, s1, g1, b2, s2, g2 = self.adaLN_modulation(c).chunk(6, dim=1)
    x = x + g1.unsqueeze(1) * self.attn(modulated(self.norm1(x), b1, s1))
    return g2.unsqueeze(1) * self.mlp(modulated(self.norm2(x), b2, s2))


def parallel(self, x, c):
    b1, s1, g1, b2, s2, g2 = self.adaLN_modulation(c).chunk(6, dim=1)
    y = x + g1.unsqueeze(1) * self.attn(modulated(self.norm1(x), b1, s1))
    return y + g2.unsqueeze(1) * self.mlp(modulated(self.norm2(x), b2, s2))


def another_factor(self, x, c):
    b1, s1, g1, b2, s2, g2 = self.adaLN_modulation(c).chunk(6, dim=1)
    x = x + g1.unsqueeze(1) * self.attn(modulated(self.norm1(x), b1, s1))
    return x + 2 * g2.unsqueeze(1) * self.mlp(modulated(self.norm2(x), b2, s2))


def on_its_input(self, x, c):
    b1, s1, g1, b2, s2, g2 = self.adaLN_modulation(c).chunk(6, dim=1)
    x.add_(g1.unsqueeze(1) * self.attn(modulated(self.norm1(x), b1, s1)))
    return x + g2.unsqueeze(1) * self.mlp(modulated(self.norm2(x), b2, s2))


def on_a_view(self, x, c):
    b1, s1, g1, b2, s2, g2 = self.adaLN_modulation(c).chunk(6, dim=1)
    y = modulated(self.norm1(x), b1, s1)
    y[:, 0].mul_(0)
    x = x + g1.unsqueeze(1) * self.attn(y)
    return x + g2.unsqueeze(1) * self.mlp(modulated(self.norm2(x), b2, s2))


def in_place_and_dropped(self, x, c):
    b1, s1, g1, b2, s2, g2 = self.adaLN_modulation(c).chunk(6, dim=1)
    y = modulated(self.norm1(x), b1, s1)
    y.mul_(2)
    x = x + g1.unsqueeze(1) * self.attn(y)
    return x + g2.unsqueeze(1) * self.mlp(modulated(self.norm2(x), b2, s2))


def by_size(self, x, c):
    if x.shape[1] > 1000:
        return x
    return DiTBlock.forward(self, x, c)


def an_option(self, x, c, mask=None):
    return DiTBlock.forward(self, x if mask is None else x * mask, c)


def leaves_a_trace(self, x, c):
    self.seen = x
    return DiTBlock.forward(self, x, c)


def positions_too(self, x, c, rope):
    return DiTBlock.forward(self, x, c)


def a_buffer(self, x, c):
    return DiTBlock.forward(self, x + self.positions, c)


def by_functions(self, x, c):
    b1, s1, g1, b2, s2, g2 = self.adaLN_modulation(c).chunk(6, dim=1)
    x = x + g1.unsqueeze(1) * self.attn(shifted(self.norm1(x), b1, s1))
    return x + g2.unsqueeze(1) * self.mlp(shifted(self.norm2(x), b2, s2))


def in_place(self, x, c):
    b1, s1, g1, b2, s2, g2 = (part[:, None] for part in self.adaLN_modulation(c).chunk(6, -1))
    y = self.norm1(x).mul(s1.add(1)).add_(b1)
    x = x + self.attn(y).mul_(g1)
    y = self.norm2(x).mul(s2.add(1))
    y.add_(b2)
    return self.mlp(y).mul_(g2).add_(x)


def other_names(self, tokens, condition):
    parts = self.adaLN_modulation(condition).chunk(6, dim=1)
    shift, scale, gate = (part.unsqueeze(1) for part in parts[:3])
    tokens = tokens + gate * self.attn(shift + self.norm1(tokens) * (1 + scale))
    shift, scale, gate = (part.unsqueeze(1) for part in parts[3:])
    return tokens + gate * self.mlp(shift + self.norm2(tokens) * (1 + scale))


SAME_FORWARDS = by_functions, in_place, other_names
OTHER_FORWARDS = (
    other_order,
    one_norm,
    no_residual,
    parallel,
    another_factor,
    positions_too,
    a_buffer,
    on_its_input,
    on_a_view,
    in_place_and_dropped,
    by_size,
    an_option,
    leaves_a_trace,
)


def of_forward(name, forward):
    """A block of another class of that name."""
    kind = type(name, (nn.Module,), {"forward": forward})
    block = kind()
    for part, module in DiTBlock(WIDTH, HEADS).named_children():
        block.add_module(part, module)
    return block


@pytest.mark.parametrize("forward", OTHER_FORWARDS, ids=lambda forward: forward.__name__)
def test_other_code_of_that_name_is_left_alone(forward):
    block = of_forward("DiTBlock", forward)
    kind = type(block)
    with pytest.warns(UserWarning, match="1 DiTBlock: its forward is not that of DiT's block"):
        accelerate(block)
    assert type(block) is kind


@pytest.mark.parametrize("forward", SAME_FORWARDS, ids=lambda forward: forward.__name__)
@torch.no_grad()
def test_the_same_code_in_another_hand_is_served(forward):
    block = of_forward("SiTBlock", forward)
    x, c = torch.randn(2, 5, WIDTH), torch.randn(2, WIDTH)
    right = DiTBlock.forward(block, x, c)
    accelerate(block)
    assert isinstance(block, Foreign)
    names = list(inspect.signature(forward).parameters)[1:]
    for result in (block(x, c), block(**dict(zip(names, (x, c), strict=True)))):
        assert (result - right).abs().max() < 1e-5


OTHERS = {
    "norms of heads": (
        lambda block: setattr(block.attn, "q_norm", nn.LayerNorm(16)),
        "attn.q_norm: a LayerNorm in the place of a Dropout",
    ),
    "another scale": (lambda block: setattr(block.attn, "scale", 1.0), "attn: its scale is 1.0"),
    "another GELU": (
        lambda block: setattr(block.mlp, "act", nn.GELU()),
        "mlp.act: its approximate is 'none'",
    ),
    "another activation": (
        lambda block: setattr(block.mlp, "act", nn.SiLU()),
        "mlp.act: a SiLU in the place of a GELU",
    ),
    "an affine norm": (
        lambda block: setattr(block, "norm2", nn.LayerNorm(WIDTH)),
        "norm2: a LayerNorm with a weight or a bias",
    ),
    "another attention": (
        lambda block: setattr(block, "attn", nn.MultiheadAttention(WIDTH, 2)),
        "attn: a MultiheadAttention in the place of a Attention",
    ),
    "another part": (
        lambda block: setattr(block, "norm3", nn.LayerNorm(WIDTH)),
        "its parts are not norm1, attn, norm2, mlp, adaLN_modulation",
    ),
    "dropout": (
        lambda block: (setattr(block.mlp.drop1, "p", 0.5), block.train()),
        "mlp.drop1: it is training with a dropout of 0.5",
    ),
}


@pytest.mark.parametrize("other", OTHERS)
def test_another_part_is_told(other):
    change, reason = OTHERS[other]
    block = DiTBlock(WIDTH, HEADS)
    change(block)
    with pytest.warns(UserWarning, match="was swapped") as caught:
        accelerate(block)
    assert reason in str(caught[0].message) and reason in str(report(block))
