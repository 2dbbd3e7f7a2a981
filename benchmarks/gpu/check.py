"""The parts of `make gpu-check`: every op and an image of each size against references; tests."""

import copy
import functools
import importlib.util
import itertools
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import cases
from benchmarks.gpu import image
from benchmarks.gpu.work import TAIL, Work
from benchmarks.results import ROOT
from ecar import ECARPipeline, sample
from ecar_kernels import registry, testing, use_backend

# Views with all optional arguments; contiguous and without them; a model's sizes: E-CAR-L's, whose
# width is no power of two and whose heads are 72 wide.
LAYOUTS = ("small views", "small plain", "E-CAR-L")
DTYPES = ("bfloat16", "float32", "float16")
KERNELS = tuple(name for name in registry.BACKENDS if name != "reference")


class Call(NamedTuple):
    """An op on one backend, its reference, and what makes their arguments."""

    name: str
    run: registry.BoundOp
    reference: registry.BoundOp
    given: Callable[[], dict[str, Any]]

    def once(self) -> None:
        """Forward and, where it has one, backward."""
        given = self.given()
        outputs = testing.tensors(self.run(**given))
        if self.run.op in testing.DIFFERENTIABLE:
            testing.run(self.run, given, None, [torch.randn_like(y) for y in outputs])


def calls(work: Work) -> Iterator[Call]:
    """Every op by every backend that serves it here; bfloat16 first, the model's sizes last."""
    for layout, dtype, op in itertools.product(
        LAYOUTS[:2] if work.dry else LAYOUTS, DTYPES, registry.OPS
    ):
        size = "-" if op in cases.WIDTHLESS else "L"
        case = cases.Case(op, 256, 2, size, whole=True, dtype=dtype)
        given = functools.partial(_given, work, case, layout)
        reference, *kernels = cases.backends(case, work.device).values()
        for run in kernels:
            yield Call(f"{op} {run.backend} {dtype} {layout}", run, reference, given)


def _given(work: Work, case: cases.Case, layout: str) -> dict[str, Any]:
    if layout == "E-CAR-L":
        return cases.inputs(case, work.device)
    with work.device:  # made there: a view's copy would be contiguous
        found = testing.arguments(case.op, dtype=case.numbers, optional=layout == "small views")
    if layout == "small views":
        return found
    return {k: v.contiguous() if isinstance(v, Tensor) else v for k, v in found.items()}


def warm_items(work: Work) -> Iterator[tuple[str, Callable[[], object]]]:
    return ((call.name, call.once) for call in calls(work))


def accuracy(work: Work) -> None:
    """Every op by every backend against its reference: float64's, on this device."""
    for call in calls(work):
        if work.begins(call.name, 1):
            given, op = (call.run, call.reference, call.given()), call.run.op
            gradients = op in testing.DIFFERENTIABLE
            judged = functools.partial(testing.judge, *given, gradients=gradients)
            _judge(work, call.name, judged, {"op": op, "served": call.run.backend})


def _judge(work: Work, name: str, judged: Callable[[], list], row: dict[str, Any]) -> None:
    """A row of what failed, or came nearest to it; an error is a row, too, and the others go on."""
    try:
        worst = max(judged(), key=lambda v: (not v.ok, v.found / max(v.allowed, 1e-300)))
        row |= {"what": worst.what, "found": worst.found, "allowed": worst.allowed}
        work.add(name, str(worst), ok=worst.ok, **row)
    except Exception as error:
        said = f"{type(error).__name__}: {str(error)[:TAIL]}"
        work.add(name, said.splitlines()[0], ok=False, output=said, **row)


def images(work: Work) -> None:
    """One image of each size, by the same rule: accelerated, with graphs, in each dtype, against
    the references on the device, and float64's on the CPU."""
    given = {"class_labels": torch.tensor([3]), "seeds": torch.tensor([7]), "tf32": False}
    for size in "S" if work.dry else "SBL":
        name = f"E-CAR-{size}, the CPU's"
        if not work.begins(name, 10):
            continue
        model = image.pipeline(work, image.Row(size, 1, "float32", "plain")).model
        draw = functools.partial(sample, **given, steps=[2] * model.config.num_stages)
        with use_backend("reference"):
            exact = draw(copy.deepcopy(model).cpu().double()).latents
        work.add(name, "float64, references")
        for numbers in DTYPES[:2]:
            name, row = f"E-CAR-{size} {numbers}", {}
            if work.begins(name, 5):
                its = copy.deepcopy(model).to(getattr(torch, numbers))
                pipe = ECARPipeline(its, accelerate=True)
                _judge(work, name, functools.partial(_drawn, work, pipe, draw, exact, row), row)


def _drawn(
    work: Work, pipe: ECARPipeline, draw: Callable, exact: Tensor, row: dict[str, Any]
) -> list[testing.Verdict]:
    with use_backend("reference"):
        usual = draw(pipe.model, graphs=False).latents
    pipe._accelerate()
    output = draw(pipe.model, graphs=not work.dry)
    row |= {"graph": output.why_not_graph is None, "served": output.served}
    # The state is float32, whatever the network's dtype.
    return testing.verdicts([output.latents.cpu()], [usual.cpu()], [exact], pipe.dtype)


def tests(work: Work) -> None:
    """A row for each suite; what pytest prints names each test as it ends."""
    names = [name for name in ("pytest", "hypothesis") if importlib.util.find_spec(name) is None]
    pytest = [sys.executable, "-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider"]
    pytest += ["-n", "8"] if importlib.util.find_spec("xdist") else []
    for suite, chosen in suites().items():
        if names:
            work.add(suite, skipped=f"not installed here: {', '.join(names)}")
        elif work.begins(suite, 10):
            work.run(suite, [*pytest, *chosen], PYTEST_ADDOPTS="")


def suites() -> dict[str, list[str]]:
    """pytest's arguments; only files with a test for GPUs or for every kernel: others may need what
    is not here. The kernels first, but for the sampler as it is used, in case a run is cut off."""

    def files(folder: str, mark: str) -> list[str]:
        found = [f for f in ROOT.glob(f"{folder}/test_*.py") if mark in f.read_text("utf-8")]
        names = [str(file.relative_to(ROOT)) for file in found]
        return sorted(
            names, key=lambda name: ("graph_gpu" not in name, "kernels" not in name, name)
        )

    every_kernel = files("tests/ecar_kernels", "tests.support.backends")
    return {
        "marked gpu": ["-m", "gpu", *files("tests/**", "mark.gpu")],
        "Triton's kernels, compiled": ["-k", "triton", "tests/ecar_kernels/triton", *every_kernel],
    }
