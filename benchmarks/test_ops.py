"""Times of each op, on every backend that serves it here, at E-CAR-S's stages and batch 1.

The reference is the one that the tests judge by. `copy` is the floor of whatever is bound by
memory: `bytes` counts each tensor once, so bytes / copy's rate is the time that nothing can beat.
"""

import pytest
import torch

from ecar_kernels import backends, resolve

WIDTH, HEADS = 768, 6
STAGE_TOKENS = (16, 64, 256)
CHANNELS, PATCH = 4, 2
COPY_BYTES = 64 * 2**20


def tokens(count: int, width: int = WIDTH) -> torch.Tensor:
    return torch.randn(1, count, width)


def step() -> torch.Tensor:
    return torch.randn(1, 1, WIDTH)


def adaln(n):
    return (tokens(n), tokens(n), tokens(n)), {"step_shift": step(), "step_scale": step()}


def gated_residual(n):
    return (tokens(n), tokens(n), tokens(n)), {"step_gate": step()}


def gated_residual_adaln(n):
    arguments = tuple(tokens(n) for _ in range(5))
    return arguments, {"step_gate": step(), "step_shift": step(), "step_scale": step()}


def adaln_linear(n):
    arguments, options = adaln(n)
    weight, bias = torch.randn(4 * WIDTH, WIDTH) / WIDTH**0.5, torch.randn(4 * WIDTH)
    return (*arguments, weight, bias), {**options, "activation": "gelu_tanh"}


def linear_gated_residual(n):
    weight, bias = torch.randn(WIDTH, 4 * WIDTH) / (4 * WIDTH) ** 0.5, torch.randn(WIDTH)
    arguments = (tokens(n, 4 * WIDTH), weight, bias, tokens(n), tokens(n))
    return arguments, {"step_gate": step()}


def stage_attention(n):
    """The newest stage's queries over the whole cache, as the sampler has them."""
    stages = STAGE_TOKENS[: STAGE_TOKENS.index(n) + 1]
    q = torch.randn(1, n, HEADS, WIDTH // HEADS)
    k, v = torch.randn(2, 1, sum(stages), HEADS, WIDTH // HEADS)
    return (q, k, v, stages), {}


def image(n):
    side = PATCH * round(n**0.5)
    return torch.randn(1, CHANNELS, side, side)


def euler_step(n):
    velocity = torch.cat((image(n), image(n)))
    return (image(n), velocity, 0.01), {"guidance_scale": 2.0}


def upsample_renoise_euler(n):
    options = {"time": 1 / 3, "stage": 2, "seeds": torch.tensor([7])}
    return (image(n), image(n), 0.01), options


def initial_noise(n):
    shape = tuple(image(n).shape[1:])
    return (torch.tensor([7]), shape), {"device": "cpu", "dtype": torch.float32}


CASES = {
    case.__name__: case
    for case in (
        stage_attention,
        adaln,
        gated_residual,
        gated_residual_adaln,
        adaln_linear,
        linear_gated_residual,
        euler_step,
        upsample_renoise_euler,
        initial_noise,
    )
}
SERVED = [(row.op, row.backend) for row in backends() if row.available]


def traffic(*values) -> int:
    """Bytes of the tensors among the values."""
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize("n", STAGE_TOKENS, ids="{}tokens".format)
@pytest.mark.parametrize(("op", "backend"), SERVED)
def test_op(benchmark, op, backend, n):
    arguments, options = CASES[op](n)
    function = resolve(op, device="cpu", dtype=torch.float32, backend=backend)
    benchmark.group = f"{op}, {n} tokens"
    with torch.inference_mode():
        result = benchmark(function, *arguments, **options)
    outputs = result if isinstance(result, tuple) else (result,)
    benchmark.extra_info["bytes"] = traffic(*arguments, *options.values(), *outputs)


def test_copy(benchmark):
    source = torch.randn(COPY_BYTES // 4)
    target = torch.empty_like(source)
    benchmark.group = "floor: copy of 64 MiB"
    benchmark(target.copy_, source)
    benchmark.extra_info["bytes"] = 2 * COPY_BYTES
