"""Every Triton op through the real launch path of an H100: what it launches, and compiles when.

`CASES` has every op that the registry says Triton serves, and launches every kernel that there is.
"""

import contextlib
import importlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import triton
from torch import Tensor

import ecar_kernels
from ecar_kernels import registry, tuning
from tools.fake_gpu import FakeGPU
from tools.fake_triton import GRID_LIMITS, H100, Launch

FORMATS = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "tf32": torch.float32,
}
# (batch, tokens): one, odd, multiples of 16, and enough for larger tiles.
SIZES = ((1, 16), (2, 64), (1, 1), (3, 5), (1, 17), (2, 336), (16, 256))
WIDTH = 768


@dataclass(frozen=True)
class Call:
    """One call's shape and numbers; everything is on the device."""

    batch: int
    tokens: int
    dtype: torch.dtype
    number: float = 1.0  # of eps and scale
    device: str = "cuda"

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(*shape, dtype=self.dtype, device=self.device)

    def rows(self, count: int, width: int = WIDTH, *, odd: bool = False) -> tuple[Tensor, ...]:
        """Parts of one packed projection; odd: at addresses that are no multiples of 16."""
        packed = self.empty(self.batch, self.tokens, count * width + odd)
        return packed[..., odd:].chunk(count, -1)

    def steps(self, count: int, width: int = WIDTH) -> tuple[Tensor, ...]:
        return self.empty(1, 1, count * width).chunk(count, -1)


@dataclass(frozen=True)
class Case:
    """An op in one of its uses. run: makes arguments and calls it. launches: kernels, in order;
    `exact` those in float32, where they are others."""

    op: str
    use: str
    launches: tuple[str, ...]
    run: Callable[[Call], object]
    exact: tuple[str, ...] | None = None
    sizes: tuple[tuple[int, int], ...] = SIZES


def gradients(function: Callable, *inputs: Tensor) -> None:
    """Forward, then backward for every input."""
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    results = function(*inputs)
    results = results if isinstance(results, tuple) else (results,)
    torch.autograd.grad(results, inputs, [torch.empty_like(result) for result in results])


def attention(
    stages: Callable[[int], tuple[int, ...]],
    *,
    newest: int = 0,
    odd: bool = False,
    heads: int = 6,
    head_dim: int = 128,
    backward: bool = False,
    sign: float = 1,
) -> Callable:
    """stages: of a number of tokens; newest: how many of the last stages have queries, all if 0."""

    def run(call: Call) -> None:
        lengths = stages(call.tokens)
        tokens = sum(lengths)
        packed = replace(call, tokens=tokens).rows(3, heads * head_dim, odd=odd)
        q, k, v = (part.unflatten(-1, (heads, head_dim)) for part in packed)
        q = q[:, tokens - sum(lengths[-newest:]) :] if newest else q

        def op(q, k, v):
            return ecar_kernels.stage_attention(q, k, v, lengths, scale=sign * 0.1 * call.number)

        if backward:
            gradients(op, q, k, v)
        else:
            op(q, k, v)

    return run


def doubling(tokens: int) -> tuple[int, ...]:
    return (max(16, tokens // 16), max(16, tokens // 4), max(16, tokens))


def few_keys(tokens: int) -> tuple[int, ...]:
    return (1, 4, 9, max(16, tokens))


def many_keys(tokens: int) -> tuple[int, ...]:
    return (2000, tokens)


def adaln(
    op: str,
    count: int,
    *,
    step: bool = True,
    image: bool = False,
    width: int = WIDTH,
    odd: bool = False,
    backward: bool = False,
) -> Callable:
    """count: tensors before the steps' parts; image: modulations are [B, 1, C]."""
    names = {
        "adaln": ("step_shift", "step_scale"),
        "gated_residual": ("step_gate",),
        "gated_residual_adaln": ("step_gate", "step_shift", "step_scale"),
    }[op]
    modulations = {"adaln": 2, "gated_residual": 1, "gated_residual_adaln": 3}[op]

    def run(call: Call) -> None:
        tensors = call.rows(count, width, odd=odd)
        if image:
            packed = call.empty(call.batch, 1, modulations * width).chunk(modulations, -1)
            tensors = (*tensors[: count - modulations], *packed)
        steps = call.steps(len(names), width) if step else ()
        eps = {} if op == "gated_residual" else {"eps": 1e-6 * call.number}

        def function(*inputs):
            return getattr(ecar_kernels, op)(
                *inputs[:count], **dict(zip(names, inputs[count:], strict=False)), **eps
            )

        if backward:
            gradients(function, *tensors, *steps)
        else:
            function(*tensors, *steps)

    return run


def adaln_linear(width: int = WIDTH, outputs: int = 3 * WIDTH, *, bias: bool = True) -> Callable:
    def run(call: Call) -> None:
        x, shift, scale = call.rows(3, width)
        step_shift, step_scale = call.steps(2, width)
        ecar_kernels.adaln_linear(
            x,
            shift,
            scale,
            call.empty(outputs, width),
            call.empty(outputs) if bias else None,
            step_shift=step_shift,
            step_scale=step_scale,
            activation="gelu_tanh",
            eps=1e-6 * call.number,
        )

    return run


def linear_gated_residual(inputs: int = 4 * WIDTH, width: int = WIDTH) -> Callable:
    def run(call: Call) -> None:
        gate, residual = call.rows(2, width)
        ecar_kernels.linear_gated_residual(
            call.empty(call.batch, call.tokens, inputs),
            call.empty(width, inputs),
            call.empty(width),
            gate,
            residual,
            step_gate=call.steps(1, width)[0],
        )

    return run


FORWARD, DELTA, CORRECT = "forward_kernel", "delta_kernel", "correct_delta_kernel"
SPLIT = "split_forward_kernel"
BACKWARD = ("key_gradients_kernel", "query_gradients_kernel")
SUMMED = ("backward", "sum_partial")
UNALIGNED = tuple(f"unaligned_{name}" for name in (FORWARD, *BACKWARD))
FEW, MORE, MANY = ((1, 16),), ((1, 64),), ((16, 256), (64, 256))
ADALN = (("adaln", 3), ("gated_residual", 3), ("gated_residual_adaln", 5))  # tensors of each
CASES = [
    Case("stage_attention", "all stages", (FORWARD,), attention(doubling)),
    Case("stage_attention", "D = 72", (FORWARD,), attention(doubling, heads=16, head_dim=72)),
    Case("stage_attention", "over a cache", (FORWARD,), attention(doubling, newest=1)),
    Case("stage_attention", "many keys", (SPLIT,), attention(many_keys, newest=1), (FORWARD,), FEW),
    Case("stage_attention", "scale < 0", (FORWARD,), attention(doubling, sign=-1)),
    Case("stage_attention", "unaligned", UNALIGNED[:1], attention(doubling, odd=True)),
    Case(
        "stage_attention",
        "training",
        (FORWARD, DELTA, *BACKWARD),
        attention(doubling, head_dim=64, backward=True),
        exact=(FORWARD, DELTA, CORRECT, *BACKWARD),
    ),
    Case(
        "stage_attention",
        "training of the newest stages",
        (FORWARD, DELTA, *BACKWARD),
        attention(doubling, newest=2, head_dim=64, backward=True),
        exact=(FORWARD, DELTA, CORRECT, *BACKWARD),
    ),
    Case(
        "stage_attention",
        "training with few keys",
        (FORWARD, DELTA, CORRECT, *BACKWARD),
        attention(few_keys, head_dim=64, backward=True),
    ),
    Case(
        "stage_attention",
        "training unaligned",
        (UNALIGNED[0], DELTA, CORRECT, *UNALIGNED[1:]),
        attention(few_keys, head_dim=64, odd=True, backward=True),
    ),
    *(
        Case(op, use, ("forward",), adaln(op, count, **how))
        for op, count in ADALN
        for use, how in (
            ("with a step", {}),
            ("alone", {"step": False}),
            ("for images", {"image": True}),
            ("unaligned", {"odd": True}),
            ("of an odd width", {"width": 1151}),
            ("wide", {"width": 5120}),
        )
    ),
    *(
        Case(op, use, ("forward", *backward), adaln(op, count, backward=True, **how))
        for op, count in ADALN
        for use, how, backward in (
            ("training", {}, SUMMED),
            ("training for images", {"image": True}, SUMMED),
            ("training unaligned", {"odd": True}, SUMMED),
            ("training wide", {"width": 5120}, SUMMED * (2 if op == "gated_residual_adaln" else 1)),
            ("training without sums", {"step": False}, SUMMED[:1]),
        )
    ),
    *(
        Case("adaln_linear", use, launches, adaln_linear(**how), sizes=sizes)
        for use, launches, how, sizes in (
            ("few rows", ("adaln_linear",), {}, FEW),
            ("more rows", ("adaln_linear",), {}, MORE),
            ("many rows", ("normalise_and_multiply",), {}, MANY),
            ("of an odd width", ("normalise_rows", "adaln_linear"), {"width": 775}, MANY),
            ("without a bias", ("normalise_and_multiply",), {"bias": False}, MANY),
        )
    ),
    *(
        Case("linear_gated_residual", use, launches, linear_gated_residual(**how), sizes=sizes)
        for use, launches, how, sizes in (
            ("few rows", ("linear_gated_residual",), {}, FEW),
            ("more rows", ("linear_gated_residual",), {}, MORE),
            ("many rows", ("linear_gated_residual",), {}, MANY),
            ("of an odd width", ("linear_gated_residual",), {"width": 775}, MANY),
        )
    ),
    Case("adaln_linear", "any rows", (), adaln_linear()),
    Case("linear_gated_residual", "any rows", (), linear_gated_residual()),
]


GPU = FakeGPU(compile_kernels=False)


def triton_launches(gpu: FakeGPU) -> list[Launch]:
    return [launch for launch in gpu.launches if launch.kind == "triton"]


@contextlib.contextmanager
def number_format(name: str) -> Iterator[torch.dtype]:
    """The format's dtype, and how float32's products are computed."""
    products = torch.backends.cuda.matmul
    before = products.fp32_precision
    products.fp32_precision = "tf32" if name == "tf32" else "ieee"
    try:
        yield FORMATS[name]
    finally:
        products.fp32_precision = before


@pytest.mark.parametrize("numbers", FORMATS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.op}, {case.use}")
def test_what_it_launches_and_what_is_new_to_the_jit(case, numbers):
    """Kernels and grids; and where the launch settings are known, so are the kernels: nothing is
    compiled for other numbers, tensors and sizes of the same kind."""
    dtype, known = FORMATS[numbers], set()
    expected = case.exact if dtype is torch.float32 and case.exact else case.launches
    for (batch, tokens), number in zip((case.sizes[0], *case.sizes), itertools.count(1)):
        GPU.clear()
        with GPU, number_format(numbers), tuning.recording() as asked:
            case.run(Call(batch, tokens, dtype, number))
        launches = triton_launches(GPU)
        assert not expected or tuple(launch.name for launch in launches) == expected
        for launch in launches:
            assert all(
                1 <= size <= limit for size, limit in zip(launch.grid, GRID_LIMITS, strict=True)
            ), launch
        # A count of rows is an argument like another one.
        settings = {
            (op, replace(usual, program_rows=0) if hasattr(usual, "program_rows") else usual)
            for op, _, _, usual in asked
        } or {"the same for all"}
        # Images of odd rows lie at multiples of 16 or not, which the compiler takes note of.
        kind = frozenset(settings), tokens if "odd" in case.use or "unal" in case.use else 0
        if kind in known:
            assert not GPU.specialised, (batch, tokens, number)
        known.add(kind)


def test_an_empty_batch_launches_nothing():
    for case in CASES:
        GPU.clear()
        with GPU:
            case.run(Call(0, 16, torch.bfloat16))
        # Sums over no rows are zeros, and someone has to write them.
        assert {launch.name for launch in triton_launches(GPU)} <= {"sum_partial"}, case


@pytest.mark.parametrize("numbers", ["bfloat16", "float32"])
def test_tensors_on_another_device_than_the_current_one(gpus, numbers):
    """On cuda:1, an RTX 5090, all is as where it is the current device, and not as on cuda:0, an
    H100. That every tensor of a launch is on its device the launcher sees to."""
    kinds = set()
    for case, size in [(its, size) for its in CASES for size in its.sizes]:
        call = Call(*size, FORMATS[numbers], device="cuda:1")
        found = []
        for current in (0, 1):
            gpus.clear()
            with torch.cuda.device(current), tuning.recording() as asked:
                case.run(call)
                assert torch.cuda.current_device() == current
            assert {launch.device for launch in gpus.launches} == {1}
            launches = [replace(launch, key=None) for launch in triton_launches(gpus)]
            found.append(([usual for *_, usual in asked], launches))
        assert found[0] == found[1], case
        with tuning.recording() as asked:
            case.run(replace(call, device="cuda:0"))
        if found[0][0] != [usual for *_, usual in asked]:
            kinds.add(case.op)
    # The chips differ where settings depend on them, or this test would show nothing.
    expected = {"bfloat16": {"adaln_linear", "stage_attention"}, "float32": {"adaln"}}
    assert expected[numbers] <= kinds


def test_every_op_has_a_case():
    served = {op for op, backends in registry.IMPLEMENTATIONS.items() if "triton" in backends}
    assert {case.op for case in CASES} == served


def public_kernels() -> set[str]:
    package = Path(ecar_kernels.__file__).parent
    modules = [
        importlib.import_module(f"ecar_kernels.{path.parent.name}.{path.stem}")
        for path in package.glob("*/*kernels.py")
    ]
    return {
        name
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, triton.runtime.JITFunction) and not name.startswith("_")
    }


@pytest.mark.parametrize("numbers", ["bfloat16", "float32"])
def test_every_kernel_compiles_as_launched_and_fits(numbers):
    """With the arguments of real launches, for sm_90; in bfloat16 in every use, in float32 each
    kernel in its first. The compile gate has the other chips and all settings."""
    seen: set[str] = set()
    with FakeGPU() as compiling, number_format(numbers) as dtype:
        for case in CASES:
            kernels = set(case.exact if dtype is torch.float32 and case.exact else case.launches)
            if dtype is torch.bfloat16 or not kernels <= seen:
                case.run(Call(*case.sizes[0], dtype))
                seen |= kernels
    launches = triton_launches(compiling)
    for launch in launches:
        assert launch.shared <= H100.shared_bytes
        assert 0 < launch.registers <= 255
        assert launch.stack == 0, launch
    sixteen_bits = {SPLIT} if dtype is torch.float32 else set()
    assert {launch.name for launch in launches} == public_kernels() - sixteen_bits
