"""Every op on small shapes, forward and backward: what the sanitizers watch.

    compute-sanitizer --tool memcheck python -m benchmarks.gpu.small cuda
"""

import sys
from typing import Any

import torch
from torch import Tensor

from ecar_kernels.registry import OPS, BackendUnavailableError, resolve
from tests.support.ops import DIFFERENTIABLE, arguments

DTYPES = (torch.float32, torch.bfloat16)


def main(device: str) -> int:
    """Run what the native and Triton backends serve; prints how many calls there were."""
    calls = 0
    for op in OPS:
        for dtype in DTYPES:
            given = {name: _on(value, device) for name, value in arguments(op, dtype=dtype).items()}
            if "device" in given:
                given["device"] = device
            width = next((value.shape[-1] for value in given.values()
                          if isinstance(value, Tensor) and value.is_floating_point()), 0)
            for backend in ("native", "triton"):
                try:
                    function = resolve(op, device=device, dtype=dtype, width=width,
                                       backend=backend)
                except BackendUnavailableError:
                    continue
                _call(function, given, backward=op in DIFFERENTIABLE)
                calls += 1
                print(f"{op} {backend} {dtype}", flush=True)
    if device != "cpu":
        torch.cuda.synchronize()
    print(f"{calls} calls")
    return 0 if calls else 1


def _on(value: Any, device: str) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def _call(function: Any, given: dict[str, Any], *, backward: bool) -> None:
    if not backward:
        with torch.no_grad():
            function(**given)
        return
    given = {name: value.detach().requires_grad_()
             if isinstance(value, Tensor) and value.is_floating_point() else value
             for name, value in given.items()}
    outputs = function(**given)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    torch.autograd.backward(outputs, [torch.randn_like(output) for output in outputs])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else "cuda"))
