"""The drop-in modules: what they compute, plain and accelerated, and a DiT built of them."""

from unittest.mock import MagicMock

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import ecar_kernels
from ecar_kernels import (
    AdaLN,
    FlowBlock,
    GatedResidual,
    Linear,
    StageAttention,
    StageBlock,
    accelerate,
    acceleration,
    report,
    use_backend,
)
from ecar_kernels.acceleration import Accelerated, unit_gate
from ecar_kernels.registry import KERNEL_DTYPES
from ecar_kernels.stage_attention.reference import block_causal_mask
from tests.support.accuracy import assert_accurate
from tests.support.modules import accelerated, arguments_of, calls_of_a_block, functional
from tests.support.native import needs_native

WIDTH, HEADS, STAGES = 48, 4, (1, 4, 9)
TOKENS = sum(STAGES)


def flow_block(module, x, spatial, step):
    return module.infer(x, spatial.unbind(), step.unbind())


# For each class a module, how it is called, and its tensors.
CASES = {
    "AdaLN": (
        lambda: AdaLN(1e-5),
        lambda module, x, shift, scale: module(x, shift, scale),
        {"x": (2, TOKENS, WIDTH), "shift": (2, 1, WIDTH), "scale": (2, TOKENS, WIDTH)},
    ),
    "GatedResidual": (
        GatedResidual,
        lambda module, x, branch, gate: module(x, branch, gate),
        {"x": (2, TOKENS, WIDTH), "branch": (2, TOKENS, WIDTH), "gate": (2, 1, WIDTH)},
    ),
    "Linear": (lambda: Linear(WIDTH, 70), lambda module, x: module(x), {"x": (3, 2, 5, WIDTH)}),
    "Linear.product": (
        lambda: Linear(WIDTH, 70),
        lambda module, x: module.product(x),
        {"x": (5, WIDTH)},
    ),
    "StageAttention": (
        lambda: StageAttention(WIDTH, HEADS, bias=False),
        lambda module, x: module(x, STAGES),
        {"x": (2, TOKENS, WIDTH)},
    ),
    "StageBlock": (
        lambda: StageBlock(WIDTH, HEADS),
        lambda module, x: module(x, STAGES),
        {"x": (2, TOKENS, WIDTH)},
    ),
    "FlowBlock": (
        lambda: FlowBlock(WIDTH, HEADS, 100),
        flow_block,
        {"x": (2, TOKENS, WIDTH), "spatial": (6, 2, TOKENS, WIDTH), "step": (6, 1, 1, WIDTH)},
    ),
}


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_accelerated_modules_are_as_right_as_plain_ones(name, dtype):
    build, call, shapes = CASES[name]
    plain, fast = build(), build().to(dtype)
    arguments = arguments_of(plain, shapes, dtype)
    accelerate(fast)

    def reference(**arguments):
        with use_backend("reference"):
            return functional(plain, call)(**arguments)

    assert isinstance(fast, Accelerated)
    assert_accurate(functional(fast, call), reference, arguments)


@torch.no_grad()
def test_stage_attention_sees_its_own_and_earlier_stages():
    module, x = StageAttention(WIDTH, HEADS), torch.randn(2, TOKENS, WIDTH)
    q, k, v = (
        part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in module.qkv(x).chunk(3, -1)
    )
    mask = block_causal_mask(STAGES, TOKENS)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    expected = module.proj(expected.transpose(1, 2).flatten(2))
    assert (module(x, STAGES) - expected).abs().max() < 1e-5
    assert (module(x) - module(x, (TOKENS,))).abs().max() == 0


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("factor", [1e-3, 50])
@torch.no_grad()
def test_layer_norms_far_from_1(factor, dtype):
    """Their weights are what is fused, not their distance from 1, which would be rounded."""
    build, call, shapes = CASES["StageBlock"]
    plain, fast = build(), accelerated(build().to(dtype))
    arguments = arguments_of(plain, shapes, dtype)
    for index, (name, _) in enumerate(plain.named_parameters()):
        if name in ("norm1.weight", "norm2.weight"):
            arguments[f"w{index}"] = (factor * (1 + torch.rand(WIDTH))).to(dtype)
        elif name in ("norm1.bias", "norm2.bias"):
            arguments[f"w{index}"] *= factor
        elif name in ("qkv.weight", "mlp.fc1.weight"):
            # So that all tokens count, and no score is so large that rounding is a lottery.
            arguments[f"w{index}"] /= factor

    def reference(**arguments):
        with use_backend("reference"):
            return functional(plain, call)(**arguments)

    assert_accurate(functional(fast, call), reference, arguments)


class OwnNorm(nn.LayerNorm):
    """With a forward of its own: no mean is taken off."""

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight


def hooked():
    norm = nn.LayerNorm(WIDTH)
    norm.register_forward_hook(lambda module, inputs, output: 2 * output)
    return norm


NORMS = {
    "LayerNorm": lambda: nn.LayerNorm(WIDTH),
    "no weight": lambda: nn.LayerNorm(WIDTH, elementwise_affine=False),
    "no bias": lambda: nn.LayerNorm(WIDTH, bias=False),
    "RMSNorm": lambda: nn.RMSNorm(WIDTH),
    "Identity": nn.Identity,
    "another forward": lambda: OwnNorm(WIDTH),
    "a hook": hooked,
}


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("which", ["norm1", "norm2"])
@pytest.mark.parametrize("name", NORMS)
@torch.no_grad()
def test_other_norms_in_an_accelerated_block(name, which, backend):
    """Only a plain LayerNorm is fused; the answer is the plain block's, and the report tells."""
    block, x = StageBlock(WIDTH, HEADS), torch.randn(2, TOKENS, WIDTH) + 1
    setattr(block, which, NORMS[name]())
    expected = block(x, STAGES)
    accelerate(block, backend=backend)
    assert (block(x, STAGES) - expected).abs().max() < 1e-5 * expected.abs().max()
    assert (f"{which}: " in str(report(block))) is (name != "LayerNorm")


@needs_native
@torch.no_grad()
def test_an_accelerated_block_is_five_calls():
    """No other is made but views and the writes to the cache: on a GPU each would be a launch."""
    block = accelerated(StageBlock(WIDTH, HEADS), backend="cpp")
    assert calls_of_a_block(block) == [
        "ecar::packed_adaln_linear",
        "aten::copy_",
        "aten::copy_",
        "ecar::stage_attention",
        "ecar::packed_linear_gated_residual",
        "ecar::packed_adaln_linear",
        "ecar::packed_linear_gated_residual",
    ]


class TestUnitGate:
    """The constant gate of 1, kept so that it is filled once."""

    @pytest.fixture(autouse=True)
    def kept(self, monkeypatch):
        monkeypatch.setattr(acceleration, "_unit_gates", kept := {})
        return kept

    @pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
    def test_a_view_of_what_is_kept(self, dtype):
        with torch.inference_mode():
            first = unit_gate(torch.empty(3, 5, 7, dtype=dtype), WIDTH)
        again = unit_gate(torch.empty(2, 5, 7, dtype=dtype), WIDTH)
        assert first.data_ptr() == again.data_ptr() and not again.is_inference()
        assert again.equal(torch.ones(2, 1, WIDTH, dtype=dtype))

    def test_a_fake_one_is_not_kept(self, kept):
        x = torch.empty(2, 5, WIDTH)
        for _ in range(2):  # before and after there is a real one
            with FakeTensorMode() as mode:
                assert type(unit_gate(mode.from_tensor(x), WIDTH)) is FakeTensor
            assert unit_gate(x, WIDTH).equal(torch.ones(2, 1, WIDTH))
        assert len(kept) == 1

    @pytest.mark.parametrize("capturing", [True, False])
    def test_one_that_a_graph_would_fill_is_not_kept(self, kept, monkeypatch, capturing):
        """Under capture nothing is computed; else its stream is waited for, as others may read."""
        stream = MagicMock()
        monkeypatch.setattr(torch.Tensor, "is_cuda", True)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
        unit_gate(torch.empty(2, 5, WIDTH), WIDTH)
        assert len(kept) == stream.synchronize.call_count == (not capturing)


class Cache:
    def __init__(self):
        self.held = {}

    def write(self, layer, key, value):
        before = self.held.get(layer)
        if before is not None:
            key, value = (torch.cat(pair, 1) for pair in zip(before, (key, value), strict=True))
        self.held[layer] = key, value
        return key, value


@pytest.mark.parametrize("fast", [False, True], ids=["plain", "accelerated"])
@pytest.mark.parametrize("kind", [StageAttention, StageBlock])
@torch.no_grad()
def test_stage_by_stage_over_a_cache_equals_all_at_once(kind, fast):
    module, x, cache = kind(WIDTH, HEADS), torch.randn(2, TOKENS, WIDTH), Cache()
    if fast:
        accelerate(module)
    whole, found = module(x, STAGES), []
    for count, tokens in enumerate(x.split(STAGES, 1), start=1):
        found.append(module(tokens, STAGES[:count], cache, 3))
    assert set(cache.held) == {3}
    assert (torch.cat(found, 1) - whole).abs().max() < 1e-5


@torch.no_grad()
def test_a_flow_block_trains_on_what_it_infers():
    """Both paths of one block: the training path begins with its input already normalised."""
    block = FlowBlock(WIDTH, HEADS)
    x, spatial, step = (
        torch.randn(2, 9, WIDTH),
        torch.randn(8, 2, 9, WIDTH),
        torch.randn(8, 2, 1, WIDTH),
    )
    y = ecar_kernels.adaln(x, spatial[0], spatial[1], step_shift=step[0], step_scale=step[1])
    after, following = block(x, y, spatial[2:].unbind(), step[2:].unbind())
    expected = block.infer(x, spatial[:6].unbind(), step[:6].unbind())
    assert (after - expected).abs().max() < 1e-5
    normalised = ecar_kernels.adaln(
        expected, spatial[6], spatial[7], step_shift=step[6], step_scale=step[7]
    )
    assert (following - normalised).abs().max() < 1e-5


def test_heads_divide_the_width():
    with pytest.raises(ValueError, match="argument 'heads': expected a divisor of width=48, got 5"):
        StageAttention(48, 5)


class PlainDiTBlock(nn.Module):
    """DiT's block as its authors write it, in plain PyTorch."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, x, condition):
        def modulate(x, shift, scale):
            return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift

        parts = self.modulation(F.silu(condition)).unsqueeze(1).chunk(6, -1)
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(modulate(x, *parts[:2])).chunk(3, -1)
        )
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + parts[2] * self.proj(attended)
        hidden = F.gelu(self.fc1(modulate(x, *parts[3:5])), approximate="tanh")
        return x + parts[5] * self.fc2(hidden)


class DiTBlock(nn.Module):
    """The same of drop-in modules."""

    def __init__(self, width, heads):
        super().__init__()
        self.norm, self.residual = AdaLN(), GatedResidual()
        self.attention = StageAttention(width, heads)
        self.fc1, self.fc2 = Linear(width, 4 * width), Linear(4 * width, width)
        self.modulation = Linear(width, 6 * width)

    def forward(self, x, condition):
        parts = self.modulation(F.silu(condition)).unsqueeze(1).chunk(6, -1)
        x = self.residual(x, self.attention(self.norm(x, *parts[:2])), parts[2])
        hidden = F.gelu(self.fc1(self.norm(x, *parts[3:5])), approximate="tanh")
        return self.residual(x, self.fc2(hidden), parts[5])


@pytest.mark.parametrize("fast", [False, True], ids=["plain", "accelerated"])
def test_a_dit_block_of_drop_in_modules(fast):
    plain, block = PlainDiTBlock(WIDTH, HEADS), DiTBlock(WIDTH, HEADS)
    block.load_state_dict(
        {
            name.replace("qkv", "attention.qkv").replace("proj", "attention.proj"): value
            for name, value in plain.state_dict().items()
        }
    )
    if fast:
        accelerate(block)
    x, condition = torch.randn(2, 9, WIDTH), torch.randn(2, WIDTH)
    with torch.no_grad():
        assert (block(x, condition) - plain(x, condition)).abs().max() < 1e-5
    gradients = []
    for module in (plain, block):
        own = x.clone().requires_grad_()
        module(own, condition).square().sum().backward()
        gradients.append(own.grad)
    assert (gradients[0] - gradients[1]).abs().max() < 1e-4 * gradients[0].abs().max()
