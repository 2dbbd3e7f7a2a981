"""Is a layer as its class is written? The one place that asks, for all that reads a layer's
parameters in the place of calling it.

People put adapters in a layer's place, hook it, wrap its forward, parametrize, prune or quantize
its weight. A fused path computes what the class computes from its parameters, so it may serve only
a layer of which nothing of that is true; any other is called.
"""

from collections.abc import Callable
from typing import Any, TypeGuard, TypeVar

import torch
from torch import Tensor, nn

from ecar_kernels._transforms import traced_as_constant

M = TypeVar("M", bound=nn.Module)

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
# What a subclass may override without another result.
_HARMLESS = {"__init__", "reset_parameters", "extra_repr", "_reset_parameters"}
# Types of parameters that are their values, and no more. packing.py adds its own.
PLAIN = {nn.Parameter}
_missing = object()
_call = nn.Module.__call__
_forwards: dict[type[nn.Module], Callable] = {
    kind: kind.forward for kind in (nn.Linear, nn.LayerNorm, nn.Embedding)
}


def remember(*kinds: type[nn.Module]) -> None:
    """Classes as they are now, at the first call: where somebody replaces their forward later,
    `why_not` says so."""
    for kind in kinds:
        _forwards.setdefault(kind, kind.forward)


def as_written(module: object, kind: type[M], *, compiled: bool = False) -> TypeGuard[M]:
    """Does calling `module` do just what `kind` does with the module's own plain parameters?"""
    return why_not(module, kind, compiled=compiled) is None


def why_not(module: object, kind: type[nn.Module], *, compiled: bool = False) -> str | None:
    """None where the module is as `kind` is written, else what it is.

    An accelerated module counts as its original class, a subclass that changes none of the
    methods as `kind`. Parameters named weight and bias are floating-point nn.Parameters, or None.
    compiled: a call compiled by `module.compile()`, which computes the same, does not matter.
    Hooks for all modules (`register_module_forward_hook`) do not count: those of a FLOP counter,
    say, see what is called.
    """
    if (reason := why_another(module, kind)) is not None:
        return reason
    own = module.__dict__
    if not compiled and own.get("_compiled_call_impl") is not None:
        return "it is compiled"
    for name in _HOOKS:
        if own[name]:
            return f"it has {name[1:].replace('_', ' ')}"
    parameters = own["_parameters"]
    for name in ("weight", "bias"):
        value = parameters.get(name, _missing)
        if value is _missing:
            # A property of the class, as parametrize makes it, or an attribute, as pruning does.
            if own.get(name) is not None or (name not in own and hasattr(type(module), name)):
                return f"its {name} is computed"
        elif value is not None and not is_plain(value):
            return f"its {name} is a {type(value).__name__} of {value.dtype}"
    return None


def why_another(module: object, kind: type[nn.Module]) -> str | None:
    """None where its methods are those that `kind` was written with, else what they are."""
    if not isinstance(module, nn.Module):
        return f"a {type(module).__name__} in the place of a {kind.__name__}"
    own, original = module.__dict__, original_class(module)
    if original is not kind and not _inherits(original, kind):
        name = original.__name__
        if name == kind.__name__:  # as peft's Linear
            name = f"{original.__module__}.{original.__qualname__}"
        return f"a {name} in the place of a {kind.__name__}"
    methods = _methods(kind)
    if not methods.isdisjoint(own):
        return f"its {min(methods & own.keys())} was replaced"
    if kind.forward is not _forwards.get(kind, kind.forward):
        return f"{kind.__name__}.forward was replaced"
    return None


def original_class(module: nn.Module) -> type[nn.Module]:
    """Its class without acceleration, also where a library made one of the accelerated class since
    that changes none of its methods (as FSDP does)."""
    binding, kind = module.__dict__.get("_binding"), type(module)  # what `accelerate` leaves
    if binding is None:
        return kind
    made = kind is binding.replacement or _inherits(kind, binding.replacement)
    return binding.original if made else kind


def is_plain(tensor: Any) -> TypeGuard[Tensor]:
    """Does a parameter or buffer hold just its own floating-point values?"""
    return (type(tensor) in PLAIN or type(tensor) is torch.Tensor) and tensor.is_floating_point()


def has_affine(norm: object) -> TypeGuard[nn.LayerNorm]:
    """Is it a LayerNorm as written, with a weight and a bias?"""
    return as_written(norm, nn.LayerNorm) and norm.weight is not None and norm.bias is not None


def address(tensor: Tensor) -> int:
    """Where its values lie, to compare. `data_ptr()` would be a pointer to write to, for which
    PyTorch moves a tensor that shares its memory with a lazy clone (packing.py)."""
    return torch._C._data_address(tensor)  # type: ignore[attr-defined]  # not in torch's stubs


_method_names: dict[type, frozenset[str]] = {}
_inheriting: dict[tuple[type, type], bool] = {}


@traced_as_constant  # what they say of classes, which a graph need not see through
def _methods(kind: type[nn.Module]) -> frozenset[str]:
    found = _method_names.get(kind)
    if found is None:
        # With those of what it inherits from, down to nn.Module.
        bases = [base for base in kind.__mro__[:-1] if issubclass(base, nn.Module)]
        own = (vars(base).items() for base in bases if base is not nn.Module)
        names = frozenset(name for items in own for name, value in items if callable(value))
        found = _method_names[kind] = names - _HARMLESS
    return found


@traced_as_constant
def _inherits(cls: type, kind: type[nn.Module]) -> bool:
    """Is it a subclass with all of its methods?"""
    found = _inheriting.get((cls, kind))
    if found is None:
        found = _inheriting[cls, kind] = (
            issubclass(cls, kind)
            and cls.__call__ is _call
            and all(getattr(cls, name) is getattr(kind, name) for name in _methods(kind))
        )
    return found
