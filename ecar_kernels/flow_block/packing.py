"""Weights packed for the CPU's GEMM kernels: the layout of csrc/cpu/flow_block.h, and how back.

A plain weight is packed on its first use; the packed copy lives as long as the weight and is
recomputed when the weight changes, however it was written to. Its version alone would miss writes
through `weight.data`, so a packed copy keeps a lazy clone of the weight, which shares its memory:
PyTorch gives whoever writes to either of the two new memory first, and the weight's address tells.
Reading does not move it, except where the reader asks for a pointer that it could write to (NumPy,
safetensors); then the weight is packed once more than needed. A weight that cannot be cloned so,
because its memory is shared between processes, mapped from a file, or has other tensors on it, is
packed on every use. What PyTorch does not know of is not seen: an array of `weight.numpy()` itself,
of a weight without gradients, must not be used once the weight was written to.

`pack_weight` makes a parameter hold the packed form alone, so that a model's memory does not
grow. It stays the same object, of the same shape, type and device. The first that reads or
writes its values through torch, a state_dict or an optimizer for instance, turns it back into a
plain parameter with the same bits, before anything else is done with it: so there is no second
form that could go stale.
"""

import threading
import weakref
from typing import Any, NamedTuple, SupportsIndex

import torch
from torch import Tensor, nn

from ecar_kernels._transforms import traced_as_constant
from ecar_kernels._written import PLAIN, address

PANEL, GROUP = 48, 16  # kPanelColumns and kColumnGroup of csrc/cpu/flow_block.h
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def packed_size(outputs: int, depth: int) -> int:
    """Elements of the packed form."""
    return -(-outputs // GROUP) * GROUP * (depth + depth % 2)


def unpack(packed: Tensor, outputs: int, depth: int) -> Tensor:
    """The weight [outputs, depth], contiguous, from `pack_linear_weight`'s result.

    Panels of 48 outputs are [k][output]; of bfloat16, [k / 2][output][k % 2]; the last panel is
    as wide as what is left. Outputs and depth are filled up with zeros to groups and pairs.
    """
    even = depth + depth % 2
    whole = outputs // PANEL * PANEL
    weight = packed.new_empty(outputs, depth)
    for first, last in ((0, whole), (whole, outputs)):
        if first == last:
            continue
        width = min(PANEL, -(-(last - first) // GROUP) * GROUP)
        count = -(-(last - first) // width)
        panels = packed[first * even : (first + count * width) * even]
        if packed.dtype is torch.bfloat16:
            panels = panels.view(count, even // 2, width, 2).permute(0, 2, 1, 3)
        else:
            panels = panels.view(count, even, width).transpose(1, 2)
        weight[first:last] = panels.reshape(-1, even)[: last - first, :depth]
    return weight


def _pack(weight: Tensor) -> Tensor:
    return torch.ops.ecar.pack_linear_weight.default(weight)


class _Packed(NamedTuple):
    weight: weakref.ref
    layout: tuple  # what `_layout` said
    snapshot: Tensor  # the lazy clone
    tensor: Tensor


_packed: dict[int, _Packed] = {}  # by the weight's id


def _layout(weight: Tensor) -> tuple:
    """Where and how its values lie."""
    return address(weight), weight.stride(), weight.shape, weight.dtype


def packed_weight(weight: Tensor) -> Tensor:
    """The weight as the kernels take it: its own packed form, or from the cache, or packed now."""
    if type(weight) is PackedWeight and (own := _own(weight)) is not None:
        return own
    found = _kept(weight)
    if found is None:
        with _lock, torch.inference_mode(False), torch.no_grad():
            if type(weight) is PackedWeight:  # another thread may have packed it meanwhile
                if (own := _own(weight)) is not None:
                    return own
                unpack_weight(weight)
            found = _kept(weight)  # or this
            if found is None:
                found = _pack_and_keep(weight)
    return found


def _own(weight: Tensor) -> Tensor | None:
    """The packed form that it holds alone. None where another thread turns it back just now, and
    where `set_`, which does not ask __torch_function__, has given it other memory."""
    own = weight.__dict__
    return own.get("packed") if own.get("placeholder") == address(weight) else None


def _kept(weight: Tensor) -> Tensor | None:
    """The copy packed before, if the weight is as it was then."""
    found = _packed.get(id(weight))
    if found is not None and found.weight() is weight and found.layout == _layout(weight):
        return found.tensor
    return None


def _pack_and_keep(weight: Tensor) -> Tensor:
    key = id(weight)
    _packed.pop(key, None)  # with its snapshot, which would count as one more tensor
    snapshot = _lazy_clone(weight)
    if snapshot is None:
        return _pack(weight.detach())

    def forget(dead: weakref.ref) -> None:
        if (entry := _packed.get(key)) is not None and entry.weight is dead:
            del _packed[key]

    layout = _layout(weight)
    # Of a copy: the op asks for a pointer that it could write to. What another thread writes from
    # here on moves the weight, and is seen at the next use.
    tensor = _pack(snapshot.clone())
    _packed[key] = _Packed(weakref.ref(weight, forget), layout, snapshot, tensor)
    return tensor


def _lazy_clone(weight: Tensor) -> Tensor | None:
    """Shares the weight's memory until one of the two is written to; None where it cannot be."""
    if _uses(weight) > 1:  # a NumPy array might be one, which would keep the old memory
        return None
    try:
        return weight.detach()._lazy_clone()
    except (AttributeError, RuntimeError):  # memory that is not torch's own
        return None


def forget_packed() -> None:
    """Drops every copy packed beside its weight: memory is freed, the next calls pack anew."""
    _packed.clear()


# What can be asked of a packed weight without its values. All else turns it back.
_OWN = {
    "__hash__",
    "__len__",
    "_backward_hooks",
    "_post_accumulate_grad_hooks",
    "device",
    "dim",
    "dtype",
    "element_size",
    "get_device",
    "grad",
    "grad_fn",
    "is_complex",
    "is_cpu",
    "is_cuda",
    "is_floating_point",
    "is_inference",
    "is_leaf",
    "is_meta",
    "is_nested",
    "is_quantized",
    "is_sparse",
    "itemsize",
    "layout",
    "name",
    "names",
    "nbytes",
    "ndim",
    "ndimension",
    "nelement",
    "numel",
    "output_nr",
    "register_hook",
    "register_post_accumulate_grad_hook",
    "requires_grad",
    "requires_grad_",
    "retain_grad",
    "retains_grad",
    "shape",
    "size",
}
_lock = threading.RLock()
_held: dict[int, weakref.ref] = {}  # the weights held packed alone, by id


class PackedWeight(nn.Parameter):
    """A weight [outputs, depth] whose values are held only in packed form; see `pack_weight`."""

    packed: Tensor
    placeholder: int  # the address of the one number that it holds in place of its values

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.__name__
        if name in ("__get__", "__set__", "__delete__"):
            name = func.__self__.__name__
        if name not in _OWN:
            _turn_back((args, kwargs))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    def __deepcopy__(self, memo: dict) -> nn.Parameter:
        unpack_weight(self)
        return self.__deepcopy__(memo)

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple:
        unpack_weight(self)
        return self.__reduce_ex__(protocol)


PLAIN.add(PackedWeight)


def _turn_back(value: object) -> None:
    """Every packed weight among a call's arguments, in lists and dictionaries too."""
    if isinstance(value, PackedWeight):
        unpack_weight(value)
    elif isinstance(value, (tuple, list)):
        for item in value:
            _turn_back(item)
    elif isinstance(value, dict):
        for item in value.values():
            _turn_back(item)


def can_pack(weight: Tensor) -> bool:
    """Is it a plain parameter that a packed form can stand for, and that alone has its memory?"""
    return (
        type(weight) is nn.Parameter
        and weight.ndim == 2
        and weight.numel() > 0
        and weight.device.type == "cpu"
        and weight.dtype in DTYPES
        and weight.is_contiguous()
        and not weight.is_inference()
        and weight.untyped_storage().nbytes() == weight.numel() * weight.element_size()
        and _uses(weight) == 1
    )


def _uses(weight: Tensor) -> int:
    """Tensors that have the weight's memory: more than one where there are views or aliases."""
    with torch.no_grad():
        storage = weight.untyped_storage()
        return torch._C._storage_Use_Count(storage._cdata) - 1


def pack_weight(weight: Tensor) -> bool:
    """Makes it hold the packed form alone, in place, if `can_pack`; is it packed now?

    Needs the compiled library. A weight whose memory has other users stays as it is.
    """
    with _lock, torch.inference_mode(False):  # else its memory could not be written to later
        if type(weight) is PackedWeight:
            return True
        if not can_pack(weight):
            return False
        _packed.pop(id(weight), None)
        packed = _pack(weight.detach())
        # The class first: from then on other threads' reads wait for the lock.
        becoming: Any = weight
        becoming.packed = packed
        becoming.__class__ = PackedWeight
        with torch._C.DisableTorchFunctionSubclass():
            # One number in the whole shape. NaN: whoever gets past __torch_function__ sees it.
            nothing = torch.full((), float("nan"), dtype=weight.dtype, device="cpu")
            weight.data = nothing.expand(weight.shape)
        becoming.placeholder = address(weight)
        key = id(weight)
        _held[key] = weakref.ref(weight, lambda dead: _held.pop(key, None))
        return True


def unpack_weight(weight: Tensor) -> None:
    """Undoes `pack_weight`: the same object, a plain parameter with the same bits."""
    # As a plain tensor inside a transform of torch.func, too, which would wrap the values.
    with _lock, torch.inference_mode(False), torch._C._DisableFuncTorch():
        if not isinstance(weight, PackedWeight):
            return
        with torch._C.DisableTorchFunctionSubclass():
            # Else `set_` has given it other values.
            if address(weight) == weight.placeholder:
                weight.data = unpack(weight.packed, *weight.shape)
        becoming: Any = weight
        becoming.__class__ = nn.Parameter  # last: no thread takes it for plain before it is
        del weight.packed, weight.placeholder
        _held.pop(id(weight), None)


@traced_as_constant  # called for its effect when traced
def unpack_all() -> bool:
    """Turns every packed weight back. While torch.compile traces, which would look into them."""
    for reference in list(_held.values()):
        if (weight := reference()) is not None:
            unpack_weight(weight)
    return True


def release(weight: Tensor) -> None:
    """A plain weight again, without a copy packed beside it."""
    unpack_weight(weight)
    _packed.pop(id(weight), None)
