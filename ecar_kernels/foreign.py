"""Blocks of other libraries: accelerated classes that are found by the name of a block's class.

An integration (the files of integrations/) says how a block is computed from the ops, under the
full name of its class. No library is imported for that: `accelerate` compares the name with those
of the modules it meets, and joins the integration to the class of the block.
"""

import copyreg
import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ecar_kernels import _transforms, _written
from ecar_kernels.acceleration import PUBLIC, Accelerated, Ops
from ecar_kernels.flow_block import packing

integrations: dict[str, type["Foreign"]] = {}


class _Joined(type):
    """The class of a class that `join` makes."""

    integration: type["Foreign"]
    original: type[nn.Module]


class Foreign(Accelerated):
    """Base of integrations, whose `run` is tried before the block's own forward.

    A block is served whole or not at all: where anything that `run` computes in a submodule's place
    is not as its library writes it (a hook, another attention processor, an adapter around a whole
    part), the block's own forward runs. Linear layers alone are called instead, as
    `ecar_kernels.fused` does.
    """

    width = property(lambda self: self.sizes(self)[0])
    head_dim = property(lambda self: self.sizes(self)[1])

    @classmethod
    def why_another_class(cls, kind: type[nn.Module]) -> str | None:
        """None where the class of that name is the one that `run` was written for, else why not."""
        if (reason := why_patched(kind)) is not None:
            return reason
        given, known = (tuple(inspect.signature(f).parameters) for f in (kind.forward, cls.run))
        if given != known:
            return f"another version of it: its forward takes {', '.join(given[1:])}"
        return None

    @staticmethod
    def why_not(block: Any) -> str | None:
        """None where `run` computes what the block does, else what of it is otherwise.

        It is asked in each call, so it only compares.
        """
        raise NotImplementedError

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """The block's forward, with its parameters; None where the block is to run its own."""
        raise NotImplementedError

    @classmethod
    def introduce(cls, joined: type["Foreign"]) -> None:
        """Enter a new class of `join` where the library keeps tables of its classes."""

    def ready(self, x: Tensor, *others: Tensor) -> Ops | None:
        """The ops for the tokens x [B, N, C], or None for the block's own forward.

        Where the block is trained they are the public ones. others: tokens that they will be given
        besides, [B, M, C].
        """
        ops = self.ops(x)
        if (
            (ops is PUBLIC and not torch.is_grad_enabled())
            or not all(map(_has_tokens, (x, *others)))
            or torch.is_autocast_enabled(x.device.type)
            or any(_place(other) != _place(x) for other in others)
            or _transforms.active()
            or self.why_not(self) is not None
        ):
            return None
        return ops

    def fits(self, x: Tensor, *parts: Tensor) -> bool:
        """Are modulations what the ops take with x? Others are the block's own forward's."""
        return self._takes(x, parts)


def _has_tokens(x: object) -> bool:
    return isinstance(x, Tensor) and x.ndim == 3 and x.numel() > 0 and not x.is_meta


def _place(x: Tensor) -> tuple:
    return x.shape[0], x.shape[2], x.dtype, x.device


Integration = TypeVar("Integration", bound=type[Foreign])


def serves(*names: str) -> Callable[[Integration], Integration]:
    """Class decorator: an integration for blocks whose class has one of these names.

    names: full ones ("diffusers.models.attention.BasicTransformerBlock"), or, for code that is
    copied from project to project, the class's own ("DiTBlock").
    """

    def register(integration: Integration) -> Integration:
        integrations.update(dict.fromkeys(names, integration))
        return integration

    return register


def integration_of(kind: type[nn.Module]) -> tuple[type[Foreign], type[nn.Module]] | None:
    """The integration for a class or what it inherits from, and the class that bears its name."""
    for base in kind.__mro__:
        for name in (f"{base.__module__}.{base.__qualname__}", base.__name__):
            if name in integrations and not issubclass(kind, Foreign):
                return integrations[name], base
    return None


def why_not_served(
    module: nn.Module, integration: type[Foreign], base: type[nn.Module]
) -> str | None:
    """None where a module, not swapped or restored, can be served, else why not."""
    if (reason := integration.why_another_class(base)) is not None:
        return reason
    if (reason := _written.why_another(module, base)) is not None:
        return (
            "a subclass, whose forward may be another" if " in the place of " in reason else reason
        )
    if "parametrizations" in module._modules:
        return "it is parametrized"
    return integration.why_not(module)


def join(integration: type[Foreign], original: type[nn.Module]) -> type[Foreign]:
    """The class of a block that an integration serves: a subclass of both, with its own name."""
    if (integration, original) not in _joined:
        _joined[integration, original] = joined = _join(integration, original)
        integration.introduce(joined)
    return _joined[integration, original]


def _join(integration: type[Foreign], original: type[nn.Module]) -> type[Foreign]:
    written = original.forward
    given, known = (tuple(inspect.signature(f).parameters) for f in (written, integration.run))
    names = dict(zip(given, known, strict=False))  # of copied code, its own

    @functools.wraps(written)
    def forward(self, *args, **kwargs):
        if not isinstance(self, integration):  # restored, and still called
            return original.forward(self, *args, **kwargs)
        if torch.compiler.is_compiling():
            packing.unpack_all()
        elif original.forward is written:  # else somebody replaced it
            result = integration.run(self, *args, **{names.get(k, k): v for k, v in kwargs.items()})
            if result is not None:
                return result
        return super(joined, self).forward(*args, **kwargs)

    own = {
        "__doc__": original.__doc__,
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "integration": integration,
        "original": original,
        "forward": forward,
    }
    joined: Any = _Joined(original.__name__, (integration, original), own)
    return joined


def _made_of(joined: Any) -> Any:
    """How a class is pickled: the call that makes it."""
    return join, (joined.integration, joined.original)


copyreg.pickle(_Joined, _made_of)


def loaded(name: str) -> type[Any] | None:
    """The class of that full name, if its library is imported; never imports it."""
    found = _loaded.get(name)
    if found is None:
        module, _, own = name.rpartition(".")
        found = getattr(sys.modules.get(module), own, None)
        if found is not None:
            _loaded[name] = found
    return found


def why_patched(kind: type[Any], method: str = "forward") -> str | None:
    """None where a class has the method that its own file gives it, else that it has not."""
    function, key = getattr(kind, method), (kind, method)
    if key not in _methods:
        owner = next(base for base in kind.__mro__ if method in vars(base))
        code = getattr(function, "__code__", None)
        file = getattr(sys.modules.get(owner.__module__), "__file__", None)
        _methods[key] = function, code is not None and code.co_filename == file
    known, right = _methods[key]
    return None if right and known is function else f"{kind.__name__}.{method} was replaced"


_joined: dict[tuple[type, type], type[Foreign]] = {}
_loaded: dict[str, type[Any]] = {}
_methods: dict[tuple[type, str], tuple[Callable, bool]] = {}
