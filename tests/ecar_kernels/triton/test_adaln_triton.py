"""The adaLN family's Triton kernels: interpreted on the CPU, or compiled where there is a GPU."""

import inspect
import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ecar_kernels import use_backend
from ecar_kernels.adaln import api, launch, reference
from ecar_kernels.registry import KERNEL_DTYPES
from tests.support.accuracy import assert_accurate, run, tensors
from tests.support.adaln import MODULATION, call_of, calls
from tests.support.ops import opcheck

triton = pytest.importorskip("ecar_kernels.adaln.triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STEPS = (None, "one", "rows")
CHUNK = ("chunk",) * 8


def call(op, *shape, **kinds):
    return call_of(op, *shape, **kinds, device=DEVICE)


def random_calls(op, channels):
    return calls(op, channels, images=3, most=11, device=DEVICE)


def check(op, arguments, *, gradients=True):
    assert_accurate(getattr(triton, op), getattr(reference, op), arguments, gradients=gradients)


def set_tiles(monkeypatch, rows=4, fused=True):
    """What a test's few rows, or its narrow ones, would not get: tiles of several rows, of which
    a program does two one after the other; the backward of wide rows in two launches."""
    usual = launch.default

    def default(op, *sizes):
        found = replace(usual(op, *sizes), rows=rows, early=fused)
        if op.endswith("_backward"):
            found = replace(found, program_rows=2 * rows, fused=fused)
        return found

    monkeypatch.setattr(launch, "default", default)


@pytest.mark.parametrize("op", MODULATION)
@settings(max_examples=8)
@given(st.data())
def test_outputs(op, data):
    with torch.no_grad():
        check(op, data.draw(random_calls(op, st.integers(1, 150))), gradients=False)


@pytest.mark.parametrize("rows, fused", [(1, True), (4, True), (2, False)])
@pytest.mark.parametrize("op", MODULATION)
@settings(max_examples=6)
@given(st.data())
def test_gradients(op, rows, fused, data):
    """From 24 channels: the error of a sum into one or two numbers is a matter of luck."""
    with pytest.MonkeyPatch.context() as patch:
        set_tiles(patch, rows, fused)
        check(op, data.draw(random_calls(op, st.integers(24, 150))))


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("op", MODULATION)
@pytest.mark.parametrize("channels", [1, 7, 40, 768, 1152])
def test_widths(op, channels, dtype, monkeypatch):
    set_tiles(monkeypatch)
    for each in (True, False):
        check(
            op,
            call(
                op,
                2,
                5,
                channels,
                dtype=dtype,
                layouts=CHUNK,
                whole=(each,) * 3,
                steps=("one", "rows", None),
            ),
            gradients=channels > 7,
        )


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("op", MODULATION)
@pytest.mark.parametrize("channels", [5001, launch.MAX_WIDTH])
def test_the_widest_rows(op, channels, dtype, monkeypatch):
    # The interpreter takes its time for each program, and the sum's are many.
    monkeypatch.setattr(launch, "SUM_COLUMNS", 1024)
    check(op, call(op, 1, 2, channels, dtype=dtype, layouts=CHUNK, whole=(False, True, False)))


@pytest.mark.parametrize("steps", [*itertools.product(STEPS, repeat=3)], ids=str)
def test_every_mix_of_steps(steps):
    for whole in ((True, False, True), (False, True, False)):
        check(
            "gated_residual_adaln", call("gated_residual_adaln", 2, 3, 33, whole=whole, steps=steps)
        )


@pytest.mark.parametrize("value", [3000.0, 1e5])
def test_the_mean_has_more_digits_than_float32(value):
    """A few ulp of y, whatever the mean: x - mean is small beside both."""
    x = torch.randn(1, 4, 1152, device=DEVICE) + value
    zeros = torch.zeros(1, 1, 1152, device=DEVICE)
    expected = reference.adaln(x.double(), zeros.double(), zeros.double())
    error = (triton.adaln(x, zeros, zeros) - expected).abs().max()
    assert error < 8 * 2**-23 * expected.abs().max()


# The interpreter of Triton 3.9 truncates to bfloat16; compiled, as on a GPU, it rounds.
@pytest.mark.parametrize(
    "dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)], ids=str
)
def test_sixteen_bits_round_to_nearest(dtype):
    """Exact halves go to the even neighbour."""
    one = torch.ones(1, 1, 64, device=DEVICE).to(dtype)
    unit = torch.finfo(dtype).eps
    for odd in (0, 1):
        x = one * (1 + odd * unit)
        found = triton.gated_residual(x, one * unit, one / 2)
        assert found.equal((x.double() + unit / 2).to(dtype))


@pytest.mark.parametrize("op", MODULATION)
def test_the_same_bits_every_time(op, monkeypatch, programs_in_any_order):
    set_tiles(monkeypatch)
    arguments = call(op, 3, 9, 100, whole=(False,) * 3, steps=("one", "rows", "one"))
    weights = [
        torch.randn(3, 9, 100, device=DEVICE) for _ in tensors(getattr(triton, op)(**arguments))
    ]
    first, second = (run(getattr(triton, op), arguments, None, weights) for _ in range(2))
    assert all(a.equal(b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("op", MODULATION)
def test_views_are_read_in_place(op, monkeypatch):
    """No argument is copied: each kernel is given the very memory of the views."""
    given = []
    monkeypatch.setattr(
        triton, "_view", lambda tensor, view=triton._view: (given.append(tensor), view(tensor))[1]
    )
    arguments = call(op, 2, 3, 24, layouts=CHUNK, whole=(True, False, True))
    getattr(triton, op)(**arguments)
    addresses = {tensor.data_ptr() for tensor in given if tensor is not None}
    names = [name for name in arguments if not name.startswith("step_")]
    assert addresses == {arguments[name].data_ptr() for name in names}


@pytest.mark.parametrize("optional", [True, False])
@pytest.mark.parametrize("op", MODULATION)
def test_opcheck(op, optional):
    steps = ("one", "rows", "one") if optional else (None,) * 3
    whole = (not optional, True, optional)
    arguments = call(op, 2, 3, 24, layouts=CHUNK, whole=whole, steps=steps)
    forward = {
        "adaln": triton.adaln_forward,
        "gated_residual": triton.gated_residual_forward,
        "gated_residual_adaln": triton._both,
    }[op]
    backward = {
        "adaln": triton._adaln_backward,
        "gated_residual": triton._gated_residual_backward,
        "gated_residual_adaln": triton._both_backward,
    }[op]
    for kernel in (forward, backward):
        schema = inspect.unwrap(kernel)._schema
        for flags in ((True,), (False,)) if kernel is backward else ((),):
            opcheck(kernel, [_argument(entry, arguments, *flags) for entry in schema.arguments])


def _argument(entry, arguments, flag=True):
    """What a schema's argument is called with."""
    x = arguments["x"]
    if entry.name in ("grad", "grad_y", "grad_new_x"):
        return torch.randn_like(x)
    if entry.name == "new_x":
        return x
    if entry.name == "eps":
        return 1e-6
    if str(entry.type) == "bool":
        return flag
    if entry.name in ("wanted", "summed"):
        has = {"shift" in arguments, "gate" in arguments}
        both = len(has) == 1
        sizes = {"wanted": 4 if both else 2, "summed": 3 if both else 1 + ("shift" in arguments)}
        return [flag] * sizes[entry.name]
    return arguments.get(entry.name)


@pytest.fixture
def fresh_graphs():
    torch._dynamo.reset()


@pytest.mark.parametrize("optional", [True, False])
@pytest.mark.parametrize("op", MODULATION)
def test_fullgraph_equals_eager(op, optional, fresh_graphs):
    arguments = call(
        op,
        2,
        3,
        24,
        layouts=CHUNK,
        whole=(True, False, True),
        steps=("one", "rows", "one") if optional else (None,) * 3,
    )
    with use_backend("triton"):
        compiled = torch.compile(getattr(api, op), fullgraph=True, backend="aot_eager")
        with torch.no_grad():
            pairs = zip(
                tensors(compiled(**arguments)), tensors(getattr(api, op)(**arguments)), strict=True
            )
            assert all(a.equal(b) for a, b in pairs)
        weights = [torch.randn_like(arguments["x"]) for _ in tensors(compiled(**arguments))]
        found, expected = (
            run(function, arguments, None, weights) for function in (compiled, getattr(api, op))
        )
    assert all(a.equal(b) for a, b in zip(found, expected, strict=True))


def test_settings_fill_the_chip_and_fit_a_program():
    for channels, rows, arch in itertools.product(
        (1, 7, 40, 768, 1152, 5001, 8192), (1, 16, 340, 5440, 2**20), (80, 90, 100, 120)
    ):
        for op in MODULATION:
            for name in (op, f"{op}_backward"):
                for its in (
                    launch.default(name, channels, rows, arch),
                    launch.default(name, channels, rows, arch, False),
                    *launch.candidates(name, channels, rows, arch),
                ):
                    assert its.num_warps in (1, 2, 4, 8, 16)
                    assert its.rows == 1 or rows / its.rows >= launch.MULTIPROCESSORS
                    assert its.rows * launch.padded(channels) <= max(1024, launch.padded(channels))


@pytest.mark.parametrize(
    "channels, programs", [(48, 3), (512, 3), (768, 4), (1152, 2), (2048, 2), (4096, 1)]
)
@pytest.mark.parametrize("op", MODULATION)
def test_programs_that_read_ahead_share_a_multiprocessor(op, channels, programs):
    for arch in (80, 90, 100, 120):
        its = launch.default(f"{op}_backward", channels, 2**14, arch)
        assert its.prefetch and its.loads == {"EARLY": False, "STAGES": 2}
        assert programs * 32 * its.num_warps * its.max_registers <= 65536
        alone = its.unsummed()
        assert not alone.prefetch and alone.program_rows == its.rows
        for odd in (
            launch.default(f"{op}_backward", channels, 2**14, arch, False),
            launch.default(f"{op}_backward", channels + 1, 2**14, arch),
            launch.default(f"{op}_backward", 8192, 2**14, arch),
        ):
            assert not odd.prefetch and odd.loads["STAGES"] == 1


def test_a_backward_that_reads_rows_at_odd_addresses_has_more_registers():
    rows = torch.zeros(2, 3, 4112)
    for other in (rows[..., 1:4097], torch.zeros(2, 3, 4097)[..., :4096], rows[..., :4096]):
        its = triton._settings("adaln_backward", rows[..., :4096], other, None)
        assert its.num_warps == (16 if other.data_ptr() == rows.data_ptr() else 8)
    assert launch.default("adaln_backward", 4095, 6, 90).num_warps == 8


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("op", MODULATION)
@pytest.mark.parametrize("channels", [768, 1024, 1152, 4096, 8192])
def test_real_sizes(op, channels, dtype):
    for each in (True, False):
        check(op, call(op, 8, 256, channels, dtype=dtype, layouts=CHUNK, whole=(each,) * 3))


@pytest.mark.gpu
def test_more_than_2_to_the_31_elements():
    """The last image's rows, alone and at the end of a batch."""
    free, _ = torch.cuda.mem_get_info()
    shape = (9, 2**18, 1024)
    if free < 4 * 2 * 9 * 2**28:
        pytest.skip("needs 20 GiB of free GPU memory")
    x = torch.randn(shape, device=DEVICE, dtype=torch.bfloat16)
    shift, scale = torch.randn(2, 9, 1, 1024, device=DEVICE, dtype=torch.bfloat16)
    y = triton.adaln(x, shift, scale)
    assert y[8:].equal(triton.adaln(x[8:], shift[8:], scale[8:]))


@pytest.mark.gpu
@pytest.mark.parametrize("op", MODULATION)
def test_a_captured_graph_replays(op):
    arguments = call(op, 8, 256, 1152, dtype=torch.bfloat16, whole=(False,) * 3)
    inputs = {name: value.requires_grad_() for name, value in arguments.items()}
    weights = [torch.randn_like(arguments["x"]) for _ in tensors(getattr(triton, op)(**arguments))]

    def results():
        outputs = tensors(getattr(triton, op)(**inputs))
        return (*outputs, *torch.autograd.grad(outputs, list(inputs.values()), weights))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        results()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = results()
    with torch.no_grad():
        for value in inputs.values():
            value.copy_(torch.randn_like(value))
    graph.replay()
    assert all(a.equal(b) for a, b in zip(captured, results(), strict=True))
