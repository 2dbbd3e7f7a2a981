"""What PyTorch makes of a function: its derivatives and batches, each as a tuple of tensors.

Each entry takes a function of tensors, which returns one or several, and a list of such tensors.
"""

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils.checkpoint import checkpoint

from tests.support.accuracy import tensors

ROWS = 3  # of a batch


def scalar(function):
    return lambda *values: sum((0.5 * y).sin().sum() for y in tensors(function(*values)))


def tangent(x: Tensor) -> Tensor:
    return torch.linspace(-1, 2, x.numel(), dtype=x.dtype, device=x.device).view_as(x)


def tangents(values) -> tuple[Tensor, ...]:
    return tuple(map(tangent, values))


def batch(x: Tensor, dim: int = 0) -> Tensor:
    return torch.stack([x, x.flip(0), x.flip(-1)] if x.ndim else [x, x + 1, -x], dim)


def leaves(values) -> list[Tensor]:
    return [x.detach().clone().requires_grad_() for x in values]


def every(values) -> tuple[int, ...]:
    return tuple(range(len(values)))


def forward_derivative(function, values):
    return tensors(jvp(function, tuple(values), tangents(values))[1])


def forward_derivative_of_a_batch(function, values):
    return forward_derivative(vmap(function), [batch(x) for x in values])


def forward_derivative_of_each(function, values):
    """With respect to one argument, the others constant."""

    def of(index):
        return lambda x: function(*values[:index], x, *values[index + 1 :])

    return sum((forward_derivative(of(i), [x]) for i, x in enumerate(values)), ())


def dual_numbers(function, values):
    with forward_ad.dual_level():
        duals = (forward_ad.make_dual(x, tangent(x)) for x in values)
        return tuple(forward_ad.unpack_dual(y).tangent for y in tensors(function(*duals)))


@torch.no_grad()
def dual_numbers_without_grad_mode(function, values):
    return dual_numbers(function, values)


def forward_jacobian(function, values):
    return tensors(jacfwd(function)(*values))


def reverse_jacobian(function, values):
    return tensors(jacrev(function)(*values))


def second_derivatives(function, values):
    return sum(hessian(scalar(function), every(values))(*values), ())


def gradient(function, values):
    return grad(scalar(function), every(values))(*values)


def cotangents(function, values):
    outputs, pull_back = vjp(function, *values)
    return pull_back(outputs)


def gradient_of_each_row(function, values):
    return vmap(grad(scalar(function), every(values)))(*map(batch, values))


def gradient_of_a_batch(function, values):
    return grad(scalar(vmap(function)), every(values))(*map(batch, values))


def rows(function, values):
    return tensors(vmap(function)(*map(batch, values)))


@torch.no_grad()
def rows_last(function, values):
    return tensors(vmap(function, in_dims=-1)(*(batch(x, -1) for x in values)))


def rows_of_each(function, values):
    """One argument in rows, along its second dimension, the others shared."""
    found = ()
    for i, x in enumerate(values):
        given = [*values[:i], batch(x, min(1, x.ndim)), *values[i + 1 :]]
        dims = tuple(min(1, x.ndim) if j == i else None for j in every(values))
        found += tensors(vmap(function, in_dims=dims)(*given))
    return found


def rows_of_rows(function, values):
    return tensors(vmap(vmap(function, in_dims=1))(*(batch(batch(x), 2) for x in values)))


def gradient_of_gradients(function, values):
    values = leaves(values)
    first = torch.autograd.grad(scalar(function)(*values), values, create_graph=True)
    return *first, *torch.autograd.grad(scalar(lambda *x: x)(*first), values)


def batched_gradients(function, values):
    """What torch.autograd.functional.jacobian(vectorize=True) does."""
    values = leaves(values)
    outputs = tensors(function(*values))
    return torch.autograd.grad(
        outputs, values, [batch(y.detach()) for y in outputs], is_grads_batched=True
    )


def gradient_of_batched_gradients(function, values):
    values = leaves(values)
    outputs = [y.sin() for y in tensors(function(*values))]
    first = torch.autograd.grad(
        outputs,
        values,
        [batch(y.detach()) for y in outputs],
        is_grads_batched=True,
        create_graph=True,
    )
    return *first, *torch.autograd.grad(scalar(lambda *x: x)(*first), values)


def tangents_of_gradients(function, values):
    values = leaves(values)
    outputs = tensors(function(*values))
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(y.detach(), tangent(y)) for y in outputs]
        found = torch.autograd.grad(outputs, values, duals)
        return tuple(forward_ad.unpack_dual(x).tangent for x in found)


def gradient_in_the_cotangents(function, values):
    """torch.func's derivative of a backward whose forward ran outside of it."""
    values = leaves(values)
    outputs = tensors(function(*values))

    def backward(*given):
        return scalar(lambda *x: x)(*torch.autograd.grad(outputs, values, given, create_graph=True))

    return grad(backward, every(outputs))(*(y.detach() for y in outputs))


def checkpointed(function, values):
    found = ()
    for reentrant in (False, True):
        values = leaves(values)
        scalar(lambda *x: checkpoint(function, *x, use_reentrant=reentrant))(*values).backward()  # noqa: B023
        found += tuple(x.grad for x in values)
    return found


DERIVATIVES = (
    forward_derivative,
    forward_derivative_of_each,
    dual_numbers,
    dual_numbers_without_grad_mode,
    forward_jacobian,
    reverse_jacobian,
    second_derivatives,
    gradient,
    cotangents,
    gradient_of_each_row,
)
DERIVATIVES_OF_BATCHES = (gradient_of_a_batch, forward_derivative_of_a_batch)
BATCHES = (rows, rows_last, rows_of_each, rows_of_rows)
# A backend's forward runs, then what is active in its backward.
OF_BACKWARDS = (
    gradient_of_gradients,
    batched_gradients,
    gradient_of_batched_gradients,
    tangents_of_gradients,
    gradient_in_the_cotangents,
    checkpointed,
)
ALL = (*DERIVATIVES, *DERIVATIVES_OF_BATCHES, *BATCHES, *OF_BACKWARDS)
