"""Stage attention by libraries' kernels, stage by stage: PyTorch's flash attention by its CPU form,
cuDNN, flash-attn and xformers by stand-ins with their signatures."""

import importlib.util
import inspect
import math
import sys
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import ecar_kernels
from ecar_kernels import (
    BackendUnavailableError,
    backends,
    registry,
    resolve,
    stage_attention,
    tuning,
    use_backend,
)
from ecar_kernels.stage_attention import by_stage, measured, reference
from tests.support import attention_libraries
from tests.support.attention_libraries import SIXTEEN_BITS, stand_in
from tests.support.backends import needs_triton
from tests.support.stage_attention import (
    E_CAR,
    LAYOUTS,
    VAR_STAGES,
    attend,
    backward,
    call_of,
    check,
)

STAND_INS = ("sdpa_cudnn", "flash_attn", "xformers")
LIBRARIES = ("sdpa_flash", *STAND_INS)


@pytest.fixture(params=LIBRARIES)
def library(request, monkeypatch):
    """A backend's name."""
    if request.param in STAND_INS:
        stand_in(monkeypatch, request.param)
    return request.param


@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=str)
@pytest.mark.parametrize(
    ("stages", "queries"),
    [(E_CAR, 336), (E_CAR, 320), (E_CAR, 256), (VAR_STAGES[:8], 255), ((7,), 7), ((1, 3, 1), 1)],
    ids=str,
)
def test_outputs_and_gradients(library, stages, queries, dtype):
    """Of all stages, of the newest ones over a cache, and of one."""
    few = queries < 16
    call = call_of(stages, queries, batch=8 if few else 2, heads=3, head_dim=72, dtype=dtype)
    check(library, call, gradients=not few)  # of a few keys only rounding is left


@pytest.mark.parametrize("head_dim", [8, 40, 64, 128])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(library, layout, head_dim):
    """Also of rows that are not aligned to 16 bytes, which the libraries do not take."""
    call = call_of((4, 20, 17), 37, head_dim=head_dim, dtype=torch.bfloat16, layouts=[layout] * 3)
    check(library, call)


def test_gradients_that_are_one_number(library):
    call = call_of((3, 20), head_dim=16, dtype=torch.bfloat16)
    inputs = [call[name].requires_grad_() for name in "qkv"]
    found = torch.autograd.grad(attend(library)(**call).sum(), inputs)
    wide = {name: call[name].detach().double().requires_grad_() for name in "qkv"}
    exact = reference.stage_attention(**call | wide).sum()
    expected = torch.autograd.grad(exact, list(wide.values()))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=0.05, atol=0.05)


def test_a_scale_below_zero_does_not_overflow(library):
    call = call_of((4, 30), heads=1, head_dim=64, dtype=torch.bfloat16)
    call["q"] = 30 * call["q"]
    check(library, call | {"scale": -0.4}, gradients=False)
    assert all(x.isfinite().all() for x in backward(library, call, scale=-0.4))


@pytest.mark.parametrize("scale", [0.0, 2, 0.05])
def test_any_scale(library, scale):
    call = call_of((3, 20), heads=2, head_dim=16, dtype=torch.bfloat16) | {"scale": float(scale)}
    check(library, call, gradients=scale == 0.05)


def test_a_stage_does_not_see_later_stages(library):
    call = call_of((4, 9, 16), head_dim=16, dtype=torch.bfloat16)
    changed = {name: call[name].clone() for name in "kv"}
    for x in changed.values():
        x[:, 13:] = math.nan
    before, after = attend(library)(**call), attend(library)(**call | changed)
    assert after[:, :13].equal(before[:, :13]) and after[:, 13:].isnan().all()


@pytest.mark.parametrize("nothing", [{"batch": 0}, {"heads": 0}])
def test_nothing(library, nothing):
    call = call_of((4, 9), 9, dtype=torch.bfloat16, **nothing)
    out, *gradients = backward(library, call)
    assert out.shape == call["q"].shape
    assert [x.shape for x in gradients] == [call[name].shape for name in "qkv"]


def test_outputs_are_contiguous(library):
    call = call_of((4, 9), 9, head_dim=16, dtype=torch.bfloat16)
    assert all(x.is_contiguous() for x in backward(library, call))


def test_a_second_derivative_is_the_reference_s(library):
    call = call_of((2, 4), heads=1, dtype=torch.bfloat16)
    call = {
        name: x.float() if library == "sdpa_flash" and name in "qkv" else x
        for name, x in call.items()
    }

    def second(attention):
        inputs = [call[name].detach().requires_grad_() for name in "qkv"]
        out = attention(*inputs, call["stage_lengths"])
        (first,) = torch.autograd.grad(out.square().sum(), inputs[0], create_graph=True)
        return torch.autograd.grad(first.square().sum(), inputs[1])[0]

    torch.testing.assert_close(
        second(attend(library)), second(reference.stage_attention), rtol=0.1, atol=0.05
    )


@pytest.mark.parametrize("library", ["sdpa_flash", "sdpa_cudnn"])
def test_pytorch_s_cuda_ops_take_the_calls(library):
    """By their schemas and shape functions, on tensors that stand for those of a GPU."""
    dense = importlib.import_module(f"ecar_kernels.stage_attention.{library}")
    with FakeTensorMode():
        q, k, v = (
            torch.empty(2, n, 3, 64, dtype=torch.bfloat16, device="cuda") for n in (16, 29, 29)
        )
        assert dense._forward(q, k, v, 0.5).shape == q.shape
        out, *kept = dense._training(q, k, v, 0.5)
        assert out.shape == q.shape and all(isinstance(x, torch.Tensor) for x in kept)
        found = dense._backward(torch.empty_like(out), q, k, v, out, *kept, 0.5)
        assert [x.shape for x in found] == [q.shape, k.shape, v.shape]


def test_opcheck(library):
    q, k, v, stages = call_of((4, 20), 20, dtype=torch.bfloat16).values()
    dense = importlib.import_module(f"ecar_kernels.stage_attention.{library}")
    ops = getattr(torch.ops, by_stage.NAMESPACE)
    out, *kept = getattr(ops, f"{library}_training")(q, k, v, stages, 0.5)
    assert out.equal(getattr(ops, library)(q, k, v, stages, 0.5)) and dense
    for end, call in (
        ("", (q, k, v, stages, 0.5)),
        ("_training", (q, k, v, stages, 0.5)),
        ("_backward", (torch.randn_like(out), q, k, v, out, *kept, stages, 0.5)),
    ):
        torch.library.opcheck(getattr(ops, library + end).default, call)


@pytest.mark.parametrize("gradients", [False, True])
def test_a_graph_is_whole(gradients):
    torch._dynamo.reset()
    compiled = torch.compile(stage_attention, fullgraph=True, backend="aot_eager")
    with use_backend("sdpa_flash"):
        for scale in (None, 0.3, 0.4):  # a number that changes
            call = call_of((4, 9), 9, head_dim=16) | {"scale": scale}
            results = []
            for run in (compiled, stage_attention):
                inputs = {name: call[name].detach().requires_grad_(gradients) for name in "qkv"}
                out = run(**call | inputs)
                results.append([out])
                if gradients:
                    results[-1] += torch.autograd.grad(out.square().sum(), list(inputs.values()))
            for one, other in zip(*results, strict=True):
                torch.testing.assert_close(one, other)


# The registry: what is there, what serves, what is said.


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_what_is_missing_is_said(no_gpu):
    rows = {row.backend: row for row in backends() if row.op == "stage_attention"}
    flash = rows["sdpa_flash"]
    assert flash.available and "float16 on cuda" in flash.limits
    assert "gradients vary in their last bits" in flash.limits
    assert rows["sdpa_cudnn"].why_not == "torch sees no CUDA GPU"
    for name, package in (("flash_attn", "flash-attn"), ("xformers", "xformers")):
        installed = importlib.util.find_spec(name) is not None
        reason = "torch sees no CUDA GPU" if installed else f"{package} is not installed"
        assert rows[name].why_not == reason
    assert (
        "gradients vary" not in registry.IMPLEMENTATIONS["stage_attention"]["flash_attn"].limits()
    )


@pytest.mark.parametrize("name", ["flash_attn", "xformers"])
def test_a_package_that_does_not_load_is_said(monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 0))
    implementation = registry.IMPLEMENTATIONS["stage_attention"][name]
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: object())
    for module in (name, f"{name}.flash_attn_interface", f"{name}.ops"):
        monkeypatch.setitem(sys.modules, module, None)
    package = name.replace("_", "-")
    assert implementation.missing().startswith(f"{package} does not load: ")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    assert "cuda:0 is 7.5" in implementation.missing()


@pytest.mark.parametrize("name", LIBRARIES)
def test_limits(name, monkeypatch):
    """By a name nothing falls back; `auto` takes a library where it was measured, no other time."""
    implementation = registry.IMPLEMENTATIONS["stage_attention"][name]
    monkeypatch.setattr(registry, "_servers", {})
    monkeypatch.setitem(
        registry.IMPLEMENTATIONS["stage_attention"],
        name,
        replace(implementation, missing=lambda: None, missing_on={}),
    )
    if name in STAND_INS:
        stand_in(monkeypatch, name)
    widest = 128 if name == "sdpa_cudnn" else 256
    for how, reason in (
        ({"dtype": torch.float32}, "it does not serve torch.float32"),
        ({"width": 60}, "it serves a last dimension in steps of 8, not 60"),
        ({"width": widest + 8}, f"of at most {widest}, not {widest + 8}"),
    ):
        given = {"device": "cuda", "dtype": torch.bfloat16, "width": 64} | how
        with pytest.raises(BackendUnavailableError, match=f"'{name}' cannot serve .*{reason}"):
            resolve("stage_attention", backend=name, **given)
    assert name not in registry.AUTO_ORDER


def test_invalid_calls_are_refused_before_the_library():
    call = call_of((4, 9), dtype=torch.bfloat16)
    with use_backend("sdpa_flash"):
        with pytest.raises(ValueError, match="argument 'q': expected as many queries"):
            stage_attention(**call | {"q": call["q"][:, :5]})
        with pytest.raises(ValueError, match=r"argument 'stage_lengths\[1\]': expected at least 1"):
            stage_attention(**call | {"stage_lengths": (13, 0)})
        with pytest.raises(TypeError, match="argument 'k'"):
            stage_attention(**call | {"k": call["k"].half()})


# `auto` by measurement, on the CPU: Triton in its interpreter.


def served(call):
    with registry.record() as log:
        out = measured.stage_attention(**call)
    return out, log["stage_attention"]


@needs_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's kernels are not interpreted")
def test_a_measured_backend_serves(monkeypatch):
    call = call_of((4, 9), 9, head_dim=16, dtype=torch.bfloat16)
    assert served(call)[1] == {"triton"}
    with tuning.forced(**{measured.OP: measured.Settings("sdpa_flash")}):
        out, by = served(call)
        assert by == {"sdpa_flash"} and out.equal(attend("sdpa_flash")(**call))
    said = []
    monkeypatch.setattr(tuning, "warn", lambda device, message: said.append(message))
    for name in ("flash_attn", "of_another_version"):
        with tuning.forced(**{measured.OP: measured.Settings(name)}):
            assert served(call)[1] == {"triton"}
        assert f"backend '{name}' cannot serve stage_attention" in said.pop()


@needs_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's kernels are not interpreted")
def test_what_is_asked_for_a_measurement():
    """Inference and training apart, by the stages and the queries."""
    call = call_of((4, 9), 9, batch=3, heads=2, head_dim=16, dtype=torch.bfloat16)
    with tuning.recording() as asked:
        measured.stage_attention(**call)
        measured.stage_attention(**call | {"q": call["q"].detach().requires_grad_()})
        with torch.no_grad():
            measured.stage_attention(**call | {"q": call["q"].detach().requires_grad_()})
    keys = [entry[1:] for entry in asked if entry[0] == measured.OP]
    for key, kind in zip(keys, ("inference", "training", "inference"), strict=True):
        assert key == ((16, "bfloat16", kind, 9, 4, 9), 6, measured.USUAL)


def test_auto_asks_and_a_name_does_not():
    found = registry.IMPLEMENTATIONS["stage_attention"]["triton"]
    assert found.auto and registry.IMPLEMENTATIONS["adaln"]["triton"].auto == ""
    pytest.importorskip("triton")
    assert found.unnamed.chooses and found.unnamed.function is measured.stage_attention
    assert not found.loaded.chooses and found.loaded.function is not measured.stage_attention
    with use_backend("auto"):
        assert ecar_kernels.active_backend() == "auto"


# The stand-ins: are they what they stand for?


def test_the_stand_ins_have_the_schemas_of_pytorch_s_ops():
    for op, function in (
        ("_scaled_dot_product_cudnn_attention", attention_libraries._cudnn),
        ("_scaled_dot_product_cudnn_attention_backward", attention_libraries._cudnn_backward),
    ):
        schema = getattr(torch.ops.aten, op).default._schema
        assert list(inspect.signature(function).parameters) == [a.name for a in schema.arguments]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=str)
@pytest.mark.parametrize("name", LIBRARIES)
def test_on_a_gpu(name, dtype):
    """The library itself, where it is installed."""
    reason = registry.IMPLEMENTATIONS["stage_attention"][name].why_not("cuda", dtype)
    if reason is not None:
        pytest.skip(reason)
    for head_dim in (64, 72, 128):
        for queries in (336, 256):
            call = call_of(E_CAR, queries, batch=2, head_dim=head_dim, dtype=dtype)
            call |= {key: call[key].cuda() for key in "qkv"}
            check(name, call)
