"""Random calls of every op, valid and invalid mixed: python -m tests.fuzz --cases 10000.

Whether a call is valid is decided here, from the contract alone. A valid one must agree with the
reference in float64, in its gradients too; an invalid one must raise ValueError or TypeError
naming an argument. The C++ ops behind the public functions then get the same tensors unchecked:
they may raise RuntimeError, and with `make sanitize`'s library nothing may be read or written out
of bounds.
"""

import argparse
import random
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

import ecar_kernels
from ecar_kernels import registry
from ecar_kernels.registry import KERNEL_DTYPES, OPS
from tests.support.accuracy import largest_error, run, tensors, ulp
from tests.support.ops import DIFFERENTIABLE

TOKEN_OPS = (
    "adaln",
    "gated_residual",
    "gated_residual_adaln",
    "adaln_linear",
    "linear_gated_residual",
)
IMAGE_OPS = ("euler_step", "upsample_renoise_euler")
OF_TOKENS = (*TOKEN_OPS, "flow_boundary")
DTYPES = (*KERNEL_DTYPES, torch.float64)  # the last one by the references alone
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


def valid_call(rng: random.Random, op: str) -> dict:
    dtype = rng.choice(DTYPES)
    batch = rng.choice([0, 1, 1, 2, 3])

    def tensor(*shape):
        return in_memory(rng, list(shape), dtype)

    if op == "stage_attention":
        stages = tuple(rng.randint(1, 9) for _ in range(rng.randint(1, 4)))
        heads, dim = rng.randint(1, 3), rng.choice([1, 5, 8, 40, 72])
        queries = sum(stages[rng.randrange(len(stages)) :])
        return {
            "q": tensor(batch, queries, heads, dim),
            **{name: tensor(batch, sum(stages), heads, dim) for name in "kv"},
            "stage_lengths": stages,
            "scale": rng.choice([None, 0.5]),
        }
    if op in TOKEN_OPS:
        count, channels, hidden = rng.randint(0, 12), rng.randint(1, 70), rng.randint(1, 50)

        def spatial():
            return tensor(batch, rng.choice([1, count]), channels)

        def step():
            return rng.choice([None, tensor(1, 1, channels), tensor(batch, 1, channels)])

        x, branch = (tensor(batch, count, channels) for _ in range(2))
        gate = {"gate": spatial(), "step_gate": step()}
        norm = {
            "shift": spatial(),
            "scale": spatial(),
            "step_shift": step(),
            "step_scale": step(),
            "eps": rng.choice([1e-6, 1e-3]),
        }
        if op == "adaln":
            return {"x": x} | norm
        if op == "gated_residual":
            return {"x": x, "branch": branch} | gate
        if op == "gated_residual_adaln":
            return {"x": x, "branch": branch} | gate | norm
        if op == "adaln_linear":
            return {
                "x": x,
                "weight": tensor(hidden, channels),
                "activation": rng.choice([None, "gelu_tanh"]),
                "bias": rng.choice([None, tensor(hidden)]),
                "scale_offset": rng.choice([1.0, 1, 0.0, -2.5]),
            } | norm
        return {
            "h": tensor(batch, count, hidden),
            "weight": tensor(channels, hidden),
            "bias": rng.choice([None, tensor(channels)]),
            "residual": x,
        } | gate
    if op == "flow_boundary":
        return boundary_call(rng, tensor, batch)
    shape = (rng.randint(1, 4), rng.randint(1, 9), rng.randint(1, 35))
    seeds = torch.randint(-(2**63), 2**63 - 1, (batch,))
    if op == "initial_noise":
        return {"seeds": seeds, "shape": shape, "device": "cpu", "dtype": dtype}
    guided = rng.random() < 0.5
    call = {
        "x": tensor(batch, *shape),
        "velocity": tensor(batch * (1 + guided), *shape),
        "dt": rng.choice([1.0, 0.1, 1]),
        "guidance_scale": rng.choice([1.5, 0.0]) if guided else 1.0,
    }
    if op == "upsample_renoise_euler":
        call |= {"time": rng.choice([0.0, 1 / 3]), "stage": rng.randint(2, 4)} | rng.choice(
            [{"seeds": seeds}, {"details": tensor(batch, shape[0], 3, *shape[1:])}]
        )
    return call


def boundary_call(rng: random.Random, tensor: Callable[..., Tensor], batch: int) -> dict:
    guided, count, channels = rng.random() < 0.5, rng.randint(0, 12), rng.randint(1, 70)
    rows, outputs = batch * (1 + guided), rng.choice([1, 4, 16, 64])
    state = tensor(batch, count, outputs)
    shapes = {
        "weight": (outputs, channels),
        "bias": (outputs,),
        "embed_weight": (channels, outputs),
        "embed_bias": (channels,),
        "positions": (count, channels),
    }
    return {
        "x": tensor(rows, count, channels),
        "state": rng.choice([state, state.float()]),
        **{name: tensor(rows, rng.choice([1, count]), channels) for name in ("shift", "scale")},
        **{name: tensor(*shape).contiguous() for name, shape in shapes.items()},
        "dt": rng.choice([1.0, 0.1, 1]),
        "guidance_scale": rng.choice([1.5, 0.0]) if guided else 1.0,
        "eps": rng.choice([1e-6, 1e-3]),
        **{
            name: rng.choice([None, tensor(1, 1, channels), tensor(rows, 1, channels)])
            for name in ("step_shift", "step_scale")
        },
    }


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


def is_valid(op: str, call: dict) -> bool:
    """The contract, restated: nothing here is shared with the checks in the package."""

    def number(value):
        return type(value) in (int, float) and abs(value) < float("inf")

    def count(value):
        return type(value) is int and value >= 1

    def good(value, like=None):
        return (
            isinstance(value, Tensor)
            and value.dtype in DTYPES
            and value.device.type == "cpu"
            and (like is None or value.dtype == like.dtype)
            and (not value.ndim or value.shape[-1] <= 1 or value.stride(-1) == 1)
        )

    def shaped(name, *shapes):
        return good(call[name], leading) and tuple(call[name].shape) in shapes

    def stages(value):
        return isinstance(value, (tuple, list)) and len(value) > 0 and all(map(count, value))

    def triple(value):
        return isinstance(value, (tuple, list)) and len(value) == 3 and all(map(count, value))

    def seeds(value):
        return isinstance(value, Tensor) and value.dtype == torch.int64 and value.ndim == 1

    if op == "initial_noise":
        return (
            seeds(call["seeds"])
            and not call["seeds"].is_meta
            and triple(call["shape"])
            and call["device"] == "cpu"
            and call["dtype"] in DTYPES
        )
    leading = next(iter(call.values()))
    if not good(leading) or leading.ndim != (3 if op in OF_TOKENS else 4):
        return False
    if op == "stage_attention":
        if not stages(call["stage_lengths"]):
            return False
        lengths, (b, queries, h, d) = call["stage_lengths"], leading.shape
        suffixes = [sum(lengths[first:]) for first in range(len(lengths))]
        return (
            queries in suffixes
            and (call["scale"] is None or number(call["scale"]))
            and all(shaped(name, (b, suffixes[0], h, d)) for name in "kv")
        )
    if op in IMAGE_OPS:
        b, c, h, w = leading.shape
        if not shaped("velocity", (b, c, h, w), (2 * b, c, h, w)):
            return False
        plain = call["velocity"].shape[0] != 2 * b
        fine = (
            number(call["dt"])
            and number(call["guidance_scale"])
            and not (plain and call["guidance_scale"] != 1)
        )
        if op == "euler_step" or not fine:
            return fine
        fine = (
            number(call["time"])
            and 0 <= call["time"] < 1
            and count(call["stage"])
            and call["stage"] >= 2
        )
        given = call.get("seeds")
        if (given is None) == (call.get("details") is None):
            return False
        if given is None:
            return fine and shaped("details", (b, c, 3, h, w))
        return fine and seeds(given) and given.shape == (b,) and given.device.type == "cpu"
    b, n, c = leading.shape
    if op == "flow_boundary":
        state, weight = call["state"], call["weight"]
        if not good(weight, leading) or weight.ndim != 2 or not 1 <= weight.shape[0] <= 64:
            return False
        p = weight.shape[0]
        if not good(state) or state.dtype not in (torch.float32, leading.dtype):
            return False
        rows = len(state) if state.ndim == 3 else -1
        if state.shape[1:] != (n, p) or b not in (rows, 2 * rows):
            return False
        flat = {
            "weight": (p, c),
            "bias": (p,),
            "embed_weight": (c, p),
            "embed_bias": (c,),
            "positions": (n, c),
        }
        if not all(
            shaped(name, shape) and call[name].is_contiguous() for name, shape in flat.items()
        ):
            return False
        if not (number(call["dt"]) and number(call["guidance_scale"])) or (
            b != 2 * rows and call["guidance_scale"] != 1
        ):
            return False
    if op in ("adaln_linear", "linear_gated_residual"):
        weight = call["weight"]
        if not good(weight, leading) or weight.ndim != 2 or weight.shape[1] != c:
            return False
        if call["bias"] is not None and not shaped("bias", (weight.shape[0],)):
            return False
        if op == "linear_gated_residual":
            c = weight.shape[0]
            if not shaped("residual", (b, n, c)):
                return False
        elif call["activation"] not in (None, "gelu_tanh") or not number(call["scale_offset"]):
            return False
    if "branch" in call and not shaped("branch", (b, n, c)):
        return False
    if "eps" in call and not (number(call["eps"]) and call["eps"] > 0):
        return False
    for name in {"gate", "shift", "scale"} & set(call):
        step = call[f"step_{name}"]
        if not shaped(name, (b, n, c), (b, 1, c)):
            return False
        if step is not None and not shaped(f"step_{name}", (b, 1, c), (1, 1, c)):
            return False
    return True


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
        and is_valid(op, call)
        and torch.float64 in (call[next(iter(call))].dtype, call.get("dtype"))
    ):
        try:
            with ecar_kernels.use_backend(backend):
                public(**call)
        except registry.BackendUnavailableError:
            return
        raise AssertionError("a backend served float64")
    if not is_valid(op, call):
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
    function = registry.resolve(op, device="cpu", dtype=torch.float32, backend="native")
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
    parser.add_argument("--backend", default="auto", choices=("auto", "native"))
    arguments = parser.parse_args(argv)
    seed = random.SystemRandom().randrange(2**32) if arguments.seed is None else arguments.seed
    print(f"seed {seed}, {arguments.cases} cases", flush=True)
    found = {op: registry.IMPLEMENTATIONS[op].get("native") for op in OPS}
    native = {op for op in OPS if found[op] and not found[op].why_not("cpu", torch.float32)}
    begin, counts = time.monotonic(), {op: [0, 0] for op in OPS}
    for case in range(arguments.cases):
        rng = random.Random(f"{seed} {case}")
        torch.manual_seed(rng.randrange(2**32))
        op = OPS[case % len(OPS)]
        call = valid_call(rng, op)
        if rng.random() < 0.5:
            call = corrupted(rng, call)
        valid = is_valid(op, call)
        try:
            judge(op, call, arguments.backend)
            if op in native and not valid:
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
