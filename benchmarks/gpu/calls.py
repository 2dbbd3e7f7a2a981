"""Every op on every backend here, forward and backward, over dtypes and layouts.

python -m benchmarks.gpu.calls cuda     # each once, on small tensors: for the sanitizers
"""

import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks import cases
from ecar_kernels.registry import BACKENDS, KERNEL_DTYPES, OPS, BackendUnavailableError, resolve
from ecar_kernels.testing import DIFFERENTIABLE, arguments, run

# Small views with all optional arguments; small, contiguous and without them; a model's sizes:
# E-CAR-L's, whose width is no power of two and whose heads are 72 wide.
SMALL = ("views", "plain")
LAYOUTS = (*SMALL, "E-CAR-L")
KERNELS = tuple(name for name in BACKENDS if name != "reference")


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
        with torch.no_grad():
            outputs = self.function(**given) if not self.gradients else run(self.function, given)
        if self.gradients:
            run(self.function, given, None, [torch.randn_like(y) for y in outputs])


def calls(
    device: torch.device | str,
    layouts: Sequence[str] = LAYOUTS,
    dtypes: Sequence[torch.dtype] = KERNEL_DTYPES,
) -> Iterator[Call]:
    """Those that a backend serves here; bfloat16 first, the model's layout last."""
    for layout in layouts:
        for dtype in sorted(dtypes, key=lambda dtype: dtype is not torch.bfloat16):
            for op in OPS:
                given = functools.partial(_given, op, device, dtype, layout)
                width = _width(given()) if layout in SMALL else _case(op).op_width
                for backend in KERNELS:
                    try:
                        function = resolve(
                            op, device=device, dtype=dtype, width=width, backend=backend
                        )
                    except BackendUnavailableError:
                        continue
                    yield Call(op, backend, dtype, layout, function, given)


def _case(op: str) -> cases.Case:
    return cases.Case(op, 256, 2, "-" if op in cases.WIDTHLESS else "L", whole=True)


def _given(op: str, device: torch.device | str, dtype: torch.dtype, layout: str) -> dict[str, Any]:
    with torch.device(device):  # made there: a view's copy would be contiguous
        if layout == "views":
            return arguments(op, dtype=dtype)
        if layout == "plain":
            found = arguments(op, dtype=dtype, optional=False)
            return {k: v.contiguous() if isinstance(v, Tensor) else v for k, v in found.items()}
        found = cases.inputs(_case(op), cases.Arena(2**26, dtype))
    return found | {"device": torch.device(device).type} if "device" in found else found


def _width(given: dict[str, Any]) -> int:
    tensors = [v for v in given.values() if isinstance(v, Tensor) and v.is_floating_point()]
    return tensors[0].shape[-1] if tensors else 0


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
