"""Every op at the stages of E-CAR-S/B/L against PyTorch and other kernels, bfloat16.

Inputs of each repeat are other tensors, together larger than the last-level cache where 256 sets
are enough. Attention has peers of its own: scaled_dot_product_attention's backends and
flash-attn on what the sampler asks for (the newest stage's queries over all keys, no mask), and
FlexAttention, xformers and masked SDPA on what training asks for (all stages at once).
"""

import importlib.util
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import cases
from benchmarks.gpu.timing import Timer, interleave
from benchmarks.gpu.work import Work
from ecar_kernels.costs import Rates, cost, floor_seconds
from ecar_kernels.registry import OPS, BackendUnavailableError, resolve

DTYPE = torch.bfloat16
MAX_SETS = 256
SDPA = {"flash": SDPBackend.FLASH_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION,
        "cudnn": SDPBackend.CUDNN_ATTENTION, "math": SDPBackend.MATH}


class Arena(cases.Arena):
    """Random numbers on the device that inputs are cut from."""

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device) -> None:
        self.values = torch.randn(size // dtype.itemsize, device=device).to(dtype)
        self.weights = self.values * cases.WEIGHT_SCALE
        self.place = 0


def run(work: Work) -> None:
    """Rows {op, size, tokens, batch, variants}: first without, then with compiled variants."""
    arena = Arena(2**22 if work.dry else 2**30, DTYPE, work.device)
    with torch.no_grad():
        for case in _cases(work):
            if work.left < 3:
                return
            _measure(work, case, arena, {**_ours(work, case), **_peers(case)}, "eager")
        for batch in (1,) if work.dry else (1, 32):
            _training(work, arena, batch)
        for case in _cases(work)[: 1 if work.dry else None]:
            if case.batch > 1 or work.left < 10:
                continue
            torch._dynamo.reset()
            reference = resolve(case.op, device=work.device, dtype=DTYPE, backend="reference")
            compiled = torch.compile(reference, fullgraph=True, dynamic=False)
            ours = list(_ours(work, case).items())[-1:]
            _measure(work, case, arena, {"torch.compile": compiled, **dict(ours)}, "compiled")


def _cases(work: Work) -> list[cases.Case]:
    if work.dry:
        return [cases.Case(op, 16, 1, "-" if op in cases.WIDTHLESS else "S")
                for op in OPS]
    found = cases.select(forward=(1, 8), ops=OPS)
    return sorted(found, key=lambda case: (case.batch, "-SLB".index(case.size), -case.tokens))


def _ours(work: Work, case: cases.Case) -> dict[str, Callable]:
    """The op by backend, the reference first and what "auto" takes last."""
    found = {}
    width = 0 if case.size == "-" else case.width
    if case.op == "stage_attention":
        width = case.width // case.heads
    for name in ("reference", "native", "triton"):
        try:
            found[name] = resolve(case.op, device=work.device, dtype=DTYPE, width=width,
                                  backend=name)
        except BackendUnavailableError:
            continue
    return found


def _inputs(case: cases.Case, arena: Arena, device: torch.device, cache: int
            ) -> Iterator[dict[str, Any]]:
    size, sets = 0, 0
    while sets < 2 or (size < 3 * cache and sets < MAX_SETS):
        given = {name: value.to(device) if isinstance(value, Tensor) else value
                 for name, value in cases.inputs(case, arena).items()}
        if "device" in given:
            given["device"] = device
        yield given
        sets += 1
        size += sum(value.numel() * value.element_size() for value in given.values()
                    if isinstance(value, Tensor))


def _measure(work: Work, case: cases.Case, arena: Arena, variants: dict[str, Callable],
             group: str) -> None:
    sets = list(_inputs(case, arena, work.device, work.cache_bytes))
    timers, failed = {}, {}
    for name, function in variants.items():
        try:
            timers[name] = Timer([lambda f=function, a=given: f(**a) for given in sets])
        except Exception as error:  # a peer that does not serve the case is a row that says so
            failed[name] = (str(error).splitlines() or [type(error).__name__])[0][:200]
    row: dict[str, Any] = {"op": case.op, "size": case.size, "tokens": case.tokens,
                           "batch": case.batch, "group": group, "sets": len(sets)}
    if timers:
        row["variants"] = interleave(timers, work.span(0.05))
    least = cost(case.op, sets[0], resolve(
        case.op, device=work.device, dtype=DTYPE, backend="reference")(**sets[0]))
    row |= {"failed": failed, "bytes": least.bytes, "multiply_adds": least.multiply_adds}
    if {"copy", "bfloat16"} <= work.rates.keys():
        row["floor"] = floor_seconds(least, Rates(work.rates["copy"], work.rates["bfloat16"]))
    work.add(**row)


def _peers(case: cases.Case) -> dict[str, Callable]:
    """What others have for the newest stage's queries over all keys so far."""
    if case.op != "stage_attention":
        return {}

    def dense(backend: SDPBackend) -> Callable:
        def call(q: Tensor, k: Tensor, v: Tensor, stage_lengths: tuple[int, ...]) -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))
        return call

    found = {f"SDPA {name}": dense(backend) for name, backend in SDPA.items()}
    if importlib.util.find_spec("flash_attn") is not None:
        from flash_attn import flash_attn_func
        found["flash-attn"] = lambda q, k, v, stage_lengths: flash_attn_func(q, k, v)
    if importlib.util.find_spec("xformers") is not None:
        from xformers.ops import memory_efficient_attention
        found["xformers"] = lambda q, k, v, stage_lengths: memory_efficient_attention(q, k, v)
    return found


def _training(work: Work, arena: Arena, batch: int) -> None:
    """All stages at once: ours, masked SDPA, and FlexAttention with the stages' mask."""
    stages = (4, 16) if work.dry else cases.STAGES
    n = sum(stages)
    of = torch.repeat_interleave(torch.arange(len(stages)), torch.tensor(stages)).to(work.device)
    mask = of[:, None] >= of[None, :]
    for size in ("S",) if work.dry else ("S", "B", "L"):
        if work.left < 8:
            return
        case = cases.Case("stage_attention", stages[-1], batch, size)
        variants = {
            name: lambda q, k, v, f=function: f(q, k, v, stages)
            for name, function in _ours(work, case).items()
        }
        variants["SDPA with a mask"] = lambda q, k, v: F.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask)
        if not work.dry:
            variants["FlexAttention"] = _flex(of, n, work.device)
        heads, dim = case.heads, case.width // case.heads
        size_of_set = 3 * batch * n * case.width * DTYPE.itemsize
        count = min(MAX_SETS, max(2, math.ceil(3 * work.cache_bytes / size_of_set)))
        sets = [[arena.take(batch, n, heads, dim) for _ in range(3)] for _ in range(count)]
        timers, failed = {}, {}
        for name, function in variants.items():
            try:
                timers[name] = Timer([lambda f=function, a=given: f(*a) for given in sets])
            except Exception as error:
                failed[name] = (str(error).splitlines() or [type(error).__name__])[0][:200]
        work.add(op="stage_attention, all stages", size=size, tokens=n, batch=batch,
                 group="training forward", sets=count, failed=failed,
                 variants=interleave(timers, work.span(0.05)))


def _flex(of: Tensor, n: int, device: torch.device) -> Callable:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch._dynamo.reset()
    block_mask = create_block_mask(lambda b, h, q, k: of[q] >= of[k], None, None, n, n,
                                   device=device.type)
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: compiled(*(x.transpose(1, 2) for x in (q, k, v)),
                                    block_mask=block_mask)
