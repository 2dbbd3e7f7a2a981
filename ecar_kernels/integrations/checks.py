"""What an integration asks of a block: whether its parts are as their library wrote them.

Each returns None where that is so, else a reason, one line, that names the part. Integrations join
them with `or`.
"""

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

from ecar_kernels import _written
from ecar_kernels.foreign import loaded, why_patched


@functools.cache
def _path(name: str) -> tuple[str, ...]:
    return tuple(name.split("."))


def part(block: nn.Module, name: str) -> Any:
    """The submodule of that name, None where there is none."""
    found: nn.Module | None = block
    for step in _path(name):
        found = None if found is None else found._modules.get(step)
    return found


def unlike(block: nn.Module, name: str, *kinds: str | type[nn.Module]) -> str | None:
    """None where the submodule is as one of these classes is written, else what it is.

    kinds: classes, or the full names of other libraries'.
    """
    module, known = part(block, name), None
    for kind in kinds:
        found = loaded(kind) if isinstance(kind, str) else kind
        if found is not None:
            known = found if known is None else known
            if isinstance(module, found):  # else what is said is of the first
                known = found
                break
    reason: str | None = f"a {type(module).__name__}"
    if known is not None:
        reason = _written.why_not(module, known) or why_patched(known)
    return None if reason is None else f"{name}: {reason}"


def copied(block: nn.Module, name: str, known: Callable[[Callable], bool], what: str) -> str | None:
    """None where the submodule is as its class is written, and `known` knows the class's forward.

    For code that is copied from project to project, whose modules' names say nothing.
    """
    module = part(block, name)
    reason = _written.why_not(module, type(module))
    if reason is None and not known(type(module).forward):
        reason = f"its forward is not that of {what}"
    return None if reason is None else f"{name}: {reason}"


def has_parameters(block: nn.Module, name: str) -> str | None:
    """None where a LayerNorm is as written and has no parameters of its own."""
    if (reason := unlike(block, name, nn.LayerNorm)) is not None:
        return reason
    norm = part(block, name)
    if norm.weight is None and norm.bias is None:
        return None
    return f"{name}: a LayerNorm with a weight or a bias"


def drops(block: nn.Module, name: str) -> str | None:
    """None where a dropout does nothing now."""
    if (reason := unlike(block, name, nn.Dropout, nn.Identity)) is not None:
        return reason
    dropout = part(block, name)
    if dropout.training and getattr(dropout, "p", 0):
        return f"{name}: it is training with a dropout of {dropout.p}"
    return None


def differs(module: nn.Module, where: str = "", /, **expected: Any) -> str | None:
    """None where the attributes are as expected, else which is not; one that is missing is None."""
    own, children = module.__dict__, module.__dict__["_modules"]
    for name, value in expected.items():
        found = own[name] if name in own else children.get(name, getattr(type(module), name, None))
        if found is not value and found != value:
            return f"{where and where + ': '}its {name} is {_shown(found)}, not {value!r}"
    return None


def _shown(value: Any) -> str:
    return f"a {type(value).__name__}" if isinstance(value, nn.Module) else repr(value)
