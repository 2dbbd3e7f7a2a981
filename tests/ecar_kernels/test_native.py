"""The C++ library: opcheck, compiled graphs, threads, instruction sets, and being absent."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ecar_kernels
from ecar_kernels import _native, registry, use_backend
from ecar_kernels.registry import KERNEL_DTYPES, OPS
from tests import fuzz
from tests.support.accuracy import assert_accurate, run, tensors
from tests.support.native import needs_native
from tests.support.ops import DIFFERENTIABLE, INFERENCE_ONLY, arguments, function

ROOT = Path(__file__).parent.parent.parent
ELEMENTWISE = tuple(
    op
    for op in OPS
    if (its := registry.RECORDS[op].backends.get("cpp")) is not None
    and not its.prepare  # no product
    and op not in ("stage_attention", *INFERENCE_ONLY)
)
SETS = ("amx", "avx512", "avx2", "baseline")


def samples(op):
    """Arguments of the C++ op of this name, in the layouts that users have."""
    b, n, c = 2, 5, 9

    def normal(*shape):
        return torch.randn(*shape)

    packed = normal(b, n, 6 * c).chunk(6, -1)
    row, one, each = normal(b, 1, c), normal(1, 1, c), normal(b, 1, c)
    x, y = normal(n, b, c).transpose(0, 1), normal(b, n, c)
    image, velocity = normal(b, 3, 4, 5), normal(2 * b, 3, 4, 5)
    details = normal(b, 3, 3, 4, 5)
    previous, data = normal(3, b, 4, 5).transpose(0, 1), (each[0, 0, 0],) * 3
    histories = [(), (previous,), (previous, *data), (None, None, data[0])]
    return {
        "adaln": [(x, packed[0], row, None, one, 1e-6), (y, row, packed[1], each, None, 1e-5)],
        "gated_residual": [(x, y, packed[2], None), (y, packed[0], row, one)],
        "gated_residual_adaln": [
            (x, y, packed[0], row, packed[1], None, one, each, 1e-6),
            (y, packed[3], row, packed[1], row, one, None, None, 1e-6),
        ],
        "adaln_backward": [
            (y, x, packed[0], one, 1e-6, True, True),
            (x, y, row, None, 1e-6, False, False),
        ],
        "gated_residual_backward": [
            (y, x, packed[0], None, True, True),
            (y, x, row, one, False, False),
        ],
        "gated_residual_adaln_backward": [
            (x, y, packed[0], packed[1], row, packed[2], one, None, 1e-6, True, True, True),
            (x, y, y, packed[1], row, row, None, each, 1e-6, False, False, False),
        ],
        "euler_step": [
            *((image, velocity, 0.1, 1.5, 0.7, *history) for history in histories),
            (image.transpose(0, 1), image.transpose(0, 1), 0.1, 1.0, 0.0),
        ],
        "upsample_renoise_euler_seeds": [
            (image, velocity, 0.1, 1.5, 0.7, 0.5, 2, torch.tensor([1, -7]), *history)
            for history in histories
        ],
        "upsample_renoise_euler_seeds_out": [
            (
                image,
                velocity,
                0.1,
                1.5,
                0.5,
                2,
                torch.tensor([1, -7]),
                torch.empty(2, 3, 4, 5),
                torch.empty(2, 3, 8, 10),
            )
        ],
        "upsample_renoise_euler_details": [
            (image, image, 0.1, 1.0, 0.7, 0.5, details, *history) for history in histories
        ],
        "initial_noise": [(torch.tensor([3, -3]), 3, 4, 5, torch.float16)],
    }[op.removesuffix("_velocity")]


NAMES = (
    "adaln",
    "gated_residual",
    "gated_residual_adaln",
    "adaln_backward",
    "gated_residual_backward",
    "gated_residual_adaln_backward",
    "euler_step",
    "euler_step_velocity",
    "upsample_renoise_euler_seeds",
    "upsample_renoise_euler_seeds_velocity",
    "upsample_renoise_euler_seeds_out",
    "upsample_renoise_euler_details",
    "upsample_renoise_euler_details_velocity",
    "initial_noise",
)


@needs_native
@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name):
    """Schema (nothing mutated, nothing aliased), fake against real, tracing."""
    for op in ELEMENTWISE:
        registry.IMPLEMENTATIONS[op]["cpp"].loaded  # noqa: B018 (its fakes)
    for call in samples(name):
        torch.library.opcheck(getattr(torch.ops.ecar, name).default, call)


@pytest.fixture
def fresh_graphs():
    torch._dynamo.reset()


@needs_native
@pytest.mark.parametrize("op", ELEMENTWISE)
@torch.no_grad()
def test_inductor_equals_eager(op, fresh_graphs):
    """Bit for bit: the same op runs in both."""
    for optional in (True, False):
        call = arguments(op, optional=optional)
        with use_backend("cpp"):
            compiled = tensors(torch.compile(function(op), fullgraph=True)(**call))
            for result, eager in zip(compiled, tensors(function(op)(**call)), strict=True):
                torch.testing.assert_close(result, eager, rtol=1e-6, atol=1e-6)


@needs_native
@pytest.mark.parametrize("op", [op for op in ELEMENTWISE if op in DIFFERENTIABLE])
def test_inductor_gradients_by_the_accuracy_rule(op, fresh_graphs):
    compiled = torch.compile(function(op), fullgraph=True)
    reference = registry.resolve(op, device="cpu", dtype=torch.float32, backend="reference")
    with use_backend("cpp"):
        weights = [torch.randn_like(y) for y in tensors(function(op)(**arguments(op)))]
        call = arguments(op)
        for ours, eager in zip(
            run(compiled, call, None, weights), run(function(op), call, None, weights), strict=True
        ):
            torch.testing.assert_close(ours, eager, rtol=1e-6, atol=1e-6)
    assert_accurate(function(op), reference, call, gradients=True)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@needs_native
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_any_number_of_threads_gives_the_same_bits(dtype, threads):
    x, branch, gate, shift, scale = torch.randn(5, 5, 70, 200).to(dtype)
    row, one = torch.randn(5, 1, 200).to(dtype), torch.randn(1, 1, 200).to(dtype)
    state, velocity = torch.randn(5, 4, 48, 48).to(dtype), torch.randn(10, 4, 48, 48).to(dtype)
    seeds = torch.arange(5)
    step = {"x": state, "velocity": velocity, "dt": 0.1, "guidance_scale": 2.0}
    step |= {"previous": torch.randn_like(state), "ratio": 0.7, "return_velocity": True}
    calls = {
        "adaln": {"x": x, "shift": row, "scale": scale, "step_shift": one, "step_scale": one},
        "gated_residual": {"x": x, "branch": branch, "gate": row, "step_gate": one},
        "gated_residual_adaln": {
            "x": x,
            "branch": branch,
            "gate": gate,
            "shift": shift,
            "scale": row,
            "step_gate": row,
            "step_scale": one,
        },
        "euler_step": step,
        "upsample_renoise_euler": step | {"time": 0.5, "stage": 2, "seeds": seeds},
        "initial_noise": {"seeds": seeds, "shape": (4, 48, 48), "device": "cpu", "dtype": dtype},
    }
    assert set(calls) == set(ELEMENTWISE)
    for op, call in calls.items():
        results = {}
        with use_backend("cpp"):
            weights = (
                None
                if op == "initial_noise"
                else [torch.randn_like(y) for y in tensors(function(op)(**call))]
            )
            for count in (1, 2, 3, 5):
                threads(count)
                results[count] = run(function(op), call, None, weights)
        for count, others in results.items():
            for result, other in zip(results[1], others, strict=True):
                assert result.equal(other), (op, count)


@needs_native
@given(
    st.sampled_from([op for op in ELEMENTWISE if op in DIFFERENTIABLE]),
    st.integers(1, 4),
    st.integers(0, 2**32),
)
def test_an_image_does_not_depend_on_its_batch(op, batch, seed):
    torch.manual_seed(seed)
    call = arguments(op, batch=batch, optional=False)
    with use_backend("cpp"):
        whole = tensors(function(op)(**call))
        for image in range(batch):
            rows = [image, batch + image]
            alone = {
                name: value
                if not isinstance(value, torch.Tensor)
                else value[rows if len(value) == 2 * batch else [image]]
                for name, value in call.items()
            }
            for part, every in zip(tensors(function(op)(**alone)), whole, strict=True):
                assert part[0].equal(every[image])


@needs_native
@pytest.mark.parametrize("channels", [768, 767])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_outputs_too_large_for_a_cache_have_the_same_bits(dtype, channels):
    """They are written past the caches, rows aligned or not; those of one image are not."""
    images, count = 8, (36 << 20) // (channels * dtype.itemsize)
    given = torch.randn(6, images, count // images, channels).to(dtype)
    x, branch, gate, shift, scale, gradient = given
    calls = {
        "adaln": (x, shift, scale),
        "gated_residual": (x, branch, gate),
        "gated_residual_adaln": (x, branch, gate, shift, scale),
    }

    def results(op, call, gradient):
        call = [value.detach().requires_grad_() for value in call]
        outputs = tensors(function(op)(*call))
        return *outputs, *torch.autograd.grad(outputs, call, [gradient] * len(outputs))

    with use_backend("cpp"):
        for op, call in calls.items():
            whole = results(op, call, gradient)
            for one in (0, images - 1):
                part = slice(one, one + 1)
                alone = results(op, [value[part] for value in call], gradient[part])
                assert all(a.equal(b[part]) for a, b in zip(alone, whole, strict=True)), op
        state, velocity = x.unflatten(1, (-1, 1)), branch.unflatten(1, (-1, 1))
        step, previous = function("euler_step"), gate.unflatten(1, (-1, 1))
        whole = step(state, velocity, 0.1)
        assert step(state[:1], velocity[:1], 0.1)[0].equal(whole[0])
        history = {"ratio": 0.7, "return_velocity": True}
        whole = step(state, velocity, 0.1, previous=previous, **history)
        part = step(state[:1], velocity[:1], 0.1, previous=previous[:1], **history)
        assert all(a[0].equal(b[0]) for a, b in zip(part, whole, strict=True))


@needs_native
@pytest.mark.slow
@pytest.mark.parametrize("isa", SETS[1:])
def test_lesser_instruction_sets(isa):
    """The families' own tests again, in a process that may not use more."""
    if SETS.index(_native.instruction_set()) > SETS.index(isa):
        pytest.skip(f"this CPU has no {isa}")
    files = [
        f"tests/ecar_kernels/test_{name}.py"
        for name in ("adaln", "flow_step", "flow_boundary", "flow_block_whole")
    ]
    code = (
        "import sys, pytest; from ecar_kernels import _native; "
        f"assert _native.instruction_set() == {isa!r}; "
        "options = ['-q', '-k', 'not triton', '-p', 'no:xdist', '-p', 'no:cacheprovider']; "
        f"sys.exit(pytest.main([*options, *{files}]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"ECAR_CPU_ISA": isa, "OMP_NUM_THREADS": "1", "PYTEST_ADDOPTS": ""},
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


@needs_native
def test_an_unknown_instruction_set_changes_nothing():
    code = "from ecar_kernels import _native; print(_native.instruction_set())"
    found = [
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env=os.environ | {"ECAR_CPU_ISA": isa},
        ).stdout
        for isa in ("", "sse9")
    ]
    assert found[0] == found[1] != ""


@needs_native
def test_a_wrong_call_of_the_op_itself_is_refused():
    """Behind the public functions: nothing that reaches a kernel is trusted."""
    registry.IMPLEMENTATIONS["adaln"]["cpp"].loaded  # noqa: B018
    x, row = torch.randn(2, 3, 8), torch.randn(2, 1, 8)
    wrong = [
        ((x, row[:1], row, None, None, 1e-6), r"argument 'shift': expected \[2, 1, 8\], got "),
        ((x, row, x[:, :2], None, None, 1e-6), r"argument 'scale': expected \[2, 3, 8\], got "),
        ((x, row, row, x, None, 1e-6), r"argument 'step_shift': expected "),
        ((x[0], row, row, None, None, 1e-6), "argument 'x': expected 3 dimensions"),
        ((x.double(), row, row, None, None, 1e-6), "argument 'x': expected float32, bfloat16"),
        ((x, row.half(), row, None, None, 1e-6), "argument 'shift': expected the first arg"),
        ((x.transpose(1, 2), x, x, None, None, 1e-6), "argument 'x': expected a contiguous last"),
    ]
    for call, message in wrong:
        with pytest.raises(RuntimeError, match=message):
            torch.ops.ecar.adaln(*call)


def test_random_calls_of_every_op(seed, capsys):
    """A few of `make fuzz`'s."""
    failed = fuzz.main(["--cases", "900", "--seed", str(seed)])
    assert not failed, capsys.readouterr().out


@pytest.mark.parametrize("op", ["adaln", "adaln_linear", "flow_boundary", "stage_attention"])
def test_a_hundred_thousandth_too_much_is_found_among_random_calls(op, monkeypatch, capsys):
    right = getattr(ecar_kernels, op)

    def wrong(*args, **kwargs):
        result = right(*args, **kwargs)
        return (
            result * (1 + 1e-5)
            if isinstance(result, torch.Tensor)
            else tuple(y * (1 + 1e-5) for y in result)
        )

    monkeypatch.setattr(ecar_kernels, op, wrong)
    assert fuzz.main(["--cases", "400", "--seed", "5"]) == 1
    said = capsys.readouterr().out
    assert f": {op} valid" in said and "allowed" in said


class TestAbsence:
    """What is said where the library is not there or does not load."""

    @pytest.fixture
    def package(self, tmp_path, monkeypatch):
        monkeypatch.setattr(_native, "FOLDER", tmp_path)
        return tmp_path

    @staticmethod
    def why_not():
        return _native.why_not.__wrapped__()

    def test_never_built(self, package):
        assert self.why_not() == "the C++ library is not built: run pip install ."

    def test_could_not_be_built(self, package):
        (package / _native.WHY_NOT_BUILT).write_text("cmake was not found when ecar was installed")
        assert self.why_not() == (
            "the C++ library is not built: cmake was not found when ecar was installed"
        )

    def test_does_not_load(self, package):
        (package / _native.NAMES[0]).write_bytes(b"not a library" * 1000)
        assert self.why_not().startswith("the C++ library does not load: ")
        assert "invalid ELF header" in self.why_not() or sys.platform != "linux"

    def test_the_reference_serves_without_it(self):
        code = """if True:
            from pathlib import Path
            from ecar_kernels import _native
            _native.FOLDER = Path("/nonexistent")
            import torch, ecar_kernels as ek
            from ecar_kernels.__main__ import main
            x = torch.randn(1, 2, 4)
            assert ek.resolve("adaln", device="cpu", dtype=x.dtype).backend == "reference"
            try:
                with ek.use_backend("cpp"):
                    ek.adaln(x, x, x)
            except ek.BackendUnavailableError as error:
                print(error)
            main()
        """
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT
        )
        assert done.returncode == 0, done.stderr
        said = "the C++ library is not built: run pip install ."
        lines = done.stdout.splitlines()
        assert lines[0] == f"backend 'cpp' cannot serve adaln: {said}"
        (row,) = [line for line in lines if line.split()[:1] == ["adaln"]]
        assert row.split()[1:3] == ["yes", "no"]  # by the reference, and by C++
        assert f"cpp is missing: {said}" in lines
