"""Random calls of every op, valid and invalid mixed: python -m tests.fuzz --cases 10000.

Calls are drawn from the ops' records, and these say whether a call is valid; the public functions
check on their own. A valid call must agree with the reference in float64, in its gradients too; an
invalid one must raise ValueError or TypeError naming an argument. The C++ ops behind the public
functions then get the same tensors unchecked: they may raise RuntimeError, and with
`make sanitize`'s library nothing may be read or written out of bounds.
"""

import argparse
import random
import sys
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import ecar_kernels
from ecar_kernels import registry
from ecar_kernels.ops import DTYPES, Argument, Op
from ecar_kernels.registry import OPS, RECORDS
from ecar_kernels.testing import DIFFERENTIABLE, Draw, SampleSizes, largest_error, run, tensors, ulp

PERTURBED = 3  # draws of the inputs within their rounding


def in_memory(rng: random.Random, shape: list[int], dtype: torch.dtype) -> Tensor:
    """A random tensor of this shape, its last dimension contiguous, laid out at random."""
    kind = rng.choice(["contiguous", "contiguous", "chunk", "permuted", "sliced", "expanded"])
    if kind == "chunk":
        parts = rng.randint(2, 6)
        whole = torch.randn(*shape[:-1], parts * shape[-1])
        return whole.to(dtype).chunk(parts, -1)[rng.randrange(parts)]
    if kind == "permuted" and len(shape) > 2:
        return torch.randn(shape[1], shape[0], *shape[2:]).to(dtype).transpose(0, 1)
    if kind == "sliced":
        whole = torch.randn([size + rng.randint(0, 3) for size in shape]).to(dtype)
        return whole[
            tuple(slice(have - size, have) for have, size in zip(whole.shape, shape, strict=True))
        ]
    if kind == "expanded" and len(shape) > 1:
        return (
            torch.randn([1 if rng.random() < 0.5 else size for size in shape[:-1]] + shape[-1:])
            .to(dtype)
            .expand(shape)
        )
    return torch.randn(shape).to(dtype)


class RandomDraw(Draw):
    """Random sizes, layouts, values and dtypes of what an op's record allows."""

    says_defaults = True

    def __init__(self, rng: random.Random, op: Op) -> None:
        attends = any(argument.name == "stage_lengths" for argument in op.arguments)
        stages = tuple(rng.randint(1, 9) for _ in range(rng.randint(1, 4)))
        sizes = SampleSizes(
            batch=rng.choice([0, 1, 1, 2, 3]),
            stages=stages if attends else (rng.randint(0, 12),),
            queries=sum(stages[rng.randrange(len(stages)) :]) if attends else None,
            heads=rng.randint(1, 3),
            head_dim=rng.choice([1, 5, 8, 40, 72]),
            channels=rng.randint(1, 70),
            hidden=rng.randint(1, 50),
            outputs=rng.choice([1, 4, 16, 64]),
            image=(rng.randint(1, 4), rng.randint(1, 9), rng.randint(1, 35)),
            guided=rng.random() < 0.5,
        )
        super().__init__(sizes, rng.choice(DTYPES), "cpu")
        self.rng = rng

    def one_of(self, names: tuple[str, ...]) -> str:
        return self.rng.choice(names)

    def is_none(self) -> bool:
        return self.rng.random() < 1 / 3

    def choose(self, values: tuple) -> object:
        return self.rng.choice(values)

    def shape(self, argument: Argument) -> tuple[str, ...]:
        if self.sizes.guided and argument.shapes[0][0].startswith("2"):
            return argument.shapes[0]
        return self.rng.choice(self.shapes(argument))

    def tensor(self, argument: Argument, shape: tuple[int, ...]) -> Tensor:
        if argument.dtype is not None:
            return super().tensor(argument, shape)
        found = in_memory(self.rng, list(shape), self.dtype)
        if argument.either is not None and self.rng.random() < 0.5:
            found = found.to(argument.either)
        return found.contiguous() if argument.contiguous else found

    def projection(self, arguments: Sequence[Argument], shape: tuple[int, ...]) -> list[Tensor]:
        return [self.tensor(argument, shape) for argument in arguments]


def other_tensor(rng: random.Random, value: Tensor) -> object:
    """Something like `value`, mostly not what the op takes."""
    kind = rng.choice(["type", "device", "strides", "more", "fewer", "size", "size", "object"])
    if kind == "type":
        return value.to(
            rng.choice(
                [
                    torch.float32,
                    torch.bfloat16,
                    torch.float16,
                    torch.float64,
                    torch.int64,
                    torch.bool,
                ]
            )
        )
    if kind == "device":
        return value.to("meta")
    if kind == "strides" and value.ndim:
        return value.repeat_interleave(2, dim=-1)[..., ::2]
    if kind == "more":
        return value[None]
    if kind == "fewer" and value.ndim and len(value):
        return value[0]
    if kind == "object":
        return rng.choice([None, 1.0, [0.5], "x"])
    size = list(value.shape)
    size[rng.randrange(len(size))] += rng.choice([-1, 1, 2])
    return torch.zeros([max(0, n) for n in size], dtype=value.dtype)


def corrupted(rng: random.Random, call: dict) -> dict:
    name = rng.choice(list(call))
    value = call[name]
    if isinstance(value, Tensor):
        value = other_tensor(rng, value)
    elif name == "device":
        value = rng.choice([None, True, -1, 2.5, "gelu", "cpu:x", (), torch.float32])
    else:
        value = rng.choice(
            [
                None,
                True,
                -1,
                0,
                1,
                2.5,
                float("nan"),
                float("inf"),
                "gelu",
                (),
                (2,),
                (0, 3, 4),
                (2, 3, 4.0),
                [3, 1, 2],
                torch.float64,
                torch.int32,
            ]
        )
    return call | {name: value}


def nearby(
    reference: Callable, call: dict, weights: list[Tensor] | None, exact: tuple[Tensor, ...]
) -> list[tuple[float, float]]:
    """For each result, where every input is another within its rounding: how far the exact one
    moves, and the plain reference's error there, at most.

    No way of computing is more exact than that: what is left where terms cancel (the gradient of
    a row of two channels, a sum far out in a GELU's tail) is rounding, small only by luck.
    `initial_noise` has no inputs that are rounded.
    """

    def moved(value):
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        by = torch.finfo(value.dtype).eps * (2 * torch.rand(value.shape, dtype=torch.float64) - 1)
        return (value.double() * (1 + by)).to(value.dtype)

    found = [(0.0, 0.0)] * len(exact)
    for _ in range(0 if "dtype" in call else PERTURBED):
        there = {name: moved(value) for name, value in call.items()}
        towards = weights and [moved(weight) for weight in weights]
        oracles = run(reference, there, torch.float64, towards)
        plains = run(reference, there, None, towards)
        found = [
            (max(move, largest_error(oracle, centre)), max(worst, largest_error(plain, oracle)))
            for (move, worst), plain, oracle, centre in zip(
                found, plains, oracles, exact, strict=True
            )
        ]
    return found


def rounded(op: str, call: dict, weights: list[Tensor] | None) -> list[float]:
    """What one rounding within each result may come to, beyond those of the inputs.

    Attention's gradients of scores are differences of a product and of its mean over the keys:
    the mean's rounding is the same for all keys, so that theirs do not cancel it.
    """
    if op != "stage_attention" or weights is None:
        return []
    dim = call["q"].shape[-1]
    scale = dim**-0.5 if call["scale"] is None else abs(call["scale"])
    gradient, q, k, v = (
        x.abs().max().item() for x in (weights[0], call["q"], call["k"], call["v"])
    )
    size = torch.finfo(call["q"].dtype).eps * scale * dim * gradient * v
    return [0, size * k, size * q, 0]


def judge(op: str, call: dict, backend: str) -> None:
    """Raises AssertionError where the op does not do what the contract says."""
    public = getattr(ecar_kernels, op)
    if (
        backend != "auto"
        and RECORDS[op].is_valid(call)
        and torch.float64 in (call[next(iter(call))].dtype, call.get("dtype"))
    ):
        try:
            with ecar_kernels.use_backend(backend):
                public(**call)
        except registry.BackendUnavailableError:
            return
        raise AssertionError("a backend served float64")
    if not RECORDS[op].is_valid(call):
        try:
            with ecar_kernels.use_backend(backend):
                public(**call)
        except (ValueError, TypeError) as error:
            # A required tensor that is None is still named.
            assert str(error).startswith("argument"), f"unnamed: {error!r}"
            return
        raise AssertionError("an invalid call was served")
    reference = registry.resolve(op, device="cpu", dtype=torch.float32, backend="reference")
    weights = None
    if op in DIFFERENTIABLE and call[next(iter(call))].numel():
        weights = [torch.randn_like(y) for y in tensors(reference(**call))]
    with ecar_kernels.use_backend(backend), torch.set_grad_enabled(weights is not None):
        found = run(public, call, None, weights)
    plain = run(reference, call, None, weights)
    exact = run(
        reference,
        call if op != "initial_noise" else call | {"dtype": torch.float64},
        torch.float64,
        weights,
    )
    around = nearby(reference, call, weights, exact)
    roundings = rounded(op, call, weights) or [0.0] * len(exact)
    for ours, usual, oracle, (move, plain_error), rounding in zip(
        found, plain, exact, around, roundings, strict=True
    ):
        assert ours.shape == oracle.shape and ours.dtype == usual.dtype
        if not oracle.numel():
            continue
        # Far out in a GELU's tail the oracle's own 1 + tanh is 0 where another way has 1e-17.
        allowed = (
            2 * max(plain_error, largest_error(usual, oracle))
            + 16 * (ulp(oracle, ours.dtype) + move + rounding)
            + 1e-15
        )
        worst = largest_error(ours, oracle)
        assert worst <= allowed, f"error {worst:.3g}, allowed {allowed:.3g}"


def unchecked(op: str, call: dict) -> None:
    """The backend's own function, without the public checks: it may only raise."""
    function = registry.resolve(op, device="cpu", dtype=torch.float32, backend="cpp")
    try:
        with torch.no_grad():
            function(**call)
        if op in DIFFERENTIABLE:
            run(function, call, None, [torch.randn_like(y) for y in tensors(function(**call))])
    except (
        RuntimeError,
        TypeError,
        ValueError,
        AttributeError,
        IndexError,
        NotImplementedError,
        ZeroDivisionError,
    ):
        pass


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--backend", default="auto", choices=("auto", "cpp"))
    parser.add_argument("--ops", nargs="+", default=OPS, choices=OPS)
    arguments = parser.parse_args(argv)
    seed = random.SystemRandom().randrange(2**32) if arguments.seed is None else arguments.seed
    print(f"seed {seed}, {arguments.cases} cases", flush=True)
    found = {op: registry.IMPLEMENTATIONS[op].get("cpp") for op in OPS}
    cpp = {op for op in OPS if found[op] and not found[op].why_not("cpu", torch.float32)}
    begin, counts = time.monotonic(), {op: [0, 0] for op in arguments.ops}
    for case in range(arguments.cases):
        rng = random.Random(f"{seed} {case}")
        torch.manual_seed(rng.randrange(2**32))
        op = arguments.ops[case % len(arguments.ops)]
        call = RandomDraw(rng, RECORDS[op])(RECORDS[op])
        if rng.random() < 0.5:
            call = corrupted(rng, call)
        valid = RECORDS[op].is_valid(call)
        try:
            judge(op, call, arguments.backend)
            if op in cpp and not valid:
                unchecked(op, call)
        except Exception as error:
            said = {
                name: (list(value.shape), value.stride(), value.dtype, str(value.device))
                if isinstance(value, Tensor)
                else value
                for name, value in call.items()
            }
            print(
                f"case {case} of seed {seed}: {op} {'valid' if valid else 'invalid'}\n{said}\n"
                f"{type(error).__name__}: {error}"
            )
            return 1
        counts[op][not valid] += 1
    for op, (valid, invalid) in counts.items():
        print(f"{op}: {valid} valid, {invalid} invalid")
    print(f"no failure in {time.monotonic() - begin:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
