"""Every op on every backend here, forward and backward, over dtypes and layouts.

python -m benchmarks.gpu.calls cuda     # each once, on small tensors: for the sanitizers
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks import cases
from ecar_kernels.registry import KERNEL_DTYPES, OPS, BackendUnavailableError, resolve
from ecar_kernels.testing import DIFFERENTIABLE, arguments, run

# Small views with all optional arguments; small, contiguous and without them; a model's sizes:
# E-CAR-L's, whose width is no power of two and whose heads are 72 wide.
SMALL = ("views", "plain")
LAYOUTS = (*SMALL, "E-CAR-L")
BACKENDS = ("native", "triton")


@dataclass(frozen=True)
class Call:
    """An op on one backend, and what makes its arguments."""

    op: str
    backend: str
    dtype: torch.dtype
    layout: str
    function: Callable
    given: Callable[[], dict[str, Any]]

    @property
    def name(self) -> str:
        return f"{self.op} {self.backend} {str(self.dtype).removeprefix('torch.')} {self.layout}"

    @property
    def gradients(self) -> bool:
        return self.op in DIFFERENTIABLE

    def once(self) -> None:
        given = self.given()
        if not self.gradients:
            with torch.no_grad():
                self.function(**given)
            return
        with torch.no_grad():
            weights = [torch.randn_like(y) for y in run(self.function, given)]
        run(self.function, given, None, weights)


def calls(
    device: torch.device | str,
    layouts: Sequence[str] = LAYOUTS,
    dtypes: Sequence[torch.dtype] = KERNEL_DTYPES,
) -> Iterator[Call]:
    """Those that a backend serves here; bfloat16 first, the model's layout last."""
    for layout in layouts:
        for dtype in sorted(dtypes, key=lambda dtype: dtype is not torch.bfloat16):
            for op in OPS:

                def given(
                    op: str = op, dtype: torch.dtype = dtype, layout: str = layout
                ) -> dict[str, Any]:
                    return _given(op, device, dtype, layout)

                width = _width(given()) if layout in SMALL else _model_width(op)
                for backend in BACKENDS:
                    try:
                        function = resolve(
                            op, device=device, dtype=dtype, width=width, backend=backend
                        )
                    except BackendUnavailableError:
                        continue
                    yield Call(op, backend, dtype, layout, function, given)


def _given(op: str, device: torch.device | str, dtype: torch.dtype, layout: str) -> dict[str, Any]:
    with torch.device(device):  # made there: a view's copy would be contiguous
        if layout in SMALL:
            found = arguments(op, dtype=dtype, optional=layout == "views")
            return (
                found
                if layout == "views"
                else {
                    name: value.contiguous() if isinstance(value, Tensor) else value
                    for name, value in found.items()
                }
            )
        widthless = op in cases.WIDTHLESS
        case = cases.Case(op, 256, 2, "-" if widthless else "L", whole=True)
        found = cases.inputs(case, cases.Arena(2**26, dtype))
    return found | {"device": torch.device(device).type} if "device" in found else found


def _width(given: dict[str, Any]) -> int:
    return next(
        (
            value.shape[-1]
            for value in given.values()
            if isinstance(value, Tensor) and value.is_floating_point()
        ),
        0,
    )


def _model_width(op: str) -> int:
    if op in cases.WIDTHLESS:
        return 0
    model = cases.MODELS["L"]
    return model.width // model.heads if op == "stage_attention" else model.width


def main(device: str) -> int:
    """Each call on small tensors once; prints how many there were."""
    count = 0
    for call in calls(device, SMALL, (torch.float32, torch.bfloat16)):
        call.once()
        count += 1
        print(call.name, flush=True)
    if device != "cpu":
        torch.cuda.synchronize()
    print(f"{count} calls")
    return 0 if count else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else "cuda"))
