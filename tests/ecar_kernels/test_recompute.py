"""Linear layers that forget their input: what they compute, what is kept, and where they do not."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from ecar_kernels import (
    MLP,
    FlowBlock,
    StageBlock,
    accelerate,
    adaln,
    recompute,
    stage_attention,
    use_backend,
)
from ecar_kernels.registry import KERNEL_DTYPES
from ecar_kernels.testing import judge, middle
from tests.support.accuracy import assert_accurate
from tests.support.backends import kernel
from tests.support.modules import arguments_of, functional
from tests.support.native import needs_native

WIDTH, HEADS, HIDDEN, STAGES, BATCH = 48, 4, 100, (1, 4, 9), 2
TOKENS = sum(STAGES)
UNIT = BATCH * TOKENS * WIDTH * 4  # bytes of one [B, N, C] in float32


def flow_block(module, x, spatial, step):
    """With the adaLN that the block begins with, as a flow head calls it."""
    spatial, step = spatial.unbind(), step.unbind()
    begun = (*spatial[:2], *step[:2])
    y = adaln(x, *spatial[:2], step_shift=step[0], step_scale=step[1])
    return module(x, y, spatial[2:], step[2:], begun)


# For each a module, how it is called, and its tensors.
CASES = {
    "StageBlock": (
        lambda: StageBlock(WIDTH, HEADS),
        lambda module, x: module(x, STAGES),
        {"x": (BATCH, TOKENS, WIDTH)},
    ),
    "StageBlock without biases": (
        lambda: without_biases(StageBlock(WIDTH, HEADS)),
        lambda module, x: module(x, STAGES),
        {"x": (BATCH, TOKENS, WIDTH)},
    ),
    "MLP": (lambda: MLP(WIDTH, HIDDEN), lambda module, x: module(x), {"x": (3, WIDTH)}),
    "FlowBlock": (
        lambda: FlowBlock(WIDTH, HEADS, HIDDEN),
        flow_block,
        {
            "x": (BATCH, TOKENS, WIDTH),
            "spatial": (8, BATCH, TOKENS, WIDTH),
            "step": (8, BATCH, 1, WIDTH),
        },
    ),
    "FlowBlock, one modulation for all tokens": (
        lambda: FlowBlock(WIDTH, HEADS),
        flow_block,
        {"x": (BATCH, TOKENS, WIDTH), "spatial": (8, BATCH, 1, WIDTH), "step": (8, 1, 1, WIDTH)},
    ),
}


def without_biases(block):
    block.qkv, block.mlp.fc2 = (
        nn.Linear(WIDTH, 3 * WIDTH, bias=False),
        nn.Linear(4 * WIDTH, WIDTH, bias=False),
    )
    block.norm2 = nn.LayerNorm(WIDTH, elementwise_affine=False)
    return block


def on_the_reference(call):
    def run(**arguments):
        with use_backend("reference"):
            return call(**arguments)

    return run


def nodes(result):
    """The names of all nodes of the result's graph."""
    seen, waiting = set(), [result.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [following for following, _ in node.next_functions]
    return [node.name() for node in seen]


def recomputing(result):
    return sum(name in ("_LinearBackward", "_GELULinearBackward") for name in nodes(result))


def kept(call, *given):
    """Bytes that autograd keeps of a call, but those of the tensors given."""
    found = {}

    def pack(tensor):
        found[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = call()
    for tensor in given:
        found.pop(tensor.untyped_storage().data_ptr(), None)
    del result
    return sum(tensor.untyped_storage().nbytes() for tensor in found.values())


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_of_every_tensor(name, dtype):
    build, call, shapes = CASES[name]
    module = build()
    run = functional(module, call)
    assert_accurate(run, on_the_reference(run), arguments_of(module, shapes, dtype), gradients=True)


@pytest.mark.parametrize("name", ["StageBlock", "FlowBlock"])
def test_under_autocast(name):
    """Against the reference under autocast; the oracle, in float64, knows of none."""
    build, call, shapes = CASES[name]
    module = build()
    plain = functional(module, call)

    def run(**arguments):
        low = arguments["x"].dtype is torch.float32
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            result = plain(**arguments)
        # Compared as bfloat16, whose rounding an output under autocast has.
        found = (result,) if isinstance(result, torch.Tensor) else result
        return tuple(y.bfloat16() if low else y for y in found)

    def judgement():
        arguments = arguments_of(module, shapes, torch.float32)
        rounded = {key: value.bfloat16().float() for key, value in arguments.items()}
        return judge(run, on_the_reference(run), rounded, gradients=True)

    for verdict in middle([judgement() for _ in range(5)]):
        assert verdict.ok, str(verdict)


def layers(dtype):
    layer, norm = nn.Linear(6, 5).to(dtype), nn.LayerNorm(6).to(dtype)
    nn.init.normal_(norm.weight)
    return layer, norm, torch.randn(2, 3, 6, dtype=dtype, requires_grad=True)


def test_gradients_of_gradients():
    layer, norm, x = layers(torch.float64)
    parameters = (*layer.parameters(), *norm.parameters())

    def run(x, *parameters):
        y = recompute.linear(layer, *recompute.layer_norm(norm, x))
        return y + recompute.gelu_linear(layer, x)

    assert recomputing(run(x)) == 2
    assert torch.autograd.gradcheck(run, (x, *parameters))
    assert torch.autograd.gradgradcheck(run, (x, *parameters))


@pytest.mark.parametrize("wanted", ["x", "weight", "bias"])
def test_only_the_gradients_that_are_wanted(wanted):
    layer, _, x = layers(torch.float32)
    tensors = {"x": x, "weight": layer.weight, "bias": layer.bias}
    for name, tensor in tensors.items():
        tensor.requires_grad_(name == wanted)
    for run, plain in (
        (recompute.gelu_linear, lambda x: F.gelu(x, approximate="tanh")),
        (lambda layer, x: recompute.linear(layer, *recompute.silu(x)), F.silu),
    ):
        (found,) = torch.autograd.grad(run(layer, x).square().sum(), tensors[wanted])
        (expected,) = torch.autograd.grad(layer(plain(x)).square().sum(), tensors[wanted])
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@needs_native
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_the_librarys_gelu_and_its_gradient(dtype):
    """Within a unit of their type, and of float32's of where they cancel."""
    x = torch.cat([torch.linspace(-12, 12, 40_001), torch.tensor([0.0, -1e13, 1e13, 6e4, -6e4])])
    x = x.to(dtype).nan_to_num()  # 1e13 is not in float16's range
    exact = x.double().requires_grad_()
    y = F.gelu(exact, approximate="tanh")
    (slope,) = torch.autograd.grad(y.sum(), exact)
    found, grad = torch.ops.ecar.gelu(x), torch.full_like(x, 0.5)
    again = torch.ops.ecar.gelu_backward_(grad, x)
    for ours, expected in ((found, y.detach()), (again, y.detach()), (grad, slope / 2)):
        unit = torch.finfo(dtype).eps * expected.abs() + 4 * torch.finfo(torch.float32).eps
        assert ((ours.double() - expected).abs() <= unit).all()
    nan = torch.full((3,), math.nan, dtype=dtype)
    assert torch.ops.ecar.gelu(nan).isnan().all()
    grad_of_nan = torch.ones_like(nan)
    assert torch.ops.ecar.gelu_backward_(grad_of_nan, nan).isnan().all()
    assert grad_of_nan.isnan().all()
    kernel("adaln_linear", "cpp")  # which registers both for fake tensors
    torch.library.opcheck(torch.ops.ecar.gelu.default, (x,))
    torch.library.opcheck(torch.ops.ecar.gelu_backward_.default, (grad, x))


@needs_native
def test_the_librarys_gelu_refuses_what_it_cannot_take():
    x = torch.randn(4, 6)
    for call in (
        lambda: torch.ops.ecar.gelu(x.T),
        lambda: torch.ops.ecar.gelu(x.double()),
        lambda: torch.ops.ecar.gelu_backward_(x.T, x),
        lambda: torch.ops.ecar.gelu_backward_(x, x),
        lambda: torch.ops.ecar.gelu_backward_(torch.randn(5), x),
        lambda: torch.ops.ecar.gelu_backward_(torch.randn(4, 6).bfloat16(), x),
    ):
        with pytest.raises(RuntimeError, match=r"argument '(x|grad)': expected"):
            call()


class Calls(TorchDispatchMode):
    """The names of the ops that run, with "gelu" in them."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "gelu" in str(func):
            self.names.add(str(func).partition("::")[0].partition(".gelu")[0])
        return func(*args, **(kwargs or {}))


@needs_native
@pytest.mark.parametrize(
    ("backend", "change", "namespace"),
    [
        ("auto", lambda x: x, "ecar"),
        ("cpp", lambda x: x, "ecar"),
        ("reference", lambda x: x, "aten"),
        ("auto", lambda x: x.double(), "aten"),
        ("auto", lambda x: x.transpose(0, 1), "aten"),
    ],
)
def test_whose_gelu_runs(backend, change, namespace):
    x = change(torch.randn(4, 5, 6)).requires_grad_()
    layer = nn.Linear(6, 6).to(x.dtype)
    with use_backend(backend), Calls() as calls:
        recompute.gelu_linear(layer, x).sum().backward()
    assert calls.names == {namespace}


@needs_native
@pytest.mark.parametrize(
    ("watch", "namespace"),
    [(lambda call: call, "ecar"), (torch.func.vmap, "aten")],
    ids=["plain", "vmap"],
)
def test_whose_gelu_runs_without_gradients(watch, namespace):
    mlp, x = MLP(8, 32), torch.randn(2, 3, 8)
    with torch.no_grad(), Calls() as calls:
        y = watch(mlp)(x)
    assert calls.names == {namespace}
    torch.testing.assert_close(y, mlp.fc2(F.gelu(mlp.fc1(x), approximate="tanh")))


def test_a_source_that_was_changed_is_refused():
    layer, _, x = layers(torch.float32)
    source = x * 1
    y = recompute.gelu_linear(layer, source)
    source.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_stage_block_keeps_what_its_products_and_its_attention_need():
    """Two streams, q, k and v, the attention's output and the hidden tokens before the GELU."""
    block = StageBlock(WIDTH, HEADS)
    x = torch.randn(BATCH, TOKENS, WIDTH, requires_grad=True)
    qkv = torch.randn(BATCH, TOKENS, 3, HEADS, WIDTH // HEADS, requires_grad=True)
    attention = kept(lambda: stage_attention(*qkv.unbind(2), STAGES), qkv)
    statistics = 4 * BATCH * TOKENS * 4  # mean and deviation of two LayerNorms
    given = list(block.parameters())
    ours = kept(lambda: block(x, STAGES), *given)
    assert ours <= (1 + 1 + 3 + 1 + 4) * UNIT + attention + statistics
    with use_backend("reference"):
        assert kept(lambda: block(x, STAGES), *given) >= ours + (1 + 1 + 4) * UNIT


def test_a_flow_block_keeps_neither_its_normalised_tokens_nor_its_gelu():
    """Two streams, two branches, q, k and v, the attention's output, the hidden tokens."""
    block = FlowBlock(WIDTH, HEADS)
    x, y = (torch.randn(BATCH, TOKENS, WIDTH, requires_grad=True) for _ in range(2))
    spatial, step = torch.randn(8, BATCH, TOKENS, WIDTH), torch.randn(8, BATCH, 1, WIDTH)
    parts = spatial.unbind()[2:], step.unbind()[2:]
    begun = *spatial.unbind()[:2], *step.unbind()[:2]
    qkv = torch.randn(BATCH, TOKENS, 3, HEADS, WIDTH // HEADS, requires_grad=True)
    attention = kept(lambda: stage_attention(*qkv.unbind(2), (TOKENS,)), qkv)
    given = (x, spatial, step, *block.parameters())
    ours = kept(lambda: block(x, y, *parts, begun), *given)
    assert ours <= (2 + 2 + 3 + 1 + 4) * UNIT + attention
    # What made y is not told: it is kept.
    assert kept(lambda: block(x, y, *parts), *given) == ours + UNIT


@pytest.mark.parametrize("kind", ["checkpointed", "accelerated", "packed"])
def test_a_block_trains_the_same(kind):
    block, x = StageBlock(WIDTH, HEADS), torch.randn(BATCH, TOKENS, WIDTH)

    def gradients(run):
        block.zero_grad()
        result = run(x, STAGES)
        result.square().sum().backward()
        return recomputing(result), [p.grad.clone() for p in block.parameters()]

    recomputed, expected = gradients(block)
    assert recomputed == 3
    if kind != "checkpointed":
        accelerate(block, keep_weights=kind == "accelerated")
    recomputed, found = gradients(
        block
        if kind != "checkpointed"
        else lambda *arguments: checkpoint(block, *arguments, use_reentrant=False)
    )
    assert recomputed == 3
    assert all(map(torch.equal, found, expected))


def test_the_reference_and_inference_do_not_recompute():
    block, x = StageBlock(WIDTH, HEADS), torch.randn(BATCH, TOKENS, WIDTH)
    with use_backend("reference"):
        assert recomputing(block(x, STAGES)) == 0
    with torch.no_grad():
        assert block(x, STAGES).grad_fn is None
    on_meta = StageBlock(WIDTH, HEADS).to("meta")(x.to("meta"), STAGES)
    assert on_meta.shape == x.shape and recomputing(on_meta) == 0


def hooked(layer, calls):
    layer.register_forward_hook(lambda *arguments: calls.append(layer))
    return layer


def replaced(layer, calls):
    class Other(nn.Linear):
        def forward(self, x):
            calls.append(self)
            return super().forward(x)

    return Other(layer.in_features, layer.out_features)


def patched(layer, calls):
    forward = layer.forward
    layer.forward = lambda x: calls.append(layer) or forward(x)
    return layer


@pytest.mark.parametrize("change", [hooked, replaced, patched])
@pytest.mark.parametrize("name", ["qkv", "mlp.fc1", "mlp.fc2"])
def test_a_layer_that_is_no_plain_one_is_called(name, change):
    """A hook sees its input, and an adapter in a layer's place computes."""
    block, x, calls = StageBlock(WIDTH, HEADS), torch.randn(BATCH, TOKENS, WIDTH), []
    parent, _, last = name.rpartition(".")
    setattr(block.get_submodule(parent), last, change(block.get_submodule(name), calls))
    assert recomputing(block(x, STAGES)) == 2
    assert len(calls) == 1


def test_other_norms_and_mlps_are_called():
    block, x = StageBlock(WIDTH, HEADS), torch.randn(BATCH, TOKENS, WIDTH)
    block.norm1, block.mlp = nn.RMSNorm(WIDTH), nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU())
    result = block(x, STAGES)
    assert recomputing(result) == 0
    with use_backend("reference"):
        assert (block(x, STAGES) - result).abs().max() < 1e-5


def test_compiled_whole_it_is_left_to_the_compiler():
    block, x = StageBlock(WIDTH, HEADS), torch.randn(BATCH, TOKENS, WIDTH)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    gradients = []
    for run in (block, compiled):
        block.zero_grad()
        run(x, STAGES).square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in block.parameters()]))
    assert (gradients[0] - gradients[1]).abs().max() < 1e-4 * gradients[0].abs().max()
