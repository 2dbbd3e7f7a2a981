"""Modules as functions of their inputs and weights, as the rule of accuracy judges functions."""

import torch
from torch import nn


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
        return torch.func.functional_call(Call(), weights, (arguments,))
    return run


def arguments_of(module, shapes, dtype):
    weights = {f"w{i}": p.detach() + 0.1 * torch.randn(p.shape)
               for i, p in enumerate(module.parameters())}
    inputs = {name: torch.randn(shape) for name, shape in shapes.items()}
    return {name: value.to(dtype) for name, value in (weights | inputs).items()}
