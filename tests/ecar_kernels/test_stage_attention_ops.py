"""Stage attention's registered ops: opcheck, what they refuse, graphs, and being absent."""

import subprocess
import sys

import pytest
import torch

from ecar_kernels import stage_attention, use_backend
from tests.support.backends import DEVICES, KERNELS, by_every_kernel, kernel
from tests.support.native import needs_native
from tests.support.ops import opcheck
from tests.support.stage_attention import E_CAR, attend, call_of


def op_calls():
    kernel("stage_attention", "cpp")  # which registers them
    call = call_of((2, 5), heads=3, head_dim=9, batch=2, layouts=("packed", "sliced", "one head"))
    q, k, v, stages = call.values()
    out, lse = torch.ops.ecar.stage_attention_training(q, k, v, stages, 0.3)
    return {
        "stage_attention": (q, k, v, stages, 0.3),
        "stage_attention_training": (q, k, v, stages, 0.3),
        "stage_attention_backward": (torch.randn_like(out), q, k, v, out, lse, stages, 0.3),
    }


@needs_native
@pytest.mark.parametrize(
    "op", ["stage_attention", "stage_attention_training", "stage_attention_backward"]
)
def test_opcheck(op):
    torch.library.opcheck(getattr(torch.ops.ecar, op).default, op_calls()[op])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("permuted", [False, True])
def test_opcheck_of_triton_s(permuted, dtype):
    triton = pytest.importorskip("ecar_kernels.stage_attention.triton")
    q, k, v, stages = call_of((4, 20), 20, dtype=dtype, backend="triton").values()
    if permuted:
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    for op in (triton._forward, triton._training):
        opcheck(op, (q, k, v, list(stages), -0.5))
    kept = triton._training(q, k, v, stages, -0.5)
    assert kept[0].equal(triton._forward(q, k, v, stages, -0.5))
    grad = torch.randn_like(kept[0])
    opcheck(triton._backward, (grad, q, k, v, *kept, list(stages), -0.5))


@needs_native
def test_the_ops_refuse_what_would_leave_their_tensors():
    calls = op_calls()
    for op, call in calls.items():
        run = getattr(torch.ops.ecar, op).default
        run(*call)
        first = 1 if op == "stage_attention_backward" else 0
        q, k, v = call[first : first + 3]
        wrong = [
            (first, q[0], "argument 'q': expected 4 dimensions"),
            (first, q[:, :3], "argument 'q': expected the tokens of the newest stages, got 3"),
            (first, q.double(), "argument 'q': expected float32, bfloat16 or float16"),
            (first + 1, k[:1], r"argument 'k': expected \[2, 7, 3, 9\], got "),
            (first + 1, k[0], "argument 'k': expected 4 dimensions"),
            (first + 1, k[:, :6], "argument 'v': expected "),
            (first + 2, v[:, :, :2], "argument 'v': expected "),
            (first + 2, v.half(), "argument 'v': expected the first argument's type"),
            (
                first + 2,
                v.transpose(2, 3).contiguous().transpose(2, 3),
                "argument 'v': expected a contiguous last dimension",
            ),
        ] + [
            (call.index((2, 5)), stages, "argument 'stage_lengths': expected 7 tokens")
            for stages in ((), (2, 4), (2, 6), (9, -2), (7, 0), (2**62, 2**62, 2**63 - 1, 7))
        ]
        if op == "stage_attention_backward":
            lse = call[5]
            wrong += [
                (0, call[0][:, :6], "argument 'grad': expected "),
                (4, call[4][:1], "argument 'out': expected "),
                (5, lse[:, :2], "argument 'lse': expected "),
                (5, lse.half(), "argument 'lse': expected "),
                (5, lse.transpose(1, 2), "argument 'lse': expected "),
                (5, lse[..., :6], "argument 'lse': expected "),
            ]
        for index, value, message in wrong:
            with pytest.raises(RuntimeError, match=message):
                run(*call[:index], value, *call[index + 1 :])


def named(backend):
    def attend(**call):
        with use_backend(backend):
            return stage_attention(**call)

    return attend


# Inductor's graphs are compiled; what serves without Triton on this machine, and Triton's kernels.
PLAIN = KERNELS[0] if DEVICES["triton"] == "cpu" else "sdpa"


@pytest.mark.parametrize("backend", [PLAIN, KERNELS[1]])
def test_inductor_s_full_graph_is_ours(backend):
    torch._dynamo.reset()
    attend = named(backend)
    compiled = torch.compile(attend, fullgraph=True)
    call = call_of(E_CAR, 256, backend="triton")
    with torch.no_grad():
        assert compiled(**call).equal(attend(**call))
    inputs = [call[name].requires_grad_() for name in "qkv"]
    grad = torch.randn_like(call["q"])
    runs = []
    for function in (compiled, attend):
        out = function(**call)
        runs.append((out, *torch.autograd.grad(out, inputs, grad)))
    for one, other in zip(*runs, strict=True):
        assert one.equal(other)


@by_every_kernel
def test_fullgraph_equals_eager(backend, small_tiles):
    torch._dynamo.reset()
    compiled = torch.compile(attend(backend), fullgraph=True, backend="aot_eager")
    call = call_of((4, 20), 20, backend=backend)
    with torch.no_grad():
        assert compiled(**call).equal(attend(backend)(**call))
    inputs = [call[name].requires_grad_() for name in "qkv"]
    runs = []
    for function in (compiled, attend(backend)):
        out = function(**call, scale=0.3)
        runs.append((out, *torch.autograd.grad(out.square().sum(), inputs)))
    for one, other in zip(*runs, strict=True):
        assert one.equal(other)


@needs_native
def test_under_autocast_and_the_public_name():
    call = call_of((4, 20), head_dim=24)
    with use_backend("cpp"):
        assert stage_attention(**call).equal(attend("cpp")(**call))
        with torch.autocast("cpu", torch.bfloat16):
            low = stage_attention(**call)
    assert low.dtype == torch.bfloat16
    assert low.equal(
        attend("cpp")(
            **{name: value.bfloat16() if name in "qkv" else value for name, value in call.items()}
        )
    )


@needs_native
def test_in_its_absence_the_reference_serves():
    program = """if True:
        from pathlib import Path
        from ecar_kernels import _native
        _native.FOLDER = Path("/nonexistent")
        import torch, ecar_kernels
        from ecar_kernels.stage_attention import sdpa
        bound = ecar_kernels.resolve("stage_attention", device="cpu", dtype=torch.float32)
        assert bound.backend == "reference", bound
        x = torch.randn(1, 3, 2, 8)
        try:
            with ecar_kernels.use_backend("cpp"):
                ecar_kernels.stage_attention(x, x, x, (1, 2))
        except ecar_kernels.BackendUnavailableError as error:
            print(error)
        meta = x.to("meta")
        assert sdpa.stage_attention(meta, meta, meta, (1, 2)).shape == x.shape
        rows = {row.backend: row for row in ecar_kernels.backends() if row.op == "stage_attention"}
        assert not rows["cpp"].available
        assert "the C++ library is not built" in rows["cpp"].why_not
        assert rows["sdpa"].available and "not cpu: " in rows["sdpa"].limits
    """
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == (
        "backend 'cpp' cannot serve stage_attention: the C++ library is not "
        "built: run pip install .\n"
    )
