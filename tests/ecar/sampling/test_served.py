"""What `sample` says of how it drew: each op's backend, and a warning where kernels are missing.

The truth is what was called: every backend's function is replaced by one that notes its call, and
the C++ ops that a bound step calls directly are seen by a dispatch mode. A CUDA machine is here
its registry: the same backends for each op, of CPU tensors, computed by the reference.
"""

import functools
import warnings

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ecar import ECARPipeline
from ecar.model import ECAR
from ecar.sampling import graph, plain, sampler
from ecar.sampling.cpu import CpuEngine
from ecar_kernels import (
    FlowBlock,
    StageBlock,
    _native,
    _triton,
    accelerate,
    acceleration,
    registry,
    use_backend,
)
from tests.support.modules import accelerated

from .support import TapeRecorder, draw

BLOCK = ("adaln_linear", "linear_gated_residual")
STEP = ("euler_step", "flow_boundary", "initial_noise", "upsample_renoise_euler")


def backends(attention, block, step):
    return {"stage_attention": attention} | dict.fromkeys(BLOCK, block) | dict.fromkeys(STEP, step)


PLAIN = ("reference",)
MACHINES = {  # the backends of each op, best first
    "cpu": backends(*[("cpp", "reference")] * 3),
    "cpu without C++": backends(PLAIN, PLAIN, PLAIN),
    "cuda": backends(
        ("triton", "sdpa", "reference"), ("triton", "reference"), ("cuda", "reference")
    ),
    "cuda without its half": backends(
        ("triton", "sdpa", "reference"), ("triton", "reference"), PLAIN
    ),
    "cuda without Triton": backends(("sdpa", "reference"), PLAIN, ("cuda", "reference")),
}
DIRECT = {  # what the C++ ops of whole blocks and a bound step are
    "ecar::flow_block_": ("stage_attention", *BLOCK),
    "ecar::stage_block_": ("stage_attention", *BLOCK),
    "ecar::flow_boundary_out": ("flow_boundary",),
    "ecar::upsample_renoise_euler_seeds_out": ("upsample_renoise_euler",),
}


class Calls(TorchDispatchMode):
    """(op, backend) of every call, of a machine's backends that were put in the registry."""

    def __init__(self, machine, monkeypatch):
        super().__init__()
        self.machine, self.found = machine, set()
        for op, names in MACHINES[machine].items():
            own = {}
            for name in names:
                known = registry.IMPLEMENTATIONS[op][name]
                computes = registry.IMPLEMENTATIONS[op][name if machine == "cpu" else "reference"]
                noting = self._noting(op, name, computes.function)
                own[name] = registry.Implementation(
                    known.target, max_width=known.max_width, width_step=known.width_step
                )
                own[name].function = noting
            monkeypatch.setitem(registry.IMPLEMENTATIONS, op, own)
        monkeypatch.setattr(registry, "_servers", {})

    def _noting(self, op, name, function):
        @functools.wraps(function)
        def noting(*args, **kwargs):
            self.found.add((op, name))
            return function(*args, **kwargs)

        return noting

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.found.update((op, "cpp") for op in DIRECT.get(function._schema.name, ()))
        return function(*args, **(kwargs or {}))

    def of(self, run):
        """What `run` calls, as `served` has it, and what it returns."""
        self.found.clear()
        with self:
            output = run()
        return {
            op: ", ".join(sorted(name for of, name in self.found if of == op))
            for op, _ in self.found
        }, output


@pytest.fixture
def calls(request, monkeypatch):
    if request.param == "cpu" and _native.why_not() is not None:
        pytest.skip(_native.why_not())
    acceleration._bound.cache_clear()
    yield Calls(request.param, monkeypatch)
    acceleration._bound.cache_clear()


on_every_machine = pytest.mark.parametrize("calls", MACHINES, indirect=True)


def replace_a_block(model):
    class Mine(StageBlock):
        def forward(self, x, *arguments):
            return super().forward(x, *arguments) + 1

    model.ar.blocks[1].__class__ = Mine


def replace_a_method(model):
    block = model.heads[1].blocks[0]
    block.infer = functools.partial(FlowBlock.infer, block)


CHANGES = {
    "plain": lambda model: None,
    "accelerated": accelerate,
    "in part": lambda model: accelerated(model.ar),
    "the AR by the reference": lambda model: accelerated(model.ar, backend="reference"),
    "a head by the reference": lambda model: accelerated(model.heads[0], backend="reference"),
}


@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize(
    "calls, backend",
    [
        *((machine, backend) for machine in MACHINES for backend in ("auto", "reference")),
        ("cpu", "cpp"),
    ],
    indirect=["calls"],
)
@pytest.mark.parametrize("change", CHANGES)
def test_served_is_what_was_called(model, calls, change, backend, solver):
    with use_backend(backend):
        CHANGES[change](model)
        for steps in ([1, 1], [3, 2]):
            truth, output = calls.of(
                lambda steps=steps: draw(model, steps=steps, solver=solver, guidance_scale=2.0)
            )
            assert output.served == truth


@on_every_machine
def test_an_accelerated_model_on_each_machine(model, calls):
    """As a reader expects it, not from what was called."""
    served = draw(accelerated(model)).served
    attention, block, step = {
        "cpu": ("cpp",) * 3,
        "cpu without C++": PLAIN * 3,
        "cuda": ("triton", "triton", "cuda"),
        "cuda without its half": ("triton", "triton", "reference"),
        "cuda without Triton": ("sdpa", "reference", "cuda"),
    }[calls.machine]
    expected = backends(attention, block, step)
    # Every step ends in a boundary, but by the reference, where it costs more than its parts.
    del expected["flow_boundary" if step == "reference" else "euler_step"]
    assert served == expected


@on_every_machine
@pytest.mark.parametrize("change", [replace_a_block, replace_a_method])
def test_what_a_user_put_in_its_place_is_seen_too(model, calls, change):
    change(model)
    truth, output = calls.of(lambda: draw(model))
    assert output.served == truth


@pytest.fixture
def tape(monkeypatch):
    monkeypatch.setattr(graph, "device_reason", lambda device: None)
    monkeypatch.setattr(graph, "CudaRecorder", TapeRecorder)
    monkeypatch.setattr(plain, "boundary_op", lambda *settings: None)
    monkeypatch.setattr(CpuEngine, "serves", lambda *settings: False)


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_a_replayed_graph_is_served_as_its_capture(model, tape, solver):
    accelerate(model)
    first, second = (draw(model, seeds=seeds, solver=solver) for seeds in ((1, 2, 3), (4, 5, 6)))
    assert first.why_not_graph is None and second.why_not_graph is None
    plain = draw(model, solver=solver, graphs=False)
    assert first.served == second.served == plain.served
    first.served.clear()  # the caller's own
    assert draw(model, solver=solver).served == plain.served


def test_the_pipeline_tells_it(model):
    pipeline = ECARPipeline(model)
    given = {"solver": "ab2", "grid": 1.5}
    found = pipeline([3], 4, seeds=1, output_type="latent", progress=False, **given)
    assert found.served == draw(model, (3,), (1,), steps=4, **given).served
    assert "need a CUDA device" in found.why_not_graph


class TestWarning:
    @pytest.fixture
    def warned(self, model, monkeypatch):
        """`sample` as on a CUDA device, its graph apart; returns what it warned of."""
        monkeypatch.setattr(sampler, "_said", set())
        monkeypatch.setattr(ECAR, "device", torch.device("cuda"))
        monkeypatch.setattr(graph, "device_reason", lambda device: None)
        monkeypatch.setattr(
            graph.GraphCache,
            "draw",
            lambda self, *given, **options: ([torch.zeros(3, 1, 8, 8)], {}),
        )

        def draw_where(cuda, triton=None):
            monkeypatch.setattr(_native, "why_not_cuda", lambda: cuda)
            monkeypatch.setattr(_triton, "why_not", lambda: triton)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                draw(model)
            assert all(w.category is RuntimeWarning for w in caught)
            return [str(w.message) for w in caught]

        return draw_where

    def test_once_for_each_reason(self, warned):
        (said,) = warned("the CUDA C++ library is not built: no nvcc")
        assert (
            "samples on cuda without the CUDA half of the C++ library: the CUDA C++ library "
            "is not built: no nvcc. " in said
        )
        assert "the noise" in said and "slower" in said
        assert not warned("the CUDA C++ library is not built: no nvcc")
        assert len(warned("the CUDA C++ library does not load: undefined symbol")) == 1
        (said,) = warned(None, "triton is not installed")
        assert "without Triton: triton is not installed. " in said

    def test_none_where_nothing_is_missing_or_a_backend_was_named(self, warned):
        assert not warned(None)
        with use_backend("reference"):
            assert not warned("not built")
        assert warned("not built")

    def test_none_on_the_cpu(self, model, monkeypatch):
        monkeypatch.setattr(sampler, "_said", set())
        monkeypatch.setattr(_native, "why_not_cuda", lambda: "not built")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            draw(model)
