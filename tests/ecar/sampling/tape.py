"""A CUDA graph's stand-in on the CPU: a run is recorded op by op and replayed on the same tensors.

Like a graph it knows addresses, not Python: whatever a run took from Python is baked in.
"""

import contextlib

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# What a stream under capture refuses: reading a value back, and copying one up from Python.
REFUSED = ("aten::_local_scalar_dense", "aten::lift_fresh")


class Tape(TorchDispatchMode):
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
            elif not any(leaf.untyped_storage().data_ptr() in given for leaf in kept):
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
