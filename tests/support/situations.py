"""What people do to a model's layers, as a table: each changes a model in place.

A situation is a function of the model; `LAYERS` are of linear layers, `NORMS` of LayerNorms, each
given the module, the name of the layer in it, and the layer itself. They change what the layer
computes by far more than rounding, so that a path which skips them is seen.
"""

import copy
import warnings

import torch
import torch.nn.utils.prune  # not imported with torch.nn
from torch import nn


class Adapter(nn.Module):
    """As peft's: its weight and bias are those of the layer that it wraps."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)
        for layer in (self.down, self.up):
            nn.init.normal_(layer.weight, std=0.3)
        self.to(base.weight.dtype)

    weight = property(lambda self: self.base.weight)
    bias = property(lambda self: self.base.bias)
    in_features = property(lambda self: self.base.in_features)
    out_features = property(lambda self: self.base.out_features)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Halved(nn.Module):
    """A parametrization."""

    def forward(self, weight):
        return weight / 2


def replace(model: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, new)


def an_adapter(model, name, layer):
    replace(model, name, Adapter(layer))


def a_subclass(model, name, layer):
    layer.__class__ = Doubled


def a_wrapped_forward(model, name, layer):
    own = layer.forward
    layer.forward = lambda x: 2 * own(x)


def a_forward_hook(model, name, layer):
    layer.register_forward_hook(lambda module, inputs, output: 2 * output)


def a_forward_hook_with_kwargs(model, name, layer):
    layer.register_forward_hook(
        lambda module, args, kwargs, output: 2 * output, with_kwargs=True, always_call=True
    )


def a_forward_pre_hook(model, name, layer):
    layer.register_forward_pre_hook(lambda module, inputs: (2 * inputs[0],))


def a_parametrization(model, name, layer):
    nn.utils.parametrize.register_parametrization(layer, "weight", Halved())


def weight_norm(model, name, layer):
    nn.utils.parametrizations.weight_norm(layer)
    with torch.no_grad():
        layer.parametrizations.weight.original0.mul_(2)


def spectral_norm(model, name, layer):
    nn.utils.parametrizations.spectral_norm(layer).eval()


def old_weight_norm(model, name, layer):
    nn.utils.weight_norm(layer)
    with torch.no_grad():
        layer.weight_g.mul_(2)


def old_spectral_norm(model, name, layer):
    nn.utils.spectral_norm(layer).eval()


def pruning(model, name, layer):
    nn.utils.prune.l1_unstructured(layer, "weight", 0.5)


def no_bias(model, name, layer):
    layer.bias = None


def dynamic_quantization(model, name, layer):
    plain = copy.copy(layer)
    plain.__class__ = nn.Linear
    plain.qconfig = torch.ao.quantization.default_dynamic_qconfig
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        replace(model, name, torch.ao.nn.quantized.dynamic.Linear.from_float(plain))


def a_tied_weight(model, name, layer):
    """With a layer of the same shape that is not the model's."""
    other = nn.Linear(layer.in_features, layer.out_features)
    layer.weight = other.weight


def a_computing_tensor(model, name, layer):
    """A weight of a subclass of tensors, as torchao's are: here all products are doubled."""
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Twice), requires_grad=False)


class Twice(torch.Tensor):
    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            out = function(*args, **(kwargs or {}))
            if function is torch.Tensor.detach:
                return out.as_subclass(Twice)
            return 2 * out if function is nn.functional.linear else out


LAYERS = (
    an_adapter,
    a_subclass,
    a_wrapped_forward,
    a_forward_hook,
    a_forward_hook_with_kwargs,
    a_forward_pre_hook,
    a_parametrization,
    weight_norm,
    spectral_norm,
    old_weight_norm,
    old_spectral_norm,
    pruning,
    no_bias,
    dynamic_quantization,
    a_tied_weight,
    a_computing_tensor,
)


class RootMeanSquare(nn.LayerNorm):
    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight


NORMS = {
    "RMSNorm": lambda model, name, norm: replace(model, name, nn.RMSNorm(norm.normalized_shape)),
    "Identity": lambda model, name, norm: replace(model, name, nn.Identity()),
    "without affine": lambda model, name, norm: replace(
        model, name, nn.LayerNorm(norm.normalized_shape, elementwise_affine=False)
    ),
    "without bias": lambda model, name, norm: replace(
        model, name, nn.LayerNorm(norm.normalized_shape, bias=False)
    ),
    "one's own": lambda model, name, norm: replace(
        model, name, RootMeanSquare(norm.normalized_shape)
    ),
    "a hook": a_forward_hook,
    "a pre-hook": a_forward_pre_hook,
    "a wrapped forward": a_wrapped_forward,
    "a parametrization": a_parametrization,
}


def linear_layers(model: nn.Module) -> list[str]:
    return [
        name for name, module in model.named_modules() if name and isinstance(module, nn.Linear)
    ]


def norms(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.LayerNorm)]
