"""DiT's block by its own name: only code that computes what DiT's does is served."""

import pytest
import torch
from torch import nn

from ecar_kernels import accelerate, report
from ecar_kernels.foreign import Foreign
from tests.support import blocks
from tests.support.blocks import WIDTH


def shifted(x, shift, scale):
    return torch.add(x * (1 + scale.unsqueeze(1)), shift.unsqueeze(1))


def other_order(self, x, c):
    s1, b1, g1, s2, b2, g2 = self.adaLN_modulation(c).chunk(6, dim=1)
    x = x + g1.unsqueeze(1) * self.attn(blocks.modulated(self.norm1(x), b1, s1))
    return x + g2.unsqueeze(1) * self.mlp(blocks.modulated(self.norm2(x), b2, s2))


def one_norm(self, x, c):
    b1, s1, g1, b2, s2, g2 = self.adaLN_modulation(c).chunk(6, dim=1)
    x = x + g1.unsqueeze(1) * self.attn(blocks.modulated(self.norm1(x), b1, s1))
    return x + g2.unsqueeze(1) * self.mlp(blocks.modulated(self.norm1(x), b2, s2))


def no_residual(self, x, c):
    b1, s1, g1, b2, s2, g2 = self.adaLN_modulation(c).chunk(6, dim=1)
    x = x + g1.unsqueeze(1) * self.attn(blocks.modulated(self.norm1(x), b1, s1))
    return g2.unsqueeze(1) * self.mlp(blocks.modulated(self.norm2(x), b2, s2))


def parallel(self, x, c):
    b1, s1, g1, b2, s2, g2 = self.adaLN_modulation(c).chunk(6, dim=1)
    y = x + g1.unsqueeze(1) * self.attn(blocks.modulated(self.norm1(x), b1, s1))
    return y + g2.unsqueeze(1) * self.mlp(blocks.modulated(self.norm2(x), b2, s2))


def another_factor(self, x, c):
    b1, s1, g1, b2, s2, g2 = self.adaLN_modulation(c).chunk(6, dim=1)
    x = x + g1.unsqueeze(1) * self.attn(blocks.modulated(self.norm1(x), b1, s1))
    return x + 2 * g2.unsqueeze(1) * self.mlp(blocks.modulated(self.norm2(x), b2, s2))


def by_functions(self, x, c):
    b1, s1, g1, b2, s2, g2 = self.adaLN_modulation(c).chunk(6, dim=1)
    x = x + g1.unsqueeze(1) * self.attn(shifted(self.norm1(x), b1, s1))
    return x + g2.unsqueeze(1) * self.mlp(shifted(self.norm2(x), b2, s2))


def positions_too(self, x, c, rope):
    return blocks.DiTBlock.forward(self, x, c)


def a_buffer(self, x, c):
    return blocks.DiTBlock.forward(self, x + self.positions, c)


FORWARDS = (
    other_order,
    one_norm,
    no_residual,
    parallel,
    another_factor,
    by_functions,
    positions_too,
    a_buffer,
)


@pytest.mark.parametrize("forward", FORWARDS, ids=lambda forward: forward.__name__)
def test_other_code_of_that_name_is_left_alone(forward):
    kind = type(
        "DiTBlock", (nn.Module,), {"__init__": blocks.DiTBlock.__init__, "forward": forward}
    )
    block = kind.__new__(kind)
    nn.Module.__init__(block)
    for name, part in blocks.DiTBlock().named_children():
        block.add_module(name, part)
    with pytest.warns(UserWarning, match="1 DiTBlock: its forward is not that of DiT's block"):
        accelerate(block)
    assert type(block) is kind


def test_the_same_code_in_another_hand_is_served():
    class SiTBlock(blocks.DiTBlock):
        def forward(self, tokens, condition):
            parts = self.adaLN_modulation(condition).chunk(6, dim=1)
            shift, scale, gate = (part.unsqueeze(1) for part in parts[:3])
            tokens = tokens + gate * self.attn(shift + self.norm1(tokens) * (1 + scale))
            shift, scale, gate = (part.unsqueeze(1) for part in parts[3:])
            return tokens + gate * self.mlp(shift + self.norm2(tokens) * (1 + scale))

    block = SiTBlock()
    x, c = torch.randn(2, 5, WIDTH), torch.randn(2, WIDTH)
    with torch.no_grad():
        right = block(x, c)
        accelerate(block)
        assert isinstance(block, Foreign)
        assert (block(x, c) - right).abs().max() < 1e-5


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
    block = blocks.DiTBlock()
    change(block)
    with pytest.warns(UserWarning, match="was swapped") as caught:
        accelerate(block)
    assert reason in str(caught[0].message) and reason in str(report(block))
