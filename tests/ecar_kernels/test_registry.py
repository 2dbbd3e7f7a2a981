"""Backends: what is chosen, what is refused and why, and that importing does nothing else."""

import asyncio
import os
import re
import subprocess
import sys
import threading

import pytest
import torch

import ecar_kernels
from ecar_kernels import (
    BackendUnavailableError,
    _native,
    _triton,
    active_backend,
    backends,
    registry,
    resolve,
    use_backend,
)
from ecar_kernels.registry import BACKENDS, OPS, Implementation
from tests.support.ops import arguments, function


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | environment
    )


def bound(op: str, **kwargs) -> object:
    return resolve(op, **({"device": "cpu", "dtype": torch.float32} | kwargs))


@pytest.fixture
def fake(monkeypatch):
    """Gives adaln a cpp implementation with limits of the test's choosing."""

    def install(**limits) -> Implementation:
        implementation = Implementation("ecar_kernels.adaln.reference:gated_residual", **limits)
        monkeypatch.setitem(registry.IMPLEMENTATIONS["adaln"], "cpp", implementation)
        monkeypatch.setattr(registry, "_servers", {})
        return implementation

    return install


def test_auto_prefers_the_dense_attention_per_stage():
    assert bound("stage_attention").backend == "cpp"
    assert bound("stage_attention", backend="reference").backend == "reference"


@pytest.mark.parametrize("op", OPS)
def test_auto_serves_every_op(op):
    for dtype in registry.KERNEL_DTYPES:
        assert callable(bound(op, dtype=dtype))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bound_op_says_what_it_is(op, backend):
    try:
        run = bound(op, backend=backend)
    except BackendUnavailableError:
        return
    implementation = registry.IMPLEMENTATIONS[op][backend]
    assert (run.op, run.backend, run.limits) == (op, backend, implementation.limits())
    assert (run.prepare_weight is None) == (implementation.prepare == "")
    assert str(run) == f"<{op} by {backend}>"
    assert bound(op, backend=backend) is run


@pytest.mark.parametrize("op", ["adaln", "adaln_linear", "stage_attention"])
@torch.no_grad()
def test_a_bound_op_is_traced(op):
    torch._dynamo.reset()
    run, call = bound(op), arguments(op)
    for traced in (run, lambda **given: run(**given)):
        compiled = torch.compile(traced, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(**call), run(**call), rtol=1e-6, atol=1e-6)


def test_use_backend_nests_and_ends_with_its_block():
    outside = ecar_kernels.active_backend()
    with use_backend("reference"):
        assert bound("stage_attention").backend == "reference"
        with use_backend("cpp"):
            assert bound("stage_attention").backend == "cpp"
        assert ecar_kernels.active_backend() == "reference"
        with pytest.raises(ZeroDivisionError), use_backend("triton"):
            raise ZeroDivisionError
        assert ecar_kernels.active_backend() == "reference"
    assert ecar_kernels.active_backend() == outside


def test_one_use_backend_may_be_entered_again():
    choice = use_backend("reference")
    with choice, use_backend("cpp"), choice:
        assert ecar_kernels.active_backend() == "reference"
    assert ecar_kernels.active_backend() == "auto"


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_named_backend_serves_or_says_why_not(op, backend):
    missing = {(row.op, row.backend): row.why_not for row in backends()}[op, backend]
    if not missing:
        missing = registry.IMPLEMENTATIONS[op][backend].why_not("cpu", torch.float32)
    with use_backend(backend):
        if not missing:
            function(op)(**arguments(op))
        else:
            with pytest.raises(BackendUnavailableError, match=f"'{backend}' cannot serve {op}: "):
                function(op)(**arguments(op))


def test_auto_falls_back_where_a_named_backend_refuses(fake):
    reasons = {
        "devices": (("cuda",), "it serves cuda tensors, not cpu"),
        "dtypes": ((torch.float16,), "it does not serve torch.float32"),
        "missing": (lambda: "no compiler was found", "no compiler was found"),
        "max_width": (8, "it serves a last dimension of at most 8, not 9"),
        "width_step": (8, "it serves a last dimension in steps of 8, not 9"),
    }
    for limit, (value, reason) in reasons.items():
        fake(**{limit: value})
        assert bound("adaln", width=9).function.__name__ == "adaln", limit
        with pytest.raises(BackendUnavailableError) as caught:
            bound("adaln", width=9, backend="cpp")
        assert str(caught.value) == f"backend 'cpp' cannot serve adaln: {reason}"


def test_an_implementation_within_its_limits_is_chosen(fake):
    fake(devices=("cpu",), dtypes=(torch.float32,), max_width=8, width_step=4)
    for width in (0, 4, 8):
        assert bound("adaln", width=width).function.__name__ == "gated_residual"
    for width in (6, 9, 12):
        assert bound("adaln", width=width).function.__name__ == "adaln"


def test_what_serves_by_name_alone_is_not_taken_by_auto(fake):
    fake(named_only=("cpu",))
    assert bound("adaln").function.__name__ == "adaln"
    assert bound("adaln", backend="cpp").function.__name__ == "gated_residual"


@pytest.mark.parametrize("dtype", registry.KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_auto_never_interprets_kernels(op, dtype):
    assert bound(op, dtype=dtype).backend != "triton"


def test_the_search_runs_once(fake):
    calls = []
    fake(missing=lambda: calls.append(None))
    for _ in range(3):
        bound("adaln")
    assert len(calls) == 1


def test_what_a_backend_serves_and_what_it_lacks_is_in_the_table(fake):
    def row():
        return next(row for row in backends() if (row.op, row.backend) == ("adaln", "cpp"))

    fake(missing=lambda: "no compiler was found")
    assert (row().available, row().why_not) == (False, "no compiler was found")
    for limits, said in (
        ({}, ""),
        ({"devices": ("cuda", "cpu")}, "cuda and cpu tensors"),
        ({"max_width": 256, "width_step": 8}, "last dimension at most 256, in steps of 8"),
        (
            {"devices": ("cuda",), "dtypes": (torch.float32, torch.float16), "width_step": 8},
            "cuda tensors; last dimension in steps of 8; float32 and float16",
        ),
    ):
        fake(**limits)
        assert row().limits == said


def test_triton_says_what_it_lacks(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert _triton.why_not() == "torch sees no CUDA GPU, and TRITON_INTERPRET=1 is not set"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.version, "hip", None)
    for capabilities, old in (
        (((7, 5), (7, 0)), "cuda:1 is 7.0"),
        (((7, 5), (8, 6)), "cuda:0 is 7.5"),
        (((8, 0), (12, 0)), None),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", capabilities.__getitem__)
        reason = f"needs GPUs of compute capability 8.0 or newer, {old}; CUDA_VISIBLE_DEVICES can "
        assert _triton.why_not() == (old and f"{reason}leave it out")
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert "ROCm" in _triton.why_not()
    monkeypatch.setattr(_triton, "_not_installed", lambda: True)
    assert _triton.why_not() == "triton is not installed"


def test_the_former_name_of_a_backend_serves_and_warns():
    meant = "'native' is now 'cuda', 'cpp', 'sdpa', whichever serves"
    call = arguments("adaln")
    with pytest.warns(DeprecationWarning, match=meant):
        block = use_backend("native")
    with block, registry.record() as log:
        assert active_backend() == "native"
        function("adaln")(**call)
    expected = "reference" if _native.why_not() else "cpp"
    assert log == {"adaln": {expected}}
    with pytest.warns(DeprecationWarning, match=meant):
        assert bound("stage_attention", backend="native").backend == expected
    with (
        pytest.warns(DeprecationWarning, match=meant),
        pytest.raises(BackendUnavailableError, match="backend 'cpp' cannot serve adaln"),
    ):
        bound("adaln", backend="native", dtype=torch.float64)
    code = """if True:
        import torch, ecar_kernels
        print(ecar_kernels.resolve("adaln", device="cpu", dtype=torch.float32))
    """
    done = python(code, ECAR_BACKEND="native", PYTHONWARNINGS="always::DeprecationWarning")
    assert done.stdout.strip() == f"<adaln by {expected}>", done.stderr
    assert f"environment variable ECAR_BACKEND: {meant}" in done.stderr


def test_unknown_names_are_refused():
    names = ", ".join(map(repr, (*BACKENDS, "auto")))
    expected = f"expected one of {names}, got 'fast'"
    with pytest.raises(ValueError, match=f"argument 'name': {expected}"):
        use_backend("fast")
    with pytest.raises(ValueError, match=f"argument 'backend': {expected}"):
        bound("adaln", backend="fast")
    with pytest.raises(ValueError, match=r"argument 'op': expected one of .*, got 'relu'"):
        bound("relu")


def test_the_environment_variable_sets_the_backend():
    code = """if True:
        import torch, ecar_kernels as ek
        print(ek.active_backend())
        with ek.use_backend("auto"):
            print(ek.active_backend())
        x = torch.ones(1, 1, 4)
        try:
            ek.adaln(x, x, x)
        except RuntimeError as error:
            print(type(error).__name__)
    """
    # Not interpreted, Triton's kernels cannot serve CPU tensors, on any machine.
    assert python(code, ECAR_BACKEND="triton", TRITON_INTERPRET="0").stdout.split() == [
        "triton",
        "auto",
        "BackendUnavailableError",
    ]


def test_a_wrong_environment_variable_is_named_on_use_not_on_import():
    code = """if True:
        import torch, ecar_kernels as ek
        x = torch.ones(1, 1, 4)
        for call in (ek.active_backend, lambda: ek.adaln(x, x, x)):
            try:
                call()
            except ValueError as error:
                print(error)
    """
    result = python(code, ECAR_BACKEND="fast")
    names = ", ".join(map(repr, (*BACKENDS, "auto")))
    expected = f"environment variable ECAR_BACKEND: expected one of {names}, got 'fast'"
    assert result.stdout.splitlines() == [expected] * 2, result.stderr


def test_import_needs_torch_alone_and_leaves_no_trace():
    code = """if True:
        import sys
        import torch  # first: what torch imports or looks for is its own affair

        for name in ("triton", "sklearn", "scipy", "diffusers", "ecar", "accelerate", "setuptools",
                     "safetensors", "huggingface_hub"):
            sys.modules[name] = None  # importing it, or a part of it, raises ImportError
        before = set(sys.modules)
        import ecar_kernels
        ours = {name for name in set(sys.modules) - before if not name.startswith("ecar_kernels")}
        assert not [name for name in ours if name.startswith(("torch._dynamo", "torch._inductor",
            "torch.utils.cpp_extension", "triton"))], ours
        x = torch.randn(1, 2, 4)
        print(ecar_kernels.adaln(x, x, x).shape)
    """
    result = python(code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "torch.Size([1, 2, 4])"


def test_the_command_prints_the_table():
    command = [sys.executable, "-m", "ecar_kernels"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    table, notes = result.stdout.split("\n\n")
    head, columns, *lines = table.splitlines()
    assert head.startswith(f"ecar_kernels {ecar_kernels.__version__}, ")
    assert max(map(len, result.stdout.splitlines())) <= 100
    _, *named = columns.split()
    cells = {line.split()[0]: dict(zip(named, line.split()[1:], strict=True)) for line in lines}
    assert list(cells) == list(registry.OPS)
    notes = " ".join(notes.split())
    for row in backends():
        if row.backend not in registry.RECORDS[row.op].backends:
            assert cells[row.op].get(row.backend, "-") == "-"
            continue
        assert cells[row.op][row.backend] == ("yes" if row.available else "no")
        for verb, text in (("is missing", row.why_not), ("serves", row.limits)):
            (said,) = re.findall(rf"{row.backend} {verb}[^:]*: {re.escape(text)}", notes)[:1] or [
                ""
            ]
            assert bool(said) == bool(text)
            assert "(" not in said.partition(":")[0] or row.op in said

    result = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"ECAR_BACKEND": "fast"}
    )
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: environment variable ECAR_BACKEND")


def test_ops_win_their_names_over_the_families_folders():
    from ecar_kernels.adaln import reference as found

    assert callable(ecar_kernels.adaln) and callable(ecar_kernels.stage_attention)
    assert callable(found.adaln)


def overlapping(first, second):
    """Two threads whose blocks overlap: the first is left while the second is inside."""
    steps = [threading.Event() for _ in range(3)]
    seen = {}

    def run_first():
        with use_backend(first):
            steps[0].set()
            steps[1].wait(10)
            seen["first"] = active_backend()
        steps[2].set()

    def run_second():
        steps[0].wait(10)
        with use_backend(second):
            steps[1].set()
            steps[2].wait(10)
            seen["second"] = active_backend()
        seen["after"] = active_backend()

    threads = [threading.Thread(target=run) for run in (run_first, run_second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return seen


@pytest.mark.parametrize("second", ["reference", "cpp", "auto"])
def test_threads_have_each_their_own_choice(second):
    outside = active_backend()
    seen = overlapping("reference", second)
    assert seen == {"first": "reference", "second": second, "after": outside}
    assert active_backend() == outside and registry._traced == registry._outside


def test_asyncio_tasks_have_each_their_own_choice():
    async def task(name, steps):
        seen = []
        with use_backend(name):
            for _ in range(steps):
                await asyncio.sleep(0)
                seen.append(active_backend())
        return seen

    async def both():
        return await asyncio.gather(task("reference", 2), task("cpp", 5), task("auto", 3))

    assert asyncio.run(both()) == [["reference"] * 2, ["cpp"] * 5, ["auto"] * 3]
    assert registry._traced == registry._outside


def test_what_serves_is_recorded_per_thread():
    x = torch.randn(1, 3, 8)
    with registry.record() as log:
        thread = threading.Thread(target=lambda: registry.note("adaln", "another thread's"))
        thread.start()
        thread.join()
        with use_backend("reference"):
            ecar_kernels.adaln(x, x, x)
        with registry.record() as inner:
            ecar_kernels.gated_residual(x, x, x)
    ecar_kernels.adaln(x, x, x)
    assert log == {"adaln": {"reference"}} and set(inner) == {"gated_residual"}
