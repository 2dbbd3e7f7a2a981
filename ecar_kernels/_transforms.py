"""Transforms of functions that kernels know nothing of: torch.func's and forward-mode AD.

vmap, grad, jvp and their like wrap tensors, and forward-mode AD attaches tangents to them. A
kernel sees neither: a tangent would come out as zero, without an error. So where a transform is
active, the registry serves every op from its reference, which is composed of PyTorch's own ops
and differentiates and batches as they do. The same holds for a backward that is itself
differentiated or transformed.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

F = TypeVar("F", bound=Callable)


def traced_as_constant(function: F) -> F:
    """As torch.compiler.assume_constant_result, which would import torch._dynamo (seconds)."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]  # torch's own mark
    return function


# torch.compile enters the transforms that it traces, and takes this for a constant: a function
# compiled outside of them is traced again inside, where its arguments are of another type.
@traced_as_constant
def _in_torch_func() -> bool:
    return torch._C._are_functorch_transforms_active()


def active() -> bool:
    """Is a transform of torch.func active in this thread, or a level of forward-mode AD in any?"""
    return _in_torch_func() or forward_ad._current_level >= 0


def has_tangent(x: Tensor) -> bool:
    """Of forward-mode AD; inside vmap, which does not show the tangents of its rows, False."""
    return not torch._C._functorch.is_batchedtensor(x) and (
        forward_ad.unpack_dual(x).tangent is not None
    )


def is_batched_gradient(grad: Tensor) -> bool:
    """Of torch.autograd.grad(is_grads_batched=True), whose vmap is not torch.func's.

    It calls an op of ours once for each row, which is right, and refuses what writes in place.
    """
    return torch._C._functorch.is_legacy_batchedtensor(grad)


def differentiable_again(gradients: Callable) -> Callable[[F], F]:
    """Decorates the `backward` of an autograd.Function whose gradients come from a kernel.

    Where the backward is itself differentiated (create_graph=True) or a transform is active,
    `gradients`, called with the same arguments and composed of PyTorch's ops, takes its place.
    """

    def decorate(backward: F) -> F:
        @functools.wraps(backward)
        def either(ctx, *grads):
            if not torch.compiler.is_compiling() and (torch.is_grad_enabled() or active()):
                return gradients(ctx, *grads)
            return backward(ctx, *grads)

        return cast("F", either)

    return decorate


def gradients_of(
    function: Callable, inputs: Sequence[Tensor | None], *grads: Tensor
) -> list[Tensor | None]:
    """The gradients of function(*inputs), given its outputs'; None for an input that is None.

    `function` is composed of PyTorch's ops. The result is differentiable in both the inputs and
    `grads` where grad mode is on.
    """

    # vjp takes a parameter's memory as it finds it: a packed weight has to be read as a tensor is.
    inputs = [x if x is None or type(x) is Tensor else x.view_as(x) for x in inputs]

    def of_tensors(*tensors):
        given = iter(tensors)
        return function(*(None if x is None else next(given) for x in inputs))

    outputs, pull_back = cast(  # a third result is for has_aux
        "tuple[Any, Callable]", torch.func.vjp(of_tensors, *(x for x in inputs if x is not None))
    )
    found = iter(pull_back(*grads) if isinstance(outputs, Tensor) else pull_back(grads))
    return [None if x is None else next(found) for x in inputs]
