"""Accelerated classes: modules whose ops are served by a backend chosen once, ahead of time.

`accelerate(model)` (swapping.py) changes the class of every module for which an accelerated one is
known, and `restore(model)` changes it back. So an accelerated module has no constructor and no
state of its own: it is a subclass that overrides forward (or another method) and calls the ops
that `Accelerated.ops` bound.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ecar_kernels import _transforms, registry
from ecar_kernels._written import remember
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
            linear_gated_residual where the layer is as written (`ecar_kernels.fused` asks);
            "blocks.*.fc.weight" is one of each of the blocks.
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

    @classmethod
    def sizes(cls, module: nn.Module) -> tuple[int, int]:
        """width and head_dim of a module that may not be swapped yet; 0 where there is none."""
        return getattr(module, "width", 0), getattr(module, "head_dim", 0)

    def ops(self, x: Tensor, *like: Tensor | None) -> Ops:
        """The ops for x [.., C], bound: they neither validate their arguments nor look up.

        like: modulations and other tokens that they will be given. Where the module is trained
        (grad mode is on, and a parameter requires grad), under torch.autocast (which the public ops
        obey), under torch.compile (for which they cost nothing), under a transform of torch.func or
        forward-mode AD, on the meta device, and where x or the others are not what the module takes
        (the public ops say why), they are the public ones, `PUBLIC`: a forward that trains in
        another way then calls its parent's. To be called before a weight is looked at.
        """
        if torch.compiler.is_compiling():
            packing.unpack_all()
            return PUBLIC
        if (
            (torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters()))
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
        served = ", ".join(f"{op}: {name}" for op, name in serving(self).items())
        return ", ".join(filter(None, (super().extra_repr(), served)))


Module = TypeVar("Module", bound=nn.Module)
replacements: dict[type[nn.Module], type[Accelerated]] = {}


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
        replacements[original] = replacement
        remember(original)
        return replacement

    return register


def place_of(module: nn.Module) -> tuple[str, torch.dtype]:
    """Device and dtype of its parameters; where there are none, those of a new tensor."""
    sample: Tensor | None = next((p for p in module.parameters() if p.is_floating_point()), None)
    sample = torch.empty(0) if sample is None else sample
    return sample.device.type, sample.dtype


def resolve_ops(replacement: type[Accelerated], module: nn.Module, backend: str) -> dict:
    """The function of each op that it uses, for the place where its parameters are now."""
    device_type, dtype = place_of(module)
    width, head_dim = replacement.sizes(module)
    return {
        op: registry.implementation(
            op, device_type, dtype, head_dim if op == "stage_attention" else width, backend=backend
        )
        for op in replacement.uses
    }


def serving(module: Accelerated) -> dict[str, str]:
    """Each op's backend, for the place where its parameters are now."""
    found = resolve_ops(type(module), module, module._binding.backend)
    return {op: run.backend for op, run in found.items()}
