"""Modules that are served by a backend chosen once, ahead of time: `accelerate` and `restore`.

`accelerate(model)` changes the class of every module for which an accelerated one is known;
parameters, buffers and hooks stay, and `restore(model)` changes it back. So an accelerated module
has no constructor and no state of its own: it is a subclass that overrides forward (or another
method) and calls the ops that `Accelerated.ops` bound.
"""

import functools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ecar_kernels import _transforms, registry
from ecar_kernels._written import as_written, has_affine, is_plain, remember, why_not
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


PUBLIC = Ops(
    stage_attention,
    adaln,
    gated_residual,
    gated_residual_adaln,
    adaln_linear,
    linear_gated_residual,
)


@functools.cache
def _bound(
    backend: str, device_type: str, dtype: torch.dtype, width: int, head_dim: int, recorded: bool
) -> Ops:
    def resolve(op: str) -> Callable:
        size = head_dim if op == "stage_attention" else width
        try:
            run = registry.implementation(op, device_type, dtype, size, backend=backend)
        except registry.BackendUnavailableError as error:
            return functools.partial(_refuse, str(error))  # a module need not use every op
        return registry.recorded(run) if recorded else run

    return Ops(*map(resolve, Ops._fields))


def _refuse(reason: str, *args: object, **kwargs: object) -> None:
    raise registry.BackendUnavailableError(reason)


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
    replacement: type[nn.Module]


if TYPE_CHECKING:
    _Mixin = nn.Module  # what it is mixed into
else:
    _Mixin = object


class Accelerated(_Mixin):
    """Mixin of accelerated modules: `class FastBlock(Accelerated, Block)`.

    Class attributes say what `accelerate` prepares:
        uses: the ops that it calls.
        weights: parameters of linear layers, by name, that reach adaln_linear or
            linear_gated_residual where the layer is as written (`ecar_kernels.fused` asks).
        norms: LayerNorms, by name, whose weight and bias are read likewise.
    Attributes of the module tell what some backends limit, where it has them:
        width: C of the adaLN and fused ops. head_dim: D of stage_attention.
    """

    uses: ClassVar[tuple[str, ...]] = ()
    weights: ClassVar[tuple[str, ...]] = ()
    norms: ClassVar[tuple[str, ...]] = ()
    width: int = 0
    head_dim: int = 0
    _binding: Binding

    def ops(self, x: Tensor, *like: Tensor | None) -> Ops:
        """The ops for x [.., C], bound: they neither validate their arguments nor look up.

        like: modulations and other tokens that they will be given. Where a gradient may be asked
        for, under torch.autocast (which the public ops obey), under torch.compile (for which they
        cost nothing), under a transform of torch.func or forward-mode AD, on the meta device, and
        where x or the others are not what the module takes (the public ops say why), they are the
        public ones, `PUBLIC`: a forward that is for inference only then calls its parent's. To be
        called before a weight is looked at.
        """
        if torch.compiler.is_compiling():
            packing.unpack_all()
            return PUBLIC
        if (
            torch.is_grad_enabled()
            or not isinstance(x, Tensor)
            or x.is_meta
            or _transforms.active()
            or torch.is_autocast_enabled(x.device.type)
            or not self._takes(x, like)
        ):
            return PUBLIC
        return _bound(
            self._binding.backend,
            x.device.type,
            x.dtype,
            x.shape[-1],
            self.head_dim,
            registry.recording(),
        )

    def _takes(self, x: Tensor, like: tuple[Tensor | None, ...]) -> bool:
        """Is x [.., C] as wide as the module, or [.., D] as its heads, and are the others tokens
        like x, or one for all images or tokens?"""
        shape, dtype, device = x.shape, x.dtype, x.device
        if x.ndim < 2 or (self.width and shape[-1] not in (self.width, self.head_dim)):
            return False
        return all(
            other is None
            or (
                isinstance(other, Tensor)
                and other.ndim == x.ndim == 3
                and other.dtype is dtype
                and other.device == device
                and other.shape[2] == shape[2]
                and other.shape[0] in (1, shape[0])
                and other.shape[1] in (1, shape[1])
            )
            for other in like
        )

    def extra_repr(self) -> str:
        """The module's own, and which backend serves what: "adaln_linear: cpp"."""
        served = ", ".join(f"{op}: {name}" for op, name in _serving(self).items())
        return ", ".join(filter(None, (super().extra_repr(), served)))


Module = TypeVar("Module", bound=nn.Module)
_accelerated: dict[type[nn.Module], type[Accelerated]] = {}


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
        if not (
            isinstance(replacement, type)
            and issubclass(replacement, original)
            and issubclass(replacement, Accelerated)
        ):
            raise TypeError(
                f"accelerates({original.__name__}): expected a subclass of Accelerated "
                f"and of {original.__name__}, got {replacement!r}"
            )
        if own := {"__init__", "__new__", "__slots__"} & vars(replacement).keys():
            raise TypeError(
                f"accelerates({original.__name__}): expected a class without a "
                f"constructor and state of its own, {replacement.__name__} defines "
                f"{min(own)}"
            )
        if unknown := set(replacement.uses) - set(Ops._fields):
            raise ValueError(
                f"{replacement.__name__}.uses: expected names out of "
                f"{', '.join(Ops._fields)}, got {min(unknown)!r}"
            )
        _accelerated[original] = replacement
        remember(original)
        return replacement

    return register


def accelerate(
    model: nn.Module, *, backend: str | None = None, keep_weights: bool = True
) -> "Report":
    """Serve the modules of `model` that have an accelerated class from one backend, in place.

    model: any module; its modules of a class that `accelerates` knows are swapped: those of
    `ecar_kernels.modules`, and those that their author registered. backend: as for
    `use_backend`, chosen now and for good; None for the active one. keep_weights: weights that
    the backend packs are packed now, beside the plain ones; with False in their place, so that
    memory does not grow. That is for sampling: whatever reads or writes such a weight later (a
    state_dict, an optimizer, `to`, torch.compile) turns it back into a plain one first.

    Returns a report of what was swapped, what was left and why: printed, a table. `report(model)`
    tells the same later, and print(model) shows what serves each module. A warning says so where
    nothing was swapped.
    parameters(), state_dict() and hooks are unchanged. Training, autocast and torch.compile work
    as before, on the public ops. What stands in a layer's place (an adapter, a quantized layer)
    is called, and hooks fire, also where they come later. Calling it again binds anew; a weight
    that changed is packed again on its next use.

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
        original = _original(module)
        if (replacement := _accelerated.get(original)) is not None:
            try:
                _resolve(replacement, module, backend)
            except registry.BackendUnavailableError as error:
                raise registry.BackendUnavailableError(
                    f"module '{name}' ({original.__name__}): {error}"
                ) from None
            found.append((module, replacement, Binding(backend, original, replacement)))
    if not found:
        warnings.warn(
            f"accelerate: no module of {type(model).__name__} was swapped: none is a "
            f"{', '.join(kind.__name__ for kind in _accelerated)}",
            stacklevel=2,
        )
    before = [(module, type(module), vars(module).get("_binding")) for module, *_ in found]
    try:
        for module, replacement, binding in found:
            module._binding = binding
            module.__class__ = replacement
            _prepare_weights(module, keep_weights)
    except BaseException:
        for module, kind, binding in before:
            module.__class__ = kind
            module._binding = binding
            if binding is None:
                del module._binding
        raise
    return report(model)


@dataclass(frozen=True)
class ReportRow:
    """One module of `report`.

    name: in the model. kind: its original class. served: op -> backend; empty where the module was
    not swapped. left: what of it is not fused, and why.
    """

    name: str
    kind: str
    served: dict[str, str]
    left: tuple[str, ...]


class Report(tuple[ReportRow, ...]):
    """What `accelerate` swapped in a model and what it left: a row for each module, printed as a
    table.
    """

    __slots__ = ()

    def __str__(self) -> str:
        lines = [("module", "class", "served", "left")]
        lines += [
            (
                row.name or "(the model)",
                row.kind,
                ", ".join(f"{op}: {by}" for op, by in row.served.items()) or "-",
                "; ".join(row.left) or "-",
            )
            for row in self
        ]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in lines
        )

    __repr__ = __str__


def report(model: nn.Module) -> Report:
    """The modules of `model` that `accelerate` swapped, or knows by a class of theirs, as they are
    now: what serves them, and which of their layers are called instead of fused, and why.

    Raises TypeError where `model` is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"argument 'model': expected a module, got {type(model).__name__}")
    rows = []
    for name, module in model.named_modules():
        original = _original(module)
        if original is not type(module):
            rows.append(ReportRow(name, original.__name__, _serving(module), tuple(_left(module))))
        elif isinstance(module, tuple(_accelerated)):
            why = (
                "accelerate was not called since it is there"
                if type(module) in _accelerated
                else "a subclass, whose forward may be another"
            )
            rows.append(ReportRow(name, type(module).__name__, {}, (why,)))
    return Report(rows)


def _left(module: Accelerated) -> Iterator[str]:
    for name, layer in _layers(module, type(module)):
        if (reason := why_not(layer, nn.Linear)) is not None:
            yield f"{name or 'weight'}: {reason}"
    for name in module.norms:
        norm = module.get_submodule(name)
        if (reason := why_not(norm, nn.LayerNorm)) is not None:
            yield f"{name}: {reason}"
        elif not has_affine(norm):
            yield f"{name}: it has no weight or no bias"


def _layers(module: nn.Module, kind: type[Accelerated]) -> Iterator[tuple[str, nn.Module | None]]:
    """Those whose weights the class reads, by name; None where there is nothing of that name."""
    for name in kind.weights:
        layer: nn.Module | None = module
        path = name.rpartition(".")[0]
        for part in filter(None, path.split(".")):
            layer = layer._modules.get(part) if layer is not None else None
        yield path, layer


Restored = TypeVar("Restored", bound=nn.Module)


def restore(model: Restored) -> Restored:
    """Undo `accelerate`, in place: every module has its class back, every weight is plain.

    Returns the model. Modules that were not accelerated are left alone. Raises TypeError where
    `model` is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"argument 'model': expected a module, got {type(model).__name__}")
    for module in model.modules():
        binding = vars(module).get("_binding")
        if binding is not None:
            for _, layer in _layers(module, binding.replacement):
                if layer is not None and is_plain(weight := layer._parameters.get("weight")):
                    packing.release(weight)
            module.__class__ = _restored(type(module), binding)
            del module._binding
    return model


def _original(module: nn.Module) -> type[nn.Module]:
    """Its class, without acceleration."""
    kind, binding = type(module), vars(module).get("_binding")
    return binding.original if binding is not None and kind is binding.replacement else kind


def _restored(kind: type[nn.Module], binding: Binding) -> type[nn.Module]:
    """The class without acceleration of a module whose class may have been changed since, to one
    made of the accelerated class (as parametrize does) or to another."""
    if kind is binding.replacement:
        return binding.original
    if binding.replacement not in kind.__bases__:
        return kind
    bases = tuple(
        binding.original if base is binding.replacement else base for base in kind.__bases__
    )
    own = {
        name: value for name, value in vars(kind).items() if name not in ("__dict__", "__weakref__")
    }
    return type(
        kind.__name__.replace(binding.replacement.__name__, binding.original.__name__), bases, own
    )


def _place(module: nn.Module) -> tuple[str, torch.dtype]:
    """Device and dtype of its parameters; where there are none, those of a new tensor."""
    sample: Tensor | None = next((p for p in module.parameters() if p.is_floating_point()), None)
    sample = torch.empty(0) if sample is None else sample
    return sample.device.type, sample.dtype


def _resolve(replacement: type[Accelerated], module: nn.Module, backend: str) -> dict:
    """The function of each op that it uses, for the place where its parameters are now."""
    device_type, dtype = _place(module)
    return {
        op: registry.implementation(
            op,
            device_type,
            dtype,
            getattr(module, "head_dim" if op == "stage_attention" else "width", 0),
            backend=backend,
        )
        for op in replacement.uses
    }


def _serving(module: Accelerated) -> dict[str, str]:
    """Each op's backend, for the place where its parameters are now."""
    found = _resolve(type(module), module, module._binding.backend)
    return {op: run.backend for op, run in found.items()}


def _prepare_weights(module: Accelerated, keep: bool) -> None:
    if not module.weights:
        return
    device_type, dtype = _place(module)
    run = registry.implementation(
        "adaln_linear", device_type, dtype, backend=module._binding.backend
    )
    if run.prepare_weight is not None:
        for _, layer in _layers(module, type(module)):
            if as_written(layer, nn.Linear):
                run.prepare_weight(layer.weight, keep)
