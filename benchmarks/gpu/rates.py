"""What the device does: copies, matrix products by number format, launches in a graph."""

import torch

from benchmarks.gpu.timing import Timer, interleave
from benchmarks.gpu.work import Work

COPY_BYTES = 2**30
SIDE = 8192
LAUNCHES = 1000


def run(work: Work) -> None:
    """Rows {name, value, unit}: medians of what each kind of work reached."""
    size, side, count = (2**16, 64, 10) if work.dry else (COPY_BYTES, SIDE, LAUNCHES)
    work.add(name="copy", value=2 * size / _copy_seconds(work, size), unit="bytes/s")
    one = torch.zeros(1, device=work.device)
    timer = Timer([lambda: one.add_(1)] * count)
    launch = interleave({"launch": timer}, work.span(0.5))["launch"]
    work.add(name="launch", value=launch["median"], unit="s", how=timer.how)

    for name, dtype, tf32 in (
        ("bfloat16", torch.bfloat16, False),
        ("tf32", torch.float32, True),
        ("float32", torch.float32, False),
    ):
        torch.backends.cuda.matmul.fp32_precision = "tf32" if tf32 else "ieee"
        a, b = (torch.randn(side, side, device=work.device).to(dtype) for _ in range(2))
        timer = Timer([lambda a=a, b=b: a @ b])
        found = interleave({name: timer}, work.span(1.0))[name]
        work.add(name=name, value=side**3 / found["median"], unit="multiply-adds/s")


def _copy_seconds(work: Work, size: int) -> float:
    source = torch.randn(size // 4, device=work.device)
    target = torch.empty_like(source)
    timer = Timer([lambda: target.copy_(source)])
    return interleave({"copy": timer}, work.span(1.0))["copy"]["median"]
