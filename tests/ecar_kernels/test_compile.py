"""torch.compile(fullgraph=True) and torch.export see through every op."""

import inspect
from typing import get_args

import pytest
import torch
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend

import ecar_kernels
from ecar_kernels import stage_attention, use_backend
from ecar_kernels.registry import OPS
from tests.support.accuracy import assert_accurate, run, tensors
from tests.support.ops import DIFFERENTIABLE, SIZES, arguments, function

TOKENS, CHANNELS, IMAGE = sum(SIZES.stages), SIZES.channels, SIZES.image


@pytest.fixture(autouse=True)
def fresh_graphs():
    torch._dynamo.reset()


def close(results, expected) -> None:
    for result, wanted in zip(results, expected, strict=True):
        torch.testing.assert_close(result, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("optional", [True, False])
@pytest.mark.parametrize("op", OPS)
@torch.no_grad()
def test_fullgraph_equals_eager(op, optional):
    call = arguments(op, optional=optional)
    compiled = torch.compile(function(op), fullgraph=True, backend="eager")
    close(tensors(compiled(**call)), tensors(function(op)(**call)))


@pytest.mark.parametrize("op", OPS)
@torch.no_grad()
def test_one_graph_serves_every_batch_size(op):
    counter = CompileCounter()
    compiled = torch.compile(function(op), fullgraph=True, backend=counter, dynamic=True)
    # No size of the first batch equals another: dynamic shapes would take them for one.
    for batch in (7, 9, 11):
        call = arguments(op, batch=batch)
        close(tensors(compiled(**call)), tensors(function(op)(**call)))
    assert counter.frame_count == 1


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_fullgraph_gradients_equal_eager(op):
    call = arguments(op)
    compiled = torch.compile(function(op), fullgraph=True, backend="aot_eager")
    weights = [torch.randn_like(y) for y in tensors(function(op)(**call))]
    close(run(compiled, call, None, weights), run(function(op), call, None, weights))


@pytest.mark.parametrize(
    "op", ["stage_attention", "gated_residual_adaln", "upsample_renoise_euler", "flow_boundary"]
)
def test_inductor_is_as_accurate_as_the_reference(op):
    compiled = torch.compile(function(op), fullgraph=True)
    with use_backend("reference"), torch.no_grad():
        assert_accurate(compiled, function(op), arguments(op))


def test_inductor_draws_the_same_noise():
    """Its integer arithmetic must not be optimised as if it could not wrap."""
    call = arguments("initial_noise", batch=9)
    compiled = torch.compile(ecar_kernels.initial_noise, fullgraph=True)
    torch.testing.assert_close(
        compiled(**call), ecar_kernels.initial_noise(**call), rtol=2e-6, atol=2e-6
    )


def test_fullgraph_under_autocast():
    call = arguments("stage_attention")

    def attend(q, k, v):
        with torch.autocast("cpu", torch.bfloat16):
            return stage_attention(q, k, v, call["stage_lengths"])

    compiled = torch.compile(attend, fullgraph=True, backend="eager")
    result = compiled(call["q"], call["k"], call["v"])
    assert result.dtype == torch.bfloat16
    assert result.equal(attend(call["q"], call["k"], call["v"]))


NUMBERS = [
    (op, name)
    for op in OPS
    for name, parameter in inspect.signature(function(op)).parameters.items()
    if parameter.annotation is float or float in get_args(parameter.annotation)
]


def test_ops_with_numbers_are_found():
    assert {op for op, _ in NUMBERS} == set(OPS) - {
        "gated_residual",
        "linear_gated_residual",
        "initial_noise",
    }


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize(("op", "name"), NUMBERS)
def test_values_of_a_number_are_one_graph(op, name, gradients, backend):
    """The first value is a constant of its graph, and all others share a second one."""
    if gradients and op not in DIFFERENTIABLE:
        return  # served for inference only
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function(op), fullgraph=True, backend=counter)
    call = arguments(op)
    with torch.set_grad_enabled(gradients), use_backend(backend):
        weights = [torch.randn_like(y) for y in tensors(function(op)(**call))]
        for value in (0.11, 0.23, 0.31, 0.47):
            call[name] = value
            options = (None, weights) if gradients else ()
            results, expected = run(compiled, call, *options), run(function(op), call, *options)
            # The reference's LayerNorm is composed in such a graph, so it rounds otherwise.
            torch.testing.assert_close(results, expected, rtol=1e-5, atol=2e-5)
    assert counter.frame_count == 2


@pytest.mark.parametrize("op", ["euler_step", "upsample_renoise_euler", "flow_boundary"])
@torch.no_grad()
def test_numbers_in_tensors_are_data_of_one_graph(op):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function(op), fullgraph=True, backend=counter)
    call = arguments(op)
    for value in (0.11, 0.23, 0.31):
        call |= {name: torch.tensor(value) for name in ("dt", "guidance_scale", "ratio")}
        close(tensors(compiled(**call)), tensors(function(op)(**call)))
    assert counter.frame_count == 1


@pytest.mark.parametrize("queries", ["all", "last stage"])
@torch.no_grad()
def test_lists_of_stages_are_a_bounded_number_of_graphs(queries):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(stage_attention, fullgraph=True, backend=counter)
    lists = [(1, 4, 16), (1, 9, 25), (2, 8, 32), (3, 5, 7), (4, 6, 9), (16, 64, 256), (1, 2, 3)]
    for lengths in lists:
        q, k, v = (torch.randn(2, sum(lengths), 3, 8) for _ in range(3))
        q = q if queries == "all" else q[:, -lengths[-1] :]
        close([compiled(q, k, v, lengths)], [stage_attention(q, k, v, lengths)])
    assert counter.frame_count <= 3  # constants, then the lengths that changed, then all


def test_a_graph_follows_the_backend_in_force():
    counter = CompileCounter()
    compiled = torch.compile(stage_attention, fullgraph=True, backend=counter)
    call = arguments("stage_attention")
    for backend, graphs in (("cpp", 1), ("reference", 2), ("cpp", 2)):
        with use_backend(backend):
            assert compiled(**call).equal(stage_attention(**call))
        assert counter.frame_count == graphs
    seven_wide = call | {name: call[name][..., :7] for name in "qkv"}
    with use_backend("triton"), pytest.raises(Exception, match="'triton' cannot serve"):
        compiled(**seven_wide)


def test_a_backend_may_be_chosen_inside_a_graph():
    call = arguments("stage_attention")

    def attend():
        with use_backend("reference"):
            return stage_attention(**call)

    assert torch.compile(attend, fullgraph=True, backend="eager")().equal(attend())
    assert ecar_kernels.active_backend() == "auto"


class Block(torch.nn.Module):
    """Every op that works on a model's tensors."""

    def __init__(self):
        super().__init__()
        self.qkv = torch.nn.Linear(CHANNELS, 3 * CHANNELS)
        self.out = torch.nn.Linear(CHANNELS, CHANNELS)

    def forward(self, x, modulation, seeds, state, velocity):
        shift, scale, gate = modulation.chunk(3, -1)
        qkv = ecar_kernels.adaln_linear(x, shift, scale, self.qkv.weight, self.qkv.bias)
        q, k, v = qkv.unflatten(-1, (3, 3, 8)).unbind(2)
        h = stage_attention(q, k, v, (1, 4, 16)).flatten(2)
        x = ecar_kernels.linear_gated_residual(h, self.out.weight, self.out.bias, gate, x)
        x, y = ecar_kernels.gated_residual_adaln(x, h, gate, shift, scale)
        y = ecar_kernels.adaln(ecar_kernels.gated_residual(x, y, gate), shift, scale)
        state = ecar_kernels.euler_step(state, velocity, 0.1, guidance_scale=2.0)
        return y, ecar_kernels.upsample_renoise_euler(
            state, velocity, 0.1, time=0.5, stage=2, seeds=seeds, guidance_scale=2.0
        )


def block_inputs(batch: int) -> tuple:
    return (
        torch.randn(batch, TOKENS, CHANNELS),
        torch.randn(batch, TOKENS, 3 * CHANNELS),
        torch.arange(batch),
        torch.randn(batch, *IMAGE),
        torch.randn(2 * batch, *IMAGE),
    )


@torch.no_grad()
def test_export():
    """One exported program for every batch size."""
    block = Block().requires_grad_(False)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(
        block,
        block_inputs(3),
        dynamic_shapes=({0: batch}, {0: batch}, {0: batch}, {0: batch}, {0: 2 * batch}),
    )
    for size in (2, 5):
        inputs = block_inputs(size)
        y, (end, start) = program.module()(*inputs)
        expected, (expected_end, expected_start) = block(*inputs)
        close((y, end, start), (expected, expected_end, expected_start))


def modulated_chain(x, spatial, table):
    """Blocks that share one modulation, part of it [1, 1, C] for all images, in slices of it."""
    shift, scale, gate = spatial.chunk(3, -1)
    step_shift, step_scale, step_gate = table.chunk(3, 1)
    steps = {"step_shift": step_shift, "step_scale": step_scale}
    y = ecar_kernels.adaln(x, shift, scale, **steps)
    for _ in range(3):
        x, y = ecar_kernels.gated_residual_adaln(
            x, torch.tanh(y), gate, shift, scale, step_gate=step_gate, **steps
        )
        y = ecar_kernels.adaln(y, shift, scale, **steps)
    return ecar_kernels.gated_residual(x, y, gate, step_gate=step_gate)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_gradients_of_chained_modulated_norms(device):
    """Inductor's own of such a chain were wrong in PyTorch 2.10 to 2.13 (pytorch #193061), where
    a shared modulation's slices met. It does not see into these ops."""
    arguments = {
        "x": torch.randn(2, TOKENS, CHANNELS),
        "spatial": torch.randn(2, 1, 3 * CHANNELS),
        "table": torch.randn(1, 3, CHANNELS),
    }
    arguments = {name: value.to(device) for name, value in arguments.items()}
    compiled = torch.compile(modulated_chain, fullgraph=True)

    def reference(**arguments):
        with use_backend("reference"):
            return modulated_chain(**arguments)

    assert_accurate(compiled, reference, arguments, gradients=True)
