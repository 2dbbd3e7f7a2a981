"""The fused GEMMs' registered ops: opcheck, what they refuse, and graphs."""

import pytest
import torch
from torch import nn

from ecar_kernels import adaln_linear, linear_gated_residual
from ecar_kernels.flow_block import packing
from ecar_kernels.registry import KERNEL_DTYPES
from tests.support.backends import DEVICES, by_every_kernel, kernel
from tests.support.flow_block import OPS, call_of, positional
from tests.support.native import needs_native


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("optional", [True, False])
@pytest.mark.parametrize("op", OPS)
@by_every_kernel
def test_opcheck(op, optional, dtype, backend):
    call = call_of(
        op,
        2,
        9,
        24,
        40,
        dtype=dtype,
        bias=optional,
        steps=("one", "rows") if optional else (None, None),
        layouts=("transposed", "chunk", "sliced", "chunk", "expanded", "sliced"),
        device=DEVICES[backend],
    )
    kernel(op, backend)  # which registers it
    registered = getattr(torch.ops, "ecar" if backend == "cpp" else "ecar_triton")
    torch.library.opcheck(getattr(registered, op).default, positional(op, call))


@needs_native
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("optional", [True, False])
@pytest.mark.parametrize("op", OPS)
def test_opcheck_of_packed_weights(op, optional, dtype):
    steps = ("one", "rows") if optional else (None, None)
    call = call_of(
        op,
        2,
        9,
        24,
        40,
        dtype=dtype,
        steps=steps,
        bias=optional,
        layouts=("transposed", "chunk", "sliced", "chunk", "expanded", "sliced"),
    )
    packed = packing.packed_weight(call["weight"])
    if op == "adaln_linear":
        rest = [call["bias"], call.get("step_shift"), call.get("step_scale")]
        given = (call["x"], call["shift"], call["scale"], packed, 40, *rest, True, 1e-6, 0.5)
    else:
        given = (call["h"], packed, call["bias"], call["gate"], call["residual"])
        given = (*given, call.get("step_gate"))
    torch.library.opcheck(getattr(torch.ops.ecar, f"packed_{op}").default, given)
    torch.library.opcheck(torch.ops.ecar.pack_linear_weight.default, (call["weight"],))


@pytest.mark.parametrize("op", OPS)
@by_every_kernel
def test_fullgraph(op, backend):
    torch._dynamo.reset()
    call, run = call_of(op, 2, 9, 24, 40, device=DEVICES[backend]), kernel(op, backend)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert compiled(**call).equal(run(**call))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(24, 96), nn.Linear(96, 24)

    def forward(self, x, shift, scale, gate):
        hidden = adaln_linear(
            x, shift, scale, self.fc1.weight, self.fc1.bias, activation="gelu_tanh"
        )
        return linear_gated_residual(hidden, self.fc2.weight, self.fc2.bias, gate, x)


@needs_native
@torch.no_grad()
def test_a_compiled_graph_sees_a_changed_weight():
    torch._dynamo.reset()
    block, arguments = Block(), torch.randn(4, 2, 9, 24).unbind()
    compiled = torch.compile(block, fullgraph=True)
    for _ in range(3):
        assert compiled(*arguments).equal(block(*arguments))
        block.fc1.weight.mul_(0.5)
        block.load_state_dict(Block().state_dict())


@needs_native
@torch.no_grad()
def test_export():
    block, arguments = Block(), torch.randn(4, 2, 9, 24).unbind()
    exported = torch.export.export(block, arguments)
    assert exported.module()(*arguments).equal(block(*arguments))


@needs_native
def test_the_ops_refuse_what_would_leave_their_tensors():
    x, shift, scale = torch.randn(3, 2, 5, 24).unbind()
    packed = packing.packed_weight(torch.randn(40, 24))
    op = torch.ops.ecar.packed_adaln_linear.default
    whole = [x, shift, scale, packed, 40, None, None, None, False, 1e-6, 1.0]
    op(*whole)
    for index, value, message in (
        (0, x.transpose(1, 2), "argument 'x'"),
        (1, shift[:, :3], "argument 'shift'"),
        (2, scale.double(), "argument 'scale'"),
        (3, packed[:-1], "argument 'packed'"),
        (3, packed.half(), "argument 'packed'"),
        (4, 60, "argument 'packed'"),
        (4, -1, "argument 'outputs'"),
        (5, torch.randn(39), "argument 'bias'"),
        (6, shift, "argument 'step_shift'"),
    ):
        with pytest.raises(RuntimeError, match=message):
            op(*whole[:index], value, *whole[index + 1 :])
