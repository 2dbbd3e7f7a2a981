"""Modules as functions of their inputs and weights, as the rule of accuracy judges functions."""

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ecar_kernels import accelerate


def accelerated(module, **options):
    """The module, swapped in place."""
    accelerate(module, **options)
    return module


def functional(module, call):
    """The call as a function of the module's weights too, named w0, w1, .."""
    names = [name for name, _ in module.named_parameters()]

    class Call(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = module

        def forward(self, inputs):
            return call(self.inner, **inputs)

    def run(**arguments):
        weights = {f"inner.{name}": arguments.pop(f"w{i}") for i, name in enumerate(names)}
        like = next(iter(weights.values()), None)
        for name, buffer in module.named_buffers():  # of the weights' type, as `to` has them
            if buffer.is_floating_point():
                weights[f"inner.{name}"] = buffer.to(like)
        return torch.func.functional_call(Call(), weights, (arguments,))

    return run


def arguments_of(module, shapes, dtype):
    weights = {
        f"w{i}": p.detach() + 0.1 * torch.randn(p.shape) for i, p in enumerate(module.parameters())
    }
    inputs = {name: torch.randn(shape) for name, shape in shapes.items()}
    return {name: value.to(dtype) for name, value in (weights | inputs).items()}


class Calls(TorchDispatchMode):
    """The names of what is dispatched, without views."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        given, made = (
            {
                leaf.untyped_storage().data_ptr()
                for leaf in tree_leaves(tree)
                if isinstance(leaf, Tensor)
            }
            for tree in ((args, kwargs), output)
        )
        if function._schema.is_mutable or not made <= given:
            self.names.append(function._schema.name)
        return output


class Cache:
    """Keys and values in one buffer, as a sampler has them."""

    def __init__(self, *shape, dtype=torch.float32):
        self.held, self.begin = torch.zeros(2, *shape, dtype=dtype), 0

    def write(self, layer, key, value):
        room = self.room(layer, *key.shape[:2])
        for held, new in zip(room, (key, value), strict=True):
            held[:, self.begin :] = new
        return room

    def room(self, layer, batch, tokens):
        keys, values = self.held[0], self.held[1]
        return tuple(kept[:batch, : self.begin + tokens] for kept in (keys, values))


class CopyingCache(Cache):
    """One whose `room` may not be used, for it writes in a way of its own."""

    def write(self, layer, key, value):
        return super().write(layer, key, value)


def calls_of_a_block(block):
    """What a StageBlock's second call dispatches, the first having packed weights and the like."""
    x, cache = torch.randn(2, 5, block.width), Cache(2, 5, block.heads, block.head_dim)
    block(x, (5,), cache)
    with Calls() as calls:
        block(x, (5,), cache)
    return calls.names
