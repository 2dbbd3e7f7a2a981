"""Other libraries' blocks to which something was done: the accelerated one computes what the plain
one then does, and what is left alone is reported.

Tables of situations over all blocks (tests/support/blocks.py).
"""

import copy
import types

import peft
import pytest
import torch
import torchao.quantization as torchao
from torch import nn
from torch.distributed.fsdp import fully_shard

from ecar_kernels import accelerate, foreign, report, restore, swapping
from ecar_kernels.foreign import Foreign
from tests.support import situations
from tests.support.blocks import BLOCKS, agree, flat, is_served, made, near, ops_of
from tests.support.modules import accelerated


@pytest.mark.parametrize("change", situations.LAYERS, ids=lambda change: change.__name__)
@pytest.mark.parametrize("name", BLOCKS)
@torch.no_grad()
def test_what_stands_in_a_layers_place_is_called(name, change):
    """Each fused layer in turn, before `accelerate` or after it, which takes turns too."""
    plain, arguments, call = made(name)
    untouched = call(plain, arguments)
    integration, _ = foreign.integration_of(type(plain))
    layers = [name for name, layer in swapping._layers(plain, integration) if layer is not None]
    assert len(layers) >= 4
    changed = 0
    for index, layer in enumerate(layers, start=situations.LAYERS.index(change)):
        other, fast = copy.deepcopy(plain), copy.deepcopy(plain)
        apply(change, other, layer)
        if index % 2:
            accelerate(fast)
        apply(change, fast, layer)
        if not index % 2:
            accelerate(fast)
        try:
            right = call(other, arguments)
        except TypeError:  # VAR reads a weight of its layer that a quantized one does not have
            with pytest.raises(TypeError):
                call(fast, arguments)
            continue
        got = call(fast, arguments)
        changed += not agree(right, untouched)
        # It rounds its inputs to 255 levels: one at an edge may come out a level off.
        rounded = change is situations.dynamic_quantization
        for a, b, c in zip(flat(got), flat(right), flat(untouched), strict=True):
            assert near(a, b) or (rounded and (a - b).norm() <= 0.3 * (c - b).norm()), layer
        assert isinstance(fast, Foreign)
        if change not in (situations.no_bias, situations.a_tied_weight):
            assert f"{layer}: " in str(report(fast)), layer
    # A norm of the queries or keys does not see a factor.
    assert changed >= 3


def apply(change, block, layer):
    torch.manual_seed(0)
    change(block, layer, block.get_submodule(layer))


class Halved(nn.Module):
    """An adapter around a whole part of a block."""

    def __init__(self, part):
        super().__init__()
        self.part = part

    def __getattr__(self, name):
        return (
            getattr(super().__getattr__("part"), name)
            if name != "part"
            else super().__getattr__(name)
        )

    def forward(self, *args, **kwargs):
        result = self.part(*args, **kwargs)
        return tuple(y / 2 for y in result) if isinstance(result, tuple) else result / 2


def hooked(result):
    if isinstance(result, tuple):
        return tuple(map(hooked, result))
    return None if result is None else 2 * result


WHOLE = {"attn", "attn1", "ff", "ffn", "mlp", "norm1", "norm", "ln_wo_grad", "drop_path"}
WHOLE |= {"final_layer", "res_blocks.0", "img_mlp", "img_norm1"}


def whole_parts(block):
    """The parts of a block whose forward `run` takes the place of."""
    return [name for name, _ in block.named_modules() if name in WHOLE]


PARTS = {
    "a hook": lambda block, name: block.get_submodule(name).register_forward_hook(
        lambda module, inputs, result: hooked(result)
    ),
    "an adapter": lambda block, name: situations.replace(
        block, name, Halved(block.get_submodule(name))
    ),
    "a wrapped forward": lambda block, name: setattr(
        block.get_submodule(name),
        "forward",
        types.MethodType(
            lambda module, *args, **kwargs: hooked(type(module).forward(module, *args, **kwargs)),
            block.get_submodule(name),
        ),
    ),
    "a subclass": lambda block, name: setattr(
        block.get_submodule(name),
        "__class__",
        type(
            "Other",
            (type(block.get_submodule(name)),),
            {
                "forward": lambda module, *args, **kwargs: hooked(
                    super(type(module), module).forward(*args, **kwargs)
                )
            },
        ),
    ),
}


@pytest.mark.parametrize("change", PARTS)
@pytest.mark.parametrize("name", BLOCKS)
@torch.no_grad()
def test_a_block_with_another_part_is_left_alone(name, change):
    plain, arguments, call = made(name)
    untouched = call(plain, arguments)
    for part in whole_parts(plain):
        fast, other = accelerated(copy.deepcopy(plain)), copy.deepcopy(plain)
        PARTS[change](fast, part)
        PARTS[change](other, part)
        right = call(other, arguments)
        assert not agree(untouched, right)
        assert ops_of(lambda block=fast: call(block, arguments)) == set()
        assert agree(call(fast, arguments), right)
        assert report(fast)[0].left[0].startswith(f"all: {part}")
        with pytest.warns(UserWarning, match=f"1 {type(plain).__name__}: {part}"):
            (row,) = accelerate(other)
        assert row.served == {} and row.left[0].startswith(part)
        assert not isinstance(other, Foreign)


def test_there_are_whole_parts():
    assert all(len(whole_parts(made(name)[0])) >= 2 for name in BLOCKS)


@pytest.mark.parametrize("name", BLOCKS)
def test_a_subclass_is_served_if_it_computes_the_same(name):
    block, arguments, call = made(name)

    class Named(type(block)):
        def describe(self):
            return "a block"

    class Doubled(type(block)):
        def forward(self, *args, **kwargs):
            return hooked(super().forward(*args, **kwargs))

    with torch.no_grad():
        right = call(block, arguments)
        block.__class__ = Named
        assert is_served(accelerated(block)) and agree(call(block, arguments), right)
        assert type(restore(block)) is Named
        block.__class__ = Doubled
        with pytest.warns(UserWarning, match="1 Doubled: a subclass, whose forward may be another"):
            accelerate(block)
        assert type(block) is Doubled


@pytest.mark.parametrize("name", BLOCKS)
@torch.no_grad()
def test_a_replaced_forward_is_called(name, monkeypatch):
    """Of the class, and of the block, before `accelerate` and after it."""
    block, arguments, call = made(name)
    kind, fast = type(block), accelerated(copy.deepcopy(block))
    own = kind.forward

    def forward(self, *args, **kwargs):
        return hooked(own(self, *args, **kwargs))

    with monkeypatch.context() as patched:
        patched.setattr(kind, "forward", forward)
        right = call(block, arguments)
        assert agree(call(fast, arguments), right)
        assert "forward" in report(fast)[0].left[0]
        with pytest.warns(UserWarning, match="forward"):
            accelerate(block)
    assert not agree(call(fast, arguments), right) and is_served(fast)
    block.forward = types.MethodType(forward, block)
    with pytest.warns(UserWarning, match=f"1 {kind.__name__}: its forward was replaced"):
        accelerate(block)
    assert agree(call(block, arguments), right)


@pytest.mark.parametrize("name", BLOCKS)
def test_a_parametrized_block_is_left_alone(name):
    block = made(name)[0]
    block.own = nn.Parameter(torch.ones(2))
    nn.utils.parametrize.register_parametrization(block, "own", nn.Identity())
    with pytest.warns(UserWarning, match="it is parametrized"):
        accelerate(block)


# What people do to a model as a whole: each changes a block in place, or returns another.


def scaled(block):
    return {name: 1.1 * value for name, value in block.state_dict().items()}


def each_weight(change):
    def changed(block):
        for parameter in block.parameters():
            change(parameter)

    return changed


def new_parameters(block):
    for layer in block.modules():
        for name, value in list(layer.named_parameters(recurse=False)):
            setattr(layer, name, nn.Parameter(1.1 * value.detach()))


def a_copy(block):
    other = copy.deepcopy(block)
    each_weight(nn.init.zeros_)(block)
    return other


def through_meta(block):
    state = scaled(block)
    block.to("meta").to_empty(device="cpu").load_state_dict(state)


def lora(block):
    layers = r".*(attn.*(proj|to_q|to_out.0|qkv)|fc1|ff.net.2|mlp.0|linear|proj_mlp)"
    config = peft.LoraConfig(r=2, target_modules=layers, init_lora_weights=False)
    peft.inject_adapter_in_model(config, block)


def quantized(block):
    """All layers but VAR's that it never calls, whose weight torchao then does not find."""
    torchao.quantize_(
        block,
        torchao.Int8WeightOnlyConfig(),
        filter_fn=lambda layer, name: isinstance(layer, nn.Linear) and "mat_qkv" not in name,
    )


def of_type(dtype):
    return lambda block: block.to(dtype)


CHANGES = {
    "new parameters": new_parameters,
    "written to": each_weight(lambda p: p.mul_(1.1)),
    "written to through .data": each_weight(lambda p: p.data.mul_(1.1)),
    "given other .data": each_weight(lambda p: setattr(p, "data", 1.1 * p.data)),
    "a state loaded": lambda block: block.load_state_dict(scaled(block)) and None,
    "a state assigned": lambda block: block.load_state_dict(scaled(block), assign=True) and None,
    "a copy": a_copy,
    "float64": of_type(torch.float64),
    "bfloat16 and back": lambda block: block.to(torch.bfloat16).to(torch.float32),
    "moved to meta and back": through_meta,
    "channels last": lambda block: block.to(memory_format=torch.channels_last),
    "shared memory": lambda block: block.share_memory(),
    "frozen": lambda block: block.requires_grad_(False),
    "training": lambda block: block.train(),
    "a hook": lambda block: (
        block.register_forward_hook(lambda module, inputs, result: hooked(result)) and None
    ),
    "a backward hook": lambda block: (
        block.register_full_backward_hook(lambda module, gradients, outer: None) and None
    ),
    "LoRA": lora,
    "quantized": quantized,
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", BLOCKS)
def test_a_changed_model(name, change):
    """After `accelerate` and a call, or before, which takes turns; in inference and in training."""
    plain, arguments, call = made(name)
    if change == "training":
        each_dropout_off(plain)
    fast = copy.deepcopy(plain)
    late = (list(BLOCKS).index(name) + list(CHANGES).index(change)) % 2
    with torch.no_grad():
        untouched = call(plain, arguments)
        if late:
            accelerate(fast)
            call(fast, arguments)
        plain, fast = (after(change, block) for block in (plain, fast))
        if not late:
            accelerate(fast)
        if change == "float64":
            arguments = {key: widened(value) for key, value in arguments.items()}
        right = call(plain, arguments)
        assert agree(call(fast, arguments), right)
        assert change not in SEEN or not agree(untouched, right)
        with torch.inference_mode():
            assert agree(call(fast, arguments), right)
    assert isinstance(fast, Foreign)
    gradients = []
    for block in (plain, fast):
        result = flat(call(block, arguments))
        assert agree(result, right)
        found = [p for p in block.parameters() if p.requires_grad]
        if found:
            loss = sum(y.square().sum() for y in result)
            gradients.append(torch.autograd.grad(loss, found, allow_unused=True))
    for ours, other in zip(*gradients, strict=True) if gradients else ():
        assert (ours is None) == (other is None)
        largest = max(g.abs().max() for g in gradients[0] if g is not None)
        assert ours is None or (ours - other).abs().max() <= 1e-4 * largest


def after(change, block):
    torch.manual_seed(3)
    changed = CHANGES[change](block)
    return block if changed is None else changed


# Those that change what the block computes.
SEEN = set(CHANGES) - {"a copy", "float64", "bfloat16 and back", "channels last"}
SEEN -= {"shared memory", "frozen", "training", "a backward hook", "quantized"}


def each_dropout_off(block):
    for layer in block.modules():
        for name in ("drop_prob", "dropout_prob"):
            if hasattr(layer, name):
                setattr(layer, name, 0.0)


def widened(value):
    if isinstance(value, tuple):
        return tuple(map(widened, value))
    return value.double() if torch.is_tensor(value) and value.is_floating_point() else value


@pytest.fixture
def process_group():
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("first", ["wrap", "accelerate"])
@pytest.mark.parametrize("wrap", [nn.parallel.DistributedDataParallel, fully_shard])
@pytest.mark.parametrize("name", ["DiT", "VAR", "MAR"])
def test_a_distributed_model(name, wrap, first, process_group):
    plain, arguments, call = made(name)
    fast = copy.deepcopy(plain)
    if first == "accelerate":
        accelerate(fast)
    wrapped = wrap(fast)
    if first == "wrap":
        accelerate(wrapped)
    gradients = []
    for block, layers in ((plain, plain), (wrapped, fast)):
        call(block, arguments).square().sum().backward()
        gradients.append([p.grad for p in layers.parameters() if p.grad is not None])
    for ours, right in zip(*reversed(gradients), strict=True):
        ours = ours.full_tensor() if hasattr(ours, "full_tensor") else ours
        assert (ours - right).abs().max() <= 1e-4 * max(g.abs().max() for g in gradients[0])
    with torch.no_grad():
        assert agree(call(wrapped, arguments), call(plain, arguments))
        assert ops_of(lambda: call(wrapped, arguments)) == set(fast.uses)
    assert set(report(wrapped)[0].served) == set(fast.uses)
