"""A model's modules swapped for accelerated ones, and back: `accelerate`, `report` and `restore`.

What is swapped is a module's class (acceleration.py); parameters, buffers and hooks stay.
"""

import itertools
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

from torch import nn

from ecar_kernels import foreign, registry
from ecar_kernels._written import as_written, has_affine, is_plain, original_class, why_not
from ecar_kernels.acceleration import (
    Accelerated,
    Binding,
    place_of,
    replacements,
    resolve_ops,
    serving,
)
from ecar_kernels.flow_block import packing
from ecar_kernels.foreign import Foreign


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
        if not self:
            return "no module is of a class that accelerate knows"
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in lines
        )

    __repr__ = __str__


def accelerate(
    model: nn.Module, *, backend: str | None = None, keep_weights: bool = True
) -> Report:
    """Serve the modules of `model` that have an accelerated class from one backend, in place.

    model: any module; its modules of a class that is known are swapped: those of
    `ecar_kernels.modules`, those that their author registered with `accelerates`, and blocks of
    other libraries (`ecar_kernels.integrations`) that are as their library wrote them. backend: as
    for `use_backend`, chosen now and for good; None for the active one. keep_weights: weights that
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
        original, (replacement, why) = _original(module), _replacement(module)
        if replacement is not None and why is None:
            try:
                resolve_ops(replacement, module, backend)
            except registry.BackendUnavailableError as error:
                raise registry.BackendUnavailableError(
                    f"module '{name}' ({original.__name__}): {error}"
                ) from None
            found.append((module, replacement, Binding(backend, original, replacement)))
    if not found:
        warnings.warn(
            f"accelerate: no module of {type(model).__name__} was swapped: {_why_none(model)}",
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


def report(model: nn.Module) -> Report:
    """The modules of `model` that `accelerate` swapped, or knows by a class of theirs, as they are
    now: what serves them, and which of their layers are called instead of fused, and why.

    Raises TypeError where `model` is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"argument 'model': expected a module, got {type(model).__name__}")
    rows = []
    for name, module in model.named_modules():
        original = original_class(module)
        if original is not type(module):
            rows.append(ReportRow(name, original.__name__, serving(module), tuple(_left(module))))
        elif (why := _replacement(module)[1]) is not None:
            rows.append(ReportRow(name, original.__name__, {}, (why,)))
        elif _replacement(module)[0] is not None:
            why = "accelerate was not called since it is there"
            rows.append(ReportRow(name, original.__name__, {}, (why,)))
    return Report(rows)


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


def _replacement(module: nn.Module) -> tuple[type[Accelerated] | None, str | None]:
    """The accelerated class of a module, None where its class is not known; and why it is not to
    take its place though there is one."""
    original = _original(module)
    if original in replacements:
        return replacements[original], None
    if (found := foreign.integration_of(original)) is not None:
        integration, base = found
        if (why := foreign.why_not_served(module, integration, base)) is not None:
            return integration, why
        return foreign.join(integration, original), None
    if isinstance(module, (*replacements, Foreign)):
        return Accelerated, "a subclass, whose forward may be another"
    return None, None


def _why_none(model: nn.Module) -> str:
    """Of a model in which no module is swapped."""
    reasons: dict[tuple[str, str], int] = {}
    for module in model.modules():
        why = _replacement(module)[1]
        if why is not None:
            key = _original(module).__name__, why
            reasons[key] = reasons.get(key, 0) + 1
    if reasons:
        return "; ".join(f"{count} {kind}: {why}" for (kind, why), count in reasons.items())
    kinds = (*(kind.__name__ for kind in replacements), *foreign.integrations)
    return f"none is a {', '.join(kinds)}"


def _left(module: Accelerated) -> Iterator[str]:
    if isinstance(module, Foreign):
        found = foreign.integration_of(original_class(module))
        if found is not None and (why := foreign.why_not_served(module, *found)) is not None:
            yield f"all: {why}"
            return
    for name, layer in _layers(module, type(module)):
        if layer is None and isinstance(module, Foreign):
            continue  # a part that not every such block has
        if (reason := why_not(layer, nn.Linear)) is not None:
            yield f"{name or 'weight'}: {reason}"
    for name, norm in itertools.chain(*(_named(module, path) for path in module.norms)):
        if (reason := why_not(norm, nn.LayerNorm)) is not None:
            yield f"{name}: {reason}"
        elif not has_affine(norm):
            yield f"{name}: it has no weight or no bias"


def _layers(module: nn.Module, kind: type[Accelerated]) -> Iterator[tuple[str, nn.Module | None]]:
    """Those whose weights the class reads, by name; None where there is nothing of that name."""
    for name in kind.weights:
        yield from _named(module, name.rpartition(".")[0])


def _named(module: nn.Module | None, path: str) -> Iterator[tuple[str, nn.Module | None]]:
    """The submodules of that path, of which a step "*" is any."""
    step, _, rest = path.partition(".")
    if not step or module is None:
        yield path, module
        return
    for name in module._modules if step == "*" else (step,):
        for found, layer in _named(module._modules.get(name), rest):
            yield f"{name}.{found}" if found else name, layer


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


def _prepare_weights(module: Accelerated, keep: bool) -> None:
    if not module.weights:
        return
    device_type, dtype = place_of(module)
    run = registry.implementation(
        "adaln_linear", device_type, dtype, backend=module._binding.backend
    )
    if run.prepare_weight is not None:
        for _, layer in _layers(module, type(module)):
            if as_written(layer, nn.Linear):
                run.prepare_weight(layer.weight, keep)
