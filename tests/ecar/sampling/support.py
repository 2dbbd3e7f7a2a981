"""What the sampler's tests share: short draws, an op composed of others, and a CUDA graph's
stand-in on the CPU."""

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ecar.sampling import sample
from ecar_kernels import adaln_linear

LABELS, SEEDS = (3, 7, 1), (11, -5, 2**40)


def draw(model, labels=LABELS, seeds=SEEDS, **options):
    """By even steps of Euler's, if nothing else is said."""
    options = {"steps": 6, "solver": "euler", "grid": 1.0, **options}
    return sample(model, torch.tensor(labels), seeds=torch.tensor(seeds), **options)


def assert_same_image(found, expected):
    """To float rounding, which differs with the rows of a product and which a random model
    enlarges: 7.2e-5 of 4.9 has been seen. Other noise makes a difference of more than 0.1."""
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


def composed_boundary(
    x,
    state,
    shift,
    scale,
    weight,
    bias,
    embed_weight,
    embed_bias,
    positions,
    dt,
    *,
    step_shift,
    step_scale,
    guidance_scale,
    eps,
    previous=None,
    ratio=0.0,
    return_velocity=False,
):
    """flow_boundary by its contract, out of plain ops."""
    v = adaln_linear(
        x, shift, scale, weight, bias, step_shift=step_shift, step_scale=step_scale, eps=eps
    ).to(state.dtype)
    if len(v) != len(state):
        conditional, unconditional = v.chunk(2)
        v = unconditional + guidance_scale * (conditional - unconditional)
    slope = v if previous is None else v + ratio / 2 * (v - previous)
    state = state + dt * slope
    embedded = F.linear(state.to(x.dtype), embed_weight, embed_bias) + positions
    embedded = embedded.repeat(len(x) // len(state), 1, 1) if len(state) else embedded
    return (state, embedded, v) if return_velocity else (state, embedded)


# What a stream under capture refuses: reading a value back, and copying one up from Python.
REFUSED = ("aten::_local_scalar_dense", "aten::lift_fresh")


class Tape(TorchDispatchMode):
    """A run is recorded op by op and replayed on the same tensors. Like a graph it knows addresses,
    not Python: whatever a run took from Python is baked in."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function._schema.name in REFUSED:
            raise RuntimeError(f"operation not permitted when stream is capturing: {function}")
        kwargs = kwargs or {}
        output = function(*args, **kwargs)
        self.calls.append((function, args, kwargs, output))
        return output

    @torch.no_grad()
    def replay(self):
        for function, args, kwargs, output in self.calls:
            given = {
                leaf.untyped_storage().data_ptr()
                for leaf in tree_leaves((args, kwargs))
                if isinstance(leaf, Tensor)
            }
            kept = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
            if function._schema.is_mutable:
                function(*args, **kwargs)
            elif kept and not any(leaf.untyped_storage().data_ptr() in given for leaf in kept):
                for leaf, new in zip(kept, tree_leaves(function(*args, **kwargs)), strict=True):
                    leaf.copy_(new)


class TapeRecorder:
    """`CudaRecorder` for CPU tensors. `failures` are raised by the next captures."""

    captured = 0
    failures: list = []  # noqa: RUF012 - shared on purpose, reset by the fixture

    def __init__(self, device):
        self.device = device

    def warm_up(self, run):
        run()

    def record(self, run):
        if TapeRecorder.failures:
            raise TapeRecorder.failures.pop(0)
        with Tape() as tape:
            run()
        TapeRecorder.captured += 1
        return tape.replay

    def turn(self):
        return contextlib.nullcontext()

    def settle(self):
        pass

    def give_back(self):
        pass
