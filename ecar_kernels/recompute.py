"""Linear layers that do not keep their input for the backward, where it is cheap to make anew.

A linear layer keeps its input, for the gradient of its weight. Where that input came of one pass
over tensors that the backward has anyway (a LayerNorm's, a GELU's or an adaLN's arguments), the
layer keeps those instead, and its backward makes the input anew:

    z = f(sources);  y = z W^T + b;  dW = dy^T f(sources)

No matrix product is done twice, unlike in gradient checkpointing, and the two go together. It is
done where a gradient may be asked for, by every backend but the reference. Under torch.compile it
is left to the compiler, whose partitioner does the same.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ecar_kernels import _native, _transforms, registry
from ecar_kernels._written import as_written


def active(x: Tensor) -> bool:
    """Is a linear layer that runs now to forget its input x?"""
    return (
        torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not x.is_meta
        and not _transforms.active()
        and registry.active_backend() != "reference"
    )


def linear(
    layer: nn.Module,
    z: Tensor,
    function: Callable[..., Tensor] | None = None,
    *sources: Tensor | None,
) -> Tensor:
    """layer(z), keeping `sources` in z's place.

    z: [.., C], the result of function(*sources), whose gradient goes its own way. function: makes
    the same z of the same sources at any time, without a module's state; None: z is kept.
    """
    if function is None or not active(z) or not as_written(layer, nn.Linear):
        return layer(z)  # an accelerated one multiplies by its packed weight
    return product(layer.weight, layer.bias, z, function, *sources)


def product(
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor,
    function: Callable[..., Tensor] | None = None,
    *sources: Tensor | None,
) -> Tensor:
    """z W^T + b, likewise."""
    if function is None or not active(z):
        return F.linear(z, weight, bias)
    return _Linear.apply(function, z, weight, bias, *sources)


def gelu_linear(layer: nn.Module, x: Tensor) -> Tensor:
    """layer(GELU(x)), tanh's approximation, keeping x [.., C] alone."""
    if not active(x) or not as_written(layer, nn.Linear):
        return layer(gelu(x, by_cpp=not torch.is_grad_enabled() and gelu_by_cpp(x)))
    return _GELULinear.apply(x, layer.weight, layer.bias)


def gelu(x: Tensor, by_cpp: bool = False) -> Tensor:
    """tanh's approximation; `by_cpp`: by the C++ library."""
    return torch.ops.ecar.gelu.default(x) if by_cpp else F.gelu(x, approximate="tanh")


def gelu_gradient(grad: Tensor, x: Tensor, by_cpp: bool) -> Tensor:
    """That of x, given that of gelu(x), which is left as it is."""
    if by_cpp and (torch.compiler.is_compiling() or not _transforms.is_batched_gradient(grad)):
        grad = grad.clone(memory_format=torch.contiguous_format)
        torch.ops.ecar.gelu_backward_.default(grad, x)
        return grad
    return torch.ops.aten.gelu_backward.default(grad, x, approximate="tanh")


def gelu_by_cpp(x: Tensor) -> bool:
    """Where PyTorch's takes five times as long: of contiguous tensors on a CPU."""
    return (
        registry.active_backend() in ("auto", "cpp")
        and type(x) in (Tensor, nn.Parameter)
        and x.device.type == "cpu"
        and x.dtype in registry.KERNEL_DTYPES
        and x.is_contiguous()
        and not torch.compiler.is_compiling()
        and not _transforms.active()
        and _native.why_not() is None
    )


# What makes z of its sources: each returns (z, function, *sources), as `linear` takes them.


def silu(x: Tensor) -> tuple:
    return F.silu(x), F.silu, x


def layer_norm(norm: nn.Module, x: Tensor) -> tuple:
    """norm(x); of a module that is no plain LayerNorm the result alone."""
    z = norm(x)
    if not as_written(norm, nn.LayerNorm):
        return (z,)

    def again(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        return F.layer_norm(x, shape, weight, bias, eps)

    shape, eps = norm.normalized_shape, norm.eps
    return z, again, x, norm.weight, norm.bias


def adaln(
    y: Tensor,
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    step_shift: Tensor | None,
    step_scale: Tensor | None,
    eps: float,
) -> tuple:
    """y, which adaln(x, shift, ..) has made, or gated_residual_adaln with the new x."""

    def again(x: Tensor, *modulation: Tensor | None) -> Tensor:
        run = registry.implementation(
            "adaln",
            x.device.type,
            dtype,
            x.shape[-1],
            backend="reference" if _transforms.active() else backend,
        )
        # Under torch.autocast y is of a lower type than x may be.
        given, shift, scale, step_shift, step_scale = (
            None if source is None else source.to(dtype) for source in (x, *modulation)
        )
        return run(given, shift, scale, step_shift=step_shift, step_scale=step_scale, eps=eps)

    backend, dtype = registry.active_backend(), y.dtype
    return y, again, x, shift, scale, step_shift, step_scale


class _Linear(torch.autograd.Function):
    """Differentiable twice where `function` is: the sources are saved as inputs."""

    @staticmethod
    def forward(ctx, function, z, weight, bias, *sources):
        y = F.linear(z, weight, bias)  # first of all: it turns a packed weight back
        ctx.save_for_backward(weight, *sources)
        ctx.function, ctx.autocast = function, _autocast_state(z)
        return y

    @staticmethod
    def backward(ctx, grad):
        weight, *sources = ctx.saved_tensors
        _, z_wanted, weight_wanted, bias_wanted, *_ = ctx.needs_input_grad
        with torch.autocast(**ctx.autocast):
            return (
                None,
                grad @ weight if z_wanted else None,
                weight_gradient(grad, ctx.function(*sources)) if weight_wanted else None,
                bias_gradient(grad) if bias_wanted else None,
                *(None for _ in sources),
            )


class _GELULinear(torch.autograd.Function):
    """One for both, as the gradient of the GELU is then written over that of its result."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.by_cpp = gelu_by_cpp(x)
        y = F.linear(gelu(x, ctx.by_cpp), weight, bias)
        ctx.save_for_backward(x, weight)
        ctx.autocast = _autocast_state(x)
        return y

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        x_wanted, weight_wanted, bias_wanted = ctx.needs_input_grad
        grad_x = grad_weight = None
        plain = not (
            torch.is_grad_enabled() or _transforms.active() or _transforms.is_batched_gradient(grad)
        )
        with torch.autocast(**ctx.autocast):
            z = None
            if x_wanted:
                grad_x = (grad @ weight).to(x.dtype)
                if not plain:
                    grad_x = torch.ops.aten.gelu_backward.default(grad_x, x, approximate="tanh")
                elif ctx.by_cpp and grad_x.is_contiguous():
                    z = torch.ops.ecar.gelu_backward_.default(grad_x, x)  # both in one pass
                else:
                    torch.ops.aten.gelu_backward.grad_input(
                        grad_x, x, approximate="tanh", grad_input=grad_x
                    )
            if weight_wanted:
                z = gelu(x, ctx.by_cpp and plain) if z is None else z
                grad_weight = weight_gradient(grad, z)
            return grad_x, grad_weight, bias_gradient(grad) if bias_wanted else None


def _autocast_state(x: Tensor) -> dict:
    device = x.device.type
    return {
        "device_type": device,
        "enabled": torch.is_autocast_enabled(device),
        "dtype": torch.get_autocast_dtype(device),
    }


def weight_gradient(grad: Tensor, z: Tensor) -> Tensor:
    return _rows(grad).T @ _rows(z)


def bias_gradient(grad: Tensor) -> Tensor:
    return _rows(grad).sum(0)


def _rows(x: Tensor) -> Tensor:
    # Not flatten, which has no rule for is_grads_batched; not -1, which no values leave open.
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])
