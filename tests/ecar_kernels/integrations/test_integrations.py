"""Other libraries' blocks, accelerated, compute what the plain ones do, in every mode of PyTorch's.

Over all blocks of tests/support/blocks.py: an integration must have an entry there.
"""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from ecar_kernels import accelerate, foreign, restore
from ecar_kernels.registry import KERNEL_DTYPES
from ecar_kernels.testing import middle, verdicts
from tests.support.accuracy import assert_accurate, run
from tests.support.blocks import BLOCKS, TEXT, WIDTH, agree, flat, is_served, made, ops_of
from tests.support.modules import accelerated, functional

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def test_no_library_is_imported():
    code = """if True:
        import sys, torch, ecar_kernels
        ecar_kernels.accelerate(torch.nn.Sequential(ecar_kernels.AdaLN(), torch.nn.Linear(2, 2)))
        assert not {"diffusers", "timm"} & set(sys.modules)
    """
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_integration_has_an_entry():
    served = set()
    for name in BLOCKS:
        served.add(foreign.integration_of(type(made(name)[0]))[0])
    assert served == set(foreign.integrations.values())


def uses(name):
    return foreign.integration_of(type(made(name)[0]))[0].uses


def moved(value, device):
    if isinstance(value, tuple):
        return tuple(moved(part, device) for part in value)
    return value if value is None else value.to(device)


def case(name, dtype, device="cpu", batch=2, std=0.2):
    """A plain and an accelerated block's call as functions of weights too, and arguments."""
    plain, arguments, call = made(name, batch, std)
    plain, fast = plain.to(device), copy.deepcopy(plain).to(device, dtype)
    accelerate(fast)
    assert is_served(fast)
    functions = (
        functional(block, lambda block, **given: call(block, given)) for block in (fast, plain)
    )
    weights = {f"w{i}": p.detach() for i, p in enumerate(plain.parameters())}
    given = {key: moved(value, device) for key, value in (arguments | weights).items()}
    return *functions, {
        key: value.to(dtype)
        if isinstance(value, torch.Tensor) and value.is_floating_point()
        else value
        for key, value in given.items()
    }


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("name", BLOCKS)
@torch.no_grad()
def test_as_right_as_the_plain_block(name, dtype, batch, device):
    """An image alone, and two with guidance."""
    fast, plain, arguments = case(name, dtype, device, batch)
    assert ops_of(lambda: fast(**arguments)) == set(uses(name))
    assert_accurate(fast, plain, arguments)


def judged_gradients(name, device):
    """The accuracy rule's verdicts on the outputs and gradients of one random block."""
    # Small scores: a flash backward errs by as many ulp as a score is large.
    fast, plain, arguments = case(name, torch.float32, device, std=0.1)
    arguments.pop("encoder_attention_mask", None)  # which nobody differentiates
    weights = [torch.randn_like(y) for y in run(plain, arguments)]
    assert "gated_residual" in ops_of(lambda: run(fast, arguments, None, weights))
    exact = run(plain, arguments, torch.float64, weights)
    # A bias of the keys has none: softmax does not see it, and what is found is rounding alone.
    largest = max(value.abs().max() for value in exact)
    some = [value.abs().max() > 1e-10 * largest for value in exact]
    return verdicts(
        *(
            [value for value, kept in zip(values, some, strict=True) if kept]
            for values in (
                run(fast, arguments, None, weights),
                run(plain, arguments, None, weights),
                exact,
            )
        )
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", BLOCKS)
def test_gradients_are_as_right_as_the_plain_blocks(name, device):
    """By the median of 9 blocks: of a gradient of two numbers, as that of VAR's scale or MAR's
    times, the error itself is so random that one block in twelve is past the bound."""
    for verdict in middle(judged_gradients(name, device) for _ in range(9)):
        assert verdict.ok, verdict


@pytest.mark.parametrize("name", BLOCKS)
def test_a_frozen_block_is_fused_and_gradients_flow_through_it(name):
    block, arguments, call = made(name)
    block.requires_grad_(False)
    first = arguments[next(iter(arguments))].requires_grad_()

    def gradient(block):
        return torch.autograd.grad(sum(y.sin().sum() for y in flat(call(block, arguments))), first)

    fast = accelerated(copy.deepcopy(block))
    assert ops_of(lambda: call(fast, arguments)) == set(uses(name))
    assert agree(gradient(fast), gradient(block))


def kept(block, arguments, call):
    """Bytes that wait for the backward, without parameters."""
    parameters = {p.untyped_storage().data_ptr() for p in block.parameters()}
    found = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            found[storage.data_ptr()] = storage.nbytes(), tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = call(block, arguments)
    return sum(count for count, _ in found.values()), result


@pytest.mark.parametrize("name", BLOCKS)
def test_training_keeps_less(name):
    block, arguments, call = made(name)
    arguments[next(iter(arguments))].requires_grad_()
    plain, _ = kept(block, arguments, call)
    ours, _ = kept(accelerated(block), arguments, call)
    assert ours < (0.65 if "DiT" in name else 0.95) * plain


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("training", [False, True])
def test_autocast(name, training):
    block, arguments, call = made(name)
    fast = accelerated(copy.deepcopy(block))
    with torch.set_grad_enabled(training), torch.autocast("cpu", torch.bfloat16):
        right, got = flat(call(block, arguments)), flat(call(fast, arguments))
    for a, b in zip(got, right, strict=True):
        assert a.dtype is b.dtype
        assert (a - b).norm() <= 0.02 * b.norm()


@pytest.mark.parametrize("name", BLOCKS)
@torch.no_grad()
def test_what_else_the_block_gets(name):
    """Calls that the ops do not take run as in the plain block, and fail as in it."""
    block, arguments, call = made(name)
    fast = accelerated(copy.deepcopy(block))
    key = next(iter(arguments))
    x = arguments[key]

    def compared(given, block=block, fast=fast):
        results = []
        for each in (block, fast):
            try:
                results.append(call(each, given))
            except (RuntimeError, TypeError, ValueError, IndexError) as error:
                results.append(type(error))
        plain, ours = results
        if isinstance(plain, type):
            assert isinstance(ours, type), (plain, ours)
            return "refused"
        assert not isinstance(ours, type), ours
        for a, b in zip(flat(ours), flat(plain), strict=True):
            assert a.shape == b.shape and a.dtype is b.dtype and a.device == b.device
        assert agree(ours, plain)
        return "taken"

    assert compared(arguments) == "taken"
    transposed = x.transpose(-1, -2).contiguous().transpose(-1, -2)
    assert compared(arguments | {key: transposed}) == "taken"
    for wrong in (x[..., :-1], x[..., :16], x[0], x.bfloat16(), x[:1].repeat(3, 1, 1)):
        compared(arguments | {key: wrong})
    compared(arguments | {key: x[:, :0]})
    wide = [block.double(), fast.double()]
    given = {
        k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v
        for k, v in arguments.items()
    }
    assert compared(given, *wide) == "taken"


@pytest.mark.parametrize("name", BLOCKS)
def test_transforms_are_the_plain_blocks(name):
    block, arguments, call = made(name)
    fast = accelerated(copy.deepcopy(block))
    key = next(iter(arguments))
    tangent = torch.randn_like(arguments[key])

    def along(block):
        return torch.func.jvp(
            lambda x: flat(call(block, arguments | {key: x})), (arguments[key],), (tangent,)
        )

    # The only attention of PyTorch's that has forward derivatives.
    with sdpa_kernel(SDPBackend.MATH):
        for ours, plain in zip(along(fast), along(block), strict=True):
            assert agree(ours, plain)


@pytest.mark.parametrize("name", BLOCKS)
@torch.no_grad()
def test_compiled(name):
    torch._dynamo.reset()
    block, arguments, call = made(name)
    fast = accelerated(copy.deepcopy(block), keep_weights=False)
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    assert agree(call(compiled, arguments), call(block, arguments))


@pytest.mark.parametrize("name", BLOCKS)
@torch.no_grad()
def test_there_and_back(name):
    """Same bits after `restore`; copies and pickles stay accelerated; called while restored."""
    block, arguments, call = made(name)
    right, kinds = call(block, arguments), [type(module) for module in block.modules()]
    state = {key: value.clone() for key, value in block.state_dict().items()}
    for keep in (True, False):
        assert accelerate(block, keep_weights=keep) == accelerate(block, keep_weights=keep)
        held = block.forward  # as a library that wraps a forward holds it
        got = call(block, arguments)
        assert type(block).__name__ == kinds[0].__name__ and isinstance(block, kinds[0])
        assert "adaln_linear: " in str(block)
        for other in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
            assert type(other) is type(block) and is_served(other)
            assert all(map(torch.equal, flat(call(other, arguments)), flat(got)))
        after = block.state_dict()
        assert list(after) == list(state) and all(map(torch.equal, after.values(), state.values()))
        assert restore(block) is block
        assert [type(module) for module in block.modules()] == kinds
        assert all(map(torch.equal, flat(call(block, arguments)), flat(right)))
        wrapped = flat(call(held, arguments))
        assert all(map(torch.equal, wrapped, flat(right)))


def test_text_alone_is_as_the_plain_block_takes_it():
    """Without text there is no second stream for the ops."""
    for name in ("SD3", "Flux single"):
        block, arguments, call = made(name)
        arguments["encoder_hidden_states"] = torch.randn(2, 0, WIDTH)
        if "image_rotary_emb" in arguments:
            arguments["image_rotary_emb"] = tuple(x[TEXT:] for x in arguments["image_rotary_emb"])
        with torch.no_grad():
            right = call(block, arguments)
            assert agree(call(accelerated(block), arguments), right)
