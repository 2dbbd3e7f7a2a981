"""Modules that are served by a backend chosen once, ahead of time: `accelerate` and `restore`.

`accelerate(model)` changes the class of every module for which an accelerated one is known;
parameters, buffers and hooks stay, and `restore(model)` changes it back. So an accelerated module
has no constructor and no state of its own: it is a subclass that overrides forward (or another
method) and calls the ops that `Accelerated.ops` bound.
"""

import functools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ecar_kernels import _transforms, registry
from ecar_kernels.adaln.api import adaln, gated_residual, gated_residual_adaln
from ecar_kernels.flow_block import packing
from ecar_kernels.flow_block.api import adaln_linear, linear_gated_residual
from ecar_kernels.stage_attention.api import stage_attention


class Ops(NamedTuple):
    """The ops of a module, as functions with the signatures of `ecar_kernels`'."""

    stage_attention: Callable
    adaln: Callable
    gated_residual: Callable
    gated_residual_adaln: Callable
    adaln_linear: Callable
    linear_gated_residual: Callable


PUBLIC = Ops(stage_attention, adaln, gated_residual, gated_residual_adaln, adaln_linear,
             linear_gated_residual)


@functools.cache
def _bound(backend: str, device_type: str, dtype: torch.dtype, width: int, head_dim: int) -> Ops:
    def resolve(op: str) -> Callable:
        size = head_dim if op == "stage_attention" else width
        try:
            return registry.implementation(op, device_type, dtype, size, backend=backend)
        except registry.BackendUnavailableError as error:
            return functools.partial(_refuse, str(error))  # a module need not use every op
    return Ops(*map(resolve, Ops._fields))


def _refuse(reason: str, *args: object, **kwargs: object) -> None:
    raise registry.BackendUnavailableError(reason)


def server(ops: Ops, op: str, x: Tensor, weight: Tensor | None = None) -> str | None:
    """The backend that serves `op` out of a module's `ops` for x [.., C], by the function called.

    weight: what a fused GEMM reads. None where no backend does.
    """
    run = getattr(ops, op)
    if ops is PUBLIC:
        run = registry.implementation(op, x.device.type, x.dtype, x.shape[-1])
    backend = registry.backend_of(op, run)
    # Such a weight has no version, by which a packed copy is known to be fresh.
    refused = backend == "native" and weight is not None and weight.is_inference()
    return "reference" if refused else backend


def served(module: nn.Module, x: Tensor, method: str = "forward") -> Iterator[tuple[str, str]]:
    """What serves a call of the method for x [.., C], where no gradient is asked for.

    Pairs of an op and a backend, or of a class and "torch", whose layers are torch's own. Of
    another class, a subclass too, and of a method that was replaced: the class and "unknown".
    """
    binding = vars(module).get("_binding")
    original = type(module) if binding is None else binding.original
    if "served" in vars(original) and method not in vars(module):
        yield from module.served(x)
    else:
        yield type(module).__name__, "unknown"


_unit_gates: dict[tuple, Tensor] = {}


def unit_gate(x: Tensor, width: int) -> Tensor:
    """A gate of 1 for tokens like x [B, ..]: [B, 1, width], a view of a constant.

    The constant is kept, so that no call launches a kernel to fill it.
    """
    key = x.device, x.dtype, width
    ones = _unit_gates.get(key) if type(x) is Tensor else None
    if ones is None:
        with torch.inference_mode(False):
            ones = torch.ones(1, 1, width, device=x.device, dtype=x.dtype)
        # Not a fake one, and not one that a CUDA graph fills when it is replayed.
        keep = type(x) is type(ones) is Tensor
        if keep and x.is_cuda:
            keep = not torch.cuda.is_current_stream_capturing()
            if keep:  # the next to read it may be on another stream
                torch.cuda.current_stream(x.device).synchronize()
        if keep:
            _unit_gates[key] = ones
    return ones.expand(len(x), 1, -1)


@dataclass(frozen=True)
class Binding:
    """What `accelerate` leaves in a module, and `restore` takes away."""

    backend: str  # "auto", or a name
    original: type[nn.Module]


class Accelerated:
    """Mixin of accelerated modules: `class FastBlock(Accelerated, Block)`.

    Class attributes say what `accelerate` prepares:
        uses: the ops that it calls.
        weights: parameters, by name, that reach adaln_linear or linear_gated_residual.
    Attributes of the module tell what some backends limit, where it has them:
        width: C of the adaLN and fused ops. head_dim: D of stage_attention.
    """

    uses: ClassVar[tuple[str, ...]] = ()
    weights: ClassVar[tuple[str, ...]] = ()
    width: int = 0
    head_dim: int = 0
    _binding: Binding

    def ops(self, x: Tensor) -> Ops:
        """The ops for x [.., C], bound: they neither validate their arguments nor look up.

        Where a gradient may be asked for, under torch.autocast (which the public ops obey),
        under torch.compile (for which they cost nothing), under a transform of torch.func or
        forward-mode AD and on the meta device they are the public ones, `PUBLIC`: a forward that
        is for inference only then calls its parent's. To be called before a weight is looked at.
        """
        if torch.compiler.is_compiling():
            packing.unpack_all()
            return PUBLIC
        if (torch.is_grad_enabled() or x.is_meta or _transforms.active()
                or torch.is_autocast_enabled(x.device.type)):
            return PUBLIC
        return _bound(self._binding.backend, x.device.type, x.dtype, x.shape[-1], self.head_dim)

    def extra_repr(self) -> str:
        """The module's own, and which backend serves what: "adaln_linear: native"."""
        served = ", ".join(f"{op}: {name}" for op, name in _serving(self).items())
        return ", ".join(filter(None, (super().extra_repr(), served)))


Module = TypeVar("Module", bound=nn.Module)
_accelerated: dict[type[nn.Module], type[nn.Module]] = {}


def accelerates(original: type[nn.Module]) -> Callable[[type[Module]], type[Module]]:
    """Class decorator: `accelerate` makes modules of class `original` into the decorated class.

        @ecar_kernels.accelerates(DiTBlock)
        class FastDiTBlock(ecar_kernels.Accelerated, DiTBlock):
            uses = ("adaln_linear",)
            weights = ("mlp.fc1.weight",)

            def forward(self, x, modulation):
                ops = self.ops(x)
                ...

    It holds for `original` itself, not for its subclasses, whose forward may be another. Raises
    TypeError where `original` is no class of modules, or the decorated one no subclass of it and
    of `Accelerated`, or one with a constructor or slots of its own; ValueError for an unknown
    name in `uses`.
    """
    if not (isinstance(original, type) and issubclass(original, nn.Module)):
        raise TypeError(f"argument 'original': expected a class of modules, got {original!r}")

    def register(replacement: type[Module]) -> type[Module]:
        if not (isinstance(replacement, type) and issubclass(replacement, original)
                and issubclass(replacement, Accelerated)):
            raise TypeError(f"accelerates({original.__name__}): expected a subclass of Accelerated "
                            f"and of {original.__name__}, got {replacement!r}")
        if own := {"__init__", "__new__", "__slots__"} & vars(replacement).keys():
            raise TypeError(f"accelerates({original.__name__}): expected a class without a "
                            f"constructor and state of its own, {replacement.__name__} defines "
                            f"{min(own)}")
        if unknown := set(replacement.uses) - set(Ops._fields):
            raise ValueError(f"{replacement.__name__}.uses: expected names out of "
                             f"{', '.join(Ops._fields)}, got {min(unknown)!r}")
        _accelerated[original] = replacement
        return replacement
    return register


Model = TypeVar("Model", bound=nn.Module)


def accelerate(model: Model, *, backend: str | None = None, keep_weights: bool = True) -> Model:
    """Serve the modules of `model` that have an accelerated class from one backend, in place.

    model: any module; its modules of a class that `accelerates` knows are swapped: those of
    `ecar_kernels.modules`, and those that their author registered. backend: as for
    `use_backend`, chosen now and for good; None for the active one. keep_weights: weights that
    the backend packs are packed now, beside the plain ones; with False in their place, so that
    memory does not grow. That is for sampling: whatever reads or writes such a weight later (a
    state_dict, an optimizer, `to`, torch.compile) turns it back into a plain one first.

    Returns the model. parameters(), state_dict() and hooks are unchanged, print(model) shows
    what serves each module. Training, autocast and torch.compile work as before, on the public
    ops. Calling it again binds anew; a weight that changed is packed anew on its next use.

    Raises TypeError where `model` is no module, ValueError for an unknown backend,
    BackendUnavailableError where a backend asked for by name cannot serve a module, which then
    names it; the model is then unchanged.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"argument 'model': expected a module, got {type(model).__name__}")
    if backend is None:
        backend = registry.active_backend()
    else:
        registry._check_backend(backend, "argument 'backend'")
    found = []
    for name, module in model.named_modules():
        binding = vars(module).get("_binding")
        original = type(module) if binding is None else binding.original
        if (replacement := _accelerated.get(original)) is not None:
            try:
                _resolve(replacement, module, backend)
            except registry.BackendUnavailableError as error:
                raise registry.BackendUnavailableError(
                    f"module '{name}' ({original.__name__}): {error}") from None
            found.append((module, replacement, Binding(backend, original)))
    for module, replacement, binding in found:
        module._binding = binding
        module.__class__ = replacement
        _prepare_weights(module, keep_weights)
    return model


def restore(model: Model) -> Model:
    """Undo `accelerate`, in place: every module has its class back, every weight is plain.

    Returns the model. Modules that were not accelerated are left alone. Raises TypeError where
    `model` is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"argument 'model': expected a module, got {type(model).__name__}")
    for module in model.modules():
        binding = vars(module).get("_binding")
        if binding is not None:
            for name in module.weights:
                packing.release(module.get_parameter(name))
            module.__class__ = binding.original
            del module._binding
    return model


def _place(module: nn.Module) -> tuple[str, torch.dtype]:
    """Device and dtype of its parameters; where there are none, those of a new tensor."""
    sample = next((p for p in module.parameters() if p.is_floating_point()), None)
    sample = torch.empty(0) if sample is None else sample
    return sample.device.type, sample.dtype


def _resolve(replacement: type[Accelerated], module: nn.Module, backend: str) -> dict:
    """The function of each op that it uses, for the place where its parameters are now."""
    device_type, dtype = _place(module)
    return {op: registry.implementation(
        op, device_type, dtype,
        getattr(module, "head_dim" if op == "stage_attention" else "width", 0), backend=backend)
        for op in replacement.uses}


def _serving(module: Accelerated) -> dict[str, str]:
    """Each op's backend, for the place where its parameters are now."""
    found = _resolve(type(module), module, module._binding.backend)
    return {op: registry.backend_of(op, run) for op, run in found.items()}


def _prepare_weights(module: Accelerated, keep: bool) -> None:
    if not module.weights:
        return
    device_type, dtype = _place(module)
    run = registry.implementation("adaln_linear", device_type, dtype,
                                  backend=module._binding.backend)
    prepare = getattr(sys.modules[run.__module__], "prepare_weight", None)
    if prepare is not None:
        for name in module.weights:
            prepare(module.get_parameter(name), keep)
